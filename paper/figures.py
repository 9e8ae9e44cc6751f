"""Redraw the phenomena of the paper's figures that need no training, in about a minute:  python -m paper.figures

    figures/fig1_3_exploration.png    noise injected per step, where one step of it leads, how much leaves the manifold
    figures/marginals.png             error of the marginals against the number of steps, exact propagation
    figures/fig4_gradient_norms.png   gradient norm of each step through a network, before and after the equalizer
    figures/fig2_pipeline.png         the algorithm as a diagram of this code's functions

The numbers that the pictures show are printed and written to figures/figures.json.
"""

import json
import math
from pathlib import Path
from unittest import mock

import matplotlib

matplotlib.use("Agg")  # no display is needed

import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402

import sde as sde_module  # noqa: E402
from equalizer import equalizer_scales, gradient_norms  # noqa: E402
from sde import SDE, SDE_TYPES, SIGMA_MAX, diffusion_coefficient, log_prob, predict_x0, rollout, sigma_schedule  # noqa: E402
from toy import world  # noqa: E402
from toy.gaussian import GaussianMixture, gaussian, propagate  # noqa: E402
from toy.model import ToyPolicy  # noqa: E402
from paper.plots import LOOKS, finish  # noqa: E402

FOLDER = Path("figures")
SAMPLERS = dict(zip(SDE_TYPES, LOOKS, strict=True))
ODE = "sage_grpo", 0.0  # any sampler at η = 0
RADIUS, THICK = 1.5, 0.03  # the 2-D data: an arc, thin in the normal direction


def erratum_score(x, v, sigma):
    """What some write-ups print for the score: without the factor (1 − sigma) on x0_hat."""
    return -(x - predict_x0(x, v, sigma)) / sigma**2


# ---------------------------------------------------------------------------------------------- Fig. 1 and 3
def exact_integral(sigmas, eta):
    """∫ε² over each step by Gauss–Legendre quadrature with 200 nodes, independent of Eq. 5; from SIGMA_MAX down. [T]"""
    nodes, weights = np.polynomial.legendre.leggauss(200)
    high, low = np.minimum(sigmas[:-1], SIGMA_MAX), np.minimum(sigmas[1:], SIGMA_MAX)
    points = low[:, None] + (high - low)[:, None] * (nodes + 1) / 2
    squares = np.vectorize(lambda sigma: diffusion_coefficient(sigma, eta) ** 2)(points)
    return (squares * weights).sum(1) * (high - low) / 2


def arc_world(parts=24):
    """Half a circle of thin Gaussians, each lying along the tangent."""
    angles = torch.linspace(0, math.pi, parts, dtype=torch.float64)
    normal = torch.stack([angles.cos(), angles.sin()], 1)
    tangent = torch.stack([-angles.sin(), angles.cos()], 1)
    along = RADIUS * math.pi / parts / 2
    covs = THICK**2 * torch.einsum("pi,pj->pij", normal, normal) + along**2 * torch.einsum("pi,pj->pij", tangent, tangent)
    return GaussianMixture(torch.full((parts,), 1 / parts), RADIUS * normal, covs)


def off_and_along(samples, origin):
    """Energy of samples [N, 2] off the arc (normal) and along it from `origin` (tangent), mean squares."""
    normal = samples.norm(dim=1) - RADIUS
    angle = torch.atan2(samples[:, 1], samples[:, 0]) - torch.atan2(origin[1], origin[0])
    along = RADIUS * torch.remainder(angle + math.pi, 2 * math.pi).sub(math.pi)
    return normal.square().mean().item(), along.square().mean().item()


def exploration():
    sigmas, eta, data = sigma_schedule(20), 0.5, arc_world()
    figure, axes = plt.subplots(2, 3, figsize=(15, 8.5), layout="constrained")
    (variance, shares, energies), clouds = axes

    for sde_type, (colour, line, marker) in SAMPLERS.items():
        table = SDE(sde_type, eta, sigmas).variance.numpy()
        kept = table > 0
        variance.plot(np.arange(20)[kept], table[kept], color=colour, ls=line, marker=marker, ms=4, lw=1.4, label=sde_type)
    variance.plot(range(20), exact_integral(sigmas.numpy(), eta), "k+", ms=11, mew=1.6, label="∫ε² by quadrature")
    variance.set(yscale="log", title="Injected variance per step (T = 20, η = 0.5)", xlabel="step k", ylabel="Σ² of the step")
    variance.set_xticks(range(0, 20, 5))

    def velocity(x, sigma):
        return data.velocity(x, sigma[0].item())

    start = torch.tensor([[-0.9, -0.5]], dtype=torch.float64)  # the noise that the trajectory starts from
    path = rollout(velocity, start, SDE(*ODE, sigmas), torch.Generator()).states[0]  # [T + 1, 2]
    truth = data.sample(1500, torch.Generator().manual_seed(0))
    for axis, sde_type in zip(clouds, ("sage_grpo", "flow_grpo", "dance_grpo"), strict=True):
        colour, _, marker = SAMPLERS[sde_type]
        axis.scatter(*truth.T, s=3, color="0.8", label="data")
        for k in (8, 15, 19):
            x = path[k].expand(150, 2)
            mean, std = SDE(sde_type, eta, sigmas).transition(x, velocity(x, sigmas[k : k + 1]), k)
            points = mean + std * torch.randn(150, 2, generator=torch.Generator().manual_seed(k), dtype=torch.float64)
            axis.scatter(*points.T, s=9, alpha=0.6, color=colour, marker=marker, lw=0)
            axis.annotate(f"{k}", mean[0], mean[0] + torch.tensor([-0.75, -0.2]), arrowprops=dict(arrowstyle="-", lw=0.8))
        axis.plot(*path.T, "k.-", lw=1, ms=4, label="ODE trajectory")
        axis.set(title=f"{sde_type}: one step from step k = 8, 15, 19", xlabel="x", ylabel="y", aspect="equal")
        axis.set(xlim=(-2.3, 2.3), ylim=(-1.2, 2.2))

    numbers, width = {}, 0.38
    for place, (sde_type, (colour, _, _)) in enumerate(SAMPLERS.items()):
        for shift, noisy in ((-width / 2, True), (width / 2, False)):
            x = start.expand(4000, 2)
            sampler = SDE(sde_type, eta, sigmas, noisy_last_step=noisy)
            samples = rollout(velocity, x, sampler, torch.Generator().manual_seed(1)).states[:, -1]
            off, along = off_and_along(samples, path[-1])
            numbers[f"{sde_type}, {'noisy' if noisy else 'deterministic'} last step"] = dict(off=off, along=along)
            look = dict(color=colour, width=width, hatch=None if noisy else "//", edgecolor="white")
            shares.bar(place + shift, off / (off + along), **look)
            energies.bar(place + shift, off**0.5, **look)
    energies.axhline(THICK, color="0.4", ls="--", lw=1.2, label="thickness of the data")
    shares.set(title="Share of the samples' energy off the manifold", ylabel="normal / (normal + tangent)", yscale="log")
    energies.set(title="Distance to the arc (hatched: ODE last step)", ylabel="RMS", yscale="log")
    for axis in (shares, energies):
        axis.set_xticks(range(len(SAMPLERS)), list(SAMPLERS), fontsize=8)
    finish(figure, axes.flat, FOLDER / "fig1_3_exploration.png", (variance, clouds[0], energies))
    return numbers


# ---------------------------------------------------------------------------------------------- marginals
def marginal_errors(sde_type, eta, steps, data_std=1.0):
    """(|relative error| of the last std, the worst over all sigmas), exactly, for N(0, data_std²)."""
    sigmas, data = sigma_schedule(steps), gaussian([0.0], [[data_std**2]])
    _, covs = propagate(SDE(sde_type, eta, sigmas), data)
    true = torch.stack([data.marginal(sigma.item())[1][0, 0, 0] for sigma in sigmas]).sqrt()
    errors = (covs[:, 0, 0].sqrt() / true - 1).abs()
    return errors[-1].item(), errors.max().item()


def marginals():
    lengths, eta = np.array([10, 20, 50, 100, 200, 400, 800]), 1.0
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.8), sharey=True, layout="constrained")
    curves = {name: (name, look) for name, look in SAMPLERS.items()} | {"sage, erratum's score": ("sage_grpo", ("0.5", "-", "x"))}
    slopes = {}
    for text, (sde_type, (colour, line, marker)) in curves.items():
        right = sde_module.score
        with mock.patch.object(sde_module, "score", right if text in SAMPLERS else erratum_score):
            errors = np.array([marginal_errors(sde_type, eta, int(steps)) for steps in lengths])  # [T, 2]
        for axis, error, which in zip(axes, errors.T, ("last", "worst"), strict=True):
            slope = np.polyfit(np.log(lengths[-4:]), np.log(error[-4:]), 1)[0]
            slopes[f"{text}, {which}"] = slope
            axis.loglog(lengths, error, color=colour, ls=line, marker=marker, ms=5, lw=1.4, label=f"{text}: slope {slope:+.2f}")
    for axis, words in zip(axes, ("last sample", "worst intermediate state"), strict=True):
        axis.set(title=f"Error of the std, {words} (N(0, 1) data, η = 1)", xlabel="steps T", ylabel="|relative error|")
    finish(figure, axes, FOLDER / "marginals.png", axes)
    return slopes


# ---------------------------------------------------------------------------------------------- Fig. 4
def measured_norms(sampler, policy, count=24):
    """E‖∇_θ log π‖ over samples and E‖∇_v log π‖, each by autograd through the network, for every stochastic step. [K]"""
    prompts = world.PROMPTS[:: len(world.PROMPTS) // count][:count]
    conditions, generator = policy.encode(prompts), torch.Generator().manual_seed(0)
    noise = torch.randn(count, *policy.latent_shape, generator=generator)
    walk = rollout(lambda x, sigma: policy.velocity(x, sigma, conditions), noise, sampler, generator)
    weights = list(policy.module.parameters())
    by_weights, by_velocity = [], []
    for k in sampler.stochastic.nonzero().flatten().tolist():
        x, x_next = walk.states[:, k], walk.states[:, k + 1]
        v = policy.velocity(x, sampler.sigmas[k].float().expand(count), conditions)
        values = log_prob(x_next, *sampler.transition(x, v, k))  # [count]
        by_velocity.append(torch.autograd.grad(values.sum(), v, retain_graph=True)[0].flatten(1).norm(dim=1).mean())
        norms = []
        for value in values:
            gradient = torch.autograd.grad(value, weights, retain_graph=True, allow_unused=True)
            norms.append(torch.stack([g.square().sum() for g in gradient if g is not None]).sum().sqrt())
        by_weights.append(torch.stack(norms).mean())
    return torch.stack(by_weights).double(), torch.stack(by_velocity).double()


def gradient_norm_figure():
    policy, sigmas, spreads = ToyPolicy(), sigma_schedule(20), {}
    figure, axes = plt.subplots(2, 4, figsize=(16, 7.5), sharex=True, sharey="row", layout="constrained")
    for column, sde_type in zip(axes.T, ("sage_grpo", "flow_grpo", "dance_grpo", "cps"), strict=True):
        sampler = SDE(sde_type, 0.5, sigmas)
        by_weights, by_velocity = measured_norms(sampler, policy)
        steps, scales = sampler.stochastic.nonzero().flatten(), equalizer_scales(sampler)[sampler.stochastic]
        curves = {
            "‖∇_θ log π‖, network": by_weights,
            "‖∇_v log π‖": by_velocity,
            "N_t of Eq. 8": gradient_norms(sampler)[sampler.stochastic],
        }
        before, after = {**curves, "1/Σ": 1 / sampler.std[sampler.stochastic]}, {t: scales * c for t, c in curves.items()}
        for axis, shown, words in zip(column, (before, after), ("before", "after S_t"), strict=True):
            for (text, values), (colour, line, marker) in zip(shown.items(), LOOKS, strict=False):
                spreads[f"{sde_type}, {text}, {words}"] = (values.max() / values.min()).item()
                axis.plot(steps, values / values.median(), color=colour, ls=line, marker=marker, ms=3.5, lw=1.4, label=text)
            axis.set(title=f"{sde_type}, {words}", yscale="log", xlabel="step k", ylabel="norm / its median")
    finish(figure, axes.flat, FOLDER / "fig4_gradient_norms.png", axes[0, :1])
    return spreads


# ---------------------------------------------------------------------------------------------- Fig. 2
BOXES = {  # place of the middle, title, functions
    "prompts": (1.0, 3.0, "prompts, noise", ["train.draw_prompts", "sde.randn"]),
    "rollout": (4.0, 3.0, "rollout, Eq. 7", ["sde.rollout", "SDE.transition", "sde.log_prob"]),
    "reward": (7.0, 3.0, "reward, Eq. 10", ["policy.decode", "rewards.composite_reward"]),
    "advantage": (10.0, 3.0, "advantage A_i", ["rewards.group_advantages"]),
    "equalizer": (4.0, 0.8, "micro: S_t, Eq. 8–9", ["sde.step_variances", "equalizer.equalizer_scales"]),
    "loss": (7.0, 0.8, "objective", ["grpo.clipped_policy_loss", "grpo.micro_batch_loss"]),
    "step": (10.0, 0.8, "policy θ", ["grpo.optimizer_step"]),
    "position": (7.0, -1.4, "macro: position, Eq. 11, 13", ["trust_region.gaussian_kl", "trust_region.Anchor"]),
    "velocity": (4.0, -1.4, "macro: velocity, Eq. 12, 15", ["trust_region.stepwise_kl_…", "trust_region.dual_kl"]),
}
ARROWS = "prompts rollout, rollout reward, reward advantage, advantage loss, rollout equalizer, equalizer loss, loss step"
ARROWS += ", position loss, velocity loss, step position"


def pipeline():
    figure, axis = plt.subplots(figsize=(12, 5.4), layout="constrained")
    wide, tall = 1.25, 0.72
    for pair in ARROWS.split(", "):
        (x0, y0, *_), (x1, y1, *_) = (BOXES[name] for name in pair.split())
        dx, dy = x1 - x0, y1 - y0
        shrink = min(wide / abs(dx) if dx else 9, tall / abs(dy) if dy else 9)  # from the middle to the edge of a box
        begin, end = (x0 + dx * shrink, y0 + dy * shrink), (x1 - dx * shrink, y1 - dy * shrink)
        axis.annotate("", end, begin, arrowprops=dict(arrowstyle="-|>", lw=1.5, color="0.3"))
    for name, (x, y, title, functions) in BOXES.items():
        face = {"equalizer": "#DDEBF5", "position": "#FBE8D3", "velocity": "#FBE8D3"}.get(name, "#F2F2F2")
        axis.add_patch(plt.Rectangle((x - wide, y - tall), 2 * wide, 2 * tall, facecolor=face, edgecolor="0.3"))
        axis.text(x, y + 0.38, title, ha="center", va="center", weight="bold", fontsize=10)
        axis.text(x, y - 0.22, "\n".join(functions), ha="center", va="center", family="monospace", fontsize=8)
    axis.text(5.5, 4.0, "grpo.collect: once per rollout update", ha="center", style="italic")
    axis.text(8.5, -2.4, "grpo.update: every trained step of every sample, in an order of each sample's own", ha="center", style="italic")
    axis.set(xlim=(-0.5, 11.5), ylim=(-2.7, 4.3))
    axis.axis("off")
    figure.savefig(FOLDER / "fig2_pipeline.png", dpi=110)
    plt.close(figure)


def main():
    FOLDER.mkdir(exist_ok=True)
    results = {"energy": exploration(), "slopes": marginals(), "spreads": gradient_norm_figure()}
    pipeline()
    (FOLDER / "figures.json").write_text(json.dumps(results, indent=1, ensure_ascii=False))
    for title, numbers in results.items():
        print(title)
        for name, value in numbers.items():
            shown = {key: float(f"{v:.3g}") for key, v in value.items()} if isinstance(value, dict) else f"{value:.3g}"
            print(f"    {name:48} {shown}")
    print(f"wrote {', '.join(sorted(path.name for path in FOLDER.glob('*')))} in {FOLDER}/")


if __name__ == "__main__":
    main()
