"""Temporal gradient equalizer: Eq. 8 and 9. One scale per step, so that all steps move the policy equally."""

import torch


def gradient_norms(sde):
    """N_t = |∂mean/∂v| / Σ = |b_t| / Σ_t: the norm of Eq. 8 taken with respect to the VELOCITY. Float64 [T].

    Eq. 8 as printed is another norm:  ‖∇_mean log π‖ ∝ 1/Σ, with respect to the mean. It vanishes at high noise and
    explodes at low noise (Fig. 4). The optimizer sees the gradient at the network's output, one link further along the
    chain rule: mean = a·x + b·v, so ∂mean/∂v = b (sde.py). The released code uses this norm, too. Scales made from the
    printed 1/Σ would leave the norms a factor of 21 apart (T = 20, shift 5, η = 0.5).

    With log π a mean over D elements, E‖∇_v log π‖ ≈ N_t / √D. Deterministic steps have no log-probability: 0.
    """
    std = torch.where(sde.stochastic, sde.std, 1.0)
    return torch.where(sde.stochastic, sde.b.abs() / std, 0.0)


def equalizer_scales(sde, guard=1e-12):
    """Eq. 9:  S_t = median_τ(N_τ) / (N_t + guard). It multiplies the policy term of step t, not the KL.

    The median runs over the stochastic steps only and is torch's lower median, as in the released code: deterministic
    steps would drag it to 0. They get S_t = 0. Where --sde_steps draws the stochastic steps, the median depends on the
    draw, and with it the size of an update. Returns float64 [T]. ValueError where no step is stochastic.
    """
    norms = gradient_norms(sde)
    if not sde.stochastic.any():
        raise ValueError("the equalizer needs at least one stochastic step: this SDE has none; raise eta or the steps")
    return torch.where(sde.stochastic, norms[sde.stochastic].median() / (norms + guard), 0.0)
