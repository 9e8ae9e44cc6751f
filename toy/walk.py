"""A walk through Eq. 1–9 and 16 in a world with exact answers: `python -m toy.walk`, a few seconds on one core.

Equation by equation it prints the value of the function that this project trains with beside an independent value, and
their relative difference. The independent value comes from quadrature, autograd, finite differences or samples. The
command exits with 1 if a difference exceeds its tolerance. EQUATIONS.md has the formulas and the reasons.

Change --eta, --steps, --shift or --sampler and look. What only holds for many steps has no tolerance; its lines
begin with "look".

The world is a mixture of two Gaussians in the plane, and one Gaussian where a whole chain needs an exact answer.
"""

import argparse
import math
import signal
import sys
from dataclasses import dataclass

import numpy as np
import torch

import equalizer
import grpo
import rewards
import sde
from toy.gaussian import GaussianMixture, gaussian, propagate

LEVELS = (0.9, 0.5, 0.1)  # noise levels where an equation does not depend on the schedule
ROUNDING = 1e-9  # tolerance where both values are the same number up to rounding
CURVATURE = 1e-6  # … where the independent value is a finite difference
SAMPLES = 0.03  # … where it is an average over samples


@dataclass
class Setting:
    """What the command line chose, and the worlds."""

    sampler: sde.SDE
    shift: float
    mixture: GaussianMixture
    single: GaussianMixture
    shown: list  # an early, a middle and a late step, none of which touches an end of the schedule

    def states(self, k, count=5):
        """A few states x of the mixture at step k, and their velocities. [count, 2] each."""
        return at_level(self.mixture, self.sampler.sigmas[k].item(), count)


def make_setting(sampler, eta, steps, shift):
    if not eta > 0:
        raise ValueError(f"eta must be positive, a step without noise has no policy: got {eta}")
    if steps < 3:
        raise ValueError(f"steps must be at least 3, for one between the first and the last: got {steps}")
    chain = sde.SDE(sampler, eta, sde.sigma_schedule(steps, shift))
    below = []  # steps where nothing is clamped and no end is touched
    for k in range(steps - 1):
        if chain.sigmas[k] < sde.SIGMA_MAX:
            below.append(k)
    if not below:
        raise ValueError(f"no step to show: all but the last start above sigma = {sde.SIGMA_MAX} with shift {shift}")
    shown = sorted({below[0], below[len(below) // 2], below[-1]})
    covs = [[[0.3, 0.1], [0.1, 0.2]], [[0.2, 0.0], [0.0, 0.4]]]
    mixture = GaussianMixture([0.4, 0.6], [[2.0, 0.0], [-1.0, 1.0]], covs)
    single = gaussian([1.0, -0.5], [[0.5, 0.2], [0.2, 0.3]])
    return Setting(chain, shift, mixture, single, shown)


class Report:
    """Prints each comparison, and remembers those that disagree."""

    def __init__(self):
        self.number = None
        self.compared = 0
        self.disagreements = []

    def equation(self, number, formula):
        self.number = number
        print(f"\nEq. {number:<3} {formula}")

    def compare(self, what, ours, other, how, tolerance):
        """Tensors are printed as root mean squares; the difference is that of the tensors themselves."""
        ours = torch.as_tensor(ours, dtype=torch.float64)
        other = torch.as_tensor(other, dtype=torch.float64)
        difference = rms(ours - other) / rms(other)
        agrees = difference <= tolerance  # False for NaN, too
        self.compared += 1
        if not agrees:
            self.disagreements.append((self.number, what))
        verdict = "≤" if agrees else "DISAGREES >"
        print(f"    {what:<46}{rms(ours):<12.6g}{rms(other):<12.6g}{how:<34}{difference:.0e} {verdict} {tolerance:.0e}")

    def look(self, text):
        print(f"    look: {text}")


# ---------------------------------------------------------------------------------------------- tools
def rms(values):
    return values.square().mean().sqrt().item()


def generator():
    return torch.Generator().manual_seed(0)


def at_level(world, sigma, count):
    """Samples of p_sigma by Eq. 2, and the exact velocity there. [count, 2] each."""
    g = generator()
    x0 = world.sample(count, g)
    z = torch.randn(count, 2, generator=g, dtype=torch.float64)
    x = (1 - sigma) * x0 + sigma * z
    return x, world.velocity(x, sigma)


def true_score(world, x, sigma):
    """∇ log p_sigma by autograd of the density."""
    x = x.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(world.log_density(x, sigma).sum(), x)
    return gradient


def quadrature(function, low, high):
    """∫ of function from low to high, Gauss–Legendre with 100 nodes."""
    nodes, weights = np.polynomial.legendre.leggauss(100)
    points = low + (high - low) * (nodes + 1) / 2
    values = [function(point) for point in points]
    return float(np.dot(weights, values)) * (high - low) / 2


def divergence(field, x):
    """∇·field at each of the points x [B, 2] that it was computed from. [B]"""
    total = torch.zeros(len(x), dtype=x.dtype)
    for i in range(x.shape[1]):
        (gradient,) = torch.autograd.grad(field[:, i].sum(), x, retain_graph=True)
        total += gradient[:, i]
    return total


# ---------------------------------------------------------------------------------------------- flow matching
def eq_1(report, chosen):
    report.equation(1, "dx/dσ = v(x, σ)")
    ode = sde.SDE("sage_grpo", 0.0, chosen.sampler.sigmas)
    mean = chosen.single.means[0]
    z = torch.randn(5, 2, generator=generator(), dtype=torch.float64)

    def path(sigma):
        """The exact solution that starts at z:  (1 − sigma)·m + S^½·z, with S the covariance of p_sigma."""
        _, covs = chosen.single.marginal(sigma)
        values, vectors = torch.linalg.eigh(covs[0])
        root = vectors @ values.sqrt().diag() @ vectors.T
        return (1 - sigma) * mean + z @ root

    h = 1e-5
    for k in chosen.shown:
        sigma = chosen.sampler.sigmas[k].item()
        x = path(sigma)
        x_next, _ = ode.transition(x, chosen.single.velocity(x, sigma), k)
        slope = (x - x_next) / (chosen.sampler.sigmas[k] - chosen.sampler.sigmas[k + 1])
        expected = (path(sigma + h) - path(sigma - h)) / (2 * h)
        what = f"SDE.transition at η = 0, step {k}: (x − x')/Δ"
        report.compare(what, slope, expected, "slope of the exact path", CURVATURE)


def eq_2(report, chosen):
    report.equation(2, "x_σ = (1 − σ)·x0 + σ·z,  z ~ N(0, I)")
    g = generator()
    x0 = chosen.single.sample(100_000, g)
    z = torch.randn(100_000, 2, generator=g, dtype=torch.float64)
    for sigma in LEVELS:
        x = sde.interpolate(x0, z, sigma)
        mean, cov = chosen.single.marginal(sigma)
        second_moment = cov[0] + torch.outer(mean[0], mean[0])
        what = f"interpolate, σ = {sigma}: E[x·xᵀ] over samples"
        report.compare(what, x.T @ x / len(x), second_moment, "closed form", SAMPLES)


def eq_3(report, chosen):
    report.equation(3, "v = z − x0,  so  x0_hat = x − σ·v = E[x0|x]  and  z_hat = x + (1 − σ)·v = E[z|x]")
    data = chosen.mixture.sample(200_000, generator())  # [N, 2]
    for sigma in (0.9, 0.5):
        x, v = at_level(chosen.mixture, sigma, 5)
        implied = (x[:, None] - (1 - sigma) * data) / sigma  # [5, N, 2], the z that leads from each x0 to x
        weights = (-implied.square().sum(2) / 2).softmax(1)  # [5, N], P(x0 | x)
        mean_x0 = weights @ data
        mean_z = torch.einsum("bn,bnd->bd", weights, implied)
        how = "Bayes over 200 000 data samples"
        report.compare(f"predict_x0, σ = {sigma}", sde.predict_x0(x, v, sigma), mean_x0, how, SAMPLES)
        report.compare(f"predict_noise, σ = {sigma}", sde.predict_noise(x, v, sigma), mean_z, how, SAMPLES)


# ---------------------------------------------------------------------------------------------- the SDE
def eq_16(report, chosen):
    report.equation(16, "dx = [v − ½ε²·s] dσ + ε dw,  ε = η·√(σ/(1 − σ)),  s = ∇ log p_σ")
    for sigma in LEVELS:
        x, v = at_level(chosen.mixture, sigma, 5)
        expected = true_score(chosen.mixture, x, sigma)
        report.compare(f"score, σ = {sigma}", sde.score(x, v, sigma), expected, "autograd of log p", ROUNDING)
    choices = {"Eq. 16": sde.diffusion_coefficient, "the constant η": lambda sigma, eta: eta}
    for name, coefficient in choices.items():
        for sigma in (0.9, 0.5):
            ours = fokker_planck(chosen.mixture, sigma, coefficient(sigma, chosen.sampler.eta))
            expected = density_rate(chosen.mixture, sigma)
            report.compare(f"−∂p/∂σ of the SDE, ε: {name}, σ = {sigma}", ours, expected, "p at σ ± h", CURVATURE)


def fokker_planck(world, sigma, epsilon):
    """−∂p/∂sigma = −∇·(f·p) + ½ε²·∇²p with the drift f = −v + ½ε²·s, both for falling sigma. [5]"""
    x, _ = at_level(world, sigma, 5)
    x.requires_grad_()
    v = world.velocity(x, sigma)
    p = world.log_density(x, sigma).exp()
    drift = -v + epsilon**2 / 2 * sde.score(x, v, sigma)
    (gradient,) = torch.autograd.grad(p.sum(), x, create_graph=True)
    transported = divergence(drift * p[:, None], x)
    spread = epsilon**2 / 2 * divergence(gradient, x)
    return (-transported + spread).detach()


def density_rate(world, sigma):
    """−∂p/∂sigma by a central difference. [5]"""
    h = 1e-4
    x, _ = at_level(world, sigma, 5)
    higher = world.log_density(x, sigma + h).exp()
    lower = world.log_density(x, sigma - h).exp()
    return -(higher - lower) / (2 * h)


def eq_5(report, chosen):
    report.equation(5, "Σ² = ∫ε² from σ' to σ = η²·[ −(σ − σ') + log((1 − σ')/(1 − σ)) ]")
    sigmas = chosen.sampler.sigmas
    eta = chosen.sampler.eta
    for k in chosen.shown:
        ours = sde.sage_variance(sigmas[k], sigmas[k + 1], eta)
        expected = integral_of_eq_5(sigmas[k].item(), sigmas[k + 1].item(), eta)
        what = f"sage_variance, step {k}: {sigmas[k]:.3f} → {sigmas[k + 1]:.3f}"
        report.compare(what, ours, expected, "quadrature of ε²", ROUNDING)
    if chosen.sampler.sde_type != "sage_grpo":
        for k in chosen.shown:
            expected, how = variance_of_table_1(chosen.sampler, k)
            what = f"Σ² of {chosen.sampler.sde_type}, step {k}"
            report.compare(what, chosen.sampler.variance[k], expected, how, ROUNDING)
    elif sigmas[1] < sde.SIGMA_MAX:  # the step from sigma = 1, whose integral starts at SIGMA_MAX
        expected = integral_of_eq_5(sde.SIGMA_MAX, sigmas[1].item(), eta)
        what = f"Σ² of step 0, clamped: {sde.SIGMA_MAX} → {sigmas[1]:.3f}"
        report.compare(what, chosen.sampler.variance[0], expected, "quadrature of ε²", ROUNDING)
    sums = []
    for name in ("sage_grpo", "flow_grpo", "dance_grpo"):
        sums.append(f"{sde.SDE(name, eta, sigmas).variance.sum():.4g} for {name}")
    report.look(f"Σ² summed over the schedule: {', '.join(sums)}")


def integral_of_eq_5(high, low, eta):
    """∫ε² from low to high by quadrature."""
    return quadrature(lambda sigma: sde.diffusion_coefficient(sigma, eta) ** 2, low, high)


def variance_of_table_1(sampler, k):
    """(Σ² of step k, how it was found), without step_variances."""
    sigma, sigma_next = sampler.sigmas[k : k + 2].tolist()
    eta = sampler.eta
    if sampler.sde_type == "sage_grpo":
        return integral_of_eq_5(sigma, sigma_next, eta), "quadrature of ε²"
    if sampler.sde_type == "flow_grpo":
        return sde.diffusion_coefficient(sigma, eta) ** 2 * (sigma - sigma_next), "ε(σ)²·Δ"
    if sampler.sde_type == "dance_grpo":
        return eta**2 * (sigma - sigma_next), "η²·Δ"
    if sampler.sde_type == "cps":
        noise_kept = sigma_next * math.cos(eta * math.pi / 2)
        return sigma_next**2 - noise_kept**2, "σ'² less the noise kept"
    if sampler.sde_type == "exact":

        def noise_that_is_left(u):
            return (sde.diffusion_coefficient(u, eta) * decay_of_the_frozen_sde(u, sigma_next, eta)) ** 2

        return quadrature(noise_that_is_left, sigma_next, sigma), "quadrature of the frozen SDE"
    raise ValueError(f"the walk needs an independent formula for each sampler: there is none for {sampler.sde_type}")


def decay_of_the_frozen_sde(high, low, eta):
    """What is left at `low` of y = x − (1 − sigma)·x0_hat, 1 at `high`, in Eq. 16 with x0_hat frozen.

    There v = y/sigma − x0_hat and s = −y/sigma², so  dy = (1/sigma + ½ε²/sigma²)·y dsigma + ε dw.
    """

    def rate(sigma):
        return 1 / sigma + sde.diffusion_coefficient(sigma, eta) ** 2 / (2 * sigma**2)

    return math.exp(-quadrature(rate, low, high))


def eq_6(report, chosen):
    report.equation(6, "Σ = √Σ²,  already integrated: no further √Δ")
    sampler = sde.SDE("sage_grpo", chosen.sampler.eta, chosen.sampler.sigmas)
    g = generator()
    parts = 50
    for k in chosen.shown:
        high, low = sampler.sigmas[k : k + 2].tolist()
        small = (high - low) / parts
        noise = torch.zeros(50_000, dtype=torch.float64)
        for part in range(parts):
            middle = high - (part + 0.5) * small
            xi = torch.randn(50_000, generator=g, dtype=torch.float64)
            noise += sde.diffusion_coefficient(middle, sampler.eta) * math.sqrt(small) * xi
        how = f"∫ε dw in {parts} small steps"
        report.compare(f"SDE.std of sage_grpo, step {k}", sampler.std[k], noise.std(), how, SAMPLES)


def eq_7(report, chosen):
    formulas = {
        "cps": "for cps:  x' = (1 − σ')·x0_hat + √(σ'² − Σ²)·z_hat + Σ·ξ,  ξ ~ N(0, I)",
        "exact": "for exact:  x' = (1 − σ')·x0_hat + decay·(x − (1 − σ)·x0_hat) + Σ·ξ,  ξ ~ N(0, I)",
    }
    report.equation(7, formulas.get(chosen.sampler.sde_type, "x' = x − Δ·v + ½Σ²·s + Σ·ξ,  ξ ~ N(0, I)"))
    for k in chosen.shown:
        x, v = chosen.states(k)
        variance, how = variance_of_table_1(chosen.sampler, k)
        expected = mean_of_table_1(chosen, k, x, v, variance)
        mean, std = chosen.sampler.transition(x, v, k)
        report.compare(f"SDE.transition, step {k}: mean", mean, expected, "the formula, s by autograd", ROUNDING)
        report.compare(f"SDE.transition, step {k}: std", std, math.sqrt(variance), how, ROUNDING)
    compare_chain(report, chosen)


def mean_of_table_1(chosen, k, x, v, variance):
    """Mean of step k, without the mean rules of sde.py."""
    sigma, sigma_next = chosen.sampler.sigmas[k : k + 2].tolist()
    x0_hat = x - sigma * v
    gradient = true_score(chosen.mixture, x, sigma)
    if chosen.sampler.sde_type == "cps":
        noise_kept = math.sqrt(max(sigma_next**2 - variance, 0.0))
        return (1 - sigma_next) * x0_hat + noise_kept * (-sigma * gradient)
    if chosen.sampler.sde_type == "exact":
        decay = decay_of_the_frozen_sde(sigma, sigma_next, chosen.sampler.eta)
        return (1 - sigma_next) * x0_hat + decay * (x - (1 - sigma) * x0_hat)
    return x - (sigma - sigma_next) * v + variance / 2 * gradient


def compare_chain(report, chosen):
    """The whole chain on one Gaussian: samples against exact propagation, and how far both are from the data."""
    x = torch.randn(20_000, 2, generator=generator(), dtype=torch.float64)
    g = torch.Generator().manual_seed(1)
    path = sde.rollout(lambda x, sigma: chosen.single.velocity(x, sigma[0].item()), x, chosen.sampler, g)
    last = path.states[:, -1]
    means, covs = propagate(chosen.sampler, chosen.single)
    second_moment = covs[-1] + torch.outer(means[-1], means[-1])
    what = "rollout: E[x·xᵀ] of the last sample"
    report.compare(what, last.T @ last / len(last), second_moment, "exact propagation", SAMPLES)
    texts = []
    for steps in (chosen.sampler.num_steps, 2 * chosen.sampler.num_steps, 4 * chosen.sampler.num_steps):
        error = std_error(chosen, chosen.sampler.eta, steps)
        of_ode = std_error(chosen, 0.0, steps)
        texts.append(f"{error:+.2%} at T = {steps} (the ODE: {of_ode:+.2%})")
    report.look(f"error of the last sample's std: {', '.join(texts)}")


def std_error(chosen, eta, steps):
    """Relative error of the last sample's standard deviation for the single Gaussian, exactly."""
    chain = sde.SDE(chosen.sampler.sde_type, eta, sde.sigma_schedule(steps, chosen.shift))
    _, covs = propagate(chain, chosen.single)
    return (covs[-1].trace() / chosen.single.covs[0].trace()).sqrt().item() - 1


# ---------------------------------------------------------------------------------------------- the equalizer
def eq_8(report, chosen):
    report.equation(8, "‖∇_mean log π‖ ∝ 1/Σ;  N = |∂mean/∂v|/Σ = √D·‖∇_v log π‖ for a noise ξ of length √D")
    norms = equalizer.gradient_norms(chosen.sampler)
    for k in chosen.shown:
        by_velocity, by_mean = measured_norms(chosen, k)
        report.compare(f"gradient_norms, step {k}", norms[k], by_velocity, "autograd of log_prob", ROUNDING)
        report.compare(f"1/SDE.std, step {k}", 1 / chosen.sampler.std[k], by_mean, "the same by the mean", ROUNDING)
    noisy = chosen.sampler.stochastic
    by_velocity = norms[noisy].max() / norms[noisy].min()
    by_mean = chosen.sampler.std[noisy].max() / chosen.sampler.std[noisy].min()
    report.look(f"largest over smallest on the schedule: {by_velocity:.1f} for N, {by_mean:.1f} for 1/Σ")


def measured_norms(chosen, k):
    """√D·‖∇ log π‖ of step k by (the velocity, the mean), for ξ = (1, 1), a noise of the expected length."""
    x, v = chosen.states(k, count=1)
    v.requires_grad_()
    mean, std = chosen.sampler.transition(x, v, k)
    mean.retain_grad()
    x_next = (mean + std).detach()
    sde.log_prob(x_next, mean, std).sum().backward()
    root_d = math.sqrt(x.shape[1])
    return root_d * v.grad.norm().item(), root_d * mean.grad.norm().item()


def eq_9(report, chosen):
    report.equation(9, "S_t = median(N)/N_t  over the steps with noise")
    scales = equalizer.equalizer_scales(chosen.sampler)
    noisy = chosen.sampler.stochastic.nonzero().flatten().tolist()
    measured = {}
    for k in noisy:
        measured[k], _ = measured_norms(chosen, k)
    ordered = sorted(measured.values())
    median = ordered[(len(ordered) - 1) // 2]  # the lower one of two
    how = "sorted measured norms"
    for k in chosen.shown:
        report.compare(f"equalizer_scales, step {k}", scales[k], median / measured[k], how, ROUNDING)
    equalized = torch.stack([scales[k] * measured[k] for k in noisy])
    flat = torch.full_like(equalized, median)
    report.compare("S_t·N_t over all noisy steps", equalized, flat, "the median", ROUNDING)


# ---------------------------------------------------------------------------------------------- GRPO
def eq_4(report, chosen):
    report.equation(4, "A = (r − mean r)/std r;  the loss has the gradient −A·∇log π at ρ = 1")
    scores = np.array([0.1, 0.7, 0.4, 0.2])
    ours, _, _ = rewards.group_advantages(torch.tensor(scores), 4)
    report.compare("group_advantages (float32)", ours, (scores - scores.mean()) / scores.std(), "numpy", 1e-5)

    k = chosen.shown[-1]
    x, v = chosen.states(k, count=4)
    mean, std = chosen.sampler.transition(x, v, k)
    x_next = mean + std * torch.randn(4, 2, generator=generator(), dtype=torch.float64)
    log_density = torch.distributions.Normal(mean, std).log_prob(x_next)
    log_prob_old = sde.log_prob(x_next, mean, std)
    how = "torch.distributions, mean over D"
    report.compare(f"log_prob, step {k}", log_prob_old, log_density.mean(1), how, ROUNDING)

    v.requires_grad_()
    mean, std = chosen.sampler.transition(x, v, k)
    ratio = (sde.log_prob(x_next, mean, std) - log_prob_old).exp()
    grpo.clipped_policy_loss(ratio, ours.double(), clip_range=1e-4).sum().backward()
    expected = -ours.double()[:, None] * slope_of_log_density(chosen.sampler, x, v.detach(), x_next, k)
    what = f"clipped_policy_loss, step {k}: gradient by v"
    report.compare(what, v.grad, expected, "log density at v ± h", CURVATURE)


def slope_of_log_density(sampler, x, v, x_next, k):
    """∂/∂v of the log density's mean over D, by central differences. [B, 2]"""
    h = 1e-4
    columns = []
    for i in range(2):
        shift = torch.zeros(2, dtype=torch.float64)
        shift[i] = h
        higher = torch.distributions.Normal(*sampler.transition(x, v + shift, k)).log_prob(x_next).mean(1)
        lower = torch.distributions.Normal(*sampler.transition(x, v - shift, k)).log_prob(x_next).mean(1)
        columns.append((higher - lower) / (2 * h))
    return torch.stack(columns, 1)


# ---------------------------------------------------------------------------------------------- command
EQUATIONS = (eq_1, eq_2, eq_3, eq_16, eq_5, eq_6, eq_7, eq_8, eq_9, eq_4)


def walk(setting):
    """Print every comparison. Returns the Report."""
    report = Report()
    header = f"{'our function':<46}{'ours':<12}{'other':<12}{'the other comes from':<34}"
    print(f"    {header}relative difference ≤ tolerance")
    for equation in EQUATIONS:
        equation(report, setting)
    return report


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, without the usage."""

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n")


def main(arguments=None):
    """Returns the exit status: 0 if all pairs agree, else 1."""
    summary = "A walk through Eq. 1–9 and 16 in a world with exact answers: a few seconds on one core."
    parser = OneLineParser(prog="toy.walk", description=summary, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--eta", type=float, default=0.5, help="η, the exploration scale")
    parser.add_argument("--steps", type=int, default=20, help="T, steps of the schedule")
    parser.add_argument("--shift", type=float, default=5.0, help="shift of the schedule; 1 spaces it evenly")
    parser.add_argument("--sampler", default="sage_grpo", choices=sde.SDE_TYPES, help="sampler of Eq. 7, 8, 9 and 4")
    options = parser.parse_args(arguments)
    try:
        setting = make_setting(options.sampler, options.eta, options.steps, options.shift)
    except ValueError as error:
        parser.error(str(error))
    report = walk(setting)
    print()
    for number, what in report.disagreements:
        print(f"Eq. {number} disagrees: {what}")
    print(f"{report.compared - len(report.disagreements)} of {report.compared} pairs agree")
    return 1 if report.disagreements else 0


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it, as it ends other commands that only print
    sys.exit(main())
