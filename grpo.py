"""The algorithm box: collect rollouts, score them, update the policy. The toy and the full run call this same code.

    collect:  noise → rollout (Eq. 7) → decode → rewards (Eq. 10) → advantages (Eq. 4)
    update:   for every trained step of every sample:
              L = −(1/G) Σ_i A_i Σ_t S_t·log π_θ + λ_KL·L_KL  with the clipped ratio → backward
              then clip the gradient norm → optimizer → anchor
    evaluate: noise → ODE samples → decode → rewards

Words:
    iteration       one rollout of all samples and the update on it
    optimizer step  one step of the optimizer; config.optimizer_steps of them in an iteration, the paper's number is 1
    step            one of the T sampling steps of a rollout
    micro-batch     one forward and backward pass
    pass            one forward pass of the network for one video

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
                      each condition is that of B / P adjacent samples, so that they can run as one batch
    decode(x [B, …])  -> uint8 video [B, F, C, H, W]
    passes            how many forward passes of the network velocity has made so far
and, if a part of its guided velocity has no gradient,
    frozen_velocity(x, sigma, cond)   that part [B, …], or None. velocity takes it as a fourth argument
A reward is any function (videos, prompts) -> {name: [B]}, NaN for a failed sample: see rewards.py. On several ranks it
returns the scores of all ranks' samples, in the order of the ranks: engine/scoring.py makes one of a plain function.

`config` is engine.config.Config; a setting is explained there.
"""

import math
import time
from dataclasses import dataclass, replace

import torch

from equalizer import equalizer_scales
from rewards import composite_reward, group_advantages, reward_weights
from sde import SDE, Trajectory, log_prob, randn, rollout
from trust_region import (
    dual_kl,
    gaussian_kl,
    kl_coefficient,
    kl_weights,
    stepwise_kl_closed_form,
    stepwise_kl_rollout_phase,
)

RATIO_TOLERANCE = 1e-3  # of ρ before the first optimizer step, where it must be 1


class OneRank:
    """`ranks` of a run on one process. engine.ranks.AllRanks is that of a run under torch.distributed."""

    rank, world = 0, 1
    dp_rank, dp_world = 0, 1
    context = None

    def gather(self, tensor):
        """The values of all ranks, concatenated in their order. A single process returns the tensor itself."""
        return tensor

    def exchange(self, value):
        """A list of the values of all ranks; a value is any small object."""
        return [value]

    def before_backward(self, module, last):
        """Called before each backward pass; `last`: of its optimizer step. A single process has nothing to prepare."""


@dataclass
class Batch:
    """The rollouts of this rank's B samples, and the tables in which the update finds what belongs to sample and step.

    `update` fills the tables before its first backward pass.
    """

    sde: SDE
    conditions: list
    trajectory: Trajectory
    advantages: torch.Tensor  # [B]
    valid: torch.Tensor  # [B] bool, False where the reward failed
    collected_at: int  # optimizer steps made when the rollout's weights were the policy
    metrics: dict
    frozen: torch.Tensor | None = None  # [B, T, …]  the policy's frozen_velocity, until the first optimizer step
    scales: torch.Tensor | None = None  # [T]  S_t of Eq. 9
    position_weights: torch.Tensor | None = None  # [B, T]  weight of the position KL
    means_ref: torch.Tensor | None = None  # [B, T, …]  mean of each step under the anchor

    def part(self, rows):
        """The Batch of some of the samples."""
        if len(rows) == len(self.valid):
            return self
        paths = self.trajectory
        return replace(
            self,
            conditions=[self.conditions[row] for row in rows],
            trajectory=Trajectory(paths.states[rows], paths.means[rows], paths.log_probs[rows]),
            advantages=self.advantages[rows],
            valid=self.valid[rows],
            frozen=None if self.frozen is None else self.frozen[rows],
        )


# ---------------------------------------------------------------------------------------------- collect
def collect(policy, reward, prompts, sde, generators, config, steps_made=0, ranks=OneRank(), callback=None):
    """Roll out one sample for each of this rank's B prompts and turn their rewards into advantages. Returns a Batch.

    prompts: the G copies of a prompt are adjacent in the order of all ranks together, so that a group may
    span ranks. generators: one torch.Generator a sample; it gives the first noise and that of every step.
    callback(k): called after each step of the rollout.
    """
    device, passes, started = device_of(policy), policy.passes, clock(device_of(policy))
    copies = copies_in_rollout(config)
    check_copies(prompts, copies, config.group_size)
    conditions, trajectory, frozen = sample(policy, prompts, policy.latent_shape, sde, generators, copies, callback)
    sampled = clock(device)
    videos = policy.decode(trajectory.states[:, -1])
    decoded = clock(device)
    scores = reward(videos, prompts)  # {name: [ranks·B]}
    rewards = composite_reward(scores, reward_weights(config.reward_weights))  # Eq. 10
    advantages, valid, group_std = group_advantages(rewards, config.group_size, max_advantage=config.max_advantage)

    metrics = describe_rewards({"reward": rewards, **scores}, advantages.view(-1, config.group_size), valid, group_std)
    metrics |= {"rollout_passes": policy.passes - passes}
    metrics |= {"rollout_seconds": sampled - started, "decode_seconds": decoded - sampled}
    own = slice(ranks.dp_rank * len(prompts), (ranks.dp_rank + 1) * len(prompts))
    return Batch(sde, conditions, trajectory, advantages[own], valid[own], steps_made, metrics, frozen)


def sample(policy, prompts, latent_shape, sde, generators, copies=1, callback=None):
    """(conditions, Trajectory, frozen velocities [B, T, …] or None) of one sample for each prompt, where runs of
    `copies` prompts are the same. Stops at NaN, which would be decoded to black and be scored.
    """
    conditions = policy.encode(prompts)
    noise = randn((len(prompts), *latent_shape), generators).to(device_of(policy))
    frozen = []

    def velocity_at(x, sigma):
        v, part = velocity_and_frozen(policy, x, sigma, conditions[::copies])
        frozen.append(part)
        return v

    trajectory = rollout(velocity_at, noise, sde, generators, callback)
    if not trajectory.states[:, -1].isfinite().all():
        raise FloatingPointError(
            "samples must be finite: got NaN or infinity, so the policy has diverged. Lower the learning rate, and "
            "look at the gradient norm and ratio in the last lines of metrics.jsonl"
        )
    return conditions, trajectory, None if frozen[0] is None else torch.stack(frozen, 1)


def velocity_and_frozen(policy, x, sigma, cond, frozen=None):
    """(v, the part of it that has no gradient, or None). frozen: that part, where a rollout has computed it before."""
    if not hasattr(policy, "frozen_velocity"):
        return policy.velocity(x, sigma, cond), None
    if frozen is None:
        frozen = policy.frozen_velocity(x, sigma, cond)
    return policy.velocity(x, sigma, cond, frozen), frozen


def copies_in_rollout(config):
    """`copies`: how many adjacent samples velocity may take as samples of one prompt.

    On each rank they are counted from its first sample. Every micro-batch, every group and the first place of every
    rank are multiples of this number, so no rank's run of so many samples ever crosses from one group into the next.
    It depends on the settings alone: all ranks make the same number of forward passes, as FSDP needs.
    """
    return math.gcd(config.micro_batch, config.group_size)


def copies_in_update(config):
    """The same where a part of each group is trained."""
    _, kept = samples_held_and_kept(config.batch_size, config)
    return math.gcd(config.micro_batch, kept) if config.train_samples else copies_in_rollout(config)


def check_copies(prompts, copies, group_size):
    """Raise where a sample would get the condition of another prompt."""
    for first in range(0, len(prompts), copies):
        if len(set(prompts[first : first + copies])) > 1:
            raise ValueError(
                f"the {group_size} samples of a prompt must be adjacent: got {prompts}; repeat each prompt group_size "
                "times"
            )


def describe_rewards(scores, advantages, valid, group_std):
    """The metrics of an iteration's rewards. scores: {name: [ranks·B]}; advantages: [groups, G] of the same samples."""
    metrics = {"reward_failed": 1 - valid.double().mean().item(), "group_std": group_std.mean().item()}
    metrics["groups_without_spread"] = 1 - advantages.any(1).double().mean().item()
    for name, values in scores.items():
        values = values[values.isfinite()].double()
        metrics[f"{name}_mean"] = values.mean().item()
        metrics[f"{name}_std"] = (values - values.mean()).square().mean().sqrt().item()
    return metrics


def device_of(policy):
    return next(policy.module.parameters()).device


def clock(device):
    """Seconds, when all that was asked of the device so far is done."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


# ---------------------------------------------------------------------------------------------- update
def update(
    policy, batch, config, optimizers, anchor, generators, iteration, steps_made, ranks=OneRank(), controller=None
):
    """One pass over a batch of rollouts. Returns (metrics, optimizer steps made so far).

    Full objective: L = −(1/G) Σ_i A_i Σ_t S_t·log π_θ + λ_KL·L_KL, with clipped_policy_loss for the first term. All
    trained steps of all samples go into config.optimizer_steps optimizer steps, evenly. Both terms are means over the
    steps, so a λ_KL for a literal Σ_t would be T times ours.
    anchor: an Anchor, or None where the KL mode has no position term. A sample whose reward failed takes no part.
    controller: the LambdaController of kl_schedule `controller`; else None.
    """
    device = batch.advantages.device
    started, passes = clock(device), policy.passes
    rows = trained_rows(batch.advantages, batch.valid, config)
    batch, generators = batch.part(rows), [generators[row] for row in rows]
    per_step = micro_batches_per_step(len(rows), int(batch.sde.stochastic.sum()), config)
    lambda_kl = kl_coefficient(
        config.kl_schedule, iteration, config.kl_lambda, config.kl_lambda_early, config.kl_switch
    )
    parameters = [p for p in policy.module.parameters() if p.requires_grad]
    batch.scales = equalizer_scales(batch.sde) if config.equalizer else torch.ones(batch.sde.num_steps)
    batch.position_weights = position_weights(batch.sde, config.kl_steps, generators)
    batch.means_ref = reference_means(policy, batch, config, anchor)
    logs, grad_norms, lambdas = [], [], []
    for number, (rows, steps) in enumerate(micro_batches(batch, config, generators), start=1):
        if controller is not None:
            lambda_kl = controller.value
        loss, log = micro_batch_loss(policy, batch, rows, steps, config, lambda_kl)
        if number <= per_step:  # no optimizer step has been made yet
            check_first_ratio(log["ratio"])
        ranks.before_backward(policy.module, last=number % per_step == 0)
        (loss / per_step).backward()
        if controller is not None:
            controller.observe(ranks.gather(log["kl"]).mean().item())
        lambdas.append(lambda_kl)
        logs.append(log)
        if number % per_step == 0:
            grad_norms.append(optimizer_step(optimizers, parameters, config.max_grad_norm, loss.detach()))
            steps_made += 1
            batch.frozen = None  # the policy is no longer the one that made the rollout
    if anchor is not None:
        anchor.maybe_refresh(steps_made)

    metrics = summarise({name: torch.cat([log[name] for log in logs]) for name in logs[0]}, config.clip_range, ranks)
    first_ratios = ranks.gather(torch.cat([log["ratio"] for log in logs[:per_step]]))
    metrics["first_ratio_error"] = (first_ratios - 1).abs().max().item()
    metrics["lambda_kl"] = math.fsum(lambdas) / len(lambdas)
    metrics["grad_norm"] = torch.stack(grad_norms).mean().item()
    metrics["update_passes"] = policy.passes - passes
    metrics["update_seconds"] = clock(device) - started
    return metrics, steps_made


def trained_rows(advantages, valid, config):
    """The places, among this rank's B samples, of those that the update trains: all, or config.train_samples a group.

    They are the extremes of each group, as many of the largest advantages as of the smallest: the samples that say
    most of what to do more and less of. Their advantages are still those among all G. The number is the same for every
    group and rank whatever the rewards, as FSDP needs. A failed sample is chosen only where a group has too few others,
    and takes no part then. Where a group spans ranks, each rank chooses among the samples that it holds.
    """
    if not config.train_samples:
        return torch.arange(len(advantages))
    held, kept = samples_held_and_kept(len(advantages), config)
    advantages, valid = advantages.cpu().view(-1, held), valid.cpu().view(-1, held)
    order = torch.where(valid, advantages, -torch.inf).argsort(dim=1, descending=True, stable=True)  # failed ones last
    smallest = valid.sum(1, keepdim=True).clamp(min=kept) - kept // 2  # where the valid ones' smallest begin
    places = torch.arange(kept // 2).expand(len(order), -1)
    chosen = order.gather(1, torch.cat([places, smallest + places], 1)).sort(1).values  # [groups, kept]
    return (chosen + held * torch.arange(len(order))[:, None]).flatten()


def samples_held_and_kept(num_samples, config):
    """(samples of a group that lie together on a rank of so many samples, how many of them are trained)."""
    held = math.gcd(num_samples, config.group_size)
    kept, rest = divmod(config.train_samples * held, config.group_size)
    if config.train_samples and (rest or kept % 2 or not 0 < kept <= held):
        raise ValueError(
            f"train_samples must be even, and at most group_size: got {config.train_samples} of {config.group_size}, "
            f"of which a rank of {num_samples} samples holds {held} together and would train "
            f"{config.train_samples * held / config.group_size:g}; raise train_samples, or make batch_size a multiple "
            "of group_size"
        )
    return held, kept or held


def samples_in_update(config):
    """How many of its samples each rank trains in an iteration."""
    held, kept = samples_held_and_kept(config.batch_size, config)
    return config.batch_size // held * kept


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


def micro_batch_loss(policy, batch, rows, steps, config, lambda_kl):
    """The full objective on the samples `rows` [b], each at its own step of `steps` [b]. Returns (loss, {name: detached
    [b]}).
    """
    trajectory, frozen = batch.trajectory, batch.frozen
    x, x_next = trajectory.states[rows, steps], trajectory.states[rows, steps + 1]  # [b, …]
    mean_old, log_prob_old = trajectory.means[rows, steps], trajectory.log_probs[rows, steps]
    conditions = [batch.conditions[i] for i in rows[:: copies_in_update(config)]]
    stored = None if frozen is None else frozen[rows, steps]
    sigma = batch.sde.sigmas[steps].to(x)

    v, _ = velocity_and_frozen(policy, x, sigma, conditions, stored)
    mean, std = batch.sde.transition(x, v, steps)
    log_prob_new = log_prob(x_next, mean, std)
    ratio = (log_prob_new - log_prob_old).exp()  # [b]
    policy_loss = clipped_policy_loss(ratio, batch.advantages[rows], config.clip_range)
    if config.stepwise_kl == "closed_form":
        kl_velocity = stepwise_kl_closed_form(mean, mean_old, std)
    else:
        kl_velocity = stepwise_kl_rollout_phase(log_prob_new, log_prob_old)
    log = {"ratio": ratio, "policy_loss": policy_loss, "kl_velocity": kl_velocity}
    kl_position = torch.zeros_like(kl_velocity)
    if batch.means_ref is not None:
        weights = batch.position_weights[rows, steps].to(x)
        kl_position = weights * gaussian_kl(mean, batch.means_ref[rows, steps], std)
        log["kl_position"] = kl_position
    w_pos, w_vel = kl_weights(config.kl_mode, config.beta_pos, config.beta_vel)
    kl = dual_kl(kl_position, kl_velocity, w_pos, w_vel)
    log["kl"] = kl

    valid = batch.valid[rows].to(x.dtype)
    scales = batch.scales[steps].to(x)  # S_t of Eq. 9 weighs the policy term alone, not the KL
    loss = (valid * (scales * policy_loss + lambda_kl * kl)).mean()
    return loss, {name: value.detach() for name, value in log.items()}


def clipped_policy_loss(ratio, advantages, clip_range):
    """Eq. 4 as it is trained:  max(−A·ρ, −A·clip(ρ, 1 − c, 1 + c)), per sample. [B]

    At ρ = 1 its gradient is −A·∇log π_θ, that of Eq. 4. Beyond 1 ± c, on the side that A pushes to, the gradient is 0.
    """
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip_range, 1 + clip_range))


def position_weights(sde, count, generators):
    """Weight of the position KL at each step of each sample, float64 [B, T]: K/n at n = `count` of the K trained steps.

    On average over draws each trained step has the weight 1, so the gradient is on average that of all steps. A count
    of 0 means all. The other steps need no reference pass. Each sample draws its own steps, so that the samples of an
    iteration together have the KL of nearly all steps; if all had the same few, the gradient would vary far more from
    one iteration to the next (measured: RESULTS.md, "The miniature").
    """
    if not count:
        return sde.stochastic.double().expand(len(generators), -1)
    trained = sde.stochastic.nonzero().flatten()
    weights = torch.zeros(len(generators), sde.num_steps, dtype=torch.float64)
    for own, generator in zip(weights, generators, strict=True):
        order = torch.randperm(len(trained), generator=generator)
        own[trained[order[:count]]] = len(trained) / count
    return weights


def reference_means(policy, batch, config, anchor):
    """Mean of each step under the anchor, [B, T, …], where batch.position_weights is not 0; None without an anchor.

    They are computed once per iteration, as in the released code: the anchor is swapped in and out once, and it stays
    the same reference for all optimizer steps of the iteration. While the anchor is the policy that made the rollout,
    they are the rollout's own means, which are stored: no pass is made.
    """
    if anchor is None:
        return None
    trajectory = batch.trajectory
    if anchor.refreshed_at == batch.collected_at:
        return trajectory.means
    means = trajectory.means.clone()  # where the weight is 0, any finite number
    wanted = batch.position_weights.nonzero()[:, 1].view(len(means), -1)  # [B, n], steps; every sample has as many
    with torch.no_grad(), anchor.swapped_in():
        for rows in torch.arange(len(means)).split(config.micro_batch):
            for steps in wanted[rows].unbind(1):  # [b], one of each sample
                x = trajectory.states[rows, steps]
                sigma = batch.sde.sigmas[steps].to(x)
                v = policy.velocity(x, sigma, [batch.conditions[i] for i in rows[:: copies_in_update(config)]])
                means[rows, steps], _ = batch.sde.transition(x, v, steps)
    return means


RATIO_CAUSES = (
    "Rollout and update computed different velocities for the same state: look for dropout, low-precision states or "
    "timesteps, guidance that differs between the two, or kernels that round differently with a gradient (--attention)"
)


def check_first_ratio(ratio):
    """Before the first optimizer step the policy is the one that made the rollout, so every ratio must be 1.

    Rounding alone moves it: the metric first_ratio_error says by how much. A fault moves it by far more.
    """
    worst = (ratio - 1).abs().max().item()
    if not worst <= RATIO_TOLERANCE:
        raise RuntimeError(
            f"the ratio must be 1 before the first optimizer step: got |ρ − 1| = {worst:.2e}, allowed "
            f"{RATIO_TOLERANCE:.0e}. {RATIO_CAUSES}"
        )


def optimizer_step(optimizers, parameters, max_grad_norm, loss):
    """Clip, stop if anything is not finite BEFORE the optimizers act, step. Returns the norm before clipping."""
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm)
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # over all shards under FSDP2
    if not (norm.isfinite() and loss.isfinite()):
        raise FloatingPointError(
            f"loss and gradient norm must be finite: got {loss.item()} and {norm.item()}. No optimizer "
            "step used them, but the policy may have diverged earlier: look in metrics.jsonl for the last iteration "
            "with a steady reward and gradient norm, and resume from a checkpoint before it with a lower learning rate"
        )
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return norm


def summarise(log, clip_range, ranks):
    """Metrics of one update over all ranks, as numbers."""
    log = {name: ranks.gather(values) for name, values in log.items()}
    ratio, _ = log.pop("ratio"), log.pop("kl", None)  # L_KL is the sum of the two that are logged
    metrics = {
        "ratio_mean": ratio.mean(),
        "ratio_min": ratio.min(),
        "ratio_max": ratio.max(),
        "clip_low": (ratio < 1 - clip_range).double().mean(),
        "clip_high": (ratio > 1 + clip_range).double().mean(),
        **{name: values.mean() for name, values in log.items()},
    }
    return {name: value.item() for name, value in metrics.items()}


# ---------------------------------------------------------------------------------------------- evaluate
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
    share = math.ceil(len(prompts) / ranks.dp_world)
    first = ranks.dp_rank * share
    places = [place % len(prompts) for place in range(first, first + share)]
    parts, kept = [], []
    for start in range(0, share, config.batch_size):
        chosen = places[start : start + config.batch_size]
        texts = [prompts[place] for place in chosen]
        noise = [generators[place] for place in chosen]
        _, trajectory, _ = sample(policy, texts, latent_shape, sde, noise)
        videos = policy.decode(trajectory.states[:, -1])
        parts.append(reward(videos, texts))  # {name: [ranks·b]}
        for place, video in zip(chosen, videos, strict=True):
            kept.append(keep(place, video))

    scores = {}
    for name in parts[0]:
        by_rank = [part[name].double().view(ranks.dp_world, -1) for part in parts]  # [ranks, b] each
        scores[name] = torch.cat(by_rank, 1).flatten()[: len(prompts)]
    rewards = composite_reward(scores, reward_weights(config.reward_weights))
    metrics = {"eval_reward": rewards.nanmean().item()}
    for name, values in scores.items():
        metrics[f"eval_{name}"] = values.nanmean().item()
    metrics["eval_failed"] = 1 - rewards.isfinite().double().mean().item()
    return metrics, ranks.gather(torch.stack(kept).to(device_of(policy)))[: len(prompts)].cpu()
