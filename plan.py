"""The plan of a run: what it will do and cost, in numbers, before anything is spent.

    arithmetic      samples, passes, optimizer steps; every run prints it at its start
    print_memory    GiB on each GPU, by part
    passes          transformer passes per video and sampling step, by what they are made for
    print_cost      those passes, and the FLOPs, hours and disk that follow from them
All of it is computed from the settings and the sizes of the architecture; nothing is measured.
"""

import dataclasses
import math

from config import TOY
from grpo import micro_batches_per_step
from prompts import read_prompts
from trust_region import kl_weights

TFLOPS = 400.0  # of a GPU at work; an H100's bf16 matrices reach about twice that where nothing else is done


def branches(config):
    """(branches of guidance that a rollout has, those that are trained)."""
    if config.model == TOY or config.guidance_scale == 1:
        return 1, 1
    return 2, 2 if config.guidance_gradient == "both" else 1


def iterations_per_anchor(config):
    """Iterations from one refresh of a moving anchor to the next: it moves between iterations, never within one."""
    return math.ceil(config.anchor_every / config.optimizer_steps)


def arithmetic(config, ranks):
    """What a run of these settings does on so many processes, in numbers, before anything is spent."""
    trained, samples = config.trained_steps(), config.batch_size * (ranks // config.context_parallel)
    per_step = micro_batches_per_step(config.batch_size, trained, config)
    micro_batches = per_step * config.optimizer_steps
    sampled_branches, trained_branches = branches(config)
    passes = config.batch_size * sampled_branches
    trained_passes = config.batch_size * trained_branches
    doubled = ", doubled by guidance" if sampled_branches == 2 else ""
    prompts = samples // config.group_size
    shared = f", {config.context_parallel} to a video" if config.context_parallel > 1 else ""
    sizes = f"{config.batch_size} / {config.micro_batch} × {trained}"
    in_all = config.optimizer_steps * config.iterations
    lines = [
        f"samples per iteration    {samples} = {prompts} prompts × {config.group_size}, on {ranks} rank(s){shared}",
        f"trained steps            {trained} of {config.num_steps}",
        f"micro-batches            {micro_batches} = {sizes} per iteration and rank",
        f"optimizer steps          {config.optimizer_steps} per iteration, of {per_step} micro-batches each;"
        f" {in_all} in all, {config.optimizer}",
        f"passes per rank          rollout {passes} × {config.num_steps}, update {trained_passes} × {trained} with"
        f" gradient; counted per sample{doubled}",
    ]
    if trained_passes < passes and config.optimizer_steps > 1:
        lines.append("                         from the second optimizer step on as many more without gradient")
    w_pos, _ = kl_weights(config.kl_mode)
    if w_pos:
        lines.append(
            f"reference passes         {passes} × {config.kl_steps or trained} without gradient, unless the anchor is"
            " the rollout's policy"
        )
    if config.kl_mode in ("moving", "dual"):
        often = iterations_per_anchor(config)
        lines.append(f"anchor refresh           every {config.anchor_every} optimizer steps = {often} iteration(s)")
        if often == 1:  # Eq. 11 against the anchor is then Eq. 12
            lines.append("                         so the anchor is always the rollout's policy: no position control;")
            lines.append("                         raise anchor_every")
    return "\n".join(lines)


def memory(config, shards):
    """hunyuan.memory_estimate for a Config whose model is shared by so many GPUs."""
    import hunyuan

    _, trained_branches = branches(config)
    parts = hunyuan.memory_estimate(
        hunyuan.token_count(config.frames, config.height, config.width) // config.context_parallel,
        shards,
        config.lora_rank,
        config.micro_batch,
        config.anchor_offload,
        muon=config.optimizer == "muon",
        branches=trained_branches,
        checkpointing=config.checkpointing,
    )
    w_pos, _ = kl_weights(config.kl_mode)
    if not w_pos:
        parts["anchor"] = 0.0
    return parts


def print_memory(config, ranks, gpu_memory_gb):
    """The dry run's estimate of memory per GPU, from the configuration alone; SystemExit where it cannot fit."""
    import hunyuan

    shards = ranks // config.replicate
    parts = memory(config, shards)
    parts["videoalign"] = 4 * 2.2e9 / 2**30  # Qwen2-VL-2B in float32
    _, trained_branches = branches(config)
    if not config.lora_rank and trained_branches == 2:
        # A weight's gradient is the sum of both branches'. Backward goes through one branch after the other, so
        # the first one's bf16 gradients of all weights wait, before FSDP can shard them, on every GPU.
        parts["waiting"] = parts["gradients"] * shards / 2
    total, parameters = sum(parts.values()), hunyuan.meta_transformer().num_parameters()
    tokens = hunyuan.token_count(config.frames, config.height, config.width)
    eval_tokens = hunyuan.token_count(config.frames, config.eval_height, config.eval_width)
    print(f"tokens per video         {tokens:,} in training, {eval_tokens:,} in evaluation")
    print(f"parameters               {parameters:,}")
    print(
        "memory per GPU (GiB)     "
        + " + ".join(f"{name} {size:.1f}" for name, size in parts.items())
        + f" = {total:.1f}"
    )
    if gpu_memory_gb and total > gpu_memory_gb:
        raise SystemExit(
            f"the estimate must fit the GPU: got {total:.1f} GiB for {gpu_memory_gb:g}; use more GPUs, --lora_rank 64, "
            "--anchor_offload, --micro_batch 1, or fewer frames and pixels"
        )


# ---------------------------------------------------------------------------------------------- FLOPs and hours
def passes(config):
    """{purpose: passes for each video and sampling step}, in forward passes of the network, as (linear, attention)."""
    sampled_branches, trained_branches = branches(config)
    trained_share = config.trained_steps() / config.num_steps
    linear, attention = pass_with_gradient(config)
    with_gradient = trained_share * trained_branches
    parts = {
        "rollout": (sampled_branches, sampled_branches),
        "reference": (reference_share(config) * sampled_branches,) * 2,
        "update": (with_gradient * linear, with_gradient * attention),
    }
    if trained_branches < sampled_branches:  # the stored branch serves until the first optimizer step
        later = trained_share * (1 - 1 / config.optimizer_steps)
        parts["update"] = tuple(part + later for part in parts["update"])
    return parts


def pass_with_gradient(config):
    """(linear, attention) of one pass with gradient, in forward passes.

    That is the forward; what checkpointing computes again; backward, which is 2 forwards of a linear map (1 in a LoRA,
    whose base has no gradient of its own) and 2.5 of attention.
    """
    linear, attention = 1 + (1 if config.lora_rank else 2), 1 + 2.5
    if config.checkpointing != "none":
        linear += 1
    if config.checkpointing == "full":
        attention += 1
    return linear, attention


def measured_tflops(config, line, forward):
    """TFLOP/s of this rank's rollout and update: the FLOPs of the passes that a line of the log counts, by its seconds.

    forward: (linear, attention), the FLOPs of one forward pass of one video: hunyuan.pass_flops.
    """
    linear, attention = pass_with_gradient(config)
    _, trained_branches = branches(config)
    trained = config.batch_size * config.trained_steps() * trained_branches
    plain = line["rollout_passes"] + line["update_passes"] - trained
    flops = (plain + trained * linear) * forward[0] + (plain + trained * attention) * forward[1]
    seconds = line["rollout_seconds"] + line["update_seconds"]
    return flops / config.context_parallel / seconds / 1e12


def reference_share(config):
    """Share of all steps, over many iterations, whose mean under the anchor must be computed."""
    w_pos, _ = kl_weights(config.kl_mode, config.beta_pos, config.beta_vel)
    if not w_pos:
        return 0.0
    share = (config.kl_steps or config.trained_steps()) / config.num_steps
    if config.kl_mode == "fixed":  # it is the rollout's policy once, at the start
        return share
    return share * (1 - 1 / iterations_per_anchor(config))


def forward_equivalents(config, linear, attention):
    """Passes per video and step in whole forward passes, where one forward has these FLOPs of each kind."""
    whole = linear + attention
    return {name: (a * linear + b * attention) / whole for name, (a, b) in passes(config).items()}


def cost(config, linear, attention):
    """({purpose: FLOPs of an iteration on each GPU}, FLOPs of all iterations), for a forward pass of these FLOPs."""
    videos_and_steps = config.batch_size * config.num_steps / config.context_parallel
    iteration = {name: videos_and_steps * (a * linear + b * attention) for name, (a, b) in passes(config).items()}
    return iteration, config.iterations * sum(iteration.values())


def evaluation_cost(config):
    """FLOPs of a run's evaluations, of all GPUs together."""
    import hunyuan

    tokens = hunyuan.token_count(config.frames, config.eval_height, config.eval_width)
    evaluations = 1 + math.ceil(config.iterations / config.eval_every)  # the first before training
    samples = len(read_prompts(config.eval_prompts)) * config.eval_noises
    sampled_branches, _ = branches(config)
    return evaluations * samples * config.eval_steps * sampled_branches * sum(hunyuan.pass_flops(tokens))


def print_cost(config, ranks, tflops):
    """FLOPs, hours and disk. The VAE, the reward model, text tokens, messages between GPUs and waiting are left out."""
    import hunyuan

    forward = hunyuan.pass_flops(hunyuan.token_count(config.frames, config.height, config.width))
    iteration, run = cost(config, *forward)
    equivalents = forward_equivalents(config, *forward)
    shown = " + ".join(f"{name} {value:.1f}" for name, value in equivalents.items())
    print(f"passes per video, step   {shown} = {sum(equivalents.values()):.1f} forward passes")
    each = sum(iteration.values())
    in_all = f"{each / 1e15:.0f} an iteration, {run / 1e15:,.0f} a run"
    print(f"PFLOP per GPU            {sum(forward) / 1e15:.2f} a pass, {in_all}")
    rate = (tflops or TFLOPS) * 1e12
    minutes, training = each / rate / 60, run / rate / 3600
    evaluating = evaluation_cost(config) / ranks / rate / 3600
    print(
        f"time at {rate / 1e12:g} TFLOP/s      {minutes:.1f} minutes an iteration, {training:.1f} hours for all"
        f" {config.iterations}, {evaluating:.1f} more for evaluations; VAE, rewards and messages not counted"
    )
    size = checkpoint_bytes(config) / 1e9
    count = config.keep_checkpoints + 1
    most = f"{count} at most while one is written: {count * size:.0f}"
    print(f"disk                     {size:.0f} GB a checkpoint, {most}")


def checkpoint_bytes(config):
    """Trained weights, which are as large as their gradients, the optimizer's moments and the anchor."""
    parts = memory(dataclasses.replace(config, anchor_offload=False), shards=1)
    return 2**30 * (parts["gradients"] + parts["optimizer"] + parts["anchor"])
