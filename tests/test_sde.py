"""Eq. 1–3, 5–7, 16 against quadrature, additivity, independent transcriptions, torch.distributions and autograd."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import sde as sde_module
from sde import (
    SDE,
    SDE_TYPES,
    SIGMA_MAX,
    diffusion_coefficient,
    interpolate,
    log_prob,
    predict_noise,
    predict_x0,
    randn,
    rollout,
    sage_variance,
    score,
    sigma_schedule,
)
from toy.gaussian import GaussianMixture
from toy.walk import integral_of_eq_5

steps, shifts, etas = st.integers(1, 1000), st.floats(0.1, 20), st.floats(0.01, 1)
sigma_pairs = st.tuples(st.floats(1e-3, 0.99), st.floats(1e-3, 0.99)).filter(lambda p: p[0] - p[1] > 1e-3)


def f64(x):
    return torch.tensor(x, dtype=torch.float64)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


# ---------------------------------------------------------------------------------------------- schedule, Eq. 2, 3
@pytest.mark.parametrize("shift", [0.3, 1.0, 5.0])
def test_schedule_is_its_formula(shift):
    """Written with fractions: σ_k = shift·u/(1 + (shift − 1)·u), u = 1 − k/T. A shift below 1 spends more steps at low
    noise."""
    exact = Fraction(str(shift))
    levels = [Fraction(10 - k, 10) for k in range(11)]
    expected = [float(exact * u / (1 + (exact - 1) * u)) for u in levels]
    assert sigma_schedule(10, shift).tolist() == pytest.approx(expected, rel=1e-14)
    assert (expected[5] < 0.5) == (shift < 1)


@given(steps, shifts)
def test_schedule_falls_from_one_to_zero(T, shift):
    sigmas = sigma_schedule(T, shift)
    assert sigmas.dtype == torch.float64 and len(sigmas) == T + 1
    assert sigmas[0] == 1 and sigmas[-1] == 0 and (sigmas.diff() < 0).all()


@given(st.floats(0, 1))
def test_predictions_invert_the_interpolation(sigma):
    x0, z = torch.randn(2, 3, 4, dtype=torch.float64, generator=rng())
    x, v = interpolate(x0, z, sigma), z - x0
    torch.testing.assert_close(predict_x0(x, v, sigma), x0)
    torch.testing.assert_close(predict_noise(x, v, sigma), z)


def test_score_is_the_gradient_of_the_log_density():
    world = GaussianMixture([0.3, 0.7], [[2.0, 0.0], [-1.0, 1.0]], [[[0.5, 0.1], [0.1, 0.2]], [[0.3, 0.0], [0.0, 1.0]]])
    x = torch.randn(50, 2, dtype=torch.float64, generator=rng(), requires_grad=True)
    for sigma in (0.05, 0.4, 0.9, 1.0):
        (gradient,) = torch.autograd.grad(world.log_density(x, sigma).sum(), x)
        torch.testing.assert_close(score(x, world.velocity(x, sigma), sigma).detach(), gradient, rtol=1e-9, atol=1e-9)


# ---------------------------------------------------------------------------------------------- Eq. 5
@given(sigma_pairs, st.floats(0.01, 3))
def test_variance_is_the_integral_of_epsilon_squared(pair, eta):
    sigma, sigma_next = pair
    integral = integral_of_eq_5(sigma, sigma_next, eta)
    assert sage_variance(f64(sigma), f64(sigma_next), eta).item() == pytest.approx(integral, rel=1e-10)


@given(st.lists(st.floats(1e-3, 0.99), min_size=3, max_size=3, unique=True), st.floats(0.01, 3))
def test_variance_is_additive(points, eta):
    a, b, c = sorted(points, reverse=True)
    whole = sage_variance(f64(a), f64(c), eta)
    torch.testing.assert_close(
        sage_variance(f64(a), f64(b), eta) + sage_variance(f64(b), f64(c), eta), whole, rtol=1e-9, atol=1e-15
    )


@given(steps, shifts, etas)
def test_variance_scales_with_eta_squared(T, shift, eta):
    for sde_type in ("sage_grpo", "flow_grpo", "dance_grpo"):
        one, scaled = (SDE(sde_type, e, sigma_schedule(T, shift)).variance for e in (1.0, eta))
        torch.testing.assert_close(scaled, eta**2 * one)


@given(st.integers(2, 1000), shifts, etas)
def test_sage_injects_less_than_flow_below_sigma_max(T, shift, eta):
    sigmas = sigma_schedule(T, shift)
    sage, flow = (SDE(t, eta, sigmas).variance for t in ("sage_grpo", "flow_grpo"))
    below = sigmas[:-1] < SIGMA_MAX
    assert (sage[below] < flow[below]).all()


def test_on_the_first_step_sage_injects_more_than_flow():
    sage, flow = (SDE(t, 1.0, sigma_schedule(20, 5.0)).variance[0].item() for t in ("sage_grpo", "flow_grpo"))
    assert sage == pytest.approx(1.24, abs=0.005) and flow == pytest.approx(1.00, abs=0.005)


@given(st.floats(0.01, 0.98), st.floats(0.1, 2))
def test_a_short_step_has_the_variance_of_its_start(sigma, eta):
    delta = 1e-6
    expected = diffusion_coefficient(sigma, eta) ** 2 * delta
    assert sage_variance(f64(sigma), f64(sigma - delta), eta).item() == pytest.approx(expected, rel=2e-3)


@given(steps, shifts, etas, st.sampled_from(SDE_TYPES), st.booleans())
def test_every_schedule_gives_finite_steps(T, shift, eta, sde_type, noisy_last_step):
    """Also where the released formula turns NaN: from T = 68 on at shift 5, 30 at shift 12."""
    sde = SDE(sde_type, eta, sigma_schedule(T, shift), noisy_last_step)
    assert sde.variance.isfinite().all() and (sde.variance >= 0).all()
    for k, sigma_next in enumerate(sde.sigmas[1:].tolist()):
        within_the_clamp = sde_type == "sage_grpo" and sigma_next >= SIGMA_MAX
        ends_in_data = sde_type in ("cps", "exact") and sigma_next == 0
        made_an_ode_step = k == T - 1 and not noisy_last_step
        assert bool(sde.stochastic[k]) != (within_the_clamp or ends_in_data or made_an_ode_step), k
    x, v = torch.randn(2, T, 2, generator=rng())
    mean, std = sde.transition(x, v, torch.arange(T))
    assert mean.isfinite().all() and std.isfinite().all() and mean.dtype == torch.float32


def test_released_clamp_agrees_where_it_is_valid():
    """The released code clamps 1 − sigma at 0.003 inside the logarithm only; on its valid schedules it differs by ≤
    η²·0.003.
    """
    sigmas, eta = sigma_schedule(20, 5.0), 0.5
    released = eta**2 * (-(1 - sigmas[1]) + math.log((1 - sigmas[1]) / 0.003))
    assert abs(SDE("sage_grpo", eta, sigmas).variance[0] - released) <= eta**2 * 0.003 * 1.000001


# ---------------------------------------------------------------------------------------------- Eq. 7 and its rivals
def transcription(sde_type, x, v, sigma, sigma_next, second_sigma, eta):
    """Each sampler once more, scalar by scalar, from the published formulas. Returns (mean, std)."""
    x0, delta = x - sigma * v, sigma - sigma_next
    if sde_type == "cps":
        std = sigma_next * math.sin(math.pi / 2 * eta)
        return (1 - sigma_next) * x0 + math.sqrt(max(sigma_next**2 - std**2, 0.0)) * (x0 + v), std
    if sde_type == "exact":
        q = sigma_next * (1 - sigma) / (sigma * (1 - sigma_next))
        kept = sigma_next / sigma * q ** (eta**2 / 2) * (x - (1 - sigma) * x0)
        return (1 - sigma_next) * x0 + kept, sigma_next * math.sqrt(1 - q ** (eta**2))
    if sde_type == "sage_grpo":
        high, low = min(sigma, 0.997), min(sigma_next, 0.997)
        variance = eta**2 * ((-high - math.log(1 - high)) - (-low - math.log(1 - low)))
    elif sde_type == "flow_grpo":
        at_one = second_sigma if sigma == 1 else sigma
        variance = (eta * math.sqrt(sigma / (1 - at_one)) * math.sqrt(delta)) ** 2
    elif sde_type == "dance_grpo":
        variance = eta * eta * delta
    else:
        raise ValueError(f"no formula for {sde_type}")
    return x - delta * v - 0.5 * variance * (x - (1 - sigma) * x0) / sigma**2, math.sqrt(variance)


@pytest.mark.parametrize("sde_type", SDE_TYPES)
@pytest.mark.parametrize(
    "T, shift, eta", [(1, 5.0, 0.5), (7, 1.0, 0.3), (20, 5.0, 0.5), (20, 3.0, 1.0), (50, 5.0, 0.7), (100, 5.0, 0.5)]
)
def test_transition_agrees_with_an_independent_transcription(sde_type, T, shift, eta):
    sigmas = sigma_schedule(T, shift)
    sde = SDE(sde_type, eta, sigmas)
    x, v = torch.randn(2, 6, 3, dtype=torch.float64, generator=rng())
    for k in range(T):
        mean, std = sde.transition(x, v, k)
        expected, expected_std = transcription(sde_type, x, v, *sigmas[k : k + 2].tolist(), sigmas[1].item(), eta)
        torch.testing.assert_close(mean, expected, rtol=1e-10, atol=1e-13)
        torch.testing.assert_close(std, torch.full_like(std, expected_std), rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("sde_type", SDE_TYPES)
def test_without_noise_every_sampler_is_the_euler_step(sde_type):
    """Eq. 1, and with it every deterministic step of a noisy sampler."""
    sigmas = sigma_schedule(9, 5.0)
    x, v = torch.randn(2, 6, 3, dtype=torch.float64, generator=rng())
    for k in range(9):
        mean, std = SDE(sde_type, 0.0, sigmas).transition(x, v, k)
        assert (std == 0).all()
        torch.testing.assert_close(mean, x - (sigmas[k] - sigmas[k + 1]) * v)
    for noisy, deterministic in ((0.5, False), (0.0, True)):
        mean, std = SDE(sde_type, noisy, sigmas, noisy_last_step=deterministic).transition(x, v, 8)
        torch.testing.assert_close(mean, x - sigmas[8] * v)
        assert (std == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sde_type", SDE_TYPES)
def test_each_sample_may_stand_at_its_own_step(sde_type, dtype):
    sde = SDE(sde_type, 0.5, sigma_schedule(8))
    x, v = torch.randn(2, 8, 3, 2, dtype=dtype, generator=rng())
    mean, std = sde.transition(x, v, torch.arange(8).flip(0))
    assert mean.dtype == std.dtype == dtype and std.shape == (8, 1, 1)
    for row, k in enumerate(range(7, -1, -1)):
        one_mean, one_std = sde.transition(x[row : row + 1], v[row : row + 1], k)
        assert torch.equal(one_mean[0], mean[row]) and torch.equal(one_std[0], std[row])


# ---------------------------------------------------------------------------------------------- log_prob, rollout
@given(st.floats(1e-3, 10), st.integers(1, 40))
def test_log_prob_is_the_mean_log_density(std, D):
    mean, x = torch.randn(2, 4, D, dtype=torch.float64, generator=rng(D))
    expected = torch.distributions.Normal(mean, std).log_prob(x).mean(1)
    torch.testing.assert_close(log_prob(x, mean, f64(std)), expected)


def log_ratios(D, delta, count):
    """log π_new − log π_old of samples of the old policy, whose mean the new one has moved by δ·Σ. [count]"""
    std, generator, ratios = f64(0.3), rng(D), []
    old_mean = torch.zeros(1, D, dtype=torch.float64)
    new_mean = old_mean + delta * std
    for _ in range(count):
        x_next = std * torch.randn(1, D, generator=generator, dtype=torch.float64)
        ratios.append((log_prob(x_next, new_mean, std) - log_prob(x_next, old_mean, std)).item())
    return np.array(ratios)


@pytest.mark.parametrize("D", [3_000, 100_000, 1_000_000])
@pytest.mark.parametrize("delta", [0.005, 0.02])
def test_log_ratio_spreads_with_d_and_shifts_without_it(D, delta):
    """The log ratio of old samples has the mean −δ²/2 at every D, and the standard deviation δ/√D."""
    count = 40
    ratios = log_ratios(D, delta, count)
    spread = delta / D**0.5
    assert ratios.mean() == pytest.approx(-(delta**2) / 2, abs=4 * spread / count**0.5)
    assert ratios.std(ddof=1) == pytest.approx(spread, rel=0.5)  # 4.5 standard errors of a std over 40 samples


def test_no_clip_range_serves_every_resolution():
    """c = 1e-4 and δ = 0.02, shares of ρ beyond 1 ± c: both sides at D = 3000, the lower alone at 10⁶."""

    def beyond(D, delta, count, c=1e-4):
        ratios = np.exp(log_ratios(D, delta, count))
        return np.mean(ratios < 1 - c), np.mean(ratios > 1 + c)

    low, high = beyond(3_000, 0.02, 1000)
    assert 0.4 < low < 0.7 and 0.1 < high < 0.3
    assert beyond(1_000_000, 0.02, 20) == (1, 0)
    low_before, _ = beyond(1_000_000, 0.012, 20)
    low_after, _ = beyond(1_000_000, 0.016, 20)
    assert low_before == 0 and low_after > 0.8  # the edge lies at δ = √(2c) ≈ 0.014


@pytest.mark.parametrize("sde_type", SDE_TYPES)
def test_rollout_keeps_what_the_update_needs(sde_type):
    sde = SDE(sde_type, 0.5, sigma_schedule(6), noisy_last_step=False)
    seen = []
    trajectory = rollout(lambda x, sigma: 0.3 * x + sigma[:, None], torch.ones(5, 3), sde, rng(), seen.append)
    assert seen == list(range(6)) and trajectory.states.shape == (5, 7, 3) and trajectory.states.dtype == torch.float32
    for k in range(6):
        x = trajectory.states[:, k]
        mean, std = sde.transition(x, 0.3 * x + sde.sigmas[k].float(), k)
        assert torch.equal(mean, trajectory.means[:, k])
        if sde.stochastic[k]:
            expected = torch.distributions.Normal(mean, std).log_prob(trajectory.states[:, k + 1]).mean(1)
            torch.testing.assert_close(trajectory.log_probs[:, k], expected)
        else:
            assert torch.equal(trajectory.states[:, k + 1], mean) and trajectory.log_probs[:, k].isnan().all()
    assert not sde.stochastic[5]


def test_rollout_stays_float32_under_a_low_precision_model():
    trajectory = rollout(
        lambda x, _: x.bfloat16(), torch.ones(2, 3).bfloat16(), SDE("sage_grpo", 0.5, sigma_schedule(3)), rng()
    )
    assert {t.dtype for t in (trajectory.states, trajectory.means, trajectory.log_probs)} == {torch.float32}


def test_noise_of_a_sample_does_not_depend_on_its_batch():
    sde = SDE("sage_grpo", 0.5, sigma_schedule(4))
    whole, part = (
        rollout(lambda x, _: -x, torch.ones(len(seeds), 3), sde, [rng(s) for s in seeds]).states
        for seeds in ([1, 2, 3], [3])
    )
    assert torch.equal(whole[2], part[0]) and not torch.equal(whole[0], whole[1])
    with pytest.raises(ValueError, match="one generator per sample"):
        randn((2, 3), [rng()])


def test_a_deterministic_last_step_changes_nothing_before_it():
    noisy, deterministic = (SDE("sage_grpo", 0.5, sigma_schedule(10), last) for last in (True, False))
    assert noisy.stochastic.all() and deterministic.stochastic.tolist() == [True] * 9 + [False]
    assert torch.equal(noisy.variance[:9], deterministic.variance[:9])


# ---------------------------------------------------------------------------------------------- bad arguments
@pytest.mark.parametrize(
    "call, rule",
    [
        (lambda: sigma_schedule(0), "num_steps must be at least 1: got 0"),
        (lambda: sigma_schedule(5, 0.0), "shift must be positive"),
        (lambda: SDE("ddpm", 0.5, sigma_schedule(5)), "sde_type must be one of sage_grpo"),
        (lambda: SDE("sage_grpo", -0.1, sigma_schedule(5)), "eta must be finite and not negative"),
        (lambda: SDE("sage_grpo", math.nan, sigma_schedule(5)), "eta must be finite and not negative"),
        (lambda: SDE("cps", 1.8, sigma_schedule(5)), r"eta must lie in \[0, 1\] for cps"),
        (lambda: SDE("sage_grpo", 0.5, [1.0, 0.5, 0.5, 0.0]), "sigmas must fall strictly"),
        (lambda: SDE("sage_grpo", 0.5, [0.0, 1.0]), "sigmas must fall strictly"),
        (lambda: SDE("sage_grpo", 0.5, [1.0]), "at least two noise levels"),
        (lambda: SDE("sage_grpo", 0.5, [1.0, 0.0]).transition(torch.ones(2, 3), torch.ones(2, 1), 0), "the same shape"),
    ],
)
def test_bad_arguments_name_the_rule(call, rule):
    with pytest.raises(ValueError, match=rule):
        call()


def test_module_needs_torch_alone():
    text = open(sde_module.__file__, encoding="utf-8").read()
    imported = {line.split()[1] for line in text.splitlines() if line.startswith(("import ", "from "))}
    assert imported == {"math", "dataclasses", "typing", "torch"}
