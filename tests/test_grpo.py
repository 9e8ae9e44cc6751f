"""The algorithm box on a third policy, a linear map: gradients by hand, the ratio, masks, the stops."""

import math
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import grpo
from engine.config import Config
from engine.scoring import Scorer
from engine.show import warn
from equalizer import equalizer_scales
from grpo import (
    OneRank,
    clipped_policy_loss,
    collect,
    evaluate,
    micro_batches,
    micro_batches_per_step,
    position_weights,
    reference_means,
    samples_in_update,
    trained_rows,
    update,
)
from sde import SDE, log_prob, sigma_schedule
from trust_region import Anchor, gaussian_kl, stepwise_kl_closed_form, stepwise_kl_rollout_phase

B, DIM, T = 8, 6, 5
CONFIG = Config(
    group_size=4,
    batch_size=B,
    micro_batch=B,
    kl_mode="none",
    max_grad_norm=1e9,
    clip_range=10.0,
    max_failed_rewards=0.2,
)


class LinearPolicy:
    """v = W·x + sigma·c: the whole policy interface in a few lines."""

    latent_shape = (DIM,)

    def __init__(self):
        self.module, self.passes = nn.Linear(DIM, DIM, bias=False), 0
        # A generator of its own: ranks that are threads make their policies at the same time.
        nn.init.uniform_(self.module.weight, -(DIM**-0.5), DIM**-0.5, generator=torch.Generator().manual_seed(0))

    def encode(self, prompts):
        return [torch.full((DIM,), float(len(prompt))) for prompt in prompts]

    def velocity(self, x, sigma, cond):
        self.passes += 1
        return self.module(x) + sigma[:, None] * torch.stack(cond).repeat_interleave(len(x) // len(cond), 0)

    def decode(self, x):
        return x


def reward(x, prompts):
    return {"VQ": -x.square().mean(1), "MQ": x[:, 0].clone(), "TA": -x[:, 1]}


def generators(offset):
    return [torch.Generator().manual_seed(offset + i) for i in range(B)]


def rolled_out(config=CONFIG, sde=None, reward=reward):
    policy, sde = LinearPolicy(), sde or SDE("sage_grpo", 0.5, sigma_schedule(T))
    return policy, collect(policy, reward, ["a"] * 4 + ["bcd"] * 4, sde, generators(0), config)


def one_update(policy, batch, config, anchor=None, iteration=0, learning_rate=1.0):
    optimizer = torch.optim.SGD(policy.module.parameters(), lr=learning_rate)
    return update(policy, batch, config, [optimizer], anchor, generators(100), iteration, batch.collected_at)


def weight_change(policy, batch, config, anchor=None):
    """−gradient of the objective: what one SGD step of rate 1 adds to the weights."""
    start = policy.module.weight.detach().clone()
    one_update(policy, batch, config, anchor)
    return policy.module.weight.detach() - start


def shifted_anchor(policy, batch):
    """An anchor as after earlier iterations: neither the policy nor the rollout's policy."""
    anchor = Anchor(policy.module, every=None)
    with torch.no_grad():
        anchor._copies[0].add_(0.1 * torch.randn(DIM, DIM, generator=torch.Generator().manual_seed(3)))
    batch.collected_at, anchor.refreshed_at = 7, 0
    return anchor


def position_kl(policy, batch, anchor, rows=range(B)):
    """Eq. 11 against the anchor, written down directly: mean over steps, sum over the samples `rows` divided by B."""
    total = 0.0
    for k in range(T):
        x, sigma = batch.trajectory.states[:, k], batch.sde.sigmas[k].float().expand(B)
        with torch.no_grad(), anchor.swapped_in():
            mean_ref, _ = batch.sde.transition(x, policy.velocity(x, sigma, batch.conditions), k)
        mean, std = batch.sde.transition(x, policy.velocity(x, sigma, batch.conditions), k)
        total = total + gaussian_kl(mean, mean_ref, std)[list(rows)].sum() / B / T
    return total


def objective(policy, batch, scales, rows=range(B)):
    """Eq. 4 with S_t, written down directly: −(1/G) Σ_i A_i Σ_t S_t log π_θ, averaged over steps."""
    total = 0.0
    for k in range(T):
        x, x_next = batch.trajectory.states[:, k], batch.trajectory.states[:, k + 1]
        mean, std = batch.sde.transition(
            x, policy.velocity(x, batch.sde.sigmas[k].float().expand(B), batch.conditions), k
        )
        per_sample = -batch.advantages * scales[k] * log_prob(x_next, mean, std)
        total = total + per_sample[list(rows)].sum() / B
    return total / T


@pytest.mark.parametrize("equalizer", [True, False])
def test_update_follows_the_gradient_of_equation_4(equalizer):
    config = replace(CONFIG, equalizer=equalizer)  # one optimizer step over all steps, at ρ = 1
    policy, batch = rolled_out(config)
    scales = equalizer_scales(batch.sde).float() if equalizer else torch.ones(T)
    (gradient,) = torch.autograd.grad(objective(policy, batch, scales), policy.module.weight)
    torch.testing.assert_close(-weight_change(policy, batch, config), gradient, rtol=1e-4, atol=1e-6)


def test_micro_batches_do_not_change_the_update():
    changes = []
    for micro_batch in (8, 2):
        policy, batch = rolled_out()
        changes.append(weight_change(policy, batch, replace(CONFIG, micro_batch=micro_batch)))
    torch.testing.assert_close(*changes, rtol=1e-4, atol=1e-6)


def test_optimizer_steps_share_the_micro_batches_evenly():
    """At learning rate 0 the gradients of T optimizer steps, one micro-batch each, average to that of one step."""
    policy, batch = rolled_out()
    (gradient,) = torch.autograd.grad(
        objective(policy, batch, equalizer_scales(batch.sde).float()), policy.module.weight
    )
    seen = []

    class Recorder:
        def step(self):
            seen.append(policy.module.weight.grad.clone())

        def zero_grad(self):
            policy.module.zero_grad()

    _, made = update(policy, batch, replace(CONFIG, optimizer_steps=T), [Recorder()], None, generators(100), 0, 3)
    assert len(seen) == T and made == 3 + T
    torch.testing.assert_close(torch.stack(seen).mean(0), gradient, rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------------------------------------- one optimizer step
@pytest.mark.parametrize("micro_batch", [8, 2])
def test_with_one_optimizer_step_every_ratio_is_one(micro_batch):
    policy, batch = rolled_out()
    metrics, _ = one_update(
        policy, batch, replace(CONFIG, micro_batch=micro_batch, clip_range=1e-4), learning_rate=10.0
    )
    assert metrics["ratio_min"] == pytest.approx(1, abs=1e-6)  # other rows in a matrix product may round differently
    assert metrics["ratio_max"] == pytest.approx(1, abs=1e-6)
    assert metrics["clip_low"] == metrics["clip_high"] == 0
    policy, batch = rolled_out()
    metrics, _ = one_update(policy, batch, replace(CONFIG, optimizer_steps=T))
    assert metrics["ratio_max"] - metrics["ratio_min"] > 1e-3  # with several, it moves


def test_with_one_optimizer_step_the_closed_form_has_gradient_zero():
    changes = {}
    for steps in (1, T):
        for mode in ("none", "stepwise"):
            policy, batch = rolled_out()
            config = replace(
                CONFIG,
                kl_mode=mode,
                stepwise_kl="closed_form",
                kl_schedule="fixed",
                kl_lambda=1.0,
                optimizer_steps=steps,
            )
            changes[steps, mode] = weight_change(policy, batch, config)
    assert torch.equal(changes[1, "none"], changes[1, "stepwise"])
    assert not torch.allclose(changes[T, "none"], changes[T, "stepwise"], rtol=1e-2)


def test_with_one_optimizer_step_the_rollout_phase_gradient_has_mean_zero():
    """Over 4000 noises, the gradient of Eq. 15 at θ = π_old lies within 4.5 standard errors of 0 in each weight and
    step.

    The control: at a θ that has moved on, where it must be that of the KL, it lies far outside.
    """
    count = 4000
    policy, sde = LinearPolicy(), SDE("sage_grpo", 0.5, sigma_schedule(T))
    prompts, noise = ["a"] * count, [torch.Generator().manual_seed(seed) for seed in range(count)]
    batch = collect(policy, reward, prompts, sde, noise, replace(CONFIG, max_failed_rewards=0.99))

    def scores_of(weight, k):
        """Mean of the per-sample gradients in units of its standard error, [DIM, DIM]."""
        x, x_next = batch.trajectory.states[:, k], batch.trajectory.states[:, k + 1]
        v = x @ weight.T + sde.sigmas[k].float() * torch.stack(batch.conditions)
        v.requires_grad_()
        mean, std = sde.transition(x, v, k)
        estimate = stepwise_kl_rollout_phase(log_prob(x_next, mean, std), batch.trajectory.log_probs[:, k])
        (by_v,) = torch.autograd.grad(estimate.sum(), v)
        by_weight = by_v[:, :, None] * x[:, None, :]  # [count, DIM, DIM]
        return by_weight.mean(0) / by_weight.std(0) * count**0.5

    weight = policy.module.weight.detach()
    moved = weight + 0.2 * torch.randn(DIM, DIM, generator=torch.Generator().manual_seed(5))
    assert max(scores_of(weight, k).abs().max() for k in range(T)) < 4.5
    assert max(scores_of(moved, k).abs().max() for k in range(T)) > 9


def test_clipped_loss_has_the_gradient_of_a_hand_written_one():
    ratio = torch.tensor([0.7, 0.7, 0.95, 1.0, 1.05, 1.3, 1.3], requires_grad=True)
    advantages = torch.tensor([1.0, -1.0, 2.0, -3.0, -0.5, 1.0, -1.0])
    clipped_policy_loss(ratio, advantages, 0.1).sum().backward()
    clipped = ((advantages > 0) & (ratio > 1.1)) | ((advantages < 0) & (ratio < 0.9))
    assert torch.equal(ratio.grad, torch.where(clipped, 0.0, -advantages)) and clipped.sum() == 2


@pytest.mark.parametrize("mode", ["fixed", "moving", "dual", "stepwise"])
def test_nothing_moves_before_the_first_update(mode):
    """Learning rate 0: every ratio of every micro-batch is exactly 1, both KL terms exactly 0."""
    config = replace(CONFIG, kl_mode=mode, stepwise_kl="closed_form", optimizer_steps=T)
    policy, batch = rolled_out(config)
    anchor = Anchor(policy.module, every=None if mode == "fixed" else 3) if mode != "stepwise" else None
    metrics, steps_made = one_update(policy, batch, config, anchor, learning_rate=0.0)
    assert metrics["ratio_min"] == metrics["ratio_max"] == 1 and steps_made == T
    assert metrics["kl_velocity"] == 0 and metrics.get("kl_position", 0) == 0 and metrics["clip_low"] == 0


def test_the_anchor_moves_between_iterations_not_within_one():
    """Five optimizer steps, N = 3: due after the third, refreshed at the end of the iteration."""
    config = replace(CONFIG, kl_mode="moving", micro_batch=4, optimizer_steps=T)
    policy, batch = rolled_out(config)
    anchor = Anchor(policy.module, every=3)
    one_update(policy, batch, config, anchor)
    assert anchor.refreshed_at == T
    assert torch.equal(anchor._copies[0], policy.module.weight)


def test_reference_means_swap_the_anchor_in_once():
    policy, batch = rolled_out()
    anchor, swaps = shifted_anchor(policy, batch), []
    swapped_in = anchor.swapped_in

    def counted():
        swaps.append(1)
        return swapped_in()

    anchor.swapped_in = counted
    batch.position_weights = position_weights(batch.sde, 0, generators(0))
    means = reference_means(policy, batch, replace(CONFIG, micro_batch=2), anchor)
    assert len(swaps) == 1
    for k in range(T):
        x, sigma = batch.trajectory.states[:, k], batch.sde.sigmas[k].float().expand(B)
        with torch.no_grad(), swapped_in():
            expected, _ = batch.sde.transition(x, policy.velocity(x, sigma, batch.conditions), k)
        torch.testing.assert_close(means[:, k], expected, rtol=1e-5, atol=1e-6)


def test_position_kl_is_measured_against_the_anchor():
    config = replace(CONFIG, kl_mode="fixed", kl_schedule="fixed", kl_lambda=0.3)
    policy, batch = rolled_out(config)
    anchor = shifted_anchor(policy, batch)
    kl = position_kl(policy, batch, anchor)
    total = objective(policy, batch, equalizer_scales(batch.sde).float()) + 0.3 * kl
    (gradient,) = torch.autograd.grad(total, policy.module.weight)
    start = policy.module.weight.detach().clone()
    metrics, _ = one_update(policy, batch, config, anchor)
    assert metrics["kl_position"] == pytest.approx(kl.item(), rel=1e-4)
    torch.testing.assert_close(start - policy.module.weight.detach(), gradient, rtol=1e-4, atol=1e-6)


def test_the_position_kl_of_some_steps_is_that_of_all_on_average():
    """Gradient and metric, over ten runs in which each sample draws each choice of 2 of 5 steps once; and the other
    steps cost no reference pass. The samples of a run draw for themselves."""
    config = replace(CONFIG, kl_mode="fixed", kl_schedule="fixed", kl_lambda=0.3)
    sde, choices = SDE("sage_grpo", 0.5, sigma_schedule(T)), {}
    for seed in range(100):
        (weights,) = position_weights(sde, 2, [torch.Generator().manual_seed(seed)])
        choices[tuple(weights.nonzero().flatten().tolist())] = seed
    assert len(choices) == math.comb(T, 2)
    seeds = list(choices.values())

    def change(kl_steps, drawn_seeds):
        policy, batch = rolled_out(config, sde)
        anchor, start = shifted_anchor(policy, batch), policy.module.weight.detach().clone()
        optimizer, drawn = torch.optim.SGD(policy.module.parameters(), lr=1.0), replace(config, kl_steps=kl_steps)
        own = [torch.Generator().manual_seed(seed) for seed in drawn_seeds]
        metrics, _ = update(policy, batch, drawn, [optimizer], anchor, own, 0, 7)
        assert metrics["update_passes"] == T + (kl_steps or T)
        return policy.module.weight.detach() - start, metrics["kl_position"]

    some = [change(2, [seeds[(run + sample) % len(seeds)] for sample in range(B)]) for run in range(len(seeds))]
    changes, metrics = torch.stack([weights for weights, _ in some]), [metric for _, metric in some]
    whole, metric = change(0, range(B))
    torch.testing.assert_close(changes.mean(0), whole, rtol=1e-4, atol=1e-6)
    assert sum(metrics) / len(metrics) == pytest.approx(metric, rel=1e-4)
    # Were the samples to share their steps, gradient and metric would vary more.
    shared = [change(2, [seed] * B) for seed in seeds]
    shared_metrics = [metric for _, metric in shared]
    assert (shared[0][0] - shared[1][0]).abs().max() > 1e-3 and max(shared_metrics) > 1.1 * min(shared_metrics)
    assert max(shared_metrics) - min(shared_metrics) > 1.5 * (max(metrics) - min(metrics)) > 0
    assert not torch.allclose(changes[0], changes[1], rtol=1e-3)


def test_the_velocity_term_has_its_weight_and_form(monkeypatch):
    """Dual KL after a first optimizer step: Eq. 12 in closed form, times β_vel·λ_KL, beside the position term."""
    config = replace(
        CONFIG,
        kl_mode="dual",
        stepwise_kl="closed_form",
        kl_schedule="fixed",
        kl_lambda=0.4,
        beta_pos=0.7,
        beta_vel=0.5,
    )
    monkeypatch.setattr(grpo, "RATIO_TOLERANCE", 1.0)
    policy, batch = rolled_out(config)
    anchor = shifted_anchor(policy, batch)
    with torch.no_grad():  # as after a first optimizer step: the policy is not the rollout's any more
        policy.module.weight.mul_(1.02)
    velocity_kl = 0.0
    for k in range(T):
        x, sigma = batch.trajectory.states[:, k], batch.sde.sigmas[k].float().expand(B)
        mean, std = batch.sde.transition(x, policy.velocity(x, sigma, batch.conditions), k)
        velocity_kl = velocity_kl + stepwise_kl_closed_form(mean, batch.trajectory.means[:, k], std).mean() / T
    batch.advantages = torch.zeros(B)  # the trust region alone
    total = 0.4 * (0.7 * position_kl(policy, batch, anchor) + 0.5 * velocity_kl)
    (gradient,) = torch.autograd.grad(total, policy.module.weight)
    torch.testing.assert_close(-weight_change(policy, batch, config, anchor), gradient, rtol=1e-4, atol=1e-7)


def test_lambda_follows_its_schedule():
    config = replace(CONFIG, kl_mode="stepwise", kl_switch=2)
    policy, batch = rolled_out(config)
    seen = [one_update(policy, batch, config, iteration=i, learning_rate=0.0)[0]["lambda_kl"] for i in (0, 1, 2)]
    assert seen == [1e-7, 1e-7, 1e-5]


def test_the_controller_sees_every_backward_pass():
    """λ_KL of a pass is the controller's before it; what it observes is the mean L_KL of that pass, over all ranks."""

    class Recorder:
        value, seen = 1.0, []

        def observe(self, kl):
            self.seen.append(kl)
            self.value *= 2

    config = replace(CONFIG, kl_mode="fixed", kl_schedule="controller", micro_batch=4)
    policy, batch = rolled_out(config)
    anchor, controller = shifted_anchor(policy, batch), Recorder()
    optimizer = torch.optim.SGD(policy.module.parameters(), lr=0.0)
    metrics, _ = update(policy, batch, config, [optimizer], anchor, generators(100), 0, 7, controller=controller)
    passes = 2 * T
    assert metrics["lambda_kl"] == pytest.approx((2**passes - 1) / passes) and len(controller.seen) == passes
    assert sum(controller.seen) / passes == pytest.approx(metrics["kl_position"]) and "kl" not in metrics


def test_noise_and_training_on_some_steps():
    """The others are steps of the ODE, and the update is the gradient of Eq. 4 over the noisy ones alone."""
    sde = SDE("sage_grpo", 0.5, sigma_schedule(T), noisy_steps=torch.tensor([3, 1]))
    policy, batch = rolled_out(sde=sde)
    assert sde.stochastic.tolist() == [False, True, False, True, False]
    for k in (0, 2, 4):
        x, sigma = batch.trajectory.states[:, k], sde.sigmas[k].float().expand(B)
        with torch.no_grad():
            euler = x - (sde.sigmas[k] - sde.sigmas[k + 1]).float() * policy.velocity(x, sigma, batch.conditions)
        torch.testing.assert_close(batch.trajectory.states[:, k + 1], euler, rtol=1e-5, atol=1e-6)
    scales, total = equalizer_scales(sde).float(), 0.0
    for k in (1, 3):
        x, sigma = batch.trajectory.states[:, k], sde.sigmas[k].float().expand(B)
        mean, std = sde.transition(x, policy.velocity(x, sigma, batch.conditions), k)
        per_sample = -batch.advantages * scales[k] * log_prob(batch.trajectory.states[:, k + 1], mean, std)
        total = total + per_sample.mean() / 2
    (gradient,) = torch.autograd.grad(total, policy.module.weight)
    torch.testing.assert_close(-weight_change(policy, batch, CONFIG), gradient, rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------------------------------------- the extremes alone
@given(st.data())
def test_the_extremes_of_each_group_are_trained(data):
    """Against a choice by hand: as many of the largest advantages as of the smallest, valid ones before failed ones."""
    group, ties = data.draw(st.sampled_from([2, 4, 6, 8])), st.integers(-3, 3).map(float)
    kept = data.draw(st.integers(1, group // 2)) * 2
    advantages = torch.tensor(data.draw(st.lists(ties, min_size=3 * group, max_size=3 * group)))
    valid = torch.tensor(data.draw(st.lists(st.booleans(), min_size=3 * group, max_size=3 * group)))
    config = replace(CONFIG, group_size=group, train_samples=kept, batch_size=3 * group)
    rows = trained_rows(advantages.where(valid, torch.tensor(0.0)), valid, config).tolist()
    assert rows == sorted(set(rows)) and len(rows) == 3 * kept == samples_in_update(config)
    for first in range(0, 3 * group, group):
        members = range(first, first + group)
        scored = sorted((i for i in members if valid[i]), key=lambda i: advantages[i].item())
        chosen = [i for i in rows if i in members]
        assert len(chosen) == kept
        own = sorted(advantages[i].item() for i in chosen if valid[i])
        if len(scored) <= kept:
            assert set(scored) <= set(chosen)
        else:
            wanted = scored[: kept // 2] + scored[len(scored) - kept // 2 :]
            assert own == [advantages[i].item() for i in wanted]


@pytest.mark.parametrize("micro_batch", [4, 2, 1])
def test_training_the_extremes_is_the_gradient_of_their_objective(micro_batch):
    """Advantages among all four of a group; policy and reference passes for two of them; failed samples left out."""
    config = replace(
        CONFIG, train_samples=2, micro_batch=micro_batch, kl_mode="fixed", kl_schedule="fixed", kl_lambda=0.3
    )
    policy, batch = rolled_out(config, reward=failing(1))
    _, whole = rolled_out(replace(config, train_samples=0), reward=failing(1))
    assert torch.equal(batch.advantages, whole.advantages)
    rows = [i for first in (0, 4) for i in sorted(range(first, first + 4), key=lambda i: batch.advantages[i])[::3]]
    assert 1 not in rows and sorted(rows) == trained_rows(batch.advantages, batch.valid, config).tolist()
    anchor = shifted_anchor(policy, batch)
    scales = equalizer_scales(batch.sde).float()
    total = 2 * (objective(policy, batch, scales, rows) + 0.3 * position_kl(policy, batch, anchor, rows))
    (gradient,) = torch.autograd.grad(total, policy.module.weight)  # twice, since the mean is over half of the samples
    start = policy.module.weight.detach().clone()
    metrics, _ = one_update(policy, batch, config, anchor)
    torch.testing.assert_close(start - policy.module.weight.detach(), gradient, rtol=1e-4, atol=1e-6)
    assert metrics["update_passes"] == 2 * T * 4 // micro_batch and metrics["ratio_max"] == pytest.approx(1, abs=1e-6)


class FreezingPolicy(LinearPolicy):
    """A part of its velocity has no gradient, and is counted."""

    frozen = 0

    def frozen_velocity(self, x, sigma, cond):
        self.frozen += len(x)
        return 0.3 * x.sin() + sigma[:, None]

    def velocity(self, x, sigma, cond, frozen=None):
        return super().velocity(x, sigma, cond) + (self.frozen_velocity(x, sigma, cond) if frozen is None else frozen)


@pytest.mark.parametrize("train_samples", [0, 2])
def test_the_frozen_part_is_the_rollouts_own_until_the_first_optimizer_step(train_samples):
    """Of each trained sample its own: with another's the first ratio would not be 1."""
    config = replace(CONFIG, train_samples=train_samples, micro_batch=4, optimizer_steps=T)
    policy, sde = FreezingPolicy(), SDE("sage_grpo", 0.5, sigma_schedule(T))
    batch = collect(policy, reward, ["a"] * 4 + ["bcd"] * 4, sde, generators(0), config)
    assert batch.frozen.shape == batch.trajectory.means.shape and policy.frozen == B * T
    metrics, _ = one_update(policy, batch, config, learning_rate=1e-3)
    trained = samples_in_update(config)
    assert metrics["first_ratio_error"] < 1e-6 and policy.frozen == B * T + trained * (T - 1)


@pytest.mark.parametrize("group, keep, batch", [(4, 3, 8), (4, 6, 8), (4, 2, 6), (8, 2, 4)])
def test_a_part_of_a_group_that_cannot_be_halved_on_each_rank_is_refused(group, keep, batch):
    config = replace(CONFIG, group_size=group, train_samples=keep, batch_size=batch)
    with pytest.raises(ValueError, match="train_samples must be even, and at most group_size: got"):
        samples_in_update(config)


def test_a_group_that_spans_ranks_has_its_extremes_chosen_on_each():
    """Eight samples of one prompt, four on each rank: the same number on both, whatever the rewards."""
    config = replace(CONFIG, group_size=8, train_samples=4, batch_size=4)
    assert samples_in_update(config) == 2
    falling = torch.tensor([4.0, 3.0, 2.0, 1.0, -1.0, -2.0, -3.0, -4.0])
    every = torch.ones(4, dtype=torch.bool)
    for own in (slice(0, 4), slice(4, 8)):
        assert trained_rows(falling[own], every, config).tolist() == [0, 3]


# ---------------------------------------------------------------------------------------------- failures
def failing(place):
    def scores(x, prompts):
        result = reward(x, prompts)
        result["MQ"][place] = math.nan
        return result

    return scores


def test_a_failed_sample_takes_no_part():
    """Neither in the policy's term nor in the trust region's."""
    config = replace(CONFIG, kl_mode="fixed", kl_schedule="fixed", kl_lambda=0.3)
    policy, batch = rolled_out(config, reward=failing(5))
    assert batch.metrics["reward_failed"] == 1 / 8 and batch.valid.tolist() == [True] * 5 + [False] + [True] * 2
    assert math.isfinite(batch.metrics["reward_mean"])
    rows = [i for i in range(B) if i != 5]
    anchor = shifted_anchor(policy, batch)
    kl = position_kl(policy, batch, anchor, rows)
    total = objective(policy, batch, equalizer_scales(batch.sde).float(), rows) + 0.3 * kl
    (gradient,) = torch.autograd.grad(total, policy.module.weight, retain_graph=True)
    (own_kl,) = torch.autograd.grad(position_kl(policy, batch, anchor, [5]), policy.module.weight)
    assert own_kl.abs().max() > 1e-3  # what the failed sample would add is not small
    torch.testing.assert_close(-weight_change(policy, batch, config, anchor), gradient, rtol=1e-4, atol=1e-6)


def test_all_samples_failing_is_an_error():
    scorer = Scorer(failing(slice(None)), OneRank(), "cpu", 60.0)
    _, batch = rolled_out(reward=scorer)
    assert batch.metrics["reward_failed"] == 1 and not batch.advantages.any()
    with pytest.raises(RuntimeError, match="at most a share of 0.2 of the samples .* got 1.000; first cause: rank 0"):
        scorer.check_failed(batch.metrics["reward_failed"], 0.2)
    scorer.check_failed(0.2, 0.2)


def test_seconds_go_to_the_part_that_took_them_and_equal_groups_are_counted():
    def slow_and_equal_for_one_prompt(x, prompts):
        time.sleep(0.2)
        result = reward(x, prompts)
        for name in result:
            result[name][:4] = 0.5
        return result

    scorer = Scorer(slow_and_equal_for_one_prompt, OneRank(), "cpu", 60.0)
    started = time.perf_counter()
    metrics = rolled_out(reward=scorer)[1].metrics | scorer.seconds
    passed = time.perf_counter() - started
    assert metrics["groups_without_spread"] == 0.5 and rolled_out()[1].metrics["groups_without_spread"] == 0
    others = [metrics[f"{name}_seconds"] for name in ("rollout", "decode", "wait")]
    assert metrics["reward_seconds"] >= 0.2 and min(others) >= 0
    assert metrics["reward_seconds"] + sum(others) <= passed  # no part is counted twice


def test_an_evaluation_counts_what_it_could_not_score():
    policy, ode, prompts = LinearPolicy(), SDE("sage_grpo", 0.0, sigma_schedule(T)), ["a"] * B
    whole, _ = evaluate(policy, reward, prompts, (DIM,), ode, generators(0), replace(CONFIG, batch_size=B))
    metrics, _ = evaluate(policy, failing([1, 5]), prompts, (DIM,), ode, generators(0), replace(CONFIG, batch_size=B))
    assert whole["eval_failed"] == 0 and metrics["eval_failed"] == 2 / B
    assert math.isfinite(metrics["eval_reward"]) and metrics["eval_reward"] != whole["eval_reward"]
    assert metrics["eval_VQ"] == whole["eval_VQ"]


def test_samples_that_are_not_finite_are_never_scored():
    policy, sde, config = LinearPolicy(), SDE("sage_grpo", 0.5, sigma_schedule(T)), replace(CONFIG, batch_size=B)
    with torch.no_grad():
        policy.module.weight[0, 0] = math.nan

    def never(videos, prompts):
        pytest.fail("scored")

    with pytest.raises(FloatingPointError, match="samples must be finite"):
        collect(policy, never, ["a"] * B, sde, generators(0), config)
    with pytest.raises(FloatingPointError, match="samples must be finite"):
        evaluate(policy, never, ["a"] * B, (DIM,), sde, generators(0), config)


def test_an_evaluation_may_have_another_size():
    """Its latents have the shape that evaluate is given, not the policy's."""
    seen = []

    class AnySize(LinearPolicy):
        def velocity(self, x, sigma, cond):
            return -x

        def decode(self, x):
            seen.append(tuple(x.shape))
            return x

    ode = SDE("sage_grpo", 0.0, sigma_schedule(T))
    evaluate(AnySize(), reward, ["a"] * B, (DIM + 3,), ode, generators(0), replace(CONFIG, batch_size=3))
    assert seen == [(3, DIM + 3), (3, DIM + 3), (2, DIM + 3)]


class RankInThread(OneRank):
    """One of several ranks, each of which runs in a thread of its own; they meet wherever a tensor is gathered."""

    def __init__(self, rank, world, table, barrier):
        self.dp_rank, self.dp_world, self.table, self.barrier = rank, world, table, barrier
        self.rank, self.world = rank, world

    def gather(self, tensor):
        self.table[self.rank] = tensor
        self.barrier.wait(timeout=120)
        parts = [self.table[rank] for rank in range(self.world)]
        self.barrier.wait(timeout=120)
        return torch.cat(parts)

    def exchange(self, value):
        self.table[self.rank] = value
        self.barrier.wait(timeout=120)
        values = [self.table[rank] for rank in range(self.world)]
        self.barrier.wait(timeout=120)
        return values


def on_ranks(world, work):
    """[work(ranks) of each rank]."""
    table, barrier = {}, threading.Barrier(world)
    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(lambda rank: work(RankInThread(rank, world, table, barrier)), range(world)))


def test_three_ranks_evaluate_like_one():
    """Four prompts on three ranks, two at a time: the wrapped places count once, and noise goes with the prompt."""
    prompts, ode, config = list("abcd"), SDE("sage_grpo", 0.0, sigma_schedule(T)), replace(CONFIG, batch_size=2)

    def evaluated(ranks):
        made = []

        def keep(place, video):
            made.append(place)
            return video

        scorer = Scorer(reward, ranks, "cpu", 60.0)
        noise = generators(0)[:4]
        metrics, kept = evaluate(LinearPolicy(), scorer, prompts, (DIM,), ode, noise, config, ranks, keep)
        return metrics, kept, made

    metrics, kept, made = evaluated(OneRank())
    assert len(kept) == 4 and len({tuple(video.tolist()) for video in kept}) == 4
    of_ranks = on_ranks(3, evaluated)
    for own_metrics, own_kept, _ in of_ranks:
        assert own_metrics == pytest.approx(metrics, rel=1e-6)
        torch.testing.assert_close(own_kept, kept)
    assert [own for _, _, own in of_ranks] == [[0, 1], [2, 3], [0, 1]] and made == [0, 1, 2, 3]


@pytest.mark.parametrize("factor", [1.1, 0.9])
def test_a_first_ratio_that_is_off_is_an_error_on_either_side(factor):
    with pytest.raises(RuntimeError, match=r"the ratio must be 1 .* got \|ρ − 1\| = 1.00e-01"):
        grpo.check_first_ratio(torch.tensor([1.0, factor]))
    grpo.check_first_ratio(torch.tensor([1 - 9e-4, 1 + 9e-4]))


def test_a_wrong_first_ratio_is_an_error():
    policy, batch = rolled_out()
    with torch.no_grad():
        policy.module.weight.mul_(1.05)
    with pytest.raises(RuntimeError, match="the ratio must be 1 before the first optimizer step.*--attention"):
        one_update(policy, batch, replace(CONFIG, clip_range=1e-4))


def test_a_first_ratio_within_its_tolerance_is_logged_and_warned_of_above_the_clip_range(capsys):
    errors = []
    for moved in (1.0, 1.0001):
        policy, batch = rolled_out()
        with torch.no_grad():  # stands for a kernel that rounds otherwise
            policy.module.weight.mul_(moved)
        metrics, _ = one_update(policy, batch, replace(CONFIG, clip_range=1e-6, optimizer_steps=T))
        errors.append(metrics["first_ratio_error"])
        assert metrics["first_ratio_error"] < metrics["ratio_max"] - metrics["ratio_min"]  # the first step's alone
        warn({"groups_without_spread": 0.5, **metrics}, clip_range=1e-6)
        assert ("the ratio was off by" in capsys.readouterr().err) == (moved != 1)
    assert errors[0] < 1e-6 < errors[1] < 1e-3


def test_a_non_finite_loss_stops_before_the_optimizer_acts():
    policy, batch = rolled_out()
    batch.advantages[2] = math.inf
    start = policy.module.weight.detach().clone()
    with pytest.raises(FloatingPointError, match="loss and gradient norm must be finite"):
        one_update(policy, batch, CONFIG)
    assert torch.equal(start, policy.module.weight)


@pytest.mark.parametrize("gradient, loss", [(1.0, math.inf), (1.0, math.nan), (math.inf, 1.0), (math.nan, 1.0)])
def test_loss_and_norm_must_both_be_finite(gradient, loss):
    """An infinite loss can have a finite gradient."""
    weight = nn.Parameter(torch.zeros(2))
    weight.grad = torch.tensor([gradient, 0.0])
    with pytest.raises(FloatingPointError, match="loss and gradient norm must be finite"):
        grpo.optimizer_step([torch.optim.SGD([weight], lr=1.0)], [weight], 1.0, torch.tensor(loss))
    assert not weight.any()


def test_gradient_norm_is_clipped():
    policy, batch = rolled_out()
    start = policy.module.weight.detach().clone()
    metrics, _ = one_update(policy, batch, replace(CONFIG, max_grad_norm=1e-3))
    assert metrics["grad_norm"] > 1e-3
    assert (start - policy.module.weight).norm().item() == pytest.approx(1e-3, rel=1e-3)


# ---------------------------------------------------------------------------------------------- order, ranks
def test_every_sample_visits_every_stochastic_step_in_its_own_order():
    sde = SDE("sage_grpo", 0.5, sigma_schedule(T), noisy_last_step=False)
    _, batch = rolled_out(sde=sde)
    visits = [[] for _ in range(B)]
    for rows, steps in micro_batches(batch, replace(CONFIG, micro_batch=2), generators(100)):
        for row, k in zip(rows.tolist(), steps.tolist(), strict=True):
            visits[row].append(k)
    assert all(sorted(order) == list(range(T - 1)) for order in visits)
    assert len({tuple(order) for order in visits}) > B // 2
    own = [torch.randperm(T - 1, generator=g).tolist() for g in generators(100)]
    assert visits == own  # a sample's order is its generator's, whatever batch it lands in


def test_each_optimizer_step_sees_every_sample_as_often():
    _, batch = rolled_out()
    config = replace(CONFIG, micro_batch=2, optimizer_steps=T)
    per_step = micro_batches_per_step(B, T, config)
    batches = micro_batches(batch, config, generators(100))
    for first in range(0, len(batches), per_step):
        seen = [row for rows, _ in batches[first : first + per_step] for row in rows.tolist()]
        assert sorted(seen) == list(range(B))


def test_weights_of_the_position_kl_leave_out_what_is_not_trained():
    """K/n with the K trained steps, not T/n: the mean weight of a trained step is 1. No pass for the last step."""
    sde = SDE("sage_grpo", 0.5, sigma_schedule(T), noisy_last_step=False)
    some = position_weights(sde, 2, [torch.Generator().manual_seed(seed) for seed in range(400)])
    assert set(some.unique().tolist()) == {0.0, 2.0} and (some.count_nonzero(1) == 2).all()
    assert not some[:, -1].any() and some[:, :-1].mean() == pytest.approx(1.0)
    every = position_weights(sde, 0, generators(0))
    assert every.tolist() == [[1.0] * (T - 1) + [0.0]] * B
    policy, batch = rolled_out(sde=sde)
    anchor = shifted_anchor(policy, batch)
    metrics, _ = one_update(policy, batch, replace(CONFIG, kl_mode="fixed"), anchor)
    assert metrics["update_passes"] == 2 * (T - 1)


@pytest.mark.parametrize(
    "steps, every, expected",
    [(T, 2 * T, [T, 2 * T, T, 2 * T]), (1, 1, [T] * 4), (1, 2, [T, 2 * T, T, 2 * T]), (1, 3, [T, 2 * T, 2 * T, T])],
)
def test_the_reference_pass_is_skipped_while_the_anchor_is_the_rollouts_policy(steps, every, expected):
    """With N = 1 the anchor follows at once; with N = 2 optimizer steps it is one step old every other time."""
    config = replace(CONFIG, kl_mode="moving", optimizer_steps=steps)
    policy, batch = rolled_out(config)
    anchor, passes, steps_made = Anchor(policy.module, every=every), [], 0
    for iteration in range(4):
        metrics, steps_made = one_update(policy, batch, config, anchor, learning_rate=1e-3)
        passes.append(metrics["update_passes"])
        prompts = ["a"] * 4 + ["bcd"] * 4
        batch = collect(policy, reward, prompts, batch.sde, generators(iteration), config, steps_made)
    assert passes == expected


def test_metrics_of_a_hand_made_log():
    """Shares beyond 1 ± c, not beyond 1; means over all ranks."""
    log = {
        "ratio": torch.tensor([0.8, 0.95, 1.0, 1.05, 1.2, 1.3]),
        "policy_loss": torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, 6.0]),
    }
    metrics = grpo.summarise(dict(log), 0.1, OneRank())
    assert metrics["clip_low"] == pytest.approx(1 / 6) and metrics["clip_high"] == pytest.approx(2 / 6)
    assert (metrics["ratio_min"], metrics["ratio_max"]) == pytest.approx((0.8, 1.3)) and metrics["policy_loss"] == 1

    class Second(OneRank):
        def gather(self, values):
            return torch.cat([values, torch.ones(6) + (values[0] == 0)])

    both = grpo.summarise(dict(log), 0.1, Second())
    assert both["clip_low"] == pytest.approx(1 / 12) and both["policy_loss"] == pytest.approx((6 + 12) / 12)


def test_the_gradient_norm_is_the_mean_over_optimizer_steps():
    """Of hand-made gradients: the network has none, and what an optimizer sees is what the hook puts there."""
    policy, batch = rolled_out()
    norms = iter(float(step + 1) for step in range(T))
    config = replace(CONFIG, optimizer_steps=T)
    policy.module.weight.register_hook(lambda gradient: next(norms) * torch.eye(DIM) / DIM**0.5)
    metrics, _ = one_update(policy, batch, config, learning_rate=0.0)
    assert metrics["grad_norm"] == pytest.approx((1 + 2 + 3 + 4 + 5) / 5)


def test_the_spread_of_the_rewards_is_the_populations():
    scores = {"VQ": torch.tensor([1.0, 2.0, 3.0, 6.0, math.nan])}
    valid = torch.tensor([True] * 4 + [False])
    metrics = grpo.describe_rewards(scores, torch.tensor([[1.0, -1.0], [0.0, 0.0]]), valid, torch.tensor([1.0, 0.0]))
    assert (metrics["VQ_mean"], metrics["VQ_std"]) == pytest.approx((3.0, 3.5**0.5))
    assert metrics["reward_failed"] == pytest.approx(0.2) and metrics["groups_without_spread"] == 0.5


def test_an_iteration_in_which_no_group_has_two_rewards_says_so(capsys):
    warn({"groups_without_spread": 1.0, "first_ratio_error": 0.0}, 1e-4)
    assert "this iteration taught nothing" in capsys.readouterr().err
    warn({"groups_without_spread": 0.9, "first_ratio_error": 0.0}, 1e-4)
    assert capsys.readouterr().err == ""


def test_a_group_may_span_ranks():
    """Two ranks of half a batch each see the rewards of all, and together get the advantages of one process."""
    _, whole = rolled_out()
    prompts, sde = ["a"] * 4 + ["bcd"] * 4, SDE("sage_grpo", 0.5, sigma_schedule(T))

    class Rank(OneRank):
        def __init__(self, rank):
            self.dp_rank = rank

    config = replace(CONFIG, group_size=8, micro_batch=4)
    scores = reward(whole.trajectory.states[:, -1], prompts)
    _, one = rolled_out(config)
    for rank in (0, 1):
        own, policy = slice(4 * rank, 4 * rank + 4), LinearPolicy()
        of_all = lambda videos, prompts: scores  # noqa: E731
        batch = collect(policy, of_all, prompts[own], sde, generators(0)[own], config, 0, Rank(rank))
        torch.testing.assert_close(batch.advantages, one.advantages[own])


class RankOfMany(OneRank):
    """One rank of several, whose others have the same rewards."""

    def __init__(self, rank, world):
        self.dp_rank, self.dp_world = rank, world

    def gather(self, tensor):
        return tensor.repeat(self.dp_world)


def calls_of_rank(ranks, config):
    """(samples, conditions) of every call of velocity in an iteration of one rank, and the prompts of its samples."""
    calls = []

    class Recorded(LinearPolicy):
        def velocity(self, x, sigma, cond):
            calls.append((len(x), len(cond)))
            return super().velocity(x, sigma, cond)

    places = range(ranks.dp_rank * config.batch_size, (ranks.dp_rank + 1) * config.batch_size)
    prompts = ["x" * (1 + place // config.group_size) for place in places]
    noise = [torch.Generator().manual_seed(place) for place in places]
    policy, sde = Recorded(), SDE("sage_grpo", 0.5, sigma_schedule(T))

    def of_all(videos, prompts):
        return {name: values.repeat(ranks.dp_world) for name, values in reward(videos, prompts).items()}

    batch = collect(policy, of_all, prompts, sde, noise, config, 0, ranks)
    anchor, optimizer = shifted_anchor(policy, batch), torch.optim.SGD(policy.module.parameters(), lr=0.0)
    metrics, _ = update(policy, batch, config, [optimizer], anchor, noise, 0, 7, ranks)
    made = list(calls)
    # Every pass had the right conditions: the update's are the rollout's, and the reference's are those of one by one.
    assert metrics["ratio_max"] == pytest.approx(1, abs=1e-6)
    batch.position_weights = position_weights(sde, 0, noise)
    one_by_one = reference_means(policy, batch, replace(config, micro_batch=1), anchor)
    torch.testing.assert_close(reference_means(policy, batch, config, anchor), one_by_one)
    x, sigma = batch.trajectory.states[:, 0], torch.ones(len(prompts))
    mean, _ = sde.transition(x, policy.velocity(x, sigma, policy.encode(prompts)), 0)
    torch.testing.assert_close(batch.trajectory.means[:, 0], mean)
    return made, prompts


@pytest.mark.parametrize(
    "world, batch_size, group_size, micro_batch, together", [(2, 6, 4, 3, 1), (2, 6, 4, 2, 2), (3, 8, 6, 4, 2)]
)
def test_every_rank_makes_the_same_passes(world, batch_size, group_size, micro_batch, together):
    """Although groups span the ranks, and a micro-batch holds two prompts on one rank and one on another."""
    sizes = dict(batch_size=batch_size, group_size=group_size, micro_batch=micro_batch)
    config = replace(CONFIG, kl_mode="moving", max_failed_rewards=0.0, **sizes)
    calls, held = [], []
    for rank in range(world):
        made, prompts = calls_of_rank(RankOfMany(rank, world), config)
        calls.append(made)
        held.append([len(set(prompts[i : i + micro_batch])) for i in range(0, batch_size, micro_batch)])
    rollout_calls = [(batch_size, batch_size // together)] * T
    update_calls = [(micro_batch, micro_batch // together)] * (2 * T * batch_size // micro_batch)
    assert all(made == rollout_calls + update_calls for made in calls)
    assert (held[0] != held[1]) == (group_size % micro_batch > 0)


def test_samples_of_a_prompt_must_stand_together():
    sde = SDE("sage_grpo", 0.5, sigma_schedule(T))
    with pytest.raises(ValueError, match="the 4 samples of a prompt must be adjacent"):
        collect(LinearPolicy(), reward, ["a", "b"] * 4, sde, generators(0), CONFIG)


def test_divisibility_of_the_batch():
    assert micro_batches_per_step(8, 5, replace(CONFIG, micro_batch=2)) == 20
    assert micro_batches_per_step(8, 5, replace(CONFIG, micro_batch=2, optimizer_steps=4)) == 5
    with pytest.raises(ValueError, match="micro_batch must divide the samples per rank: got 3 and 8"):
        micro_batches_per_step(8, 5, replace(CONFIG, micro_batch=3))
    with pytest.raises(ValueError, match=r"optimizer_steps must divide .* got 3 and 8 / 8 × 5 = 5; use a divisor of 5"):
        micro_batches_per_step(8, 5, replace(CONFIG, optimizer_steps=3))
