"""The algorithm box: collect rollouts, score them, update the policy. The toy and the full run call this same code.

    collect:  noise → rollout (Eq. 7) → decode → rewards (Eq. 10) → advantages (Eq. 4)
    update:   for every trained step of every sample:
              L = −(1/G) Σ_i A_i Σ_t S_t·log π_θ + λ_KL·L_KL  with the clipped ratio → backward
              then clip the gradient norm → optimizer → anchor

Words:
    iteration       one rollout of all samples and the update on it
    optimizer step  one step of the optimizer; config.optimizer_steps of them in an iteration, the paper's number is 1
    step            one of the T sampling steps of a rollout
    micro-batch     one forward and backward pass

**What one optimizer step per iteration implies.** During all backward passes θ still is the policy that made the
rollout. So the ratio is 1 at every one of them and the clip of Eq. 4 never acts; the closed form of the step-wise KL
(Eq. 12) has the gradient 0; its rollout-phase estimate (Eq. 15) has the gradient −∇ log π_θ of the rollout's own noise,
whose expectation is 0. Of the dual trust region (Eq. 14) only the position term pulls: dual is moving KL plus noise of
mean 0. The clip and the velocity term act from two optimizer steps per iteration on. tests/test_grpo.py shows each of
these.

A policy is any object with
    module            the nn.Module that is trained
    latent_shape      shape of one training sample's x, without the batch
    encode(prompts)   -> list with one condition per prompt, of whatever kind velocity takes
    velocity(x [B, …], sigma [B], cond list of P) -> v [B, …]; gradients flow; guidance is inside. P divides B, and
                      each condition is that of B / P samples next to each other, so that they can run as one batch
    decode(x [B, …])  -> uint8 video [B, F, C, H, W]
    passes            how many forward passes of the network velocity has made so far
and, if a part of its guided velocity has no gradient,
    unconditional_velocity   that part in the last call of velocity, which takes it back as a fourth argument
A reward is any function (videos, prompts) -> {name: [B]}, NaN for a failed sample: see rewards.py. It may keep the
causes of failures in a list `failures`. `score` is the one place that calls it.
"""

import math
import sys
import time
import traceback
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.distributed as dist

from equalizer import equalizer_scales
from rewards import REWARD_SETTINGS, broken_rule, composite_reward, group_advantages
from sde import SDE, Trajectory, log_prob, randn, rollout
from trust_region import (
    KL_MODES,
    KL_SCHEDULES,
    STEPWISE_KL,
    dual_kl,
    gaussian_kl,
    kl_coefficient,
    kl_weights,
    stepwise_kl_closed_form,
    stepwise_kl_rollout_phase,
)

METHOD, OPTIMIZATION = "method", "optimization"  # groups of --help


def option(group, default, text, choices=None, video=False, bounds=None):
    """A dataclass field that also knows its line of --help, and its choices or its bounds (lowest, highest).

    video: read by the video model alone, not by the toy.
    """
    known = {"group": group, "help": text, "choices": choices, "video": video, "bounds": bounds}
    return field(default=default, metadata=known)


@dataclass
class GRPOConfig:
    """What the algorithm itself reads. Defaults are the paper's; the presets of config.py override them."""

    group_size: int = option(METHOD, 4, "G, samples per prompt [paper: 4]", bounds=(2, 10**4))
    batch_size: int = option(
        METHOD,
        8,
        "samples per rank and iteration; a group may span ranks [paper: 2 × 4; release: 2]",
        bounds=(1, 10**6),
    )
    reward_setting: str = option(METHOD, "B", "weights of Eq. 10 [paper: A and B]", sorted(REWARD_SETTINGS))
    clip_range: float = option(
        METHOD, 1e-4, "c of clip(ρ, 1 ± c), for a log-prob that is a mean over D [release: 1e-4]", bounds=(1e-10, 1e3)
    )
    max_advantage: float = option(METHOD, 5.0, "clamp on |A| [release: 5]", bounds=(1e-3, 1e3))
    equalizer: bool = option(METHOD, True, "multiply the policy term of step t by S_t, Eq. 9 [paper: on]")
    kl_mode: str = option(METHOD, "dual", "trust region, Eq. 11–14 [paper: dual]", KL_MODES)
    stepwise_kl: str = option(
        METHOD,
        "rollout_phase",
        "form of the step-wise KL: Eq. 15, or Eq. 12 in closed form [paper: rollout_phase]",
        STEPWISE_KL,
    )
    beta_pos: float = option(METHOD, 1.0, "β_pos of Eq. 14 [paper: 1.0]", bounds=(0, 1e6))
    beta_vel: float = option(METHOD, 0.1, "β_vel of Eq. 14 [paper: 0.1]", bounds=(0, 1e6))
    kl_schedule: str = option(METHOD, "two_stage", "schedule of λ_KL, Fig. 7 [paper: two_stage]", KL_SCHEDULES)
    kl_lambda: float = option(METHOD, 1e-5, "λ_KL, final value [paper: 1e-5]", bounds=(0, 1e6))
    kl_lambda_early: float = option(
        METHOD, 1e-7, "λ_KL at the start of two_stage, milder and ramp [paper: 1e-7]", bounds=(0, 1e6)
    )
    kl_switch: int = option(
        METHOD, 50, "iteration of the second stage, or length of the ramp [not printed in the paper]", bounds=(0, 10**7)
    )
    anchor_every: int = option(
        METHOD, 10, "N, optimizer steps between refreshes of the moving anchor, Eq. 13 [paper: 10]", bounds=(1, 10**7)
    )
    kl_steps: int = option(
        METHOD,
        0,
        "trained steps of each sample that have the position KL, drawn anew and weighted so that its mean over draws "
        "is that of all; 0 = all [paper: all]",
        bounds=(0, 1000),
    )
    optimizer_steps: int = option(
        OPTIMIZATION, 1, "optimizer steps per iteration [paper and release: 1]", bounds=(1, 10**4)
    )
    micro_batch: int = option(
        OPTIMIZATION, 1,
        "samples per forward and backward pass, per rank; the video model runs those of one prompt as one batch "
        "[paper: 2]",
        bounds=(1, 10**6),
    )
    max_grad_norm: float = option(
        OPTIMIZATION, 1.0, "gradient norm is clipped to this [release: 1.0]", bounds=(1e-6, 1e9)
    )
    ratio_tolerance: float = option(
        OPTIMIZATION,
        1e-3,
        "stop where a ratio before the first optimizer step is farther from 1 than this",
        bounds=(1e-9, 1e3),
    )
    max_failed_rewards: float = option(METHOD, 0.1, "share of samples that may fail to be scored before the run stops")

    def check_algorithm(self):
        """Raise ValueError on the first setting that cannot work, before anything is loaded."""
        for name in ("batch_size", "anchor_every", "micro_batch", "optimizer_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1: got {getattr(self, name)}")
        if self.group_size < 2:
            raise ValueError(f"group_size must be at least 2, for samples to be compared with: got {self.group_size}")
        for name in ("clip_range", "max_advantage", "max_grad_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive: got {getattr(self, name)}")
        if not 0 <= self.max_failed_rewards < 1:
            raise ValueError(f"max_failed_rewards is a share in [0, 1): got {self.max_failed_rewards}")
        for name in ("beta_pos", "beta_vel", "kl_lambda", "kl_lambda_early", "kl_switch"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative: got {getattr(self, name)}")


class OneRank:
    """`ranks` of a run on one process."""

    rank, world = 0, 1
    process, processes = 0, 1
    context = None

    def gather(self, tensor):
        """The values of all ranks, concatenated in their order: on one process the tensor itself."""
        return tensor

    def exchange(self, value):
        """A list of the values of all processes; a value is any small object."""
        return [value]


class AllRanks:
    """`ranks` of a run under torch.distributed.

    rank, world          what samples are shared out by. Processes that share the tokens of their samples are one rank
    process, processes   torchrun's rank and world size. The first process writes and prints
    context              the process group that shares the tokens of its samples (parallel.py); None: each has its own
    """

    def __init__(self, context=None):
        self.process, self.processes = dist.get_rank(), dist.get_world_size()
        self.context = context
        self.sharers = 1 if context is None else context.size()
        self.rank, self.world = self.process // self.sharers, self.processes // self.sharers

    def gather(self, tensor):
        """The values of all ranks, concatenated in their order; of processes that share samples the first one's."""
        parts = [torch.empty_like(tensor) for _ in range(self.processes)]
        dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts[:: self.sharers])

    def exchange(self, value):
        """A list of the values of all processes; a value is any small object. It goes over the CPU."""
        values = [None] * self.processes
        dist.all_gather_object(values, value)
        return values


@dataclass
class Batch:
    """All that one rank needs for its update; B samples."""

    sde: SDE
    conditions: list
    trajectory: Trajectory
    unconditional: torch.Tensor | None  # [B, T, …]  what velocity takes back, until the first optimizer step
    advantages: torch.Tensor  # [B]
    valid: torch.Tensor  # [B] bool, False where the reward failed
    collected_at: int  # optimizer steps made when the rollout's weights were the policy
    metrics: dict


# ---------------------------------------------------------------------------------------------- collect, evaluate
def samples_per_condition(config):
    """How many samples next to each other velocity may take for samples of one prompt, in rollout and update.

    On each rank they are counted from its first sample. Every micro-batch, every group and the first place of every
    rank are multiples of this number, so no rank's run of so many samples ever crosses from one group into the next.
    It depends on the settings alone: all ranks make the same number of forward passes, as FSDP needs.
    """
    return math.gcd(config.micro_batch, config.group_size)


def sample(policy, prompts, latent_shape, sde, generators, copies=1, callback=None):
    """(conditions, Trajectory) of one sample for each prompt, where runs of `copies` prompts are the same. Stops at
    NaN, which would be decoded to black and be scored.
    """
    conditions = policy.encode(prompts)
    device = device_of(policy)
    noise = randn((len(prompts), *latent_shape), generators).to(device)
    trajectory = rollout(partial(policy.velocity, cond=conditions[::copies]), noise, sde, generators, callback)
    if not trajectory.states[:, -1].isfinite().all():
        raise FloatingPointError(
            "samples must be finite: got NaN or infinity, the policy has diverged. Lower the learning rate, and look "
            "at the gradient norm and ratio of the last lines of metrics.jsonl"
        )
    return conditions, trajectory


def score(reward, videos, prompts, ranks, device):
    """Call the reward and check what it returns, before a score crosses ranks.

    Returns ({name: float64 [B]}, first cause of a failed sample of each rank, seconds of the reward and of the wait
    for the slowest rank's). The names have the first rank's order.
    If the reward of one rank fails or breaks the contract of rewards.py, all ranks raise, and with the same cause.
    """
    started = clock(device)
    own, problem = call_reward(reward, videos, prompts, ranks, device)
    scored = clock(device)
    reports = ranks.exchange((problem, list(own), first_failure(reward, own)))
    seconds = {"reward_seconds": scored - started, "wait_seconds": clock(device) - scored}
    _, names, _ = reports[0]
    causes = []
    for rank, (problem, others, first) in enumerate(reports):
        if problem:
            raise RuntimeError(f"a reward must keep its contract (rewards.py): rank {rank}, {problem}")
        if set(others) != set(names):
            raise RuntimeError(
                f"a reward must return the same names on every rank: got {names} on rank 0 and {others} on rank {rank};"
                " return NaN for a score that cannot be computed"
            )
        if first:
            causes.append(f"rank {rank}, {first}")
    return {name: own[name] for name in names}, causes, seconds


def device_of(policy):
    return next(policy.module.parameters()).device


def clock(device):
    """Seconds, when all that was asked of the device so far is done."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def first_failure(reward, scores):
    """Why a sample of this rank has no score; "" if all have one."""
    for cause in getattr(reward, "failures", []):
        return str(cause)
    for name, values in scores.items():
        for place in values.isnan().nonzero().flatten().tolist():
            return f"sample {place}: {name} is NaN, and the reward keeps no list of failures"
    return ""


def call_reward(reward, videos, prompts, ranks, device):
    """({name: float64 [B]}, "") of this rank, or ({}, what is wrong)."""
    given = list(prompts)  # a copy: the update needs the prompts as they are
    try:
        scores = reward(videos, given)
        problem = broken_rule(scores, len(prompts))
        if given != list(prompts):
            problem = "it changed the list of prompts: let it work on a copy"
        if problem:
            return {}, problem
        return {name: values.detach().double().to(device) for name, values in scores.items()}, ""
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # whatever the user's code raises, sys.exit() too: all ranks must hear of it
        cause = f"it raised {type(error).__name__}: {error}"
        print(f"\nrank {ranks.process}: the reward must score videos: {cause}", file=sys.stderr)
        traceback.print_exc()
        return {}, cause


def collect(policy, reward, prompts, sde, generators, config, steps_made=0, ranks=OneRank(), callback=lambda k: None):
    """Roll out one sample for each of this rank's B prompts and turn their rewards into advantages.

    prompts: the G copies of a prompt stand next to each other in the order of all ranks together, so that a group may
    span ranks. generators: one torch.Generator a sample; it gives the first noise and that of every step.
    """
    device = device_of(policy)
    started, passes = clock(device), policy.passes
    copies = samples_per_condition(config)
    for first in range(0, len(prompts), copies):
        if len(set(prompts[first : first + copies])) > 1:
            raise ValueError(
                f"the {config.group_size} samples of a prompt must stand next to each other: got {prompts}; repeat "
                "each prompt group_size times"
            )
    unconditional = []

    def after_step(k):
        unconditional.append(getattr(policy, "unconditional_velocity", None))
        callback(k)

    conditions, trajectory = sample(policy, prompts, policy.latent_shape, sde, generators, copies, after_step)
    unconditional = None if unconditional[0] is None else torch.stack(unconditional, 1)
    sampled = clock(device)
    videos = policy.decode(trajectory.states[:, -1])
    decoded = clock(device)
    own_scores, causes, seconds = score(reward, videos, prompts, ranks, device)
    seconds |= {"rollout_seconds": sampled - started, "decode_seconds": decoded - sampled}
    scores = {name: ranks.gather(values) for name, values in own_scores.items()}  # [ranks·B]
    rewards = composite_reward(scores, config.reward_setting)
    advantages, valid, group_std = group_advantages(rewards, config.group_size, max_advantage=config.max_advantage)
    failed = 1 - valid.double().mean().item()
    if failed > config.max_failed_rewards:
        raise RuntimeError(
            f"at most a share of {config.max_failed_rewards} of the samples may fail to be scored "
            f"(max_failed_rewards): got {failed:.3f}; first cause: {causes[0]}"
        )
    teaches = advantages.view(-1, config.group_size).any(1)  # [groups]
    if ranks.process == 0 and not teaches.any():
        print("\nthis iteration teaches nothing: in no group do two samples have different rewards", file=sys.stderr)

    metrics = {"reward_failed": failed, "group_std": group_std.mean().item()}
    metrics["groups_without_spread"] = 1 - teaches.double().mean().item()
    for name, values in {"reward": rewards, **scores}.items():
        values = values[values.isfinite()]
        metrics[f"{name}_mean"] = values.mean().item()
        metrics[f"{name}_std"] = values.std(correction=0).item()
    metrics["rollout_passes"] = policy.passes - passes
    metrics |= seconds
    own = slice(ranks.rank * len(prompts), (ranks.rank + 1) * len(prompts))
    return Batch(sde, conditions, trajectory, unconditional, advantages[own], valid[own], steps_made, metrics)


def evaluate(
    policy, reward, prompts, latent_shape, sde, generators, config, ranks=OneRank(), keep=lambda place, video: video
):
    """Score one sample for each prompt; with an SDE of eta = 0 this is deterministic ODE sampling.

    latent_shape: of one sample; it may differ from the training samples'. keep(place, video) sees every video on the
    rank that made it and returns what to hand on (the place is the prompt's number).

    Returns ({eval_<name>: mean over the samples that were scored, eval_failed: share of the others}, what was kept, of
    all prompts in order).
    """
    # Each rank takes one block of the prompts. The last blocks wrap around, so that all ranks make as many passes.
    share = math.ceil(len(prompts) / ranks.world)
    first = ranks.rank * share
    places = [place % len(prompts) for place in range(first, first + share)]
    parts, kept = [], []
    device = device_of(policy)
    for start in range(0, share, config.batch_size):
        chosen = places[start : start + config.batch_size]
        texts = [prompts[place] for place in chosen]
        noise = [generators[place] for place in chosen]
        _, trajectory = sample(policy, texts, latent_shape, sde, noise)
        videos = policy.decode(trajectory.states[:, -1])
        part, _, _ = score(reward, videos, texts, ranks, device)
        if parts and part.keys() != parts[0].keys():
            names = f"{', '.join(parts[0])} first, then {', '.join(part)}"
            raise RuntimeError(f"a reward must return the same names at every call (rewards.py): got {names}")
        parts.append(part)
        for place, video in zip(chosen, videos, strict=True):
            kept.append(keep(place, video))

    scores = {}
    for name in parts[0]:
        own = torch.cat([part[name] for part in parts])
        scores[name] = ranks.gather(own)[: len(prompts)]
    rewards = composite_reward(scores, config.reward_setting)
    metrics = {"eval_reward": rewards.nanmean().item()}
    for name, values in scores.items():
        metrics[f"eval_{name}"] = values.nanmean().item()
    metrics["eval_failed"] = 1 - rewards.isfinite().double().mean().item()
    return metrics, ranks.gather(torch.stack(kept).to(device))[: len(prompts)].cpu()


# ---------------------------------------------------------------------------------------------- update
def clipped_policy_loss(ratio, advantages, clip_range):
    """Eq. 4 as it is trained:  max(−A·ρ, −A·clip(ρ, 1 − c, 1 + c)), per sample. [B]

    At ρ = 1 its gradient is −A·∇log π_θ, that of Eq. 4. Beyond 1 ± c, on the side that A pushes to, the gradient is 0.
    """
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip_range, 1 + clip_range))


def micro_batches(batch, config, generators):
    """(rows [b], steps [b]) of each micro-batch: every sample visits every stochastic step once, in an order of its
    own.

    generators: one per sample, so that the order does not depend on the rank or batch that a sample lands in.
    """
    trained = batch.sde.stochastic.nonzero().flatten()  # [K]
    orders = torch.stack([trained[torch.randperm(len(trained), generator=g)] for g in generators])  # [B, K]
    chunks = torch.arange(len(orders)).split(config.micro_batch)
    return [(rows, orders[rows, j]) for j in range(len(trained)) for rows in chunks]


def micro_batches_per_step(num_samples, num_trained_steps, config):
    """Micro-batches that each optimizer step of an iteration takes on each rank, with the divisibility rules behind
    it.
    """
    if num_samples % config.micro_batch:
        raise ValueError(
            f"micro_batch must divide the samples per rank: got {config.micro_batch} and {num_samples}; "
            f"use a divisor of {num_samples}"
        )
    passes = num_samples // config.micro_batch * num_trained_steps
    if passes % config.optimizer_steps:
        raise ValueError(
            f"optimizer_steps must divide the micro-batches of an iteration, samples / micro_batch × trained steps: "
            f"got {config.optimizer_steps} and {num_samples} / {config.micro_batch} × {num_trained_steps} = {passes}; "
            f"use a divisor of {passes}"
        )
    return passes // config.optimizer_steps


def update(policy, batch, config, optimizers, anchor, generators, iteration, steps_made, ranks=OneRank()):
    """One pass over a batch of rollouts. Returns (metrics, optimizer steps made so far).

    Full objective: L = −(1/G) Σ_i A_i Σ_t S_t·log π_θ + λ_KL·L_KL, with clipped_policy_loss for the first term. All
    trained steps of all samples go into config.optimizer_steps optimizer steps, evenly. Both terms are means over the
    steps, so a λ_KL for a literal Σ_t would be T times ours.
    anchor: an Anchor, or None where the KL mode has no position term. A sample whose reward failed takes no part.
    """
    device = batch.advantages.device
    started, passes = clock(device), policy.passes
    per_step = micro_batches_per_step(len(batch.valid), int(batch.sde.stochastic.sum()), config)
    lambda_kl = kl_coefficient(
        config.kl_schedule, iteration, config.kl_lambda, config.kl_lambda_early, config.kl_switch
    )
    scales = equalizer_scales(batch.sde) if config.equalizer else torch.ones(batch.sde.num_steps)
    parameters = [p for p in policy.module.parameters() if p.requires_grad]
    w_position = position_weights(batch.sde, config.kl_steps, generators)
    means_ref = reference_means(policy, batch, config, anchor, w_position)
    logs, grad_norms = [], []
    for number, (rows, steps) in enumerate(micro_batches(batch, config, generators), start=1):
        loss, log = micro_batch_loss(policy, batch, config, means_ref, w_position, rows, steps, scales, lambda_kl)
        if number <= per_step:  # no optimizer step has been made yet
            check_first_ratio(log["ratio"], config.ratio_tolerance)
        (loss / per_step).backward()
        logs.append(log)
        if number % per_step == 0:
            grad_norms.append(optimizer_step(optimizers, parameters, config.max_grad_norm, loss.detach()))
            steps_made += 1
            batch.unconditional = None  # the policy is no longer the one that made the rollout
    if anchor is not None:
        anchor.maybe_refresh(steps_made)

    metrics = summarise({name: torch.cat([log[name] for log in logs]) for name in logs[0]}, config.clip_range, ranks)
    metrics["first_ratio_error"] = first_ratio_error(logs[:per_step], config.clip_range, ranks)
    metrics["lambda_kl"] = lambda_kl
    metrics["grad_norm"] = torch.stack(grad_norms).mean().item()
    metrics["update_passes"] = policy.passes - passes
    metrics["update_seconds"] = clock(device) - started
    return metrics, steps_made


def position_weights(sde, count, generators):
    """Weight of the position KL at each step of each sample, float64 [B, T]: K/n at n = `count` of the K trained steps.

    Each trained step has the mean weight 1, so the mean gradient over draws is the one with all steps, which 0 stands
    for. The other steps need no reference pass. Each sample draws its own steps, so that the samples of an iteration
    together have the KL of nearly all steps; if all had the same few, the gradient would vary far more from one
    iteration to the next (measured: RESULTS.md, "The miniature").
    """
    if not count:
        return sde.stochastic.double().expand(len(generators), -1)
    trained = sde.stochastic.nonzero().flatten()
    weights = torch.zeros(len(generators), sde.num_steps, dtype=torch.float64)
    for own, generator in zip(weights, generators, strict=True):
        order = torch.randperm(len(trained), generator=generator)
        own[trained[order[:count]]] = len(trained) / count
    return weights


def reference_means(policy, batch, config, anchor, w_position):
    """Mean of each step under the anchor, [B, T, …], where w_position [B, T] is not 0; None without an anchor.

    They are computed once per iteration, as in the released code: the anchor is swapped in and out once, and it stays
    the same reference for all optimizer steps of the iteration. While the anchor is the policy that made the rollout,
    they are the rollout's own means, which are stored: no pass is made.
    """
    if anchor is None:
        return None
    trajectory = batch.trajectory
    if anchor.refreshed_at == batch.collected_at:
        return trajectory.means
    copies = samples_per_condition(config)
    means = trajectory.means.clone()  # where the weight is 0, any finite number
    wanted = w_position.nonzero()[:, 1].view(len(means), -1)  # [B, n], steps; every sample has as many
    with torch.no_grad(), anchor.swapped_in():
        for rows in torch.arange(len(means)).split(config.micro_batch):
            for steps in wanted[rows].unbind(1):  # [b], one of each sample
                x = trajectory.states[rows, steps]
                sigma = batch.sde.sigmas[steps].to(x)
                v = policy.velocity(x, sigma, [batch.conditions[i] for i in rows[::copies]])
                means[rows, steps], _ = batch.sde.transition(x, v, steps)
    return means


def micro_batch_loss(policy, batch, config, means_ref, w_position, rows, steps, scales, lambda_kl):
    """The full objective on the samples `rows`, each at its own step of `steps`. Returns (loss, {name: detached
    [b]}).
    """
    x, x_next = batch.trajectory.states[rows, steps], batch.trajectory.states[rows, steps + 1]  # [b, …]
    mean_old = batch.trajectory.means[rows, steps]
    log_prob_old = batch.trajectory.log_probs[rows, steps]  # [b]
    conditions = [batch.conditions[i] for i in rows[:: samples_per_condition(config)]]
    advantages, valid = batch.advantages[rows], batch.valid[rows].to(x.dtype)
    sigma = batch.sde.sigmas[steps].to(x)
    stored = () if batch.unconditional is None else (batch.unconditional[rows, steps],)

    mean, std = batch.sde.transition(x, policy.velocity(x, sigma, conditions, *stored), steps)
    log_prob_new = log_prob(x_next, mean, std)
    ratio = (log_prob_new - log_prob_old).exp()  # [b]
    policy_loss = clipped_policy_loss(ratio, advantages, config.clip_range)
    if config.stepwise_kl == "closed_form":
        kl_velocity = stepwise_kl_closed_form(mean, mean_old, std)
    else:
        kl_velocity = stepwise_kl_rollout_phase(log_prob_new, log_prob_old)
    log = {"ratio": ratio, "policy_loss": policy_loss, "kl_velocity": kl_velocity}
    kl_position = torch.zeros_like(kl_velocity)
    if means_ref is not None:
        kl_position = w_position[rows, steps].to(x) * gaussian_kl(mean, means_ref[rows, steps], std)
        log["kl_position"] = kl_position
    w_pos, w_vel = kl_weights(config.kl_mode, config.beta_pos, config.beta_vel)
    kl = dual_kl(kl_position, kl_velocity, w_pos, w_vel)

    loss = (valid * (scales[steps].to(x) * policy_loss + lambda_kl * kl)).mean()
    return loss, {name: value.detach() for name, value in log.items()}


RATIO_CAUSES = (
    "Rollout and update computed different velocities for the same state: look for dropout, low-precision states or "
    "timesteps, guidance that differs between the two, or kernels that round otherwise with a gradient (--attention)"
)


def check_first_ratio(ratio, tolerance):
    """Before the first optimizer step the policy is the one that made the rollout, so every ratio must be 1.

    Rounding alone moves it: see first_ratio_error. A fault moves it by far more than the tolerance.
    """
    worst = (ratio - 1).abs().max().item()
    if not worst <= tolerance:
        raise RuntimeError(
            f"the ratio must be 1 before the first optimizer step: got |ρ − 1| = {worst:.2e}, allowed {tolerance:.0e} "
            f"(ratio_tolerance). {RATIO_CAUSES}"
        )


def first_ratio_error(logs, clip_range, ranks):
    """The largest |ρ − 1| of all ranks before the first optimizer step. Above the clip range it clips: a warning."""
    ratio = ranks.gather(torch.cat([log["ratio"] for log in logs]))
    error = (ratio - 1).abs().max().item()
    if error > clip_range and ranks.process == 0:
        print(
            f"\nbefore the first optimizer step the ratio was off by {error:.2e}, more than the clip range of "
            f"{clip_range:.0e}, so some samples were clipped for nothing. {RATIO_CAUSES}",
            file=sys.stderr,
        )
    return error


def optimizer_step(optimizers, parameters, max_grad_norm, loss):
    """Clip, stop if anything is not finite BEFORE the optimizers act, step. Returns the norm before clipping."""
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm)
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # over all shards under FSDP2
    if not (norm.isfinite() and loss.isfinite()):
        raise FloatingPointError(
            f"loss and gradient norm must be finite: got {loss.item()} and {norm.item()}. No step was made of them, "
            "but the policy may have gone astray before: look in metrics.jsonl for the last iteration with a steady "
            "reward and gradient norm, and go on from a checkpoint before it with a lower learning rate"
        )
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return norm


def summarise(log, clip_range, ranks):
    """Metrics of one update over all ranks, as numbers."""
    log = {name: ranks.gather(values) for name, values in log.items()}
    ratio = log.pop("ratio")
    metrics = {
        "ratio_mean": ratio.mean(),
        "ratio_min": ratio.min(),
        "ratio_max": ratio.max(),
        "clip_low": (ratio < 1 - clip_range).double().mean(),
        "clip_high": (ratio > 1 + clip_range).double().mean(),
        **{name: values.mean() for name, values in log.items()},
    }
    return {name: value.item() for name, value in metrics.items()}
