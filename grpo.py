"""The algorithm box: collect rollouts, score them, update the policy. The toy and the full run call this same code.

    collect:  noise → rollout (Eq. 7) → decode → rewards (Eq. 10) → advantages (Eq. 4)
    update:   for every trained step, in an order of each sample's own:
              L = −(1/G) Σ_i A_i Σ_t S_t·log π_θ + λ_KL·L_KL  with the clipped ratio → backward → clip norm → optimizer → anchor

A policy is any object with
    module            the nn.Module that is trained
    latent_shape      shape of one sample's x, without the batch
    encode(prompts)   -> list with one condition per prompt, of whatever kind velocity takes
    velocity(x [B, …], sigma [B], cond list of B) -> v [B, …]; gradients flow; guidance is inside
    decode(x [B, …])  -> uint8 video [B, F, C, H, W]
    passes            how many forward passes of the network velocity has made so far
A reward is any function (videos, prompts) -> {name: [B]}, NaN for a failed sample: see rewards.py. It may keep the causes
of failures in a list `failures`.
"""

import time
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.distributed as dist

from equalizer import equalizer_scales
from rewards import REWARD_SETTINGS, composite_reward, group_advantages
from sde import SDE, Trajectory, log_prob, randn, rollout
from trust_region import (
    KL_MODES,
    KL_SCHEDULES,
    dual_kl,
    gaussian_kl,
    kl_coefficient,
    kl_weights,
    stepwise_kl_closed_form,
    stepwise_kl_rollout_phase,
)


def option(default, text, choices=None):
    """A dataclass field that also knows its line of --help."""
    return field(default=default, metadata={"help": text, "choices": choices})


@dataclass
class GRPOConfig:
    """What the algorithm itself reads. Defaults are the paper's; train.py's presets override them."""

    group_size: int = option(4, "G, samples per prompt [paper: 4]")
    batch_size: int = option(2, "samples per rank and rollout update; a group may span ranks [paper: 2]")
    reward_setting: str = option("B", "weights of Eq. 10 [paper: A and B]", sorted(REWARD_SETTINGS))
    clip_range: float = option(1e-4, "c of clip(ρ, 1 ± c), for a log-prob that is a mean over D [paper: 1e-4]")
    max_advantage: float = option(5.0, "clamp on |A| [paper: 5]")
    equalizer: bool = option(True, "multiply the policy term of step t by S_t, Eq. 9 [paper: on]")
    kl_mode: str = option("dual", "trust region, Eq. 11–14 [paper: dual]", KL_MODES)
    kl_velocity: str = option(
        "rollout_phase",
        "form of the step-wise KL: Eq. 15 or Eq. 12 in closed form [paper: rollout_phase]",
        ("rollout_phase", "closed_form"),
    )
    beta_pos: float = option(1.0, "β_pos of Eq. 14 [paper: 1.0]")
    beta_vel: float = option(0.1, "β_vel of Eq. 14 [paper: 0.1]")
    kl_schedule: str = option("two_stage", "schedule of λ_KL, Fig. 7 [paper: two_stage]", KL_SCHEDULES)
    kl_lambda: float = option(1e-5, "λ_KL, final value [paper: 1e-5]")
    kl_lambda_early: float = option(1e-7, "λ_KL of the first stage [paper: 1e-7]")
    kl_switch: int = option(50, "rollout update at which the second stage begins [not printed in the paper]")
    anchor_every: int = option(10, "N, optimizer updates between refreshes of the moving anchor, Eq. 13 [paper: 10]")
    micro_batch: int = option(2, "samples per forward and backward pass, per rank [paper: 2]")
    accumulation: int = option(4, "micro-batches per optimizer update [paper: 4]")
    max_grad_norm: float = option(1.0, "gradient norm is clipped to this [paper: 1.0]")
    max_failed_rewards: float = option(0.1, "share of samples that may fail to be scored before the run stops")

    def check(self):
        """Raise ValueError on the first setting that cannot work, before anything is loaded."""
        for name in ("group_size", "batch_size", "anchor_every", "micro_batch", "accumulation"):
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


class OneProcess:
    """`gather` of a run on one process: what is there is all there is."""

    rank, world = 0, 1

    def __call__(self, tensor):
        return tensor


class Ranks:
    """`gather` over all ranks of torch.distributed: concatenates in the order of the ranks."""

    def __init__(self):
        self.rank, self.world = dist.get_rank(), dist.get_world_size()

    def __call__(self, tensor):
        parts = [torch.empty_like(tensor) for _ in range(self.world)]
        dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)


@dataclass
class Batch:
    """All that one rank needs for its update; B samples."""

    sde: SDE
    conditions: list
    trajectory: Trajectory
    advantages: torch.Tensor  # [B]
    valid: torch.Tensor  # [B] bool, False where the reward failed
    collected_at: int  # optimizer updates made when the rollout's weights were the policy
    metrics: dict


def sample(policy, prompts, sde, generators, callback=None):
    """(conditions, Trajectory) of one sample for each prompt. Stops at NaN, which would be decoded to black and be scored."""
    conditions = policy.encode(prompts)
    noise = randn((len(prompts), *policy.latent_shape), generators).to(next(policy.module.parameters()).device)
    trajectory = rollout(partial(policy.velocity, cond=conditions), noise, sde, generators, callback)
    if not trajectory.states[:, -1].isfinite().all():
        raise FloatingPointError(
            "samples must be finite: got NaN or infinity, the policy has diverged. Lower the learning rate, and look at the "
            "gradient norm and ratio of the last lines of metrics.jsonl"
        )
    return conditions, trajectory


def collect(policy, reward, prompts, sde, generators, config, optimizer_updates=0, gather=OneProcess(), callback=None):
    """Roll out one sample for each of this rank's B prompts and turn their rewards into advantages.

    prompts: the G copies of a prompt stand next to each other in the order of all ranks together, so that a group may
    span ranks. generators: one torch.Generator a sample; it gives the first noise and that of every step.
    """
    started, passes = time.perf_counter(), policy.passes
    conditions, trajectory = sample(policy, prompts, sde, generators, callback)
    scores = reward(policy.decode(trajectory.states[:, -1]), prompts)
    scores = {name: gather(score.double().to(trajectory.states.device)) for name, score in scores.items()}  # [ranks·B]
    rewards = composite_reward(scores, config.reward_setting)
    advantages, valid, group_std = group_advantages(rewards, config.group_size, max_advantage=config.max_advantage)
    failed = 1 - valid.double().mean().item()
    if failed > config.max_failed_rewards:
        cause = next(iter(getattr(reward, "failures", [])), "not on this rank, or not reported by the reward")
        raise RuntimeError(
            f"at most a share of {config.max_failed_rewards} of the samples may fail to be scored (max_failed_rewards): "
            f"got {failed:.3f}; first cause: {cause}"
        )

    metrics = {"reward_failed": failed, "group_std": group_std.mean().item()}
    for name, values in {"reward": rewards, **scores}.items():
        values = values[values.isfinite()]
        metrics[f"{name}_mean"] = values.mean().item()
        metrics[f"{name}_std"] = values.std(correction=0).item()
    mine = slice(gather.rank * len(prompts), (gather.rank + 1) * len(prompts))
    metrics |= {"rollout_passes": policy.passes - passes, "rollout_seconds": time.perf_counter() - started}
    return Batch(sde, conditions, trajectory, advantages[mine], valid[mine], optimizer_updates, metrics)


def evaluate(policy, reward, prompts, sde, generators, config, gather=OneProcess(), keep=lambda place, video: video):
    """Score one sample for each prompt; with an SDE of eta = 0 this is deterministic ODE sampling.

    The prompts are shared out over the ranks in one block each, the last ones wrapping around so that all ranks make the
    same number of passes. keep(place, video) sees every video on the rank that made it and returns what to hand on (the
    place is the prompt's number). Returns ({eval_<name>: mean over the samples that were scored, eval_failed: share of the
    others}, what was kept, of all prompts in order).
    """
    share = -(-len(prompts) // gather.world)
    places = [i % len(prompts) for i in range(gather.rank * share, (gather.rank + 1) * share)]
    device, scores, kept = next(policy.module.parameters()).device, [], []
    for start in range(0, share, config.batch_size):
        chosen = places[start : start + config.batch_size]
        texts = [prompts[i] for i in chosen]
        _, trajectory = sample(policy, texts, sde, [generators[i] for i in chosen])
        videos = policy.decode(trajectory.states[:, -1])
        scores.append(reward(videos, texts))
        kept += [keep(i, video) for i, video in zip(chosen, videos, strict=True)]
    scores = {name: gather(torch.cat([s[name] for s in scores]).double().to(device)) for name in scores[0]}
    scores = {name: values[: len(prompts)] for name, values in scores.items()}
    scores = {"reward": composite_reward(scores, config.reward_setting), **scores}
    kept = gather(torch.stack(kept).to(device))[: len(prompts)].cpu()
    metrics = {f"eval_{name}": values.nanmean().item() for name, values in scores.items()}
    return {**metrics, "eval_failed": 1 - scores["reward"].isfinite().double().mean().item()}, kept


def clipped_policy_loss(ratio, advantages, clip_range):
    """Eq. 4 as it is trained:  max(−A·ρ, −A·clip(ρ, 1 − c, 1 + c)), per sample. [B]

    At ρ = 1 its gradient is −A·∇log π_θ, that of Eq. 4. Beyond 1 ± c, on the side that A pushes to, the gradient is 0.
    """
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip_range, 1 + clip_range))


def micro_batches(batch, config, generators):
    """(rows [b], steps [b]) of each micro-batch: every sample visits every stochastic step once, in an order of its own.

    generators: one per sample, so that the order does not depend on the rank or batch that a sample lands in.
    """
    trained = batch.sde.stochastic.nonzero().flatten()  # [K]
    orders = torch.stack([trained[torch.randperm(len(trained), generator=g)] for g in generators])  # [B, K]
    chunks = torch.arange(len(orders)).split(config.micro_batch)
    return [(rows, orders[rows, j]) for j in range(len(trained)) for rows in chunks]


def optimizer_steps(num_samples, num_trained_steps, config):
    """Optimizer updates that one batch of rollouts gives on each rank, with the divisibility rules behind it."""
    if num_samples % config.micro_batch:
        raise ValueError(
            f"micro_batch must divide the samples per rank: got {config.micro_batch} and {num_samples}; "
            f"use a divisor of {num_samples}"
        )
    passes = num_samples // config.micro_batch * num_trained_steps
    if passes % config.accumulation:
        raise ValueError(
            f"accumulation must divide the micro-batches of an update, samples / micro_batch × trained steps: got "
            f"{config.accumulation} and {num_samples} / {config.micro_batch} × {num_trained_steps} = {passes}"
        )
    return passes // config.accumulation


def update(policy, batch, config, optimizer, anchor, generators, update_index, optimizer_updates, gather=OneProcess()):
    """One pass over a batch of rollouts. Returns (metrics, optimizer updates made so far).

    Full objective: L = −(1/G) Σ_i A_i Σ_t S_t·log π_θ + λ_KL·L_KL, with clipped_policy_loss for the first term. The steps
    of a trajectory are spread over several optimizer updates, as in the released code; both terms are means over the
    steps, so a λ_KL for a literal Σ_t would be T times ours.
    anchor: an Anchor, or None where the KL mode has no position term. A sample whose reward failed takes no part.
    """
    started, passes = time.perf_counter(), policy.passes
    total = optimizer_updates + optimizer_steps(len(batch.valid), int(batch.sde.stochastic.sum()), config)
    lambda_kl = kl_coefficient(
        config.kl_schedule, update_index, config.kl_lambda, config.kl_lambda_early, config.kl_switch
    )
    scales = equalizer_scales(batch.sde) if config.equalizer else torch.ones(batch.sde.num_steps)
    parameters = [p for p in policy.module.parameters() if p.requires_grad]
    logs, grad_norms = [], []
    for number, (rows, steps) in enumerate(micro_batches(batch, config, generators), start=1):
        loss, log = micro_batch_loss(policy, batch, config, anchor, rows, steps, scales, lambda_kl)
        if number <= config.accumulation:  # no optimizer update has been made yet
            check_first_ratio(log["ratio"], config.clip_range)
        (loss / config.accumulation).backward()
        logs.append(log)
        if number % config.accumulation == 0:
            grad_norms.append(optimizer_step(optimizer, parameters, config.max_grad_norm, loss.detach()))
            optimizer_updates += 1
            if anchor is not None:
                anchor.maybe_refresh(optimizer_updates)
    assert optimizer_updates == total, "micro_batches and optimizer_steps disagree"

    metrics = summarise({name: torch.cat([log[name] for log in logs]) for name in logs[0]}, config.clip_range, gather)
    metrics |= {"lambda_kl": lambda_kl, "grad_norm": torch.stack(grad_norms).mean().item()}
    metrics |= {"update_passes": policy.passes - passes, "update_seconds": time.perf_counter() - started}
    return metrics, optimizer_updates


def micro_batch_loss(policy, batch, config, anchor, rows, steps, scales, lambda_kl):
    """The full objective on the samples `rows`, each at its own step of `steps`. Returns (loss, {name: detached [b]})."""
    x, x_next = batch.trajectory.states[rows, steps], batch.trajectory.states[rows, steps + 1]  # [b, …]
    mean_old = batch.trajectory.means[rows, steps]
    log_prob_old = batch.trajectory.log_probs[rows, steps]  # [b]
    conditions = [batch.conditions[i] for i in rows]
    advantages, valid = batch.advantages[rows], batch.valid[rows].to(x.dtype)
    sigma = batch.sde.sigmas[steps].to(x)

    mean_ref = None
    if anchor is not None:
        mean_ref = mean_old  # right while the anchor is the policy that made the rollout
        if anchor.refreshed_at != batch.collected_at:
            with torch.no_grad(), anchor.swapped_in():
                mean_ref, _ = batch.sde.transition(x, policy.velocity(x, sigma, conditions), steps)

    mean, std = batch.sde.transition(x, policy.velocity(x, sigma, conditions), steps)
    log_prob_new = log_prob(x_next, mean, std)
    ratio = (log_prob_new - log_prob_old).exp()  # [b]
    policy_loss = clipped_policy_loss(ratio, advantages, config.clip_range)
    if config.kl_velocity == "closed_form":
        kl_velocity = stepwise_kl_closed_form(mean, mean_old, std)
    else:
        kl_velocity = stepwise_kl_rollout_phase(log_prob_new, log_prob_old)
    kl_position = gaussian_kl(mean, mean_ref, std) if anchor is not None else torch.zeros_like(kl_velocity)
    kl = dual_kl(kl_position, kl_velocity, *kl_weights(config.kl_mode, config.beta_pos, config.beta_vel))

    loss = (valid * (scales[steps].to(x) * policy_loss + lambda_kl * kl)).mean()
    log = {"ratio": ratio, "policy_loss": policy_loss, "kl_velocity": kl_velocity}
    if anchor is not None:
        log["kl_position"] = kl_position
    return loss, {name: value.detach() for name, value in log.items()}


def check_first_ratio(ratio, clip_range):
    """Before the first optimizer update the policy is the one that made the rollout, so every ratio must be 1."""
    worst, tolerance = (ratio - 1).abs().max().item(), max(0.1 * clip_range, 1e-6)
    if not worst <= tolerance:
        raise RuntimeError(
            f"the ratio must be 1 before the first update of a rollout: got |ρ − 1| = {worst:.2e}, allowed {tolerance:.0e}. "
            "Rollout and update computed different velocities for the same state: look for dropout, low-precision "
            "states or timesteps, or guidance that differs between the two"
        )


def optimizer_step(optimizer, parameters, max_grad_norm, loss):
    """Clip, stop if anything is not finite BEFORE the optimizer acts, step. Returns the norm before clipping."""
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm)
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # over all shards under FSDP2
    if not (norm.isfinite() and loss.isfinite()):
        raise FloatingPointError(
            f"loss and gradient norm must be finite: got {loss.item()} and {norm.item()}. The weights were not touched; the last checkpoint is "
            "good. Lower the learning rate, or look at the reward and ratio of the last lines of metrics.jsonl"
        )
    optimizer.step()
    optimizer.zero_grad()
    return norm


def summarise(log, clip_range, gather):
    """Metrics of one update over all ranks; the only place where they cross to the host."""
    log = {name: gather(values) for name, values in log.items()}
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
