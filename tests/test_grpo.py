"""The algorithm box on a third policy, a linear map: gradients by hand, the ratio, masks, the stops."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from equalizer import equalizer_scales
from grpo import GRPOConfig, OneProcess, clipped_policy_loss, collect, evaluate, micro_batches, optimizer_steps, update
from sde import SDE, log_prob, sigma_schedule
from trust_region import Anchor, gaussian_kl

B, DIM, T = 8, 6, 5
CONFIG = GRPOConfig(group_size=4, micro_batch=8, accumulation=1, kl_mode="none", max_grad_norm=1e9, clip_range=10.0, max_failed_rewards=0.2)


class LinearPolicy:
    """v = W·x + sigma·c: the whole policy interface in a few lines."""

    latent_shape = (DIM,)

    def __init__(self):
        torch.manual_seed(0)
        self.module, self.passes = nn.Linear(DIM, DIM, bias=False), 0

    def encode(self, prompts):
        return [torch.full((DIM,), float(len(prompt))) for prompt in prompts]

    def velocity(self, x, sigma, cond):
        self.passes += 1
        return self.module(x) + sigma[:, None] * torch.stack(cond)

    def decode(self, x):
        return x


def reward(x, prompts):
    return {"VQ": -x.square().mean(1), "MQ": x[:, 0].clone(), "TA": -x[:, 1]}


def generators(offset):
    return [torch.Generator().manual_seed(offset + i) for i in range(B)]


def rolled_out(config=CONFIG, sde=None, reward=reward):
    policy, sde = LinearPolicy(), sde or SDE("sage_grpo", 0.5, sigma_schedule(T))
    return policy, collect(policy, reward, ["a"] * 4 + ["bcd"] * 4, sde, generators(0), config)


def one_update(policy, batch, config, optimizer=None, anchor=None, index=0):
    optimizer = optimizer or torch.optim.SGD(policy.module.parameters(), lr=1.0)
    return update(policy, batch, config, optimizer, anchor, generators(100), index, batch.collected_at)


def objective(policy, batch, scales, rows=range(B)):
    """Eq. 4 with S_t, written down directly: −(1/G) Σ_i A_i Σ_t S_t log π_θ, divided by the T optimizer updates."""
    total = 0.0
    for k in range(T):
        x, x_next = batch.trajectory.states[:, k], batch.trajectory.states[:, k + 1]
        mean, std = batch.sde.transition(x, policy.velocity(x, batch.sde.sigmas[k].float().expand(B), batch.conditions), k)
        per_sample = -batch.advantages * scales[k] * log_prob(x_next, mean, std)
        total = total + per_sample[list(rows)].sum() / B
    return total / T


@pytest.mark.parametrize("equalizer", [True, False])
def test_update_follows_the_gradient_of_equation_4(equalizer):
    config = replace(CONFIG, equalizer=equalizer, accumulation=T)  # one optimizer update over all steps, at ρ = 1
    policy, batch = rolled_out(config)
    scales = equalizer_scales(batch.sde).float() if equalizer else torch.ones(T)
    (gradient,) = torch.autograd.grad(objective(policy, batch, scales), policy.module.weight)
    start = policy.module.weight.detach().clone()
    one_update(policy, batch, config)
    torch.testing.assert_close(start - policy.module.weight.detach(), gradient, rtol=1e-4, atol=1e-6)


def test_micro_batches_and_accumulation_do_not_change_the_update():
    results = []
    for micro_batch, accumulation in ((8, T), (2, 4 * T)):
        policy, batch = rolled_out()
        config = replace(CONFIG, micro_batch=micro_batch, accumulation=accumulation)
        metrics, _ = one_update(policy, batch, config)
        results.append(policy.module.weight.detach())
        assert metrics["ratio_min"] == pytest.approx(1, abs=1e-6)  # other rows in a matrix product may round differently
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)


def test_clipped_loss_has_the_gradient_of_a_hand_written_one():
    ratio = torch.tensor([0.7, 0.7, 0.95, 1.0, 1.05, 1.3, 1.3], requires_grad=True)
    advantages = torch.tensor([1.0, -1.0, 2.0, -3.0, -0.5, 1.0, -1.0])
    clipped_policy_loss(ratio, advantages, 0.1).sum().backward()
    clipped = ((advantages > 0) & (ratio > 1.1)) | ((advantages < 0) & (ratio < 0.9))
    assert torch.equal(ratio.grad, torch.where(clipped, 0.0, -advantages)) and clipped.sum() == 2


@pytest.mark.parametrize("mode", ["fixed", "moving", "dual", "stepwise"])
def test_nothing_moves_before_the_first_update(mode):
    """Learning rate 0: every ratio of every micro-batch is exactly 1, both KL terms exactly 0."""
    config = replace(CONFIG, kl_mode=mode, kl_velocity="closed_form")
    policy, batch = rolled_out(config)
    anchor = Anchor(policy.module, every=None if mode == "fixed" else 3) if mode != "stepwise" else None
    optimizer = torch.optim.SGD(policy.module.parameters(), lr=0.0)
    metrics, updates = one_update(policy, batch, config, optimizer, anchor)
    assert metrics["ratio_min"] == metrics["ratio_max"] == 1 and updates == T
    assert metrics["kl_velocity"] == 0 and metrics.get("kl_position", 0) == 0 and metrics["clip_low"] == 0


def test_the_reference_pass_is_skipped_while_the_anchor_is_the_behaviour_policy():
    config = replace(CONFIG, kl_mode="moving")
    policy, batch = rolled_out(config)
    anchor = Anchor(policy.module, every=3)
    metrics, _ = one_update(policy, batch, config, anchor=anchor)
    # 5 updates; the anchor is the rollout's policy during the first three, and has moved on for the last two.
    assert metrics["update_passes"] == 5 + 2 and anchor.refreshed_at == 3


def test_position_kl_is_measured_against_the_anchor():
    config = replace(CONFIG, kl_mode="fixed", kl_schedule="fixed", kl_lambda=0.3, accumulation=T)
    policy, batch = rolled_out(config)
    anchor = Anchor(policy.module, every=None)
    with torch.no_grad():  # as after earlier updates: the anchor is neither the policy nor the rollout's
        anchor._copies[0].add_(0.1 * torch.randn(DIM, DIM, generator=torch.Generator().manual_seed(3)))
    batch.collected_at, anchor.refreshed_at = 7, 0
    scales, kl = equalizer_scales(batch.sde).float(), 0.0
    for k in range(T):
        x, sigma = batch.trajectory.states[:, k], batch.sde.sigmas[k].float().expand(B)
        with torch.no_grad(), anchor.swapped_in():
            mean_ref, _ = batch.sde.transition(x, policy.velocity(x, sigma, batch.conditions), k)
        mean, std = batch.sde.transition(x, policy.velocity(x, sigma, batch.conditions), k)
        kl = kl + gaussian_kl(mean, mean_ref, std).mean() / T
    (gradient,) = torch.autograd.grad(objective(policy, batch, scales) + 0.3 * kl, policy.module.weight)
    start = policy.module.weight.detach().clone()
    metrics, _ = one_update(policy, batch, config, anchor=anchor)
    assert metrics["kl_position"] == pytest.approx(kl.item(), rel=1e-4)
    torch.testing.assert_close(start - policy.module.weight.detach(), gradient, rtol=1e-4, atol=1e-6)


def test_lambda_follows_its_schedule():
    config = replace(CONFIG, kl_mode="stepwise", kl_switch=2)
    policy, batch = rolled_out(config)
    assert [one_update(policy, batch, config, torch.optim.SGD(policy.module.parameters(), lr=0.0), None, i)[0]["lambda_kl"]
            for i in (0, 1, 2)] == [1e-7, 1e-7, 1e-5]  # fmt: skip


# ---------------------------------------------------------------------------------------------- failures
def failing(place):
    def scores(x, prompts):
        result = reward(x, prompts)
        result["MQ"][place] = math.nan
        return result

    return scores


def test_a_failed_sample_takes_no_part():
    config = replace(CONFIG, accumulation=T)
    policy, batch = rolled_out(config, reward=failing(5))
    assert batch.metrics["reward_failed"] == 1 / 8 and batch.valid.tolist() == [True] * 5 + [False] + [True] * 2
    assert math.isfinite(batch.metrics["reward_mean"])
    rows = [i for i in range(B) if i != 5]
    (gradient,) = torch.autograd.grad(
        objective(policy, batch, equalizer_scales(batch.sde).float(), rows), policy.module.weight
    )
    start = policy.module.weight.detach().clone()
    one_update(policy, batch, config)
    torch.testing.assert_close(start - policy.module.weight.detach(), gradient, rtol=1e-4, atol=1e-6)


def test_all_samples_failing_is_an_error():
    with pytest.raises(RuntimeError, match="at most a share of 0.2 of the samples .* got 1.000; first cause"):
        rolled_out(reward=failing(slice(None)))


def test_an_evaluation_counts_what_it_could_not_score():
    policy, ode, prompts = LinearPolicy(), SDE("sage_grpo", 0.0, sigma_schedule(T)), ["a"] * B
    whole, _ = evaluate(policy, reward, prompts, ode, generators(0), replace(CONFIG, batch_size=B))
    metrics, _ = evaluate(policy, failing([1, 5]), prompts, ode, generators(0), replace(CONFIG, batch_size=B))
    assert whole["eval_failed"] == 0 and metrics["eval_failed"] == 2 / B
    assert math.isfinite(metrics["eval_reward"]) and metrics["eval_reward"] != whole["eval_reward"]
    assert metrics["eval_VQ"] == whole["eval_VQ"]


def test_samples_that_are_not_finite_are_never_scored():
    policy, sde, config = LinearPolicy(), SDE("sage_grpo", 0.5, sigma_schedule(T)), replace(CONFIG, batch_size=B)
    with torch.no_grad():
        policy.module.weight[0, 0] = math.nan
    for run in (collect, evaluate):
        with pytest.raises(FloatingPointError, match="samples must be finite"):
            run(policy, lambda videos, prompts: pytest.fail("scored"), ["a"] * B, sde, generators(0), config)


def test_a_wrong_first_ratio_is_an_error():
    policy, batch = rolled_out()
    with torch.no_grad():
        policy.module.weight.mul_(1.05)
    with pytest.raises(RuntimeError, match="the ratio must be 1 before the first update"):
        one_update(policy, batch, replace(CONFIG, clip_range=1e-4))


def test_a_non_finite_loss_stops_before_the_optimizer_acts():
    policy, batch = rolled_out()
    batch.advantages[2] = math.inf
    start = policy.module.weight.detach().clone()
    with pytest.raises(FloatingPointError, match="loss and gradient norm must be finite"):
        one_update(policy, batch, CONFIG)
    assert torch.equal(start, policy.module.weight)


def test_gradient_norm_is_clipped():
    policy, batch = rolled_out()
    start = policy.module.weight.detach().clone()
    metrics, _ = one_update(policy, batch, replace(CONFIG, accumulation=T, max_grad_norm=1e-3))
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
    assert len({tuple(order) for order in visits}) > 1


def test_a_group_may_span_ranks():
    """Two ranks of half a batch each see the rewards of all, and together get the advantages of one process."""
    _, whole = rolled_out()
    prompts, sde = ["a"] * 4 + ["bcd"] * 4, SDE("sage_grpo", 0.5, sigma_schedule(T))
    class Rank(OneProcess):
        def __init__(self, rank, everything):
            self.rank, self.everything = rank, everything

        def __call__(self, tensor):
            return self.everything(tensor)

    config = replace(CONFIG, group_size=8)
    scores = reward(whole.trajectory.states[:, -1], prompts)
    _, one = rolled_out(config)
    for rank in (0, 1):
        mine, policy = slice(4 * rank, 4 * rank + 4), LinearPolicy()
        names = iter(scores)
        gather = Rank(rank, lambda tensor, names=names: scores[next(names)].double())
        batch = collect(policy, reward, prompts[mine], sde, generators(0)[mine], config, 0, gather)
        torch.testing.assert_close(batch.advantages, one.advantages[mine])


@pytest.mark.parametrize(
    "changes, rule",
    [
        (dict(group_size=1), "group_size must be at least 2"),
        (dict(accumulation=0), "accumulation must be at least 1: got 0"),
        (dict(clip_range=0.0), "clip_range must be positive"),
        (dict(kl_lambda=-1.0), "kl_lambda must not be negative"),
    ],
)
def test_settings_that_cannot_work(changes, rule):
    with pytest.raises(ValueError, match=rule):
        replace(CONFIG, **changes).check()


def test_divisibility_of_the_batch():
    assert optimizer_steps(8, 5, replace(CONFIG, micro_batch=2, accumulation=4)) == 5
    with pytest.raises(ValueError, match="micro_batch must divide the samples per rank: got 3 and 8"):
        optimizer_steps(8, 5, replace(CONFIG, micro_batch=3))
    with pytest.raises(ValueError, match=r"accumulation must divide .* got 3 and 8 / 8 × 5 = 5"):
        optimizer_steps(8, 5, replace(CONFIG, accumulation=3))
