"""Temporal gradient equalizer: Eq. 8 and 9. One scale per step, so that each step moves the policy as much as any other."""

import torch


def gradient_norms(sde):
    """Eq. 8:  ‖∇_mean log π‖ ∝ 1/Σ: it vanishes at high noise and explodes at low noise (Fig. 4).

    What the optimizer sees is the gradient with respect to the VELOCITY, the network's output, so N_t follows the chain
    rule one link further, as in the released code:   N_t = |∂mean/∂v| / Σ.
        Eq. 7:         ∂mean/∂v = −(Δ + ½Σ²·(1 − sigma)/sigma)
        cps, exact:    ∂mean/∂v = −sigma·(1 − sigma') + sqrt(sigma'² − Σ²)·(1 − sigma)
    With log π a mean over D elements, E‖∇_v log π‖ ≈ N_t / √D.

    Returns float64 [T]; 0 on deterministic steps, which have no log-probability.
    """
    sigma, sigma_next, delta, variance, std, noise_kept = sde.table
    if sde.sde_type in ("cps", "exact"):
        dmean_dv = -sigma * (1 - sigma_next) + noise_kept * (1 - sigma)
    else:
        dmean_dv = -(delta + variance / 2 * (1 - sigma) / sigma)
    return torch.where(sde.stochastic, dmean_dv.abs() / torch.where(sde.stochastic, std, 1.0), 0.0)


def equalizer_scales(sde, eps=1e-12):
    """Eq. 9:  S_t = median_τ(N_τ) / (N_t + ε), multiplied on the policy term of step t (not on the KL).

    The median runs over the stochastic steps only and is torch's lower median, as in the released code: deterministic
    steps would drag it to 0. They get S_t = 0. Returns float64 [T].
    """
    norms = gradient_norms(sde)
    if not sde.stochastic.any():
        raise ValueError("the equalizer needs at least one stochastic step: this SDE has none; raise eta or the steps")
    return torch.where(sde.stochastic, norms[sde.stochastic].median() / (norms + eps), 0.0)
