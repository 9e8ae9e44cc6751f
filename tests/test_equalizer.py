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
    sde, norms = SDE(sde_type, eta, sigma_schedule(T)), gradient_norms(SDE(sde_type, eta, sigma_schedule(T)))
    generator = torch.Generator().manual_seed(0)
    for k in range(T):
        if not sde.stochastic[k]:
            assert norms[k] == 0
            continue
        x, v, xi = torch.randn(3, 64, D, generator=generator, dtype=torch.float64)
        v.requires_grad_()
        mean, std = sde.transition(x, v, k)
        mean.retain_grad()
        log_prob((mean + std * xi).detach(), mean, std).sum().backward()
        assert v.grad.norm(dim=1).mean().item() * D**0.5 == pytest.approx(norms[k].item(), rel=0.01)
        assert mean.grad.norm(dim=1).mean().item() * D**0.5 == pytest.approx(1 / sde.std[k].item(), rel=0.01)


@given(st.integers(1, 300), st.floats(0.1, 20), st.floats(0.01, 1), st.sampled_from(SDE_TYPES), st.booleans())
def test_equalized_norms_are_flat(T, shift, eta, sde_type, noisy_last_step):
    sde = SDE(sde_type, eta, sigma_schedule(T, shift), noisy_last_step)
    if not sde.stochastic.any():
        with pytest.raises(ValueError, match="at least one stochastic step"):
            equalizer_scales(sde)
        return
    scales, norms = equalizer_scales(sde), gradient_norms(sde)
    assert scales.isfinite().all() and (scales[~sde.stochastic] == 0).all()
    flat = (scales * norms)[sde.stochastic]
    assert flat.max() / flat.min() == pytest.approx(1, rel=1e-6)
    assert flat.median() == pytest.approx(norms[sde.stochastic].median().item(), rel=1e-6)


def test_printed_spread_of_the_paper_schedule():
    for sde_type, spread in {"sage_grpo": 148, "flow_grpo": 96, "dance_grpo": 6.6, "cps": 86}.items():
        norms = gradient_norms(SDE(sde_type, 0.5, sigma_schedule(20)))
        norms = norms[norms > 0]
        assert (norms.max() / norms.min()).item() == pytest.approx(spread, rel=0.01)


def test_scales_use_the_lower_median_of_the_stochastic_steps():
    sde = SDE("sage_grpo", 0.5, sigma_schedule(5), noisy_last_step=False)  # four steps, so two are in the middle
    norms, scales = gradient_norms(sde), equalizer_scales(sde)
    assert (scales * norms)[1] == pytest.approx(sorted(norms[:4].tolist())[1]) and norms[4] == scales[4] == 0
