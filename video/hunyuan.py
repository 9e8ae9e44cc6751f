"""HunyuanVideo-1.5 as a policy: its velocity, its attention, how it is loaded, made trainable and spread over GPUs.

`load` returns a HunyuanPolicy, which has what grpo.py asks of a policy: module, latent_shape, encode, velocity, decode,
passes. A comment marks each place that differs from the stock pipeline.
Beside this file: files.py (the model's folder, checked, read and exported), prompts.py (the text encoders and their
cache), kernels.py (of attention), parallel.py (many GPUs).
"""

import itertools
import math
import re
from functools import partial

import torch
import torch.nn.functional as F
from diffusers import HunyuanVideo15Transformer3DModel
from diffusers.models.embeddings import apply_rotary_emb
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.attention import sdpa_kernel
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from video import parallel
from video.files import (
    CHANNELS,
    SPACE,
    TIME,
    check_model,
    load_component,
    load_network,
    load_shards,
    meta_transformer,
    model_folder,
    one_after_another,
    write_weight,
)
from video.kernels import FUSED_ATTENTION, KERNELS, attention_kernel
from video.numerics import allow_tf32, exact_float32
from video.prompts import PromptEncoder


# ------------------------------------------------------------------------------------------------ the policy
class HunyuanPolicy:
    """The transformer as a policy.

    module          the transformer
    micro_batch     the most samples that run as one batch, in rollout and update
    passes          its forward passes so far, counted per sample
    prompts         the PromptEncoder
    kernel          the name of its attention's kernel, where `load` has settled it
    unconditional   the Prompt of the empty text; `encode` sets it
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
        vae_tf32=False,
        kernel=None,
    ):
        self.module = transformer
        self.vae = vae
        self.prompts = prompts
        self.latent_shape = latent_shape
        self.guidance_scale = guidance_scale
        self.compute_dtype = compute_dtype
        self.micro_batch = micro_batch
        self.guidance_gradient = guidance_gradient
        self.vae_tf32 = vae_tf32
        self.kernel = kernel
        self.passes = 0
        self.unconditional = None
        vae.enable_slicing()  # in diffusers 0.42 the decoder fails on a batch of more than one sample
        vae.enable_tiling()  # a whole 480p video does not fit beside the transformer

    def encode(self, prompts):
        """One Prompt for each text. A run passes all its texts in one call, so the text encoders are loaded once."""
        *conditions, self.unconditional = self.prompts([*prompts, ""])
        return conditions

    def velocity(self, x, sigma, cond, frozen=None):
        """Guided velocity, noise − data:  v = v_uncond + scale·(v_cond − v_uncond).  x [B, C, F, H, W], sigma [B].

        cond: P Prompts, each of B / P samples that stand next to each other.

        The video may have any size. Evaluations use a larger one than rollouts, whose size is latent_shape.

        Rollout and training use the same guidance: the policy is the guided model, so the ratio is 1 before the first
        update. Both passes carry gradients, unless v_uncond is `frozen`: see frozen_velocity.
        """
        if x.ndim != 5 or x.shape[1] != CHANNELS or x.dtype != torch.float32:
            raise ValueError(f"x must be float32 [B, {CHANNELS}, F, H, W]: got {x.dtype} of shape {tuple(x.shape)}")
        if sigma.shape != x.shape[:1] or not cond or len(x) % len(cond):
            got = f"{len(x)} samples, sigma of shape {list(sigma.shape)}, {len(cond)} conditions"
            raise ValueError(f"velocity needs one sigma per sample, and samples for every condition: got {got}")
        conditional = self._denoise(x, sigma, cond)
        if self.guidance_scale == 1:  # the unconditional pass would have weight 0
            return conditional
        unconditional = self._denoise(x, sigma, [self.unconditional]) if frozen is None else frozen
        return unconditional + self.guidance_scale * (conditional - unconditional)

    @torch.no_grad()
    def frozen_velocity(self, x, sigma, cond):
        """v_uncond, where guidance_gradient is "conditional"; None where it has a gradient, or no weight.

        It is a constant of the loss then. It is the same number as long as the policy is the rollout's, so an update
        may hand in the rollout's, and saves its pass.
        """
        if self.guidance_gradient == "both" or self.guidance_scale == 1:
            return None
        return self._denoise(x, sigma, [self.unconditional])

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
        text = prompt.text.to(x.device, self.compute_dtype).expand(len(x), -1, -1)  # [b, L, ·]
        glyphs = prompt.glyphs.to(x.device, self.compute_dtype).expand(len(x), -1, -1)  # [b, G, ·]
        # With autocast, latent and timestep stay float32, and the velocity has an error of 0.0066. The stock pipeline
        # in bf16 also rounds the timestep (978.26 becomes 980), and its error is 0.0206. Without autocast, bf16 weights
        # do not accept a float32 timestep.
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.compute_dtype == torch.bfloat16):
            v = transformer_velocity(self.module, x, sigma, text, glyphs)
        if isinstance(self.module, FSDPModule):
            v = parallel.own_backward(v)
        return v.float()

    @torch.no_grad()
    def decode(self, latents):
        """latents [B, C, F, H, W] -> uint8 video [B, F, 3, H, W]. FloatingPointError where a pixel is not finite, which
        would be scored as black.
        """
        scaled = (latents / self.vae.config.scaling_factor).to(self.vae.dtype)
        allow_tf32(self.vae_tf32)
        (video,) = self.vae.decode(scaled, return_dict=False)  # [B, 3, F, H, W], −1 … 1
        exact_float32()  # the reward model's scores must not change
        if not video.isfinite().all():
            fix = "if the latents are in order, the VAE overflowed: use --vae_dtype bfloat16 or float32"
            raise FloatingPointError(f"decoded videos must be finite: got NaN or infinity in {video.dtype}; {fix}")
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


# ------------------------------------------------------------------------------------------------ loading
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
    vae_dtype="float32",
):
    """A HunyuanPolicy from a hub id or a local folder in the layout of HunyuanVideo15Pipeline.

    shape       latent_shape(frames, height, width) of the rollouts
    lora_rank   0 trains all weights, as float32 masters; above 0, a float32 LoRA over a frozen base in compute_dtype
    mesh        the device mesh to shard over, or None
    seed        of the LoRA's first weights, the same on every rank
    micro_batch the most samples in one forward pass
    guidance_gradient   see HunyuanPolicy.velocity
    checkpointing       see checkpoint_blocks
    attention           auto or one of KERNELS: see kernels.attention_kernel
    context     the process group that shares each video's tokens, or None: see parallel.py
    compile     see compile_blocks
    vae_dtype   float32, tf32 (float32 whose products are rounded to 10 bits, on GPUs), bfloat16 or float16
    """
    if compute_dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"compute_dtype must be torch.float32 or torch.bfloat16: got {compute_dtype}")
    folder = model_folder(model)
    check_model(folder)
    exact_float32()
    settings = load_component(HunyuanVideo15Transformer3DModel, folder, "transformer", method="load_config")
    heads = settings["num_attention_heads"]
    if context is not None:
        parallel.check_heads(heads, context.size())
        heads //= context.size()
    tokens = math.prod(shape[1:])
    kernel = attention_kernel(attention, device, compute_dtype, heads, settings["attention_head_dim"], tokens)
    if mesh is None:
        transformer = load_network(folder, "transformer", compute_dtype if lora_rank else torch.float32)
        make_trainable(transformer, lora_rank, checkpointing, [kernel]).to(device)
    else:
        transformer = build_transformer(settings, compute_dtype, lora_rank, checkpointing, [kernel], context, mesh)
        transformer.to_empty(device=device)
        load_shards(transformer, folder)
    draw_adapter(transformer, seed)
    if compile:
        compile_blocks(transformer)
    vae = one_after_another(lambda: load_network(folder, "vae", decoder_dtype(vae_dtype)).to(device))
    vae.requires_grad_(False)
    prompts = PromptEncoder(folder, prompt_cache, device, compute_dtype)
    settings = guidance_scale, compute_dtype, micro_batch, guidance_gradient, vae_dtype == "tf32", kernel
    return HunyuanPolicy(transformer, vae, prompts, shape, *settings)


def transformer_velocity(module, x, sigma, text, glyphs):
    """One pass of the stock transformer, nothing masked: x [b, C, F, H, W], sigma [b], text and glyphs [b, L, ·]."""
    # It reads 65 channels: the latent, then a first frame and its mask, which only image-to-video fills.
    first_frame, mask = torch.zeros_like(x), torch.zeros_like(x[:, :1])
    (v,) = module(
        hidden_states=torch.cat([x, first_frame, mask], 1),
        timestep=sigma.float() * 1000,
        encoder_hidden_states=text,
        encoder_attention_mask=torch.ones(text.shape[:2], device=x.device),
        encoder_hidden_states_2=glyphs,
        encoder_attention_mask_2=torch.ones(glyphs.shape[:2], device=x.device),
        # The stock pipeline passes 729 image tokens of zeros, and the model masks image tokens that are all zero. An
        # empty tensor also counts as all zero, and needs no mask. (The config's task_type cannot tell that there is no
        # image: it says "i2v" even in the text-to-video release.)
        image_embeds=text.new_zeros(len(x), 0, module.config.image_embed_dim),
        return_dict=False,
    )
    return v


def decoder_dtype(vae_dtype):
    """That of the decoder's weights, for one of engine/config.py's VAE_DTYPES."""
    return torch.float32 if vae_dtype == "tf32" else getattr(torch, vae_dtype)


def build_transformer(
    config, compute_dtype, lora_rank=0, checkpointing="full", kernels=tuple(KERNELS), context=None, mesh=None
):
    """The transformer as it is trained, on meta: without memory. config: None for the released one."""
    transformer = meta_transformer(config, compute_dtype if lora_rank else torch.float32)
    make_trainable(transformer, lora_rank, checkpointing, kernels, context)
    if mesh is not None:
        shard(transformer, mesh, compute_dtype)
    return transformer


def make_trainable(transformer, lora_rank=0, checkpointing="full", kernels=tuple(KERNELS), context=None):
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
        for module in transformer.modules():
            if isinstance(module, LoraLayer):
                # Else PEFT casts each input to float32, and autocast casts it back: on an H200 a tenth of a forward
                # pass, for the same numbers.
                module.cast_input_dtype_enabled = False
        for parameter in transformer.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()  # bf16 would lose an update of 1e-5
    return transformer


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

    On a CPU without vector instructions: with them, what inductor of torch 2.13 makes of the blocks' backward (AVX-512)
    has gradients that are wrong by up to 1%, and 9% in a LoRA, while the velocity is right to 3e-7. Those of torch 2.14
    and 2.15 are right.
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


# ------------------------------------------------------------------------------------------------ sizes of a video
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
    fix = f"use {nearest}" if nearest else f"use a context_parallel that divides {tokens:,}"
    raise ValueError(
        f"context_parallel must divide the tokens of a video: got {parts} and {tokens:,} for {frames} frames of "
        f"{height} × {width}; {fix}"
    )
