"""HunyuanVideo-1.5 as a policy: everything that knows this video model, its files, its memory and its traps.

`load` returns a HunyuanPolicy, which has what grpo.py asks of a policy (module, latent_shape, encode, velocity, decode,
passes); `shard` spreads it over GPUs; `export` writes what stock diffusers loads; `token_count`, `meta_transformer` and
`memory_estimate` serve the dry run. What differs from the stock pipeline is said where it happens.
"""

import gc
import hashlib
import json
import math
import os
import re
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from diffusers import AutoencoderKLHunyuanVideo15, HunyuanVideo15Pipeline, HunyuanVideo15Transformer3DModel
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY, LORA_WEIGHT_NAME_SAFE
from diffusers.models.embeddings import apply_rotary_emb
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import ByT5Tokenizer, Qwen2_5_VLTextModel, Qwen2Tokenizer, T5EncoderModel

COMPONENTS = ("transformer", "vae", "tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2")
CHANNELS, TIME, SPACE = 32, 4, 16  # the VAE: 4 frames (the first alone) × 16 × 16 pixels become one latent of 32 channels


class Prompt(NamedTuple):
    """The text condition of one sample, without padding, on the CPU."""

    text: torch.Tensor  # [L, 3584] Qwen2.5-VL, third hidden state from the end
    glyphs: torch.Tensor  # [G, 1472] ByT5 of the quoted parts of the prompt; G = 0 without quotes


# ------------------------------------------------------------------------------------------------ the policy
class HunyuanPolicy:
    """module: the transformer; passes: its forward passes so far, of one sample each; unconditional: the Prompt of ""."""

    def __init__(self, transformer, vae, prompts, latent_shape, guidance_scale=6.0, compute_dtype=torch.float32):
        self.module, self.vae, self.prompts, self.latent_shape = transformer, vae, prompts, latent_shape
        self.guidance_scale, self.compute_dtype = guidance_scale, compute_dtype
        self.passes, self.unconditional = 0, None
        vae.enable_slicing()  # in diffusers 0.42 the decoder fails on a batch of more than one sample
        vae.enable_tiling()  # a whole 480p video does not fit beside the transformer

    def encode(self, prompts):
        """One Prompt for each. Call it once with all prompts of a run: then the text encoders are loaded only once."""
        *conditions, self.unconditional = self.prompts([*prompts, ""])
        return conditions

    def velocity(self, x, sigma, cond):
        """Guided velocity, noise − data:  v = v_uncond + scale·(v_cond − v_uncond).  x [B, C, F, H, W], sigma [B].

        Any size of video: evaluations are larger than rollouts, whose size is latent_shape.

        The same guidance in rollout and training: the policy is the guided model, so the ratio is 1 before the first
        update. Both passes carry gradients.

        Samples run one by one. Their prompts differ in length, and without padding there is nothing to mask; a video alone
        has 30,000 tokens, so a batch would win nothing; and under FSDP every rank must make the same number of passes,
        whichever prompts it happens to hold.
        """
        if x.ndim != 5 or x.shape[1] != CHANNELS or x.dtype != torch.float32:
            raise ValueError(f"x must be float32 [B, {CHANNELS}, F, H, W]: got {x.dtype} of shape {tuple(x.shape)}")
        if sigma.shape != x.shape[:1] or len(cond) != len(x):
            got = f"{len(x)} samples, sigma of shape {list(sigma.shape)}, {len(cond)} conditions"
            raise ValueError(f"velocity needs one sigma and one condition per sample: got {got}")
        return torch.cat([self._guided(x[i : i + 1], sigma[i : i + 1], cond[i]) for i in range(len(x))])

    def _guided(self, x, sigma, prompt):
        conditional = self._denoise(x, sigma, prompt)
        if self.guidance_scale == 1:  # the unconditional pass would have weight 0
            return conditional
        unconditional = self._denoise(x, sigma, self.unconditional)
        return unconditional + self.guidance_scale * (conditional - unconditional)

    def _denoise(self, x, sigma, prompt):
        """One pass of the transformer for one sample: x [1, C, F, H, W], sigma [1]."""
        self.passes += 1
        # 65 channels: the latent, then a first frame and its mask, which only image-to-video fills.
        inputs = torch.cat([x, torch.zeros_like(x), torch.zeros_like(x[:, :1])], 1)
        text, glyphs = (part.to(x.device, self.compute_dtype).unsqueeze(0) for part in prompt)
        # Latent and timestep stay float32 under autocast: error of the velocity 0.0066. The stock pipeline in bf16 rounds
        # the timestep, too (978.26 becomes 980): 0.0206. And bf16 weights without autocast refuse a float32 timestep.
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.compute_dtype == torch.bfloat16):
            (v,) = self.module(
                hidden_states=inputs,
                timestep=sigma.float() * 1000,
                encoder_hidden_states=text,
                encoder_attention_mask=torch.ones(text.shape[:2], device=x.device),
                encoder_hidden_states_2=glyphs,
                encoder_attention_mask_2=torch.ones(glyphs.shape[:2], device=x.device),
                # Stock passes 729 zero tokens, and the model masks image tokens that are all zero. None is all zero, too.
                # (Its config's task_type says "i2v" even in the text-to-video release: it cannot be asked.)
                image_embeds=text.new_zeros(1, 0, self.module.config.image_embed_dim),
                return_dict=False,
            )
        return v.float()

    @torch.no_grad()
    def decode(self, latents):
        """latents [B, C, F, H, W] -> uint8 video [B, F, 3, H, W]."""
        video = self.vae.decode(latents.to(self.vae.dtype) / self.vae.config.scaling_factor, return_dict=False)[0]
        return ((video.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).transpose(1, 2).contiguous()


class UnmaskedAttention:
    """Joint attention of video and text without a mask.

    The stock processor builds a bool [B, 1, S, S] in every block: 1.17 GiB a copy at 81 frames 480p, and it rules out the
    flash kernels. Ours has nothing to mask, since no padding reaches the transformer (see HunyuanPolicy._denoise).
    """

    def __call__(self, attn, hidden_states, encoder_hidden_states, attention_mask=None, image_rotary_emb=None):
        def heads(project, states):  # [B, S, ·] -> [B, S, heads, D]
            return project(states).unflatten(-1, (attn.heads, -1))

        video, text, rope = hidden_states, encoder_hidden_states, image_rotary_emb
        video_q = apply_rotary_emb(attn.norm_q(heads(attn.to_q, video)), rope, sequence_dim=1)
        video_k = apply_rotary_emb(attn.norm_k(heads(attn.to_k, video)), rope, sequence_dim=1)
        q = torch.cat([video_q, attn.norm_added_q(heads(attn.add_q_proj, text))], 1)  # text has no position
        k = torch.cat([video_k, attn.norm_added_k(heads(attn.add_k_proj, text))], 1)
        v = torch.cat([heads(attn.to_v, video), heads(attn.add_v_proj, text)], 1)
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))  # [B, heads, S, D]
        video, text = out.transpose(1, 2).flatten(2).split([video.shape[1], text.shape[1]], 1)
        return attn.to_out[0](video), attn.to_add_out(text)


# ------------------------------------------------------------------------------------------------ prompts
class PromptEncoder:
    """list of prompts -> list of Prompt, through a folder with one file per prompt.

    The encoders (Qwen2.5-VL 7B and ByT5) need as much memory as the transformer: they are loaded only when a prompt has no
    file yet, and freed afterwards.
    """

    def __init__(self, model, folder, device, dtype):
        self.model, self.folder, self.device, self.dtype = model, Path(folder), device, dtype
        self.folder.mkdir(parents=True, exist_ok=True)

    def __call__(self, prompts):
        missing = [prompt for prompt in dict.fromkeys(prompts) if not self.path(prompt).exists()]
        if missing:
            self._encode(missing)
        return [Prompt(**torch.load(self.path(prompt), weights_only=True)) for prompt in prompts]

    def path(self, prompt):
        """Named by what the embeddings depend on; a local folder stands for its path and the state of its encoders."""
        weights = [file.stat() for file in sorted(Path(self.model).glob("text_encoder*/*.safetensors"))]
        name = Path(self.model).resolve() if weights else self.model
        key = repr((str(name), [(file.st_size, file.st_mtime_ns) for file in weights], str(self.dtype), prompt))
        return self.folder / f"{hashlib.sha256(key.encode()).hexdigest()}.pt"

    @torch.no_grad()
    def _encode(self, prompts):
        qwen = load_component(Qwen2Tokenizer, self.model, "tokenizer")
        byt5 = load_component(ByT5Tokenizer, self.model, "tokenizer_2")
        text_encoder = load_component(Qwen2_5_VLTextModel, self.model, "text_encoder", dtype=self.dtype).to(self.device)
        glyph_encoder = load_component(T5EncoderModel, self.model, "text_encoder_2", dtype=self.dtype).to(self.device)
        for prompt in prompts:
            # These stock functions hold the system message, the cut after its 108 tokens and the search for quotes. They pad
            # to 1000 and 256 tokens; what their masks keep is all that the transformer would attend to.
            text, text_mask = HunyuanVideo15Pipeline._get_mllm_prompt_embeds(text_encoder, qwen, [prompt], self.device)
            glyphs, glyph_mask = HunyuanVideo15Pipeline._get_byt5_prompt_embeds(byt5, glyph_encoder, [prompt], self.device)
            self._write(prompt, Prompt(text[text_mask.bool()].cpu(), glyphs[glyph_mask.bool()].cpu()))
        del text_encoder, glyph_encoder
        gc.collect()  # modules hold reference cycles: without this the memory stays taken
        torch.cuda.empty_cache()  # does nothing without a GPU

    def _write(self, prompt, encoded):
        """Under a temporary name first: ranks write the same files at one time, and a killed run leaves no half a file."""
        with tempfile.NamedTemporaryFile(dir=self.folder, suffix=".tmp", delete=False) as file:
            torch.save(encoded._asdict(), file)
        os.replace(file.name, self.path(prompt))


# ------------------------------------------------------------------------------------------------ loading and saving
def load(
    model,
    shape,
    prompt_cache,
    device="cpu",
    compute_dtype=torch.float32,
    lora_rank=0,
    guidance_scale=6.0,
    mesh=None,
    seed=0,
):
    """A HunyuanPolicy from a hub id or a local folder in the layout of HunyuanVideo15Pipeline.

    shape: latent_shape(frames, height, width) of the rollouts.

    lora_rank 0 trains all weights, as float32 masters; above 0, a float32 LoRA over a frozen base in compute_dtype.
    mesh: the device mesh to shard over, or None. seed: of the LoRA's first weights, the same on every rank.
    """
    if compute_dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"compute_dtype must be torch.float32 or torch.bfloat16: got {compute_dtype}")
    check_model(model)
    weight_dtype = compute_dtype if lora_rank else torch.float32
    transformer = load_component(HunyuanVideo15Transformer3DModel, model, "transformer", dtype=weight_dtype)
    prepare(transformer, lora_rank, seed)
    # fully_shard moves one block after another to the GPU, which never holds the whole model: 33 GB in float32.
    transformer.to(device) if mesh is None else shard(transformer, mesh, compute_dtype)
    vae = load_component(AutoencoderKLHunyuanVideo15, model, "vae", dtype=torch.float32).to(device).requires_grad_(False)
    prompts = PromptEncoder(model, prompt_cache, device, compute_dtype)
    return HunyuanPolicy(transformer, vae, prompts, shape, guidance_scale, compute_dtype)


def check_model(model):
    """The folder is complete, or the name can be a hub id: from_pretrained would look for a mistyped path on the hub."""
    missing = [name for name in COMPONENTS if not (Path(model) / name).is_dir()]
    if Path(model).is_dir() and missing:
        mend = "write it with HunyuanVideo15Pipeline.save_pretrained, or download the whole release"
        raise FileNotFoundError(f"{model} must hold {', '.join(COMPONENTS)}: no {', '.join(missing)}; {mend}")
    if missing and not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(model)):
        example = "hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-480p_t2v"
        raise FileNotFoundError(f"the model must be an existing folder or a hub id like {example}: got {str(model)!r}")


def load_component(cls, model, name, **options):
    try:
        return cls.from_pretrained(model, subfolder=name, **options)
    except OSError as error:
        raise OSError(f"cannot load {name} of {model!r} (of a hub id, check spelling and network): {error}") from error


def prepare(transformer, lora_rank=0, seed=0):
    """Make a stock transformer trainable: our attention, checkpointing, dead parts frozen, LoRA. Returns it."""
    if lora_rank < 0:
        raise ValueError(f"lora_rank must be 0 (full fine-tuning) or positive: got {lora_rank}")
    for block in transformer.transformer_blocks:
        block.attn.set_processor(UnmaskedAttention())
    transformer.enable_gradient_checkpointing()  # stores the input of each block alone; gradients are bit-identical
    transformer.requires_grad_(lora_rank == 0)
    for name in dead_parts(transformer):
        transformer.get_submodule(name).requires_grad_(False)
    if lora_rank:
        config = LoraConfig(r=lora_rank, lora_alpha=lora_rank, target_modules=lora_targets(transformer))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            transformer.add_adapter(config)  # B = 0: it starts as the base model
        for parameter in transformer.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()  # bf16 would lose an update of 1e-5
    return transformer


def dead_parts(transformer):
    """Parts whose gradient is missing or exactly zero in text-to-video: frozen, and without LoRA.

    The text stream ends in the last block: what its text queries, text output and text MLP make is thrown away. The image
    embedder has no input. A parameter without a gradient has no optimizer state, so a resumed optimizer would miss keys;
    one with a zero gradient would still shrink by weight decay.
    """
    last = f"transformer_blocks.{len(transformer.transformer_blocks) - 1}"
    parts = ("attn.add_q_proj", "attn.norm_added_q", "attn.to_add_out", "ff_context")
    return (*(f"{last}.{part}" for part in parts), "image_embedder")


def lora_targets(transformer):
    """Names of the linear maps in the blocks' attention and MLPs, of the video and the text stream."""
    linear = [name for name, module in transformer.named_modules() if isinstance(module, torch.nn.Linear)]
    pattern, dead = re.compile(r"transformer_blocks\.\d+\.(attn|ff|ff_context)\."), dead_parts(transformer)
    return [name for name in linear if pattern.match(name) and not name.startswith(dead)]


def shard(transformer, mesh, compute_dtype=torch.float32):
    """FSDP2: every block gathers its own weights when it runs, the root all others."""
    # cast_forward_inputs would round the timestep and the rotary table to bf16: error 0.025 instead of 0.0066.
    bf16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    policy = bf16 if compute_dtype == torch.bfloat16 else MixedPrecisionPolicy()
    for block in (*transformer.transformer_blocks, *transformer.context_embedder.token_refiner.refiner_blocks):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    # The root, too, must gather anew for each pass: by default it keeps the weights of before an anchor swap.
    return fully_shard(transformer, mesh=mesh, mp_policy=policy, reshard_after_forward=True)


def export(policy, folder):
    """Write what stock diffusers loads. Every rank must call it, since it gathers the shards; rank 0 writes.

    LoRA: transformer.load_lora_adapter(folder, prefix=None, weight_name="pytorch_lora_weights.safetensors")
    full: HunyuanVideo15Pipeline.from_pretrained(model, transformer=HunyuanVideo15Transformer3DModel.from_pretrained(folder))
    """
    transformer, lora = policy.module, getattr(policy.module, "peft_config", {}).get("default")
    part = {"ignore_frozen_params": True, "strict": False} if lora else {}
    state = get_model_state_dict(transformer, options=StateDictOptions(full_state_dict=True, cpu_offload=True, **part))
    if dist.is_initialized() and dist.get_rank() != 0:
        return
    os.makedirs(folder, exist_ok=True)
    if lora is None:
        plain = meta_transformer(transformer.config)  # a sharded model would save its shards
        plain.load_state_dict(state, assign=True)
        plain.save_pretrained(folder)
    else:  # the file of save_lora_adapter, which cannot gather shards
        state = get_peft_model_state_dict(transformer, state_dict=state, adapter_name="default")
        metadata = {"format": "pt", LORA_ADAPTER_METADATA_KEY: json.dumps(lora.to_dict(), default=list, sort_keys=True)}
        save_file(state, Path(folder) / LORA_WEIGHT_NAME_SAFE, metadata=metadata)


# ------------------------------------------------------------------------------------------------ sizes, for a dry run
def latent_shape(frames, height, width):
    """(C, F, H, W) of one video's latent."""
    if frames < 1 or frames % TIME != 1:
        raise ValueError(f"frames must be 4k + 1: the VAE takes the first frame alone, then four at a time. Got {frames}")
    if min(height, width) < SPACE or height % SPACE or width % SPACE:
        raise ValueError(f"height and width must be multiples of {SPACE}, the pixels of one latent: got {height} × {width}")
    return CHANNELS, (frames - 1) // TIME + 1, height // SPACE, width // SPACE


def token_count(frames, height, width):
    """Video tokens in the transformer, whose patch is one latent: 33,390 for 81 × 480 × 848."""
    return math.prod(latent_shape(frames, height, width)[1:])


def meta_transformer(config=None):
    """The transformer without weights. config None: the released architecture, 54 blocks and 8,326,608,160 parameters."""
    with torch.device("meta"):
        return HunyuanVideo15Transformer3DModel.from_config(dict(config or {}))


def memory_estimate(tokens, gpus=1, lora_rank=0, batch=1, anchor_offload=False, muon=False, config=None):
    """GiB on each GPU, by part, for bf16 compute with guidance. An estimate, not a measurement.

    P parameters, of which T are trained (LoRA: r·(in + out) of each target), N GPUs, n = tokens + 1256 (the longest text):
    weights      4·P/N full;  (2·P + 4·T)/N LoRA over a bf16 base
    gathered     FSDP's bf16 copies: two blocks and the root, and full: a block's gradients in bf16 and float32.
                 Full on one GPU: 2·P, the copies that autocast makes
    gradients    4·T/N;   anchor 4·T/N, or 0 when offloaded
    optimizer    8·T/N, the two float32 moments of AdamW; muon: one moment, 4 bytes, for the matrices that it takes
    activations  2·n·D bytes for each block's input, times 2 for guidance, times batch; and what one block holds while it
                 runs backward: about 100·n·D, 56 of them counted in its saved tensors on a CPU, the rest for temporaries
    vae          1.26·10⁹ parameters in float32, without its activations: it decodes while the transformer rests
    Not in it: reward models, text encoders (freed before training), fragmentation, CUDA itself (about 1 GiB)."""
    transformer = prepare(meta_transformer(config))
    sizes = transformer.config
    width, blocks = sizes.num_attention_heads * sizes.attention_head_dim, sizes.num_layers
    total, trained = transformer.num_parameters(), transformer.num_parameters(only_trainable=True)
    block = sum(p.numel() for p in transformer.transformer_blocks[0].parameters())
    if lora_rank:
        targets = [transformer.get_submodule(name) for name in lora_targets(transformer)]
        trained = sum(lora_rank * (linear.in_features + linear.out_features) for linear in targets)
    moments = 8 * trained
    if muon:
        moments -= 4 * muon_parameters(transformer, lora_rank)
    gathered = 2 * (total - (blocks - 2) * block) + (0 if lora_rank else (2 + 4) * block)
    if gpus == 1:
        gathered = 0 if lora_rank else 2 * total
    n = tokens + 1256
    parts = {
        "weights": (2 * total + 4 * trained if lora_rank else 4 * total) / gpus,
        "gathered": gathered,
        "gradients": 4 * trained / gpus,
        "optimizer": moments / gpus,
        "anchor": 0 if anchor_offload else 4 * trained / gpus,
        "activations": 2 * 2 * n * width * blocks * batch + 100 * n * width,
        "vae": 4 * 1.26e9,
    }
    return {name: size / 2**30 for name, size in parts.items()}


def muon_parameters(transformer, lora_rank):
    """Trained parameters that --optimizer muon gives to Muon (train.make_optimizers). A LoRA consists of nothing else."""
    if lora_rank:
        targets = [transformer.get_submodule(name) for name in lora_targets(transformer)]
        return sum(lora_rank * (linear.in_features + linear.out_features) for linear in targets)
    count = 0
    for name, parameter in transformer.named_parameters():
        if parameter.requires_grad and "blocks." in name and parameter.ndim == 2:
            count += parameter.numel()
    return count
