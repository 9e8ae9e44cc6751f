"""Flow matching as a stochastic policy: Eq. 1–3, 5–7 and 16, the rival samplers of Table 1, log-probability, rollout.

Paper: Manifold-Aware Exploration for Reinforcement Learning in Video Generation (SAGE-GRPO), arXiv 2603.21872.

Symbols, here and in every other file. Five letters have two uses in the paper, ε, N, w, Σ and π; both are given below.
A and B are also the names of two sets of reward weights (rewards.py); N(m, V) is the normal distribution.
    sigma, sigma'   noise level at the start and at the end of a step; sigma falls from 1 (pure noise) to 0 (data)
    k               step index, sigmas[k] -> sigmas[k + 1];  T steps, T + 1 sigmas. In S_t and N_t the paper's t is k
    Δ  delta        sigma − sigma' > 0
    x, v            state and predicted velocity at sigma;  x' state at sigma'
    x0, z           data and noise;  x0_hat, z_hat: what a velocity predicts of them
    s               score, ∇ log p_sigma(x)
    ε(sigma)        diffusion coefficient of Eq. 16. The small constants that Eq. 4 and 9 also call ε are `guard` here
    w               Wiener process of Eq. 16. With an index (w_vq) it is a weight of Eq. 10
    η  eta          exploration scale of ε(sigma) (the released code uses 0.5 on HunyuanVideo-1.5)
    Σ  std          the EFFECTIVE standard deviation of the noise that one whole step adds;  Σ² variance. With an index
                    (Σ_i, Σ_t) it is a sum
    a, b            coefficients of a step's mean,  mean = a·x + b·v
    ξ               the noise of a step, N(0, I)
    D               number of elements of one sample
    π_θ, π_old      the policy, and the policy that made the rollout (the paper's π_{k−1}, where k counts policies). In
                    the std of cps, sin(ηπ/2), it is the number
    ρ               ratio π_θ/π_old;  c  clip range
    A, r            advantage and reward of a sample;  G  group_size, samples of one prompt;  B  samples of a batch
    N_t, S_t        gradient norm and scale of a step, Eq. 8 and 9.  The N of Eq. 13 is `anchor_every`
    β_pos, β_vel    weights of Eq. 14;  λ_KL  weight of the whole trust region

The schedule is a handful of scalars and Eq. 5 subtracts nearly equal ones, so all arithmetic on sigma is float64.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

SDE_TYPES = ("sage_grpo", "flow_grpo", "dance_grpo", "cps", "exact")
SIGMA_MAX = 0.997  # the integral of Eq. 5 diverges at sigma = 1; both of its ends stop here (see step_variances)


def sigma_schedule(num_steps, shift=5.0):
    """sigma_k = shift·u / (1 + (shift − 1)·u), u = linspace(1, 0, T + 1). Returns float64 [T + 1], from 1 to 0.

    shift > 1 spends more of the steps at high noise. Paper: T = 20. Released code: shift 5.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1: got {num_steps}")
    if not shift > 0:
        raise ValueError(f"shift must be positive: got {shift}")
    u = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)
    return shift * u / (1 - u + shift * u)  # the same denominator, arranged so that u = 1 gives exactly 1


# ---------------------------------------------------------------------------------------------- flow matching
# Eq. 1:  dx/dsigma = v(x, sigma, prompt). One Euler step of it is x' = x − Δ·v: what SDE.transition gives where Σ = 0.


def interpolate(x0, z, sigma):
    """Eq. 2:  x_sigma = (1 − sigma)·x0 + sigma·z,  z ~ N(0, I)."""
    return (1 - sigma) * x0 + sigma * z


def predict_x0(x, v, sigma):
    """Eq. 3:  v = z − x0, hence x0_hat = x − sigma·v.

    Erratum: one write-up prints v = (x − x0)/(1 − sigma). It is (x − x0)/sigma.
    """
    return x - sigma * v


def predict_noise(x, v, sigma):
    """Eq. 3:  v = z − x0, hence z_hat = x + (1 − sigma)·v."""
    return x + (1 - sigma) * v


def score(x, v, sigma):
    """s = ∇ log p_sigma(x) = −(x − (1 − sigma)·x0_hat) / sigma² = −z_hat / sigma.

    Erratum: some write-ups print −(x − x0_hat)/sigma². Without the factor (1 − sigma) the SDE no longer preserves the
    marginals, and more steps do not help (tests/test_marginals.py shows both).
    """
    return -predict_noise(x, v, sigma) / sigma


def diffusion_coefficient(sigma, eta):
    """ε(sigma) of Eq. 16:  ε = η·sqrt(sigma / (1 − sigma)), in  dx = [v − ½ε²·s] dsigma + ε dw  (sigma running down).

    The drift of Eq. 16 keeps every marginal p_sigma of the ODE for ANY function ε(sigma): in the Fokker–Planck equation
    the term −½ε²·s cancels the diffusion. This ε is the paper's choice among them; DanceGRPO's is the constant η.

    Changing this function does not change training: a step uses the integral of ε², which step_variances has in closed
    form. It stands here so that tests and figures can integrate it by quadrature and compare.
    """
    return eta * math.sqrt(sigma / (1 - sigma))


# ---------------------------------------------------------------------------------------------- variance of a step
def sage_variance(sigma, sigma_next, eta):
    """Eq. 5:  Σ² = ∫_{sigma'}^{sigma} ε² = η²·[ −(sigma − sigma') + log((1 − sigma')/(1 − sigma)) ].

    Eq. 6 is its root, Σ = sqrt(Σ²): already integrated, so NO further sqrt(Δ) anywhere.
    sigma, sigma_next: float64 tensors below 1. log1p(Δ/(1 − sigma)) is the same logarithm; it keeps the digits that
    the log of a quotient near 1 would lose.
    """
    delta = sigma - sigma_next
    return eta**2 * (-delta + torch.log1p(delta / (1 - sigma)))


def step_variances(sde_type, eta, sigmas):
    """Σ² of every step of a schedule, float64 [T]: finite, not negative, and 0 where eta is 0.

    This is the ONE place that decides what happens at sigma = 1 and sigma' = 0:

    - sigma = 1. SAGE: Eq. 5 diverges, so both ends of the integral are clamped to SIGMA_MAX. The released code clamps
      only the 1 − sigma inside the logarithm; it agrees with this to η²·0.003 until the schedule's second sigma passes
      0.997 (from T = 68 on at shift 5), where its first variance is negative and Σ is NaN. Ours is then 0: a step
      wholly above SIGMA_MAX is a step of the ODE. Flow-GRPO: on the step that starts at sigma = 1, and only there, its
      code uses 1 − sigmas[1] in place of 1 − sigma = 0.
    - sigma' = 0. CPS and exact have no noise left there: variance 0.
    - A variance of 0, or one that rounding makes negative, means a deterministic step: it has no log-probability, so no
      policy gradient.

    Sources: Eq. 5; the released codes of Flow-GRPO, DanceGRPO and CPS (Table 1); `exact` is ours, see exact_variance.
    """
    sigma, sigma_next = sigmas[:-1], sigmas[1:]
    delta = sigma - sigma_next
    if sde_type == "sage_grpo":
        variance = sage_variance(sigma.clamp(max=SIGMA_MAX), sigma_next.clamp(max=SIGMA_MAX), eta)
    elif sde_type == "flow_grpo":  # ε² at the start of the step, times Δ
        one_minus_sigma = 1 - torch.where(sigma == 1, sigmas[1], sigma)
        variance = eta**2 * sigma / one_minus_sigma * delta
    elif sde_type == "dance_grpo":  # constant ε = η
        variance = eta**2 * delta
    elif sde_type == "cps":  # a fixed share of the noise that is left at sigma'
        variance = (sigma_next * math.sin(eta * math.pi / 2)) ** 2
    elif sde_type == "exact":
        variance = exact_variance(sigma, sigma_next, eta)
    else:
        raise ValueError(f"sde_type must be one of {', '.join(SDE_TYPES)}: got {sde_type!r}")
    return variance.clamp(min=0)


def exact_variance(sigma, sigma_next, eta):
    """Our extension, not in the paper: freeze x0_hat over the step and Eq. 16 is linear, so it solves in closed form:

        q = sigma'(1 − sigma) / (sigma(1 − sigma')),   Σ² = sigma'²·(1 − q^{η²})
        mean = (1 − sigma')·x0_hat + (sigma'/sigma)·q^{η²/2}·(x − (1 − sigma)·x0_hat)

    x − (1 − sigma)·x0_hat is sigma·z_hat and sigma'·q^{η²/2} is sqrt(sigma'² − Σ²): the mean rule of CPS, so the two
    share coefficients_keeping_mean. A first-order exponential integrator. It needs no clamp at either end.
    """
    q = sigma_next * (1 - sigma) / (sigma * (1 - sigma_next))
    return sigma_next**2 * -torch.expm1(torch.xlogy(torch.tensor(eta**2, dtype=sigma.dtype), q))


# ---------------------------------------------------------------------------------------------- mean of a step
def mean_of_eq_7(x, v, sigma, sigma_next, variance):
    """Eq. 7:  x' = x − Δ·v + ½Σ²·s + Σ·ξ,  ξ ~ N(0, I); this is its mean.

    It is Eq. 16 over one step with v and s frozen at their values at sigma. The sign of the score's term: sigma runs
    down, dsigma = −Δ, so the drift −½ε²·s dsigma becomes +½Σ²·s.
    """
    delta = sigma - sigma_next
    return x - delta * v + variance / 2 * score(x, v, sigma)


def coefficients_keeping_mean(x, v, sigma, sigma_next, variance):
    """Mean of cps and exact:  (1 − sigma')·x0_hat + sqrt(sigma'² − Σ²)·z_hat.

    Adding Σ·ξ restores the total noise std to sigma': the coefficients of Eq. 2 are kept.
    """
    noise_kept = (sigma_next**2 - variance).clamp(min=0).sqrt()
    return (1 - sigma_next) * predict_x0(x, v, sigma) + noise_kept * predict_noise(x, v, sigma)


# ---------------------------------------------------------------------------------------------- the SDE
class Step(NamedTuple):
    """One step  x' = a·x + b·v + Σ·ξ  of B samples; each entry is shaped [B, 1, …], to broadcast against x."""

    a: torch.Tensor
    b: torch.Tensor
    std: torch.Tensor


class SDE:
    """The stochastic sampler of one schedule: three float64 numbers a step, and the transition that applies them.

    sde_type   sage_grpo | flow_grpo | dance_grpo | cps | exact
    eta        ≥ 0; 0 is the ODE (Eq. 1). For cps in [0, 1]: its std is sigma'·sin(ηπ/2), and 1.8 would act as 0.2
    sigmas     [T + 1], strictly falling within [0, 1]
    noisy_last_step   False turns the last step into an ODE step. The noise of that step stays in the sample which the
               reward sees. The released code keeps it (and trains the step); the toy turns it off, because this last
               noise causes most of the difference between the samplers
    noisy_steps   places of the steps that may have noise; None: all. The others are steps of the ODE

    a, b, std, variance [T] (float64) and stochastic [T] (bool) may be read; a step with Σ = 0 is deterministic.
    """

    def __init__(self, sde_type, eta, sigmas, noisy_last_step=True, noisy_steps=None):
        sigmas = torch.as_tensor(sigmas, dtype=torch.float64)
        if not 0 <= eta < math.inf:
            raise ValueError(f"eta must be finite and not negative: got {eta}")
        if sde_type == "cps" and eta > 1:
            raise ValueError(f"eta must lie in [0, 1] for cps, whose std is sigma'·sin(ηπ/2): got {eta}")
        if sigmas.ndim != 1 or len(sigmas) < 2:
            raise ValueError(f"sigmas must be a list of at least two noise levels: got shape {tuple(sigmas.shape)}")
        if not (sigmas.diff() < 0).all() or sigmas[0] > 1 or sigmas[-1] < 0:
            raise ValueError(f"sigmas must fall strictly from at most 1 to at least 0: got {sigmas.tolist()}")
        self.sde_type = sde_type
        self.eta = eta
        self.sigmas = sigmas
        self.num_steps = len(sigmas) - 1
        self.variance = step_variances(sde_type, eta, sigmas)
        if not noisy_last_step:
            self.variance[-1] = 0
        if noisy_steps is not None:
            drawn = torch.zeros(self.num_steps, dtype=torch.bool)
            drawn[noisy_steps] = True
            self.variance[~drawn] = 0
        self.std = self.variance.sqrt()  # Eq. 6
        self.stochastic = self.variance > 0
        # A mean rule must be linear in (x, v). Its coefficients are then its values at (1, 0) and (0, 1), here for
        # all T steps at once.
        mean_rule = coefficients_keeping_mean if sde_type in ("cps", "exact") else mean_of_eq_7
        one, zero = torch.ones_like(self.std), torch.zeros_like(self.std)
        self.a = mean_rule(one, zero, sigmas[:-1], sigmas[1:], self.variance)
        self.b = mean_rule(zero, one, sigmas[:-1], sigmas[1:], self.variance)

    def step(self, k, x):
        """The numbers of step k as a Step in x's dtype and on its device. k: an int, or a LongTensor [B]."""
        k = torch.as_tensor(k).cpu().expand(len(x))  # one code path, so that int and LongTensor agree bit for bit
        table = torch.stack([self.a, self.b, self.std])[:, k]  # [3, B]
        return Step(*table.to(x.dtype).to(x.device).view(3, -1, *[1] * (x.ndim - 1)))

    def transition(self, x, v, k):
        """One step as (mean, std), Eq. 7:  x' ~ N(mean, Σ²),  mean = a_k·x + b_k·v by the sampler's mean rule above.

        Where Σ = 0 every rule is the Euler step of Eq. 1, x − Δ·v.

        x, v: [B, …] float32 or float64, as are the results; k: an int, or a LongTensor [B], each sample at its own
        step. std is [B, 1, …], broadcastable to x.
        """
        if x.shape != v.shape:
            raise ValueError(f"x and v must have the same shape: got {tuple(x.shape)} and {tuple(v.shape)}")
        a, b, std = self.step(k, x)
        return a * x + b * v, std


def log_prob(x_next, mean, std):
    """log π(x'|x) of the Gaussian step: the true log density with its constants, as a MEAN over the D elements. [B]

    x_next, mean: [B, …]; std: one number for each sample ([B, 1, …]), or one for all.

    Why the mean, and why the paper's clip range is 1e-4 and not 0.2: let an update move the mean by δ standard
    deviations in every element. The log ratio of the summed log-probability would be near −D·δ²/2, and the ratio would
    leave any interval at video sizes. The log ratio of the mean is −δ²/2 + δ·ξ̄ with ξ̄ ~ N(0, 1/D). Its spread over
    samples falls like 1/√D, but its shift −δ²/2 does not depend on D. So one clip range does NOT serve every
    resolution. At D = 3·10³ a clip range of 1e-4 sees the spread. At D = 10⁶ the ratio is nearly deterministic and
    below 1: from δ ≈ 0.014 on only 1 − c is ever passed, that is, only samples with A < 0 are clipped.

    The released code takes the mean as well, without a word. CPS' authors drop constants and Σ altogether, which would
    give each sampler a learning rate of its own; here all samplers share this function. A step with std = 0 has no
    density: the result is NaN there, on purpose.
    """
    distance = (x_next - mean).square().flatten(1).mean(1)  # [B]
    std = std.flatten()  # [B] or [1]
    return -distance / (2 * std**2) - std.log() - 0.5 * math.log(2 * math.pi)


# ---------------------------------------------------------------------------------------------- rollout
@dataclass
class Trajectory:
    """One batch of rollouts, float32 (or float64 if the first state was) whatever the model's dtype: with bf16 states
    the ratio of the first update would differ from 1 by many times the clip range."""

    states: torch.Tensor  # [B, T + 1, …]  states[:, k] lies at sigmas[k]; states[:, -1] is the sample
    means: torch.Tensor  # [B, T, …]      mean of each step under the policy that made the rollout
    log_probs: torch.Tensor  # [B, T]     log π_old of each step; NaN on deterministic steps


def randn(shape, generator):
    """N(0, I) of a shape [B, …], drawn from one generator, or from B generators, one a sample.

    With one generator a sample, its noise does not depend on which rank or batch it lands in.
    """
    if isinstance(generator, torch.Generator):
        return torch.randn(shape, generator=generator, device=generator.device)
    if len(generator) != shape[0]:
        raise ValueError(f"one generator per sample is needed: got {len(generator)} for {shape[0]} samples")
    return torch.stack([torch.randn(shape[1:], generator=g, device=g.device) for g in generator])


@torch.no_grad()
def rollout(velocity, x, sde, generator, callback=None):
    """Run the policy from noise x [B, …] down the schedule and keep all that the update needs. Returns a Trajectory.

    velocity: (x [B, …], sigma [B]) -> v [B, …].  generator: one torch.Generator, or one per sample (see randn).
    Which steps carry noise is the SDE's: see its noisy_last_step; with eta = 0 this is the ODE sampler.
    callback(k): called after each step, for a progress bar.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    states, means, log_probs = [x], [], []
    for k in range(sde.num_steps):
        sigma = sde.sigmas[k].to(x).expand(len(x))
        mean, std = sde.transition(x, velocity(x, sigma).to(x.dtype), k)
        x = mean
        if sde.stochastic[k]:
            x = mean + std * randn(x.shape, generator).to(x)
        states.append(x)
        means.append(mean)
        log_probs.append(log_prob(x, mean, std))
        if callback is not None:
            callback(k)
    return Trajectory(torch.stack(states, 1), torch.stack(means, 1), torch.stack(log_probs, 1))
