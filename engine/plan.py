"""The plan of a run: what it will do and cost, in numbers, before anything is spent.

    arithmetic      samples, passes, optimizer steps; every run prints it at its start
    print_cost      passes of the transformer, FLOPs, hours, disk and messages
    print_memory    GiB on each GPU, by part
All of it is computed from the settings, the sizes of the released architecture and the rates of one GPU. trace.py runs
an iteration of the real code on tensors without data, and tests/test_trace.py compares the two.

A forward pass has two kinds of FLOPs, (linear, attention), since backward multiplies them differently.
"""

import dataclasses
import functools
import math
import re

import torch
from torch.utils.flop_counter import FlopCounterMode

from engine.presets import TOY
from grpo import copies_in_rollout, copies_in_update, micro_batches_per_step, samples_in_update
from prompts import read_prompts

VIDEOALIGN = 4 * 2.2e9  # bytes of Qwen2-VL-2B in float32
TEXT_ENCODER = 2 * 7.07e9  # bytes of the language model of Qwen2.5-VL-7B in bf16, the largest part that is read whole
VAE_PARAMETERS = 1.26e9
GPUS_PER_MACHINE = 8
# TFLOP/s on one H200, from paper/gpu.py (paper/APPENDIX.md): the passes there take the seconds of these rates to within
# a tenth. That of the linear maps includes all that is done between them, which takes longer than they do.
ATTENTION_TFLOPS = 600.0
LINEAR_TFLOPS, LORA_LINEAR_TFLOPS = 215.0, 175.0
VAE_TFLOPS = {"float32": 29.0, "tf32": 198.0, "bfloat16": 275.0, "float16": 281.0}
SCORE_TFLOPS = VAE_TFLOPS["float32"]  # VideoAlign's, assumed
SLOWER = {"bfloat16": 1, "float32": 12}  # times the seconds in bf16; of a transformer in float32 it is assumed
# Qwen2-VL-2B's FLOPs for a token of the video, 28 × 28 pixels of 2 frames: 2 for each of 1.3·10⁹ weights of the
# language model, and for 0.66·10⁹ of the vision tower at each of the token's four patches.
SCORE_FLOPS = 2 * (1.3e9 + 4 * 0.66e9)
SCORED_FPS, TOKENS_PER_PAIR = 2, 256  # of VideoAlign's released settings: frames a second, tokens of two frames


# ---------------------------------------------------------------------------------------------- what a run does
def branches(config):
    """(branches of guidance that a rollout has, those that are trained)."""
    if config.model == TOY or config.guidance_scale == 1:
        return 1, 1
    return 2, 2 if config.guidance_gradient == "both" else 1


def iterations_per_anchor(config):
    """Iterations from one refresh of a moving anchor to the next: it moves between iterations, never within one."""
    return math.ceil(config.anchor_every / config.optimizer_steps)


def reference_share(config):
    """Share of all steps, over many iterations, whose mean under the anchor must be computed."""
    if not config.has_anchor:
        return 0.0
    share = samples_in_update(config) / config.batch_size
    share *= (config.kl_steps or config.trained_steps()) / config.num_steps
    if config.kl_mode == "fixed":  # it is the rollout's policy once, at the start
        return share
    return share * (1 - 1 / iterations_per_anchor(config))


def arithmetic(config, ranks):
    """What a run of these settings does on so many processes, in numbers, before anything is spent."""
    trained, samples = config.trained_steps(), config.batch_size * (ranks // config.context_parallel)
    per_step = micro_batches_per_step(samples_in_update(config), trained, config)
    micro_batches = per_step * config.optimizer_steps
    sampled_branches, trained_branches = branches(config)
    sampled_passes = config.batch_size * sampled_branches
    trained_passes = samples_in_update(config) * trained_branches
    doubled = ", doubled by guidance" if sampled_branches == 2 else ""
    prompts = samples // config.group_size
    shared = f", {config.context_parallel} to a video" if config.context_parallel > 1 else ""
    sizes = f"{samples_in_update(config)} / {config.micro_batch} × {trained}"
    in_all = config.optimizer_steps * config.iterations
    lines = [
        f"samples per iteration    {samples} = {prompts} prompts × {config.group_size}, on {ranks} rank(s){shared}",
        f"trained steps            {trained} of {config.num_steps}",
        f"micro-batches            {micro_batches} = {sizes} per iteration and rank",
        f"optimizer steps          {config.optimizer_steps} per iteration, of {per_step} micro-batches each;"
        f" {in_all} in all, {config.optimizer}",
        f"passes per rank          rollout {sampled_passes} × {config.num_steps}, update {trained_passes} × {trained}"
        f" with gradient; counted per sample{doubled}",
    ]
    if trained_branches < sampled_branches and config.optimizer_steps > 1:
        lines.append("                         from the second optimizer step on as many more without gradient")
    reference_passes = samples_in_update(config) * sampled_branches
    if config.has_anchor:
        lines.append(
            f"reference passes         {reference_passes} × {config.kl_steps or trained} without gradient, unless the"
            " anchor is the rollout's policy"
        )
    if config.has_anchor and config.kl_mode != "fixed":
        often = iterations_per_anchor(config)
        lines.append(f"anchor refresh           every {config.anchor_every} optimizer steps = {often} iteration(s)")
        if often == 1:  # Eq. 11 against the anchor is then Eq. 12
            lines.append("                         so the anchor is always the rollout's policy: no position control;")
            lines.append("                         raise anchor_every")
    return "\n".join(lines)


def passes(config):
    """{purpose: (passes without gradient, passes with gradient) of the network for each video and sampling step}."""
    sampled_branches, trained_branches = branches(config)
    trained_share = samples_in_update(config) / config.batch_size * config.trained_steps() / config.num_steps
    later = 0.0
    if trained_branches < sampled_branches:  # the stored branch serves until the first optimizer step
        later = trained_share * (1 - 1 / config.optimizer_steps)
    return {
        "rollout": (sampled_branches, 0),
        "reference": (reference_share(config) * sampled_branches, 0),
        "update": (later, trained_share * trained_branches),
    }


# ---------------------------------------------------------------------------------------------- sizes of the network
@functools.cache
def released_transformer():
    from video import files, hunyuan

    return hunyuan.make_trainable(files.meta_transformer())


def prepared_transformer(architecture=None):
    """The transformer as it is trained in full, without memory. architecture: another than the released one."""
    from video import files, hunyuan

    return hunyuan.make_trainable(files.meta_transformer(architecture)) if architecture else released_transformer()


def takes_muon(name, parameter):
    """Whether --optimizer muon gives a trained parameter to Muon: the matrices of the blocks."""
    return "blocks." in name and parameter.ndim == 2


def trained_parameters(transformer, lora_rank):
    """(parameters that are trained, those among them that Muon can take), for a prepared_transformer.

    A LoRA has rank · (in + out) for each linear map that it adapts, all of them matrices of blocks.
    """
    from video import hunyuan

    if lora_rank:
        count = 0
        for name in hunyuan.lora_targets(transformer):
            linear = transformer.get_submodule(name)
            count += lora_rank * (linear.in_features + linear.out_features)
        return count, count
    trained = {name: p for name, p in transformer.named_parameters() if p.requires_grad}
    matrices = sum(p.numel() for name, p in trained.items() if takes_muon(name, p))
    return sum(p.numel() for p in trained.values()), matrices


def pass_flops(tokens, architecture=None):
    """FLOPs of one forward pass of one video: (linear maps, attention).

    2 for each weight and token; 4·n²·D for each block's attention over n tokens. The text is left out: about 1% for
    every hundred of its tokens.
    """
    transformer = prepared_transformer(architecture)
    acts_on_video = re.compile(r"x_embedder\.|proj_out\.|transformer_blocks\.\d+\.(attn\.to_([qkv]|out)\.|ff\.)")
    weights = 0
    for name, parameter in transformer.named_parameters():
        if acts_on_video.match(name) and parameter.ndim > 1:
            weights += parameter.numel()
    sizes = transformer.config
    width = sizes.num_attention_heads * sizes.attention_head_dim  # D
    return 2 * weights * tokens, 4 * tokens**2 * width * sizes.num_layers


def training_flops(config, architecture=None):
    """pass_flops of a video of the rollouts."""
    from video import hunyuan

    return pass_flops(hunyuan.token_count(config.frames, config.height, config.width), architecture)


def decode_flops(frames, height, width):
    """FLOPs of the VAE's decoding of one video, in its tiles: AutoencoderKLHunyuanVideo15.tiled_decode.

    All but a thousandth of them are convolutions', so they are counted for one place of the latent, and the places of
    all tiles are added up.
    """
    from video import hunyuan

    channels, latent_frames, *sides = hunyuan.latent_shape(frames, height, width)
    of_a_place, tile, overlap = decoder_sizes(channels, latent_frames)
    if max(sides) > tile:
        step = int(tile * (1 - overlap))
        sides = [sum(min(tile, side - start) for start in range(0, side, step)) for side in sides]
    return math.prod(sides) * of_a_place


@functools.cache
def decoder_sizes(channels, latent_frames):
    """(FLOPs of the released VAE's decoder for one place of a latent, a tile's side in the latent, its overlap)."""
    from video import files

    with torch.device("meta"):
        vae = files.AutoencoderKLHunyuanVideo15()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        vae.decoder(torch.empty(1, channels, latent_frames, 1, 1, device="meta"))
    return counter.get_total_flops(), vae.tile_latent_min_height, vae.tile_overlap_factor


def score_flops(config):
    """FLOPs of VideoAlign for one video, without its prompt's tokens."""
    pairs = math.ceil(config.frames / config.fps * SCORED_FPS / 2)
    return SCORE_FLOPS * TOKENS_PER_PAIR * pairs


def vae_bytes(vae_dtype):
    """Of one number."""
    return 2 if vae_dtype in ("bfloat16", "float16") else 4


def decode_bytes(frames, vae_dtype):
    """What the VAE takes while it decodes a tile of 256 × 256 pixels: six feature maps of 128 channels, as traced.
    cuDNN's kernels for TF32, bf16 and fp16 take up to a quarter more, as measured on an H200.
    """
    workspace = 1 if vae_dtype == "float32" else 1.25
    return workspace * 6 * 128 * vae_bytes(vae_dtype) * frames * 256**2


# ---------------------------------------------------------------------------------------------- memory
def memory(config, shards, architecture=None):
    """GiB on each GPU, by part, for bf16 compute, where so many GPUs share a model. An estimate, not a measurement.

    With P parameters, of which T are trained, N GPUs, and n tokens of video and longest text:
    weights      full: 4·P/N.  LoRA over a bf16 base: (2·P + 4·T)/N
    gathered     FSDP's bf16 copies, see gathered_bytes
    gradients    4·T/N
    optimizer    8·T/N, the two float32 moments of AdamW. Muon keeps one moment, 4 bytes, for the matrices that it takes
    anchor       4·T/N, or 0 when offloaded, or without a position KL
    activations  2·n·D bytes for each block's input, times the branches of guidance that are trained, times the samples
                 of a micro-batch; and about 100·n·D for what one block holds while it runs backward: 56 were counted in
                 its saved tensors on a CPU, the rest is for temporaries. Checkpointing "attention" stores 2·n·D more
                 for each block, "none" those 56·n·D of every block
    vae          1.26·10⁹ parameters, without its activations: it decodes while the transformer rests
    Not counted: text encoders (freed before training), fragmentation, CUDA itself (about 1 GiB).
    """
    from video import hunyuan
    from video.prompts import LONGEST_TEXT

    transformer = prepared_transformer(architecture)
    sizes = transformer.config
    width = sizes.num_attention_heads * sizes.attention_head_dim  # D
    tokens = hunyuan.token_count(config.frames, config.height, config.width) // config.context_parallel
    n = tokens + LONGEST_TEXT
    total = transformer.num_parameters()  # P
    trained, matrices = trained_parameters(transformer, config.lora_rank)  # T
    _, trained_branches = branches(config)
    weights = 2 * total + 4 * trained if config.lora_rank else 4 * total
    moments = 8 * trained
    if config.optimizer == "muon":
        moments -= 4 * matrices
    stored = {"full": 2, "attention": 2 + 2, "none": 56}[config.checkpointing] * n * width  # of a block and pass
    stored_blocks = stored * trained_branches * sizes.num_layers * config.micro_batch
    running_block = 100 * n * width
    parts = {
        "weights": weights / shards,
        "gathered": gathered_bytes(transformer, shards, config.lora_rank),
        "gradients": 4 * trained / shards,
        "optimizer": moments / shards,
        "anchor": 4 * trained / shards if config.has_anchor and not config.anchor_offload else 0,
        "activations": stored_blocks + running_block,
        "vae": vae_bytes(config.vae_dtype) * VAE_PARAMETERS,
    }
    return {name: size / 2**30 for name, size in parts.items()}


def gathered_bytes(transformer, shards, lora_rank):
    """Bytes of the weights' bf16 copies on one GPU.

    FSDP holds two blocks and the root at a time. Full training adds the gradients of one block, in bf16 and in float32.
    On one GPU nothing is gathered, but full training has the bf16 copies of all weights that autocast makes.
    """
    total = transformer.num_parameters()
    if shards == 1:
        return 0 if lora_rank else 2 * total
    block = sum(parameter.numel() for parameter in transformer.transformer_blocks[0].parameters())
    other_blocks = (transformer.config.num_layers - 2) * block
    copies = 2 * (total - other_blocks)
    block_gradients = 0 if lora_rank else (2 + 4) * block
    return copies + block_gradients


def peak_memory(config, shards):
    """GiB of an iteration's peak on each GPU, by part: that of the update, or of a decode where that needs more."""
    parts = memory(config, shards)
    parts["videoalign"] = VIDEOALIGN / 2**30
    parts["rollout"] = rollout_bytes(config) / 2**30
    update_alone = sum(parts[name] for name in ("activations", "gathered", "gradients"))
    tile = decode_bytes(config.frames, config.vae_dtype) / 2**30
    parts["decode"] = max(0.0, tile - update_alone)
    return parts


def rollout_bytes(config):
    """Of a rank's samples: states, means, the reference's means, and a branch of guidance if it is stored."""
    from video import hunyuan

    latents = 1 + config.num_steps  # states
    latents += config.num_steps * (2 if reference_share(config) else 1)
    sampled_branches, trained_branches = branches(config)
    if trained_branches < sampled_branches:
        latents += config.num_steps
    latent = math.prod(hunyuan.latent_shape(config.frames, config.height, config.width))
    return 4 * config.batch_size * latents * latent


def host_memory(config, ranks):
    """(bytes of a machine's memory while a model is read, while it trains)."""
    offloaded = 0.0
    if config.anchor_offload:
        on_gpu = dataclasses.replace(config, anchor_offload=False)
        offloaded = 2**30 * memory(on_gpu, ranks // config.replicate)["anchor"] * min(ranks, GPUS_PER_MACHINE)
    return max(TEXT_ENCODER, offloaded), offloaded


def checkpoint_bytes(config):
    """Trained weights, which are as large as their gradients, the optimizer's moments and the anchor."""
    parts = memory(dataclasses.replace(config, anchor_offload=False), shards=1)
    return 2**30 * (parts["gradients"] + parts["optimizer"] + parts["anchor"])


def print_memory(config, ranks, gpu_memory_gb):
    """The dry run's estimate of memory per GPU, from the configuration alone; SystemExit where it cannot fit."""
    from video import hunyuan

    parts = peak_memory(config, ranks // config.replicate)
    total, parameters = sum(parts.values()), released_transformer().num_parameters()
    tokens = hunyuan.token_count(config.frames, config.height, config.width)
    eval_tokens = hunyuan.token_count(config.frames, config.eval_height, config.eval_width)
    print(f"tokens per video         {tokens:,} in training, {eval_tokens:,} in evaluation")
    print(f"parameters               {parameters:,}")
    print(f"memory per GPU (GiB)     {sum_of(parts)}")
    if gpu_memory_gb and total > gpu_memory_gb:
        raise SystemExit(
            f"the estimate must fit the GPU: got {total:.1f} GiB for {gpu_memory_gb:g}; use more GPUs, --lora_rank 64, "
            "--anchor_offload, --micro_batch 1, or fewer frames and pixels"
        )


# ---------------------------------------------------------------------------------------------- FLOPs and hours
def gradient_cost(config):
    """What a pass with gradient costs, in forward passes: (linear, attention).

    That is the forward; what checkpointing computes again; backward, which is 2 forwards of a linear map (1 in a LoRA,
    whose base has no gradient of its own) and 2.5 of attention.
    """
    linear, attention = 1 + (1 if config.lora_rank else 2), 1 + 2.5
    if config.checkpointing != "none":
        linear += 1
    if config.checkpointing == "full":
        attention += 1
    return linear, attention


def flops_with_backward(config, forward):
    """FLOPs of a pass with gradient. forward: pass_flops of a video."""
    return sum(times * flops for times, flops in zip(gradient_cost(config), forward, strict=True))


def forward_passes(config, forward):
    """{purpose: forward passes of the same FLOPs, for each video and step}. forward: pass_flops of a video."""
    with_gradient = flops_with_backward(config, forward) / sum(forward)
    return {name: plain + with_gradient * trained for name, (plain, trained) in passes(config).items()}


def iteration_flops(config, forward):
    """{purpose: FLOPs of the transformer on each GPU in an iteration}."""
    each = config.batch_size * config.num_steps * sum(forward) / config.context_parallel
    return {name: each * number for name, number in forward_passes(config, forward).items()}


def measured_tflops(config, line, forward):
    """TFLOP/s of this rank's rollout and update: the FLOPs of the passes that a line of the log counts, by its seconds.

    forward: pass_flops of a video.
    """
    _, trained_branches = branches(config)
    trained = samples_in_update(config) * config.trained_steps() * trained_branches
    plain = line["rollout_passes"] + line["update_passes"] - trained
    flops = plain * sum(forward) + trained * flops_with_backward(config, forward)
    seconds = line["rollout_seconds"] + line["update_seconds"]
    return flops / config.context_parallel / seconds / 1e12


def transformer_tflops(config, forward):
    """Of the transformer in bf16, on the card that was measured. forward: pass_flops of a video."""
    linear, attention = forward
    of_linear = LORA_LINEAR_TFLOPS if config.lora_rank else LINEAR_TFLOPS
    return (linear + attention) / (linear / of_linear + attention / ATTENTION_TFLOPS)


def gpu_seconds(config, forward, transformer, decode, score, tflops=None):
    """{part: seconds of one GPU for so many FLOPs of it}, by the rates that were measured. forward: pass_flops of the
    video that they are spent on. tflops: the transformer's in training, on another card, whose other rates then differ
    in proportion.
    """
    usual = transformer_tflops(config, training_flops(config))
    faster = 1e12 * (tflops or usual) / usual
    return {
        "transformer": SLOWER[config.compute_dtype] * transformer / transformer_tflops(config, forward) / faster,
        "VAE": decode / VAE_TFLOPS[config.vae_dtype] / faster,
        "reward model": score / SCORE_TFLOPS / faster,  # in float32, since its scores must not change
    }


def gpu_hours(config, ranks, tflops=None):
    """{part: hours of each GPU in all iterations}. tflops: see gpu_seconds."""
    from video import hunyuan

    forward, score = training_flops(config), score_flops(config)
    transformer = sum(iteration_flops(config, forward).values())
    decode = config.batch_size * decode_flops(config.frames, config.height, config.width)
    iteration = gpu_seconds(config, forward, transformer, decode, config.batch_size * score, tflops)
    hours = {part: config.iterations * seconds / 3600 for part, seconds in iteration.items()}

    eval_size = config.frames, config.eval_height, config.eval_width
    forward = pass_flops(hunyuan.token_count(*eval_size))
    sampled_branches, _ = branches(config)
    sampling = config.eval_steps * sampled_branches * sum(forward) / config.context_parallel
    of_a_video = sum(gpu_seconds(config, forward, sampling, decode_flops(*eval_size), score, tflops).values())
    evaluations = 1 + math.ceil(config.iterations / config.eval_every)  # the first before training
    videos = len(read_prompts(config.eval_prompts)) * config.eval_noises
    most = math.ceil(videos / (ranks // config.context_parallel))  # on the GPU with most
    return hours | {"evaluations": evaluations * most * of_a_video / 3600}


def print_cost(config, ranks, tflops, price=None):
    """Passes, FLOPs, hours, disk and messages. The hours leave out text tokens, messages, saves and waiting."""
    forward = training_flops(config)
    equivalents = forward_passes(config, forward)
    each = sum(iteration_flops(config, forward).values()) / 1e15
    in_all = f"{each:.0f} an iteration, {config.iterations * each:,.0f} a run"
    print(f"passes per video, step   {sum_of(equivalents)} forward passes")
    print(f"PFLOP per GPU            {sum(forward) / 1e15:.2f} a pass, {in_all}")
    parts = gpu_hours(config, ranks, tflops)
    tflops = tflops or transformer_tflops(config, forward)
    hours = sum(parts.values())
    minutes = 60 * (hours - parts["evaluations"]) / config.iterations
    print(
        f"time at {tflops:.0f} TFLOP/s      {minutes:.1f} minutes an iteration; messages, saves and waiting not counted"
    )
    print(f"hours                    {sum_of(parts)} for all {config.iterations} iterations")
    if config.attention == "auto":
        print("attention                the kernel that the first rank measures as the fastest at the start")
    if price:
        print(
            f"price                    ${hours * ranks * price:,.0f} at ${price:g} for an hour of each of {ranks} GPUs"
        )
    size = checkpoint_bytes(config) / 1e9
    count = config.keep_checkpoints + 1
    most = f"{count} at most while one is written: {count * size:.0f}"
    print(f"disk                     {size:.0f} GB a checkpoint, {most}")
    within, between = messages_by_reach(config, ranks)
    for reach, sent in (("within", within), ("between", between)):
        if sent:
            print(f"{f'messages {reach} (TiB)':<24} {sum_of(sent, 2**40, 2)} an iteration and GPU, {reach} machines")
    reading, training = (part / 1e9 for part in host_memory(config, ranks))
    print(
        f"host memory              {reading:.0f} GB of each machine while the model is read, then {training:.0f} GB"
        " beside PyTorch's own"
    )


def sum_of(parts, unit=1, digits=1):
    """{name: number} as the text of a sum."""
    shown = " + ".join(f"{name} {part / unit:.{digits}f}" for name, part in parts.items())
    return f"{shown} = {sum(parts.values()) / unit:.{digits}f}"


# ---------------------------------------------------------------------------------------------- messages
def messages_by_reach(config, ranks):
    """The messages that there are: those that stay within a machine, and those that leave it."""
    parts = {name: part for name, part in messages(config, ranks).items() if part}
    leaving = []
    if ranks > GPUS_PER_MACHINE:
        leaving.append("replicas")
    if ranks // config.replicate > GPUS_PER_MACHINE:
        leaving += ["gather", "reduce"]
    within = {name: part for name, part in parts.items() if name not in leaving}
    between = {name: part for name, part in parts.items() if name in leaving}
    return within, between


def messages(config, ranks, architecture=None):
    """{purpose: bytes that cross each GPU's link in an iteration}, of collectives counted as in trace.MESSAGES.

    With P parameters of w bytes, of which T are trained:
    gather      P·w for a forward pass, as much again for its backward
    reduce      4·T for a pass with gradient
    replicas    2 · 4·T / shards for each pass with gradient of an optimizer step's last micro-batch, where machines
                hold whole models: parallel.reduce_between_machines
    context     4 exchanges of a share of the tokens (q, k, v, output) for each block's forward pass, for its second
                one under checkpointing, and for its backward; those of the text are left out
    """
    from video import hunyuan

    shards = ranks // config.replicate
    times = 2 if config.checkpointing == "none" else 3
    transformer = prepared_transformer(architecture)
    sizes = transformer.config
    width = 2 if config.compute_dtype == "bfloat16" else 4
    total = transformer.num_parameters()
    trained, _ = trained_parameters(transformer, config.lora_rank)
    if config.lora_rank:
        total += trained
    plain = with_gradient = context = 0.0
    for purpose, (plain_passes, trained_passes) in passes(config).items():
        copies = copies_in_rollout(config) if purpose == "rollout" else copies_in_update(config)
        calls = config.batch_size * config.num_steps / copies  # for each pass of a video and step
        plain += calls * plain_passes
        with_gradient += calls * trained_passes
        context += calls * copies * (plain_passes + times * trained_passes)
    parts = {"gather": 0.0, "reduce": 0.0, "replicas": 0.0, "context": 0.0}
    if shards > 1:
        parts["gather"] = width * total * (plain + 2 * with_gradient)
        parts["reduce"] = 4 * trained * with_gradient
    if config.replicate > 1:
        _, trained_branches = branches(config)
        of_a_micro_batch = trained_branches * config.micro_batch / copies_in_update(config)
        parts["replicas"] = 2 * 4 * trained / shards * of_a_micro_batch * config.optimizer_steps
    if config.context_parallel > 1:
        tokens = hunyuan.token_count(config.frames, config.height, config.width) / config.context_parallel
        exchange = 4 * width * tokens * sizes.num_attention_heads * sizes.attention_head_dim * sizes.num_layers
        parts["context"] = exchange * context
    return parts
