"""HunyuanVideo-1.5 as a policy. All that this code knows of the video model, its files, memory and traps is here.

`load` returns a HunyuanPolicy, which has what grpo.py asks of a policy: module, latent_shape, encode, velocity, decode,
passes. `shard` spreads it over GPUs. `export` writes what stock diffusers loads. The dry run (plan.py) uses
`token_count`, `pass_flops`, `meta_transformer` and `memory_estimate`. A comment marks each place that differs from the
stock pipeline.
"""

import gc
import hashlib
import inspect
import itertools
import json
import math
import os
import re
import shutil
import sys
import tempfile
import warnings
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from diffusers import AutoencoderKLHunyuanVideo15, HunyuanVideo15Pipeline, HunyuanVideo15Transformer3DModel
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY, LORA_WEIGHT_NAME_SAFE
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.pipelines.hunyuan_video1_5.pipeline_hunyuan_video1_5 import extract_glyph_texts, format_text_input
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import save, save_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from transformers import ByT5Tokenizer, Qwen2_5_VLTextModel, Qwen2Tokenizer, T5EncoderModel

import parallel
from videoalign import exact_float32, read_json

# The networks of a model, each with the name of its file of weights.
NETWORKS = {
    "transformer": (HunyuanVideo15Transformer3DModel, "diffusion_pytorch_model"),
    "vae": (AutoencoderKLHunyuanVideo15, "diffusion_pytorch_model"),
    "text_encoder": (Qwen2_5_VLTextModel, "model"),
    "text_encoder_2": (T5EncoderModel, "model"),
}
WEIGHT_TYPES = ("F64", "F32", "F16", "BF16")  # a quantised weight would be taken for a plain one
COMPONENTS = ("transformer", "vae", "tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2")
# The VAE makes one latent of 32 channels from 4 frames × 16 × 16 pixels; the first frame has a latent of its own.
CHANNELS, TIME, SPACE = 32, 4, 16
# The stock functions that encode a prompt, and what they take for granted.
ENCODE_TEXT = HunyuanVideo15Pipeline._get_mllm_prompt_embeds
ENCODE_GLYPHS = HunyuanVideo15Pipeline._get_byt5_prompt_embeds
SYSTEM_MESSAGE = inspect.signature(ENCODE_TEXT).parameters["system_message"].default
SYSTEM_TOKENS = inspect.signature(ENCODE_TEXT).parameters["crop_start"].default  # 108, cut off without looking
TEXT_TOKENS = inspect.signature(ENCODE_TEXT).parameters["tokenizer_max_length"].default  # 1,000 of Qwen2.5-VL
GLYPH_TOKENS = inspect.signature(ENCODE_GLYPHS).parameters["tokenizer_max_length"].default  # 256 of ByT5
LONGEST_TEXT = TEXT_TOKENS + GLYPH_TOKENS
# What this file relies on in the configs. Where a config is silent, the default of its class counts.
REQUIRED = {
    "transformer": {
        "in_channels": 2 * CHANNELS + 1,
        "out_channels": CHANNELS,
        "patch_size": 1,
        "patch_size_t": 1,
        "use_meanflow": False,  # a distilled model reads a second timestep
    },
    "vae": {"latent_channels": CHANNELS, "spatial_compression_ratio": SPACE, "temporal_compression_ratio": TIME},
    "text_encoder": {},
    "text_encoder_2": {},
}

# The kernels of attention, in the order in which `auto` looks for one that runs.
KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
FUSED_ATTENTION = (  # what they call
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
)


class Prompt(NamedTuple):
    """The text condition of one sample, without padding, on the CPU."""

    text: torch.Tensor  # [L, 3584] Qwen2.5-VL, third hidden state from the end
    glyphs: torch.Tensor  # [G, 1472] ByT5 of the quoted parts of the prompt; G = 0 without quotes


# ------------------------------------------------------------------------------------------------ the policy
class HunyuanPolicy:
    """The transformer as a policy.

    module          the transformer
    micro_batch     the most samples that run as one batch, in rollout and update
    passes          its forward passes so far, counted per sample
    prompts         the PromptEncoder
    unconditional   the Prompt of the empty text; `encode` sets it
    unconditional_velocity   that of the last call of `velocity`, where it has no gradient; else None
    """

    def __init__(
        self,
        transformer,
        vae,
        prompts,
        latent_shape,
        guidance_scale=6.0,
        compute_dtype=torch.float32,
        micro_batch=1,
        guidance_gradient="both",
    ):
        self.module = transformer
        self.vae = vae
        self.prompts = prompts
        self.latent_shape = latent_shape
        self.guidance_scale = guidance_scale
        self.compute_dtype = compute_dtype
        self.micro_batch = micro_batch
        self.guidance_gradient = guidance_gradient
        self.passes = 0
        self.unconditional = None
        self.unconditional_velocity = None
        vae.enable_slicing()  # in diffusers 0.42 the decoder fails on a batch of more than one sample
        vae.enable_tiling()  # a whole 480p video does not fit beside the transformer

    def encode(self, prompts):
        """One Prompt for each text. A run passes all its texts in one call, so the text encoders are loaded once."""
        *conditions, self.unconditional = self.prompts([*prompts, ""])
        return conditions

    def velocity(self, x, sigma, cond, unconditional=None):
        """Guided velocity, noise − data:  v = v_uncond + scale·(v_cond − v_uncond).  x [B, C, F, H, W], sigma [B].

        cond: P Prompts, each of B / P samples that stand next to each other.

        The video may have any size. Evaluations use a larger one than rollouts, whose size is latent_shape.

        Rollout and training use the same guidance: the policy is the guided model, so the ratio is 1 before the first
        update. Both passes carry gradients, unless guidance_gradient is "conditional": v_uncond is then a constant. It
        is the same number as long as the policy is the rollout's, so an update may hand in the `unconditional` velocity
        that the rollout had, and saves its pass.
        """
        if x.ndim != 5 or x.shape[1] != CHANNELS or x.dtype != torch.float32:
            raise ValueError(f"x must be float32 [B, {CHANNELS}, F, H, W]: got {x.dtype} of shape {tuple(x.shape)}")
        if sigma.shape != x.shape[:1] or not cond or len(x) % len(cond):
            got = f"{len(x)} samples, sigma of shape {list(sigma.shape)}, {len(cond)} conditions"
            raise ValueError(f"velocity needs one sigma per sample, and samples for every condition: got {got}")
        conditional = self._denoise(x, sigma, cond)
        if self.guidance_scale == 1:  # the unconditional pass would have weight 0
            return conditional
        constant = self.guidance_gradient == "conditional"
        if unconditional is None:
            with torch.set_grad_enabled(torch.is_grad_enabled() and not constant):
                unconditional = self._denoise(x, sigma, [self.unconditional])
        if constant:
            self.unconditional_velocity = unconditional
        return unconditional + self.guidance_scale * (conditional - unconditional)

    def _denoise(self, x, sigma, cond):
        """The velocity of each sample under its Prompt of `cond`, in batches of at most micro_batch samples.

        A batch holds samples of one Prompt. Prompts differ in length, so a mixed batch would need padding and a mask.
        Under FSDP every rank must make the same number of passes, or all of them hang. So how many samples share a
        Prompt is stated by the caller, who knows it from the settings; it is not read off the prompts, which differ
        from rank to rank.
        """
        copies = len(x) // len(cond)
        velocities = []
        for prompt, states, sigmas in zip(cond, x.split(copies), sigma.split(copies), strict=True):
            for part, levels in zip(states.split(self.micro_batch), sigmas.split(self.micro_batch), strict=True):
                velocities.append(self._pass(part, levels, prompt))
        return torch.cat(velocities)

    def _pass(self, x, sigma, prompt):
        """One pass of the transformer for samples of one Prompt: x [b, C, F, H, W], sigma [b]."""
        self.passes += len(x)
        # The model reads 65 channels: the latent, then a first frame and its mask, which only image-to-video fills.
        first_frame = torch.zeros_like(x)
        mask = torch.zeros_like(x[:, :1])
        inputs = torch.cat([x, first_frame, mask], 1)
        text = prompt.text.to(x.device, self.compute_dtype).expand(len(x), -1, -1)  # [b, L, ·]
        glyphs = prompt.glyphs.to(x.device, self.compute_dtype).expand(len(x), -1, -1)  # [b, G, ·]
        # With autocast, latent and timestep stay float32, and the velocity has an error of 0.0066. The stock pipeline
        # in bf16 also rounds the timestep (978.26 becomes 980), and its error is 0.0206. Without autocast, bf16 weights
        # do not accept a float32 timestep.
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.compute_dtype == torch.bfloat16):
            (v,) = self.module(
                hidden_states=inputs,
                timestep=sigma.float() * 1000,
                encoder_hidden_states=text,
                encoder_attention_mask=torch.ones(text.shape[:2], device=x.device),
                encoder_hidden_states_2=glyphs,
                encoder_attention_mask_2=torch.ones(glyphs.shape[:2], device=x.device),
                # The stock pipeline passes 729 image tokens of zeros, and the model masks image tokens that are all
                # zero. An empty tensor also counts as all zero, and needs no mask. (The config's task_type cannot tell
                # that there is no image: it says "i2v" even in the text-to-video release.)
                image_embeds=text.new_zeros(len(x), 0, self.module.config.image_embed_dim),
                return_dict=False,
            )
        if isinstance(self.module, FSDPModule):
            v = parallel.own_backward(v)
        return v.float()

    @torch.no_grad()
    def decode(self, latents):
        """latents [B, C, F, H, W] -> uint8 video [B, F, 3, H, W]."""
        scaled = latents.to(self.vae.dtype) / self.vae.config.scaling_factor
        (video,) = self.vae.decode(scaled, return_dict=False)  # [B, 3, F, H, W], −1 … 1
        unit = (video.float() / 2 + 0.5).clamp(0, 1)
        return (unit * 255).round().to(torch.uint8).transpose(1, 2).contiguous()


class UnmaskedAttention:
    """Joint attention of video and text without a mask.

    The stock processor builds a bool mask [B, 1, S, S] in every block. At 81 frames of 480p a copy takes 1.17 GiB, and
    with a mask the flash kernels cannot be used. Here nothing needs a mask: HunyuanPolicy.velocity passes no padding.

    kernels: those of KERNELS that PyTorch may take. `load` gives one, so that rollout and update, without and with a
    gradient, round alike.
    context: the process group that shares the video's tokens, or None: see parallel.py. S is then its share of them.
    """

    def __init__(self, kernels=tuple(KERNELS), context=None):
        self.kernels = [KERNELS[name] for name in kernels]
        self.context = context

    def __call__(self, attn, hidden_states, encoder_hidden_states, attention_mask=None, image_rotary_emb=None):
        def heads(project, states):  # [B, S, ·] -> [B, S, heads, D]
            return project(states).unflatten(-1, (attn.heads, -1))

        video = hidden_states
        text = encoder_hidden_states
        video_q = attn.norm_q(heads(attn.to_q, video))
        video_k = attn.norm_k(heads(attn.to_k, video))
        video_q = apply_rotary_emb(video_q, image_rotary_emb, sequence_dim=1)
        video_k = apply_rotary_emb(video_k, image_rotary_emb, sequence_dim=1)
        text_q = attn.norm_added_q(heads(attn.add_q_proj, text))  # text gets no rotary embedding of its position
        text_k = attn.norm_added_k(heads(attn.add_k_proj, text))
        video_qkv = video_q, video_k, heads(attn.to_v, video)
        text_qkv = text_q, text_k, heads(attn.add_v_proj, text)
        if self.context is not None:
            video_qkv = [parallel.heads_of_all_tokens(part, self.context) for part in video_qkv]
            text_qkv = [parallel.own_heads(part, self.context) for part in text_qkv]
        joint = [torch.cat(parts, 1).transpose(1, 2) for parts in zip(video_qkv, text_qkv, strict=True)]
        with sdpa_kernel(self.kernels):
            attended = F.scaled_dot_product_attention(*joint).transpose(1, 2)  # [B, S + L, heads, D]
        video_out, text_out = attended.split([attended.shape[1] - text.shape[1], text.shape[1]], 1)
        if self.context is not None:
            video_out = parallel.tokens_of_all_heads(video_out, self.context)
            text_out = parallel.all_heads(text_out, self.context)
        return attn.to_out[0](video_out.flatten(2)), attn.to_add_out(text_out.flatten(2))


def attention_kernel(wanted, device, dtype, head_dim):
    """The name of the first of KERNELS, or of the wanted one, that runs forward and backward; tried on a few zeros."""
    problems = []
    for name in KERNELS if wanted == "auto" else [wanted]:
        q = torch.zeros(1, 1, 16, head_dim, device=device, dtype=dtype, requires_grad=True)
        try:
            with torch.enable_grad(), sdpa_kernel(KERNELS[name]), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the reasons why a kernel cannot run, one warning each
                F.scaled_dot_product_attention(q, q, q).sum().backward()
            return name
        except RuntimeError as error:
            problems.append(f"{name}: {error}")
    rule = f"attention must have a kernel that runs on {device} in {dtype} with {head_dim} numbers to a head"
    raise ValueError(f"{rule}: {'; '.join(problems)}; use --attention auto")


# ------------------------------------------------------------------------------------------------ prompts
class PromptEncoder:
    """list of texts -> list of Prompt. A folder keeps one file for each text.

    The encoders (Qwen2.5-VL 7B and ByT5) need as much memory as the transformer. They are loaded only when a text has
    no file yet, and freed afterwards.
    """

    def __init__(self, model, folder, device, dtype):
        self.model = model
        self.folder = Path(folder)
        self.device = device
        self.dtype = dtype
        self.version = encoders_version(model)

    def __call__(self, prompts):
        found = {prompt: self._read(prompt) for prompt in prompts}
        missing = [prompt for prompt, encoded in found.items() if encoded is None]
        if missing:
            found |= self._encode(missing)
        return [found[prompt] for prompt in prompts]

    def path(self, prompt):
        """The file of a text. Its name is a hash of all that the embeddings depend on: encoders, dtype and text."""
        key = repr((self.version, str(self.dtype), prompt))
        return self.folder / f"{hashlib.sha256(key.encode()).hexdigest()}.safetensors"

    @torch.no_grad()
    def _encode(self, prompts):
        """{prompt: Prompt}, each written to its file."""
        qwen, byt5 = load_tokenizers(self.model)
        check_prompts(prompts, qwen, byt5)
        text_encoder = load_network(self.model, "text_encoder", self.dtype).to(self.device)
        glyph_encoder = load_network(self.model, "text_encoder_2", self.dtype).to(self.device)
        # The stock functions add the system message, cut its 108 tokens off again, and search for quotes. They pad to
        # 1000 and 256 tokens. What their masks keep is all that the transformer would attend to.
        encoded = {}
        for prompt in prompts:
            text, text_mask = ENCODE_TEXT(text_encoder, qwen, [prompt], self.device)
            glyphs, glyph_mask = ENCODE_GLYPHS(byt5, glyph_encoder, [prompt], self.device)
            encoded[prompt] = Prompt(text[text_mask.bool()].cpu(), glyphs[glyph_mask.bool()].cpu())
            if not all(tensor.isfinite().all() for tensor in encoded[prompt]):
                rule = "the text encoders must give finite embeddings"
                raise ValueError(f"{rule}: those of {prompt!r} are not; the weights of {self.model} are damaged")
            self._write(prompt, encoded[prompt])
        del text_encoder, glyph_encoder
        gc.collect()  # modules hold reference cycles: without this the memory stays taken
        torch.cuda.empty_cache()  # does nothing without a GPU
        return encoded

    def _read(self, prompt):
        """What the file of a text holds. None where it is missing, damaged or another text's: it is encoded anew."""
        path = self.path(prompt)
        if not path.is_file():  # reading a pipe would wait for ever
            return None
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}
            if metadata.get("checksum") == checksum(path, tensors):
                return Prompt(**tensors)
            problem = "its checksum is another"
        except Exception as error:  # a damaged file can break the reader in any way; it is written anew
            problem = repr(error)
        print(f"{path} is not what was written there ({problem}): its prompt is encoded anew", file=sys.stderr)
        return None

    def _write(self, prompt, encoded):
        """Write under a temporary name first: ranks may write the same file, and a killed run must not leave half."""
        path = self.path(prompt)
        tensors = {name: tensor.contiguous() for name, tensor in encoded._asdict().items()}
        content = save(tensors, metadata={"checksum": checksum(path, tensors)})
        temporary = None
        self.folder.mkdir(parents=True, exist_ok=True)  # here, since it may be removed during a run
        try:
            with tempfile.NamedTemporaryFile(dir=self.folder, suffix=".tmp", delete=False) as file:
                temporary = Path(file.name)
                file.write(content)
            os.replace(temporary, path)
        except OSError as error:
            if temporary is not None:
                temporary.unlink(missing_ok=True)
            free = shutil.disk_usage(self.folder).free
            raise OSError(
                f"an encoded prompt could not be written to {self.folder}, which has {free:,} bytes free: "
                f"{len(content):,} are needed ({error}); make room, or choose another --prompt_cache"
            ) from error


def encoders_version(model):
    """What the embeddings depend on in a model: the id of a hub model; of a folder its path and the encoders' files.

    A file of weights counts by its size and time. All others, the tokenizers' among them, count by their contents.
    """
    files = sorted(path for path in Path(model).glob("t*/*") if path.parent.name in COMPONENTS[2:] and path.is_file())
    if not files:
        return str(model)
    version = [str(Path(model).resolve())]
    for file in files:
        state = file.stat()
        by_state = file.suffix == ".safetensors"
        content = (state.st_size, state.st_mtime_ns) if by_state else hashlib.sha256(file.read_bytes()).hexdigest()
        version.append((file.parent.name, file.name, content))
    return repr(version)


def checksum(path, tensors):
    """sha256 of the name of a cache file and of all that its tensors hold: a damaged or a renamed file has another."""
    total = hashlib.sha256(path.name.encode())
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return total.hexdigest()


def check_prompts(prompts, qwen, byt5):
    """Raise on a prompt of which the stock functions would cut off the end."""
    for prompt in prompts:
        length = len(prompt.encode())  # no text has more tokens than bytes
        if length > TEXT_TOKENS - 100:
            length = len(chat_tokens(qwen, prompt)) - SYSTEM_TOKENS
        rule = f"the text encoder reads {TEXT_TOKENS:,} tokens: a prompt, with the few that end it, must have no more"
        if length > TEXT_TOKENS:
            raise ValueError(f"{rule}: got {length:,} in {prompt[:60]!r}…; shorten it")
        quoted = extract_glyph_texts(prompt) or ""
        length = len(byt5(quoted).input_ids)
        if length > GLYPH_TOKENS:
            rule = f"ByT5 reads {GLYPH_TOKENS} bytes: a prompt's quotes must fit in, each with 9 bytes around it"
            raise ValueError(f"{rule}: got {length:,} in {prompt[:60]!r}…; quote less")


def chat_tokens(qwen, prompt):
    """The ids of a prompt in its chat, as the stock function makes them, without padding and uncut."""
    (chat,) = format_text_input([prompt], SYSTEM_MESSAGE)
    return qwen.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=True).input_ids


# ------------------------------------------------------------------------------------------------ the files of a model
def check_model(model):
    """Raise unless the model is a folder whose contents fit together, or can be a hub id. No weight is loaded.

    Returns the tokenizers of a folder, for check_prompts. The contents of a hub id cannot be seen from here: None.
    """
    missing = [name for name in COMPONENTS if not (Path(model) / name).is_dir()]
    if str(model) and Path(model).is_dir() and missing:
        mend = "write it with HunyuanVideo15Pipeline.save_pretrained, or download the whole release"
        raise FileNotFoundError(f"{model} must hold {', '.join(COMPONENTS)}: no {', '.join(missing)}; {mend}")
    if missing:  # without this check from_pretrained would look for a mistyped path on the hub
        check_hub_id("model", model, "hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-480p_t2v")
        return None
    configs = {name: check_network(Path(model), name) for name in NETWORKS}
    check_fit(model, configs)
    for name in ("tokenizer", "tokenizer_2"):  # an empty folder would give the default of its class
        read_json(Path(model) / name / "tokenizer_config.json")
    tokenizers = load_tokenizers(model)
    known = configs["text_encoder"].vocab_size
    if len(tokenizers[0]) > known:
        rule = f"the tokenizer's ids must be among the {known:,} of the text encoder"
        raise ValueError(f"{rule}: {model} has {len(tokenizers[0]):,}; take both from one release")
    return tokenizers


def check_hub_id(setting, model, example):
    beside_others = len(Path(model).parts) > 1 and Path(model).parent.is_dir()  # a folder that is not there yet
    if beside_others or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(model)):
        rule = f"the {setting} must be an existing folder or a hub id like {example}"
        raise FileNotFoundError(f"{rule}: got {str(model)!r}")


def check_network(model, name):
    """The config of one network in a folder. Raise unless it is of the class and has the tensors that it describes."""
    cls, stem = NETWORKS[name]
    path = model / name / "config.json"
    settings = read_json(path)
    of_transformers = hasattr(cls, "config_class")
    key, kind = ("model_type", cls.config_class.model_type) if of_transformers else ("_class_name", cls.__name__)
    if settings.get(key) != kind:
        raise ValueError(f'{path} must have "{key}": "{kind}": got {settings.get(key)!r}; download it again')
    stored = stored_tensors(model / name, stem)
    keys = ("num_layers", "num_refiner_layers", "num_hidden_layers", "layers_per_block")
    counts = [0, *(settings.get(key) for key in keys)]
    layers = max(count for count in counts if type(count) is int)
    if layers > len(stored):  # to build as many, even without weights, could take for ever
        raise ValueError(f"{path} must describe its {len(stored)} tensors: got {layers} layers; download both again")
    try:
        with torch.device("meta"):
            network = cls(cls.config_class.from_dict(settings)) if of_transformers else cls.from_config(settings)
    except Exception as error:  # a wrong setting can break a library in any way
        raise ValueError(f"{path} must describe a {cls.__name__}: {error!r}; download it again") from error
    got = {key: getattr(network.config, key) for key in REQUIRED[name]}
    if got != REQUIRED[name]:
        raise ValueError(f"{path} must have {REQUIRED[name]}: got {got}; only this text-to-video model is supported")
    compare_tensors(model / name, network, stored)
    return network.config


def stored_tensors(folder, stem):
    """{name: (shape, dtype, file)}, from the headers of a network's safetensors files; they also tell a cut file."""
    index = folder / f"{stem}.safetensors.index.json"
    listed = None
    files = [f"{stem}.safetensors"]
    if index.is_file():
        listed = read_json(index).get("weight_map")
        if not isinstance(listed, dict) or not all(isinstance(file, str) for file in listed.values()):
            rule = f'{index} must have a "weight_map" of tensors and files'
            raise ValueError(f"{rule}: got {listed!r:.60}; download it again")
        files = sorted(set(listed.values()))
    stored = {}
    for file in files:
        path = folder / Path(file).name  # no file outside of the folder
        if not path.is_file():
            raise FileNotFoundError(f"{folder} must hold {path.name}: it is missing; download it again")
        try:
            with safe_open(path, framework="pt") as tensors:
                for name in tensors.keys():
                    tensor = tensors.get_slice(name)
                    stored[name] = tuple(tensor.get_shape()), tensor.get_dtype(), path
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path} must be a whole safetensors file: {error}; download it again") from error
    if listed is not None and listed.keys() != stored.keys():
        rule = f"{index} must list the tensors of its files"
        raise ValueError(f"{rule}: got {len(listed)} of {len(stored)}; download it again")
    return stored


def compare_tensors(folder, network, stored):
    """Raise unless the stored tensors are those of the network, in shape and kind."""
    expected = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    absent = expected.keys() - stored.keys()
    for one, other in (getattr(network, "_tied_weights_keys", None) or {}).items():  # two names, and one of them stored
        if one in stored or other in stored:
            absent -= {one, other}
    ignored = [*(getattr(network, "_keys_to_ignore_on_load_unexpected", None) or ()), r"inv_freq$"]
    foreign = [name for name in stored.keys() - expected.keys() if not any(re.search(rule, name) for rule in ignored)]
    shared = expected.keys() & stored.keys()
    check_tensors(folder, {
        "missing": absent,
        "unexpected": foreign,
        "of another shape": [f"{name} {stored[name][0]}" for name in shared if stored[name][0] != expected[name]],
        "of another type": [f"{name} {stored[name][1]}" for name in shared if stored[name][1] not in WEIGHT_TYPES],
    })  # fmt: skip


def check_tensors(where, problems):
    """Raise if any of the problems has a tensor: {problem: names}. The message names three of each."""
    told = []
    for problem, names in problems.items():
        if names:
            first = sorted(str(name) for name in names)[:3]
            told.append(f"{len(names)} {problem} ({', '.join(first)}{', …' if len(names) > 3 else ''})")
    if told:
        rule = f"{where} must hold exactly the tensors of its config.json"
        raise ValueError(f"{rule}: {'; '.join(told)}; download it again")


def check_fit(model, configs):
    """Raise unless the text encoders' outputs are what the transformer reads."""
    transformer, text, glyphs = configs["transformer"], configs["text_encoder"], configs["text_encoder_2"]
    widths = (text.hidden_size, glyphs.d_model)
    if widths != (transformer.text_embed_dim, transformer.text_embed_2_dim):
        expected = (transformer.text_embed_dim, transformer.text_embed_2_dim)
        rule = f"the text encoders must have the widths {expected} that the transformer reads"
        raise ValueError(f"{rule}: those of {model} have {widths}; take all parts from one release")
    if text.num_hidden_layers < 2:  # the third hidden state from the end is read
        raise ValueError(f"the text encoder must have at least 2 layers: that of {model} has {text.num_hidden_layers}")
    scale = configs["vae"].scaling_factor
    if not isinstance(scale, float) or not 0 < scale < math.inf:
        rule = f"the scaling_factor of {model}/vae must be positive"
        raise ValueError(f"{rule}: got {scale!r}; download its config.json again")


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
    micro_batch=1,
    guidance_gradient="both",
    checkpointing="full",
    attention="auto",
    context=None,
    compile=False,
):
    """A HunyuanPolicy from a hub id or a local folder in the layout of HunyuanVideo15Pipeline.

    shape       latent_shape(frames, height, width) of the rollouts
    lora_rank   0 trains all weights, as float32 masters; above 0, a float32 LoRA over a frozen base in compute_dtype
    mesh        the device mesh to shard over, or None
    seed        of the LoRA's first weights, the same on every rank
    micro_batch the most samples in one forward pass
    guidance_gradient   see HunyuanPolicy.velocity
    checkpointing       see checkpoint_blocks
    attention           auto or one of KERNELS
    context     the process group that shares each video's tokens, or None: see parallel.py
    compile     see compile_blocks
    """
    if compute_dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"compute_dtype must be torch.float32 or torch.bfloat16: got {compute_dtype}")
    check_model(model)
    exact_float32()
    settings = load_component(HunyuanVideo15Transformer3DModel, model, "transformer", method="load_config")
    kernel = attention_kernel(attention, device, compute_dtype, settings["attention_head_dim"])
    if context is not None:
        parallel.check_heads(settings["num_attention_heads"], context.size())
    weight_dtype = compute_dtype if lora_rank else torch.float32
    if mesh is None:
        transformer = load_network(model, "transformer", weight_dtype)
        prepare(transformer, lora_rank, checkpointing, [kernel]).to(device)
    else:
        transformer = meta_transformer(settings, weight_dtype)
        shard(prepare(transformer, lora_rank, checkpointing, [kernel], context), mesh, compute_dtype)
        transformer.to_empty(device=device)
        hand_out(transformer, model)
    draw_adapter(transformer, seed)
    if compile:
        compile_blocks(transformer)
    vae = one_after_another(lambda: load_network(model, "vae", torch.float32).to(device))
    vae.requires_grad_(False)
    prompts = PromptEncoder(model, prompt_cache, device, compute_dtype)
    return HunyuanPolicy(
        transformer, vae, prompts, shape, guidance_scale, compute_dtype, micro_batch, guidance_gradient
    )


def load_network(model, name, dtype):
    """One of NETWORKS. A tensor that the files lack would be drawn at random, with no more than a warning."""
    network, info = load_component(
        NETWORKS[name][0], model, name, dtype=dtype, use_safetensors=True, output_loading_info=True
    )
    check_tensors(f"{name} of {model}", {"missing": info["missing_keys"], "of another shape": info["mismatched_keys"]})
    return network


@torch.no_grad()
def hand_out(transformer, model):
    """Give each rank its part of a sharded transformer's weights, tensor by tensor.

    If every rank read the model before it is sharded, eight of them would fill 8 × 33 GB of one machine's memory.
    """
    first = dist.get_rank() == 0
    read = weight_reader(model) if first else None
    for name, parameter in transformer.named_parameters():
        if "lora_" in name:
            continue
        if first:
            stored = read(name.replace(".base_layer", ""))  # PEFT's name for a map with an adapter
            whole = stored.to(parameter.device, parameter.dtype)
        else:
            whole = torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.device)
        write_weight(parameter, whole, source=0)


def weight_reader(model):
    """A function name -> tensor of the transformer's weights. Those of a hub id are in memory as a whole."""
    if not Path(model).is_dir():
        return load_network(model, "transformer", torch.float32).state_dict().pop
    stored = stored_tensors(Path(model) / "transformer", NETWORKS["transformer"][1])

    def read(name):
        _, _, path = stored[name]
        with safe_open(path, framework="pt") as tensors:
            return tensors.get_tensor(name)

    return read


@torch.no_grad()
def draw_adapter(transformer, seed):
    """The first weights of a LoRA, on any number of ranks the same: A as PEFT draws it, and B = 0."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in transformer.named_parameters():
        if "lora_A" in name:
            bound = parameter.shape[1] ** -0.5
            whole = bound * (2 * torch.rand(parameter.shape, generator=generator) - 1)
            write_weight(parameter, whole.to(parameter.device), source=None)
        elif "lora_B" in name:
            parameter.zero_()


def write_weight(parameter, whole, source):
    """Write a tensor into a parameter, or this rank's part of it: of rank `source`'s tensor, or of its own (None)."""
    if isinstance(parameter, DTensor):
        whole = distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=source)
    parameter.copy_(whole)


def one_after_another(load):
    """What `load` returns, called by one rank of each machine at a time, so that its host memory holds one copy."""
    for turn in range(int(os.environ.get("LOCAL_WORLD_SIZE", 1))):
        if turn == int(os.environ.get("LOCAL_RANK", 0)):
            loaded = load()
        if dist.is_initialized():
            dist.barrier()
    return loaded


def load_tokenizers(model):
    """(Qwen2Tokenizer, ByT5Tokenizer) of a model, which do what the stock functions take for granted."""
    qwen = load_component(Qwen2Tokenizer, model, "tokenizer")
    byt5 = load_component(ByT5Tokenizer, model, "tokenizer_2")
    mend = "download it again"
    if not qwen.chat_template or qwen.pad_token_id is None or qwen.padding_side != "right":
        got = f"chat template {qwen.chat_template!r:.40}, pad token {qwen.pad_token!r}, side {qwen.padding_side!r}"
        raise ValueError(f"tokenizer of {model} must have a chat template and pad on the right: got {got}; {mend}")
    try:
        chats = [chat_tokens(qwen, "cat"), chat_tokens(qwen, "dog")]
    except Exception as error:  # the template is a program
        raise ValueError(f"tokenizer of {model} must have a chat template that runs: {error}; {mend}") from error
    common = os.path.commonprefix(chats)  # the ids before the prompt's own are those that all prompts share
    if len(common) != SYSTEM_TOKENS:
        rule = f"must give the system message the {SYSTEM_TOKENS} tokens that the pipeline cuts off before a prompt"
        raise ValueError(f"tokenizer of {model} {rule}: got {len(common)}; {mend}")
    ids = byt5("aé").input_ids
    if ids != [100, 198, 172, 1]:  # three more than each byte, and the end
        raise ValueError(f"tokenizer_2 of {model} must be ByT5's, one id for each byte: got {ids} for 'aé'; {mend}")
    return qwen, byt5


def load_component(cls, model, name, method="from_pretrained", **options):
    """One part of the model, with an error that says which part of which model cannot be loaded."""
    try:
        return getattr(cls, method)(model, subfolder=name, **options)
    except Exception as error:  # files from outside can break a library in any way
        where = "download it again" if Path(model).is_dir() else "check spelling and network"
        raise OSError(f"cannot load {name} of {str(model)!r}: {error or type(error).__name__}; {where}") from error


def prepare(transformer, lora_rank=0, checkpointing="full", kernels=tuple(KERNELS), context=None):
    """Make a stock transformer trainable: our attention, checkpointing, dead parts frozen, LoRA (see draw_adapter)."""
    if lora_rank < 0:
        raise ValueError(f"lora_rank must be 0 (full fine-tuning) or positive: got {lora_rank}")
    for block in transformer.transformer_blocks:
        block.attn.set_processor(UnmaskedAttention(kernels, context))
    if context is not None:
        parallel.split_tokens(transformer, context)
    checkpoint_blocks(transformer, checkpointing)
    transformer.requires_grad_(lora_rank == 0)
    for name in dead_parts(transformer):
        transformer.get_submodule(name).requires_grad_(False)
    if lora_rank:
        config = LoraConfig(r=lora_rank, lora_alpha=lora_rank, target_modules=lora_targets(transformer))
        with torch.random.fork_rng(devices=[]):  # PEFT draws weights, which draw_adapter draws again
            transformer.add_adapter(config)
        for parameter in transformer.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()  # bf16 would lose an update of 1e-5
    return transformer


def checkpoint_blocks(transformer, kind):
    """Let the backward pass recompute what a block computed, instead of storing it. The gradients stay the same.

    full        only the input of each block is stored; the whole forward pass is done twice
    attention   the attention's output, too: it costs most to recompute (60% of a pass at 352 × 624, 73% at 480 × 832),
                and storing it takes 2·n·D bytes more for each block and pass. The plain kernel `math` is recomputed
    none        everything is stored
    """
    if kind not in ("full", "attention", "none"):
        raise ValueError(f"checkpointing must be full, attention or none: got {kind!r}")
    if kind == "none":
        return
    stored = {}
    if kind == "attention":
        stored["context_fn"] = partial(create_selective_checkpoint_contexts, list(FUSED_ATTENTION))
    transformer.enable_gradient_checkpointing(partial(checkpoint, use_reentrant=False, **stored))


def compile_blocks(transformer, backend="inductor"):
    """Compile the forward pass of every block, as one graph without a break.

    Blocks, because they repeat: 54 of them need no more graphs than two. And their forward functions, because FSDP
    gathers a block's weights in hooks around it, which a compiler must not look into.

    On a CPU without vector instructions: with them, what inductor makes of the blocks' backward (torch 2.13, AVX-512)
    has gradients that are wrong by up to 1%, and 9% in a LoRA, while the velocity is right to 3e-7.
    """
    if next(transformer.parameters()).device.type == "cpu":
        torch._inductor.config.cpp.simdlen = 0
    # Graphs for the first, the last and the other blocks, each with and without gradient, of one sample and of several.
    torch._dynamo.config.recompile_limit = max(12, torch._dynamo.config.recompile_limit)
    for block in transformer.transformer_blocks:
        block.forward = torch.compile(block.forward, fullgraph=True, dynamic=True, backend=backend)


def dead_parts(transformer):
    """Names of the parts whose gradient is missing or exactly zero in text-to-video. They are frozen and get no LoRA.

    The text stream ends in the last block, which throws away what its text queries, text output and text MLP compute.
    The image embedder has no input. Training such parts would do harm in two ways. A parameter without a gradient has
    no optimizer state, so a resumed optimizer would miss keys. One with a zero gradient would shrink by weight decay.
    """
    last = f"transformer_blocks.{len(transformer.transformer_blocks) - 1}"
    return (
        f"{last}.attn.add_q_proj",
        f"{last}.attn.norm_added_q",
        f"{last}.attn.to_add_out",
        f"{last}.ff_context",
        "image_embedder",
    )


def lora_targets(transformer):
    """Names of the linear maps in the blocks' attention and MLPs, of the video and the text stream."""
    pattern = re.compile(r"transformer_blocks\.\d+\.(attn|ff|ff_context)\.")
    dead = dead_parts(transformer)
    targets = []
    for name, module in transformer.named_modules():
        is_linear = isinstance(module, torch.nn.Linear)
        if is_linear and pattern.match(name) and not name.startswith(dead):
            targets.append(name)
    return targets


def shard(transformer, mesh, compute_dtype=torch.float32):
    """Wrap it in FSDP2: every block gathers its own weights when it runs, and the root gathers all others.

    A mesh of one dimension shards over all ranks; one of two replicates over the first and shards over the second.
    """
    policy = MixedPrecisionPolicy()
    if compute_dtype == torch.bfloat16:
        # cast_forward_inputs would round the timestep and the rotary table to bf16: error 0.025 instead of 0.0066.
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    refiner_blocks = transformer.context_embedder.token_refiner.refiner_blocks
    for block in (*transformer.transformer_blocks, *refiner_blocks):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    # The root must gather anew for each pass, too. By default it would still hold the weights of before an anchor swap.
    return fully_shard(transformer, mesh=mesh, mp_policy=policy, reshard_after_forward=True)


def export(policy, folder):
    """Write what stock diffusers loads. Every rank must call it, since it gathers the shards. Rank 0 writes.

    A LoRA is loaded by
        transformer.load_lora_adapter(folder, prefix=None, weight_name="pytorch_lora_weights.safetensors")
    and a full model by
        transformer = HunyuanVideo15Transformer3DModel.from_pretrained(folder)
        HunyuanVideo15Pipeline.from_pretrained(model, transformer=transformer)
    """
    transformer = policy.module
    lora = getattr(transformer, "peft_config", {}).get("default")
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    if lora is not None:  # only the adapter is gathered, so most of the model's keys are missing
        options.ignore_frozen_params = True
        options.strict = False
    state = get_model_state_dict(transformer, options=options)
    if dist.is_initialized() and dist.get_rank() != 0:
        return
    os.makedirs(folder, exist_ok=True)
    if lora is None:
        plain = meta_transformer(transformer.config)  # a sharded model would save its shards
        plain.load_state_dict(state, assign=True)
        plain.save_pretrained(folder)
    else:  # the file that save_lora_adapter would write; it cannot gather shards
        adapter = get_peft_model_state_dict(transformer, state_dict=state, adapter_name="default")
        settings = json.dumps(lora.to_dict(), default=list, sort_keys=True)
        metadata = {"format": "pt", LORA_ADAPTER_METADATA_KEY: settings}
        save_file(adapter, Path(folder) / LORA_WEIGHT_NAME_SAFE, metadata=metadata)


# ------------------------------------------------------------------------------------------------ sizes, for a dry run
def latent_shape(frames, height, width):
    """(C, F, H, W) of one video's latent."""
    if frames < 1 or frames % TIME != 1:
        rule = "the VAE takes the first frame alone, then four at a time"
        raise ValueError(f"frames must be 4k + 1: {rule}. Got {frames}")
    if min(height, width) < SPACE or height % SPACE or width % SPACE:
        rule = f"height and width must be multiples of {SPACE}, the pixels of one latent"
        raise ValueError(f"{rule}: got {height} × {width}")
    return CHANNELS, (frames - 1) // TIME + 1, height // SPACE, width // SPACE


def token_count(frames, height, width):
    """Video tokens in the transformer, one for each place of the latent: 33,390 for 81 × 480 × 848."""
    _, *places = latent_shape(frames, height, width)
    return math.prod(places)


def check_context(frames, height, width, parts):
    """Raise unless so many ranks can share the tokens of a video of this size evenly; the error names the nearest."""
    tokens = token_count(frames, height, width)
    if tokens % parts == 0:
        return
    around = [SPACE * step for step in range(-8, 9)]
    nearest = None
    for up, wide in sorted(itertools.product(around, around), key=lambda change: abs(change[0]) + abs(change[1])):
        size = height + up, width + wide
        if min(size) >= SPACE and token_count(frames, *size) % parts == 0:
            nearest = f"{size[0]} × {size[1]}"
            break
    mend = f"use {nearest}" if nearest else f"use a context_parallel that divides {tokens:,}"
    raise ValueError(
        f"context_parallel must divide the tokens of a video: got {parts} and {tokens:,} for {frames} frames of "
        f"{height} × {width}; {mend}"
    )


def pass_flops(tokens, config=None):
    """FLOPs of one forward pass of one video: (linear maps, attention).

    2 for each weight and token; 4·n²·D for each block's attention over n tokens. The text is left out: about 1% for
    every hundred of its tokens.
    """
    transformer = meta_transformer(config)
    acts_on_video = re.compile(r"x_embedder\.|proj_out\.|transformer_blocks\.\d+\.(attn\.to_([qkv]|out)\.|ff\.)")
    weights = 0
    for name, parameter in transformer.named_parameters():
        if acts_on_video.match(name) and parameter.ndim > 1:
            weights += parameter.numel()
    sizes = transformer.config
    width = sizes.num_attention_heads * sizes.attention_head_dim  # D
    return 2 * weights * tokens, 4 * tokens**2 * width * sizes.num_layers


def meta_transformer(config=None, dtype=torch.float32):
    """The transformer without weights. Without a config: the released one, 54 blocks and 8,326,608,160 parameters."""
    with torch.device("meta"):
        transformer = HunyuanVideo15Transformer3DModel.from_config(dict(config or {}))
    for parameter in transformer.parameters():  # its own `to` warns of modules that it does not have
        parameter.data = parameter.data.to(dtype)
    return transformer


def memory_estimate(
    tokens,
    gpus=1,
    lora_rank=0,
    batch=1,
    anchor_offload=False,
    muon=False,
    config=None,
    branches=2,
    checkpointing="full",
):
    """GiB on each GPU, by part, for bf16 compute. An estimate, not a measurement.

    With P parameters, of which T are trained, N GPUs, and n tokens of video and longest text:
    weights      full: 4·P/N.  LoRA over a bf16 base: (2·P + 4·T)/N
    gathered     FSDP's bf16 copies, see gathered_bytes
    gradients    4·T/N
    optimizer    8·T/N, the two float32 moments of AdamW. Muon keeps one moment, 4 bytes, for the matrices that it takes
    anchor       4·T/N, or 0 when offloaded
    activations  2·n·D bytes for each block's input, times the branches of guidance that are trained, times batch; and
                 about 100·n·D for what one block holds while it runs backward: 56 were counted in its saved tensors on
                 a CPU, the rest is for temporaries. Checkpointing "attention" stores 2·n·D more for each block, "none"
                 those 56·n·D of every block
    vae          1.26·10⁹ parameters in float32, without its activations: it decodes while the transformer rests
    Not counted: reward models, text encoders (freed before training), fragmentation, CUDA itself (about 1 GiB).
    """
    transformer = prepare(meta_transformer(config))
    sizes = transformer.config
    width = sizes.num_attention_heads * sizes.attention_head_dim  # D
    n = tokens + LONGEST_TEXT
    total = transformer.num_parameters()  # P
    trained = trained_parameters(transformer, lora_rank)  # T
    weights = 2 * total + 4 * trained if lora_rank else 4 * total
    moments = 8 * trained
    if muon:
        moments -= 4 * muon_parameters(transformer, lora_rank)
    stored = {"full": 2, "attention": 2 + 2, "none": 56}[checkpointing] * n * width  # bytes of a block and pass
    stored_blocks = stored * branches * sizes.num_layers * batch
    running_block = 100 * n * width
    parts = {
        "weights": weights / gpus,
        "gathered": gathered_bytes(transformer, gpus, lora_rank),
        "gradients": 4 * trained / gpus,
        "optimizer": moments / gpus,
        "anchor": 0 if anchor_offload else 4 * trained / gpus,
        "activations": stored_blocks + running_block,
        "vae": 4 * 1.26e9,
    }
    return {name: size / 2**30 for name, size in parts.items()}


def gathered_bytes(transformer, gpus, lora_rank):
    """Bytes of the weights' bf16 copies on one GPU.

    FSDP holds two blocks and the root at a time. Full training adds the gradients of one block, in bf16 and in float32.
    On one GPU nothing is gathered, but full training has the bf16 copies of all weights that autocast makes.
    """
    total = transformer.num_parameters()
    if gpus == 1:
        return 0 if lora_rank else 2 * total
    block = sum(parameter.numel() for parameter in transformer.transformer_blocks[0].parameters())
    other_blocks = (transformer.config.num_layers - 2) * block
    copies = 2 * (total - other_blocks)
    block_gradients = 0 if lora_rank else (2 + 4) * block
    return copies + block_gradients


def trained_parameters(transformer, lora_rank):
    """Parameters that are trained in a transformer that `prepare` made without a LoRA, or in a LoRA on it."""
    if lora_rank:
        return lora_parameters(transformer, lora_rank)
    return transformer.num_parameters(only_trainable=True)


def lora_parameters(transformer, lora_rank):
    """Parameters of a LoRA: rank · (in + out) for each linear map that it adapts."""
    count = 0
    for name in lora_targets(transformer):
        linear = transformer.get_submodule(name)
        count += lora_rank * (linear.in_features + linear.out_features)
    return count


def muon_parameters(transformer, lora_rank):
    """Trained parameters that --optimizer muon gives to Muon (see train.make_optimizers): all of them in a LoRA."""
    if lora_rank:
        return lora_parameters(transformer, lora_rank)
    count = 0
    for name, parameter in transformer.named_parameters():
        if parameter.requires_grad and "blocks." in name and parameter.ndim == 2:
            count += parameter.numel()
    return count
