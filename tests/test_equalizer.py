"""Eq. 8 and 9 against autograd of log_prob."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from equalizer import equalizer_scales, gradient_norms
from sde import SDE, SDE_TYPES, log_prob, sigma_schedule

D = 4096


@pytest.mark.parametrize("sde_type", SDE_TYPES)
@pytest.mark.parametrize("T, eta", [(20, 0.5), (10, 0.9)])
def test_measured_gradient_norms(sde_type, T, eta):
    """By autograd through transition and log_prob: N_t of every step, and that S_t makes them equal."""
    sde = SDE(sde_type, eta, sigma_schedule(T))
    norms, scales = gradient_norms(sde), equalizer_scales(sde)
    generator = torch.Generator().manual_seed(0)
    equalized = []
    for k in range(T):
        if not sde.stochastic[k]:
            assert norms[k] == scales[k] == 0
            continue
        x, v, xi = torch.randn(3, 64, D, generator=generator, dtype=torch.float64)
        v.requires_grad_()
        mean, std = sde.transition(x, v, k)
        mean.retain_grad()
        log_prob((mean + std * xi).detach(), mean, std).sum().backward()
        measured = v.grad.norm(dim=1).mean().item() * D**0.5
        assert measured == pytest.approx(norms[k].item(), rel=0.01)
        assert mean.grad.norm(dim=1).mean().item() * D**0.5 == pytest.approx(1 / sde.std[k].item(), rel=0.01)
        equalized.append(scales[k].item() * measured)
    assert max(equalized) / min(equalized) < 1.02  # 6.6 to 178 without the scales at T = 20


@given(st.integers(1, 300), st.floats(0.1, 20), st.floats(0.01, 1), st.sampled_from(SDE_TYPES), st.booleans())
def test_scales_are_finite_on_every_schedule(T, shift, eta, sde_type, noisy_last_step):
    sde = SDE(sde_type, eta, sigma_schedule(T, shift), noisy_last_step)
    if not sde.stochastic.any():
        with pytest.raises(ValueError, match="at least one stochastic step"):
            equalizer_scales(sde)
        return
    scales = equalizer_scales(sde)
    assert scales.isfinite().all()
    assert ((scales > 0) == sde.stochastic).all()


def test_printed_spread_of_the_paper_schedule():
    for sde_type, spread in {"sage_grpo": 148, "flow_grpo": 96, "dance_grpo": 6.6, "cps": 86, "exact": 178}.items():
        norms = gradient_norms(SDE(sde_type, 0.5, sigma_schedule(20)))
        norms = norms[norms > 0]
        assert (norms.max() / norms.min()).item() == pytest.approx(spread, rel=0.01)


@pytest.mark.parametrize("T, numerator, of_all_steps", [(6, 0.226, 0.126), (10, 0.197, 0.142)])
def test_deterministic_steps_do_not_drag_the_median_down(T, numerator, of_all_steps):
    sde = SDE("sage_grpo", 0.5, sigma_schedule(T), noisy_last_step=False)
    norms = gradient_norms(sde)
    assert (equalizer_scales(sde) * norms)[0].item() == pytest.approx(numerator, abs=6e-4)
    assert norms.median().item() == pytest.approx(of_all_steps, abs=6e-4)  # with the last one's 0 among them


def test_scales_use_the_lower_median_of_the_stochastic_steps():
    sde = SDE("sage_grpo", 0.5, sigma_schedule(5), noisy_last_step=False)  # four steps, so two are in the middle
    norms, scales = gradient_norms(sde), equalizer_scales(sde)
    assert (scales * norms)[1] == pytest.approx(sorted(norms[:4].tolist())[1]) and norms[4] == scales[4] == 0
