"""Eq. 11–15 against torch.distributions; the anchor's copies bit for bit."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from sde import log_prob
from trust_region import (
    KL_MODES,
    Anchor,
    LambdaController,
    dual_kl,
    gaussian_kl,
    kl_coefficient,
    kl_weights,
    stepwise_kl_closed_form,
    stepwise_kl_rollout_phase,
)


@given(st.floats(0.01, 5), st.integers(1, 30))
def test_kl_of_two_gaussians(std, D):
    a, b = torch.randn(2, 3, D, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(D))
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(a, std), normal(b, std)).flatten(1).mean(1)
    torch.testing.assert_close(gaussian_kl(a, b, torch.tensor(std, dtype=torch.float64)), expected)


def test_rollout_phase_estimate_converges_to_the_closed_form():
    """Eq. 15's mean and gradient, over 200 000 samples of π_old, within five standard errors of Eq. 12's."""
    generator = torch.Generator().manual_seed(0)
    n, std = 200_000, torch.tensor(0.7, dtype=torch.float64)
    old = torch.tensor([[0.2, -0.4]], dtype=torch.float64)
    new = (old + torch.tensor([[0.3, 0.1]], dtype=torch.float64)).requires_grad_()
    samples = old + std * torch.randn(n, 2, dtype=torch.float64, generator=generator)
    each = stepwise_kl_rollout_phase(log_prob(samples, new, std), log_prob(samples, old, std))  # [n]
    exact = stepwise_kl_closed_form(new, old, std).sum()
    assert (each < 0).any()  # a negative "KL" on single samples: that is what the estimate is
    assert abs(each.mean() - exact).item() < 5 * each.std().item() / n**0.5
    (estimated,) = torch.autograd.grad(each.mean(), new, retain_graph=True)
    (closed,) = torch.autograd.grad(exact, new)
    assert (estimated - closed).abs().max().item() < 5 * (1 / (2 * 0.7)) / n**0.5  # std of ξ/(D·Σ) per sample


def test_weights_of_each_mode():
    assert {mode: kl_weights(mode, 1.0, 0.1) for mode in KL_MODES} == {
        "none": (0, 0), "fixed": (1, 0), "stepwise": (0, 1), "moving": (1, 0), "dual": (1.0, 0.1),
    }  # fmt: skip
    assert dual_kl(2.0, 3.0, 1.0, 0.1) == pytest.approx(2.3)
    with pytest.raises(ValueError, match="kl_mode must be one of none, fixed"):
        kl_weights("both")


def test_schedules_of_lambda():
    def values(schedule):
        return [kl_coefficient(schedule, iteration, 1e-5, 1e-7, 2) for iteration in range(4)]

    assert values("fixed") == [1e-5] * 4
    assert values("two_stage") == [1e-7, 1e-7, 1e-5, 1e-5]
    assert values("milder") == pytest.approx([1e-7, 1e-7, 1e-6, 1e-6])
    assert values("ramp") == pytest.approx([1e-7, (1e-7 + 1e-5) / 2, 1e-5, 1e-5])
    assert kl_coefficient("ramp", 0, 1e-5, 1e-7, 0) == 1e-5  # a ramp of no length
    with pytest.raises(ValueError, match="kl_schedule must be one of"):
        kl_coefficient("cosine", 0, 1e-5, 1e-7, 2)


# ---------------------------------------------------------------------------------------------- the anchor
def module_and_input():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    module[0].bias.requires_grad_(False)
    return module, torch.randn(5, 3)


def change(module):
    with torch.no_grad():
        for p in module.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p))


@pytest.mark.parametrize("offload", [False, True])
def test_swap_gives_the_anchor_and_restores_bit_for_bit(offload):
    module, x = module_and_input()
    anchor, at_start = Anchor(module, every=3, offload=offload), module(x)
    change(module)
    before = [p.clone() for p in module.parameters()]
    with torch.no_grad(), anchor.swapped_in():
        assert torch.equal(module(x), at_start)
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))
    with pytest.raises(RuntimeError, match="inside"), anchor.swapped_in():
        raise RuntimeError("inside")
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))


@pytest.mark.parametrize(
    "kl, means",
    [
        (1e-4, [2.03, 5.99, 6.44, 0.29, 0.10, 0.10]),
        (0.0, [2.03, 5.99, 9.48, 10, 10, 10]),
        (0.6e-5, [2.03, 5.99, 9.43, 9.90]),
        (1.4e-5, [2.03, 5.99, 9.43, 9.90]),
    ],
)
def test_the_controller_follows_the_forks_numbers(kl, means):
    """Mean λ_KL of iterations of 40 backward passes, in 1e-6: a large KL ends at the smallest λ_KL, one of 0 at the
    largest, and one near its target leaves it where the ramp ended."""
    controller = LambdaController(1e-7, 1e-5, target=1e-5)
    seen = []
    for _ in means:
        total = 0.0
        for _ in range(40):
            total += controller.value
            controller.observe(kl)
        seen.append(total / 40 * 1e6)
    assert seen == pytest.approx(means, abs=0.006)


def test_the_controller_judges_the_mean_of_the_last_ten_and_goes_on_from_its_state():
    controller = LambdaController(1.0, 9.0, target=2.0, ramp=1)
    controller.observe(2.0)
    assert controller.value == 1.0  # no ramp is left, and the KL is at its target
    controller.value = 3.0
    controller.observe(20.0)  # (2 + 20) / 2 = 11 > 3
    assert controller.value == pytest.approx(2.7)
    for _ in range(9):
        controller.observe(0.0)
    assert controller.recent == [20.0] + [0.0] * 9 and controller.value == pytest.approx(2.7 * 0.9**5)
    controller.observe(0.0)  # the 20 is forgotten: a mean of 0 < 1
    assert controller.value == pytest.approx(2.7 * 0.9**5 * 1.1)
    again = LambdaController(1.0, 9.0, target=2.0, ramp=1)
    again.load_state_dict(json.loads(json.dumps(controller.state_dict())))
    for kl in (0.0, 5.0, 40.0):
        controller.observe(kl)
        again.observe(kl)
        assert again.state_dict() == controller.state_dict()
    with pytest.raises(ValueError, match="kl_lambda_early must be at most kl_lambda: .*: got 2 and 1"):
        LambdaController(2.0, 1.0, target=1.0)


@pytest.mark.parametrize("per_iteration, refreshed", [(1, [3, 6]), (2, [4, 8]), (5, [5, 10, 15])])
def test_anchor_moves_after_n_optimizer_steps_and_never_aliases(per_iteration, refreshed):
    """N = 3: at the end of the first iteration by which three optimizer steps have passed since the last refresh."""
    module, x = module_and_input()
    moving, fixed, start = Anchor(module, every=3), Anchor(module, every=None), module(x)
    seen, at_refresh = [], None
    for steps_made in range(per_iteration, refreshed[-1] + per_iteration, per_iteration):
        change(module)
        assert fixed.maybe_refresh(steps_made) is False
        if moving.maybe_refresh(steps_made):
            seen.append(steps_made)
            at_refresh = module(x)
    assert seen == refreshed and moving.refreshed_at == refreshed[-1] and fixed.refreshed_at == 0
    change(module)
    with torch.no_grad():
        with moving.swapped_in():
            assert torch.equal(module(x), at_refresh)
        with fixed.swapped_in():
            assert torch.equal(module(x), start)


def test_autograd_refuses_a_swap_between_forward_and_backward():
    module, x = module_and_input()
    anchor, loss = Anchor(module, every=1), module(x).square().mean()
    with anchor.swapped_in():
        pass
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_state_of_the_anchor_round_trips():
    module, x = module_and_input()
    anchor = Anchor(module, every=2)
    state = {name: value.clone() for name, value in anchor.state_dict().items()}
    assert "0.bias" not in state  # frozen: shared with the module
    change(module)
    anchor.maybe_refresh(2)
    anchor.load_state_dict(state, refreshed_at=0)
    assert anchor.refreshed_at == 0 and all(torch.equal(state[k], v) for k, v in anchor.state_dict().items())
    with pytest.raises(ValueError, match="refresh interval"):
        Anchor(module, every=0)
