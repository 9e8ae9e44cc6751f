"""Draw the figures of the paper that need no training, or the pages' three pictures of a finished run.

python -m paper.figures                   the paper's figures on small worlds, in about a minute:
    figures/fig1_3_exploration.png        noise of each step, where it leads, how much of it leaves the data
    figures/marginals.png                 error of the marginals against the number of steps, by exact propagation
    figures/fig4_gradient_norms.png       gradient norm of each step, before and after the equalizer
    figures/fig2_pipeline.png             the algorithm as a diagram of this code's functions
    figures/figures.json                  the numbers that these pictures show; they are also printed
python -m paper.figures --run runs/toy-1  the pages' pictures, from a finished run of the toy:
    figures/default_run.gif               videos before and after training, animated
    figures/default_run.png               reward and distance to the manifold against the iteration
    figures/curves.png                    the curves that every run draws, with notes
"""

import argparse
import json
import math
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch

from engine import pictures
from engine.folder import read_log
from equalizer import equalizer_scales, gradient_norms
from paper.plots import LOOKS, finish
from sde import SDE, SDE_TYPES, SIGMA_MAX, log_prob, rollout, sigma_schedule
from toy import world
from toy.gaussian import GaussianMixture, gaussian, propagate
from toy.model import ToyPolicy
from toy.walk import integral_of_eq_5
from video.json_file import read_json

FOLDER = Path("figures")
# name -> colour, line, marker; for a sampler of your own, add one to LOOKS in paper/plots.py
SAMPLERS = dict(zip(SDE_TYPES, LOOKS, strict=True))
STEPS = 20
ETA = 0.5

# ---------------------------------------------------------------------------------------------- Fig. 1 and 3
RADIUS = 1.5  # the 2-D data: an arc,
THICK = 0.03  # thin in the normal direction
START = torch.tensor([[-0.9, -0.5]], dtype=torch.float64)  # the noise that all trajectories start from
LAST_STEPS = {"noisy last step": True, "deterministic last step": False}


def arc_world(parts=24):
    """Half a circle of thin Gaussians, each lying along the tangent."""
    angles = torch.linspace(0, math.pi, parts, dtype=torch.float64)
    normal = torch.stack([angles.cos(), angles.sin()], 1)
    tangent = torch.stack([-angles.sin(), angles.cos()], 1)
    along = RADIUS * math.pi / parts / 2
    across_covs = THICK**2 * torch.einsum("pi,pj->pij", normal, normal)
    along_covs = along**2 * torch.einsum("pi,pj->pij", tangent, tangent)
    weights = torch.full((parts,), 1 / parts)
    return GaussianMixture(weights, RADIUS * normal, across_covs + along_covs)


def exact_integral(sigmas, eta):
    """∫ε² over each step, from SIGMA_MAX down, [T]: by quadrature, without Eq. 5."""
    clamped = np.minimum(sigmas, SIGMA_MAX)
    return np.array([integral_of_eq_5(high, low, eta) for high, low in zip(clamped[:-1], clamped[1:], strict=True)])


def off_and_along(samples, origin):
    """Energy (mean square) of samples [N, 2] off the arc, in the normal direction, and along it, from `origin`."""
    normal = samples.norm(dim=1) - RADIUS
    angle = torch.atan2(samples[:, 1], samples[:, 0]) - torch.atan2(origin[1], origin[0])
    turn = torch.remainder(angle + math.pi, 2 * math.pi) - math.pi  # within ±π
    along = RADIUS * turn
    return normal.square().mean().item(), along.square().mean().item()


def exploration():
    """Draw Fig. 1 and 3. Returns the energies of sample_energies."""
    sigmas = sigma_schedule(STEPS)
    data = arc_world()

    def velocity(x, sigma):
        return data.velocity(x, sigma[0].item())

    ode = SDE("sage_grpo", 0.0, sigmas)  # every sampler is this ODE at η = 0
    path = rollout(velocity, START, ode, torch.Generator()).states[0]  # [T + 1, 2]
    truth = data.sample(1500, torch.Generator().manual_seed(0))
    energies = sample_energies(velocity, sigmas, path[-1])

    figure, axes = plt.subplots(2, 3, figsize=(15, 8.5), layout="constrained")
    variance, share, distance = axes[0]
    draw_variances(variance, sigmas)
    draw_energies(share, distance, energies)
    for axis, sde_type in zip(axes[1], ("sage_grpo", "flow_grpo", "dance_grpo"), strict=True):
        axis.scatter(*truth.T, s=3, color="0.8", label="data")
        draw_clouds(axis, sde_type, velocity, sigmas, path)
        axis.plot(*path.T, "k.-", lw=1, ms=4, label="ODE trajectory")
    finish(figure, axes.flat, FOLDER / "fig1_3_exploration.png", (variance, axes[1, 0], distance))
    return energies


def sample_energies(velocity, sigmas, origin, count=4000):
    """Energy off the arc and along it, from `origin`, of `count` samples of each sampler, with and without last noise.

    {"sampler, last step": {"off": energy, "along": energy}}
    """
    energies = {}
    for sde_type in SAMPLERS:
        for last_step, noisy in LAST_STEPS.items():
            sampler = SDE(sde_type, ETA, sigmas, noisy_last_step=noisy)
            generator = torch.Generator().manual_seed(1)
            samples = rollout(velocity, START.expand(count, 2), sampler, generator).states[:, -1]
            off, along = off_and_along(samples, origin)
            energies[f"{sde_type}, {last_step}"] = {"off": off, "along": along}
    return energies


def draw_variances(axis, sigmas):
    """Σ² of each step by each sampler, and the integral of ε² that SAGE's must be."""
    steps = np.arange(STEPS)
    for sde_type, (colour, line, marker) in SAMPLERS.items():
        variances = SDE(sde_type, ETA, sigmas).variance.numpy()
        noisy = variances > 0
        axis.plot(steps[noisy], variances[noisy], color=colour, ls=line, marker=marker, ms=4, lw=1.4, label=sde_type)
    axis.plot(steps, exact_integral(sigmas.numpy(), ETA), "k+", ms=11, mew=1.6, label="∫ε² by quadrature")
    axis.set(title=f"Injected variance per step (T = {STEPS}, η = {ETA})", xlabel="step k", ylabel="Σ² of the step")
    axis.set(yscale="log", ylim=(2e-3, 20))  # the room above the curves is for the legend
    axis.set_xticks(range(0, STEPS, 5))


def draw_clouds(axis, sde_type, velocity, sigmas, path, count=150):
    """Where one step of a sampler leads from three states of the ODE's path."""
    colour, _, marker = SAMPLERS[sde_type]
    sampler = SDE(sde_type, ETA, sigmas)
    for k in (8, 15, 19):
        x = path[k].expand(count, 2)
        mean, std = sampler.transition(x, velocity(x, sigmas[k : k + 1]), k)
        noise = torch.randn(count, 2, generator=torch.Generator().manual_seed(k), dtype=torch.float64)
        points = mean + std * noise
        axis.scatter(*points.T, s=9, alpha=0.6, color=colour, marker=marker, lw=0)
        label_at = mean[0] + torch.tensor([-0.75, -0.2])
        axis.annotate(f"{k}", mean[0], label_at, arrowprops={"arrowstyle": "-", "lw": 0.8})
    axis.set(title=f"{sde_type}: one step from step k = 8, 15, 19", xlabel="x", ylabel="y", aspect="equal")
    axis.set(xlim=(-2.3, 2.3), ylim=(-1.2, 2.2))


def draw_energies(share, distance, energies):
    """Bars of what sample_energies found: the share off the arc, and the distance from it."""
    width = 0.38
    for place, (sde_type, (colour, _, _)) in enumerate(SAMPLERS.items()):
        for last_step, noisy in LAST_STEPS.items():
            energy = energies[f"{sde_type}, {last_step}"]
            off_share = energy["off"] / (energy["off"] + energy["along"])
            x = place - width / 2 if noisy else place + width / 2
            hatch = None if noisy else "//"
            share.bar(x, off_share, color=colour, width=width, hatch=hatch, edgecolor="white")
            distance.bar(x, energy["off"] ** 0.5, color=colour, width=width, hatch=hatch, edgecolor="white")
    distance.axhline(THICK, color="0.4", ls="--", lw=1.2, label="thickness of the data")
    share.set(title="Share of the samples' energy off the arc", ylabel="normal / (normal + tangent)", yscale="log")
    distance.set(title="Distance to the arc (hatched: ODE last step)", ylabel="RMS", yscale="log")
    ticks = [0.03, 0.1, 0.3]
    distance.set_yticks(ticks, ticks)
    distance.set_yticks([], minor=True)
    for axis in (share, distance):
        axis.set_xticks(range(len(SAMPLERS)), list(SAMPLERS), fontsize=8)


# ---------------------------------------------------------------------------------------------- marginals
ERRATUM = "sage, erratum's score"
LENGTHS = [10, 20, 50, 100, 200, 400, 800]  # numbers of steps


def erratum_sde(eta, sigmas):
    """SAGE's sampler with the score that some write-ups print, s = −(x − x0_hat)/sigma², in Eq. 7.

    x − x0_hat is sigma·v (Eq. 3), so this score is −v/sigma. Eq. 7's mean x − Δ·v + ½Σ²·s then has the coefficients
    a = 1 and b = −Δ − ½Σ²/sigma.
    """
    sde = SDE("sage_grpo", eta, sigmas)
    sigma = sde.sigmas[:-1]
    delta = sigma - sde.sigmas[1:]
    sde.a = torch.ones_like(sigma)
    sde.b = -delta - sde.variance / 2 / sigma
    return sde


def marginal_errors(sde, data_std=1.0):
    """(|relative error| of the last state's std, the worst over all states), exactly, for N(0, data_std²) data."""
    data = gaussian([0.0], [[data_std**2]])
    _, covs = propagate(sde, data)
    true_variances = []
    for sigma in sde.sigmas:
        _, cov = data.marginal(sigma.item())
        true_variances.append(cov[0, 0, 0])
    true = torch.stack(true_variances).sqrt()
    errors = (covs[:, 0, 0].sqrt() / true - 1).abs()
    return errors[-1].item(), errors.max().item()


def marginals():
    """Draw the errors of marginal_errors against the number of steps. Returns {"curve, last or worst": slope}."""
    looks = SAMPLERS | {ERRATUM: ("0.5", "-", "x")}
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.8), sharey=True, layout="constrained")
    slopes = {}
    for name, (colour, line, marker) in looks.items():
        for axis, which, errors in zip(axes, ("last", "worst"), error_curves(name, eta=1.0), strict=True):
            slope = last_slope(errors)
            slopes[f"{name}, {which}"] = slope
            label = f"{name}: slope {slope:+.2f}"
            axis.loglog(LENGTHS, errors, color=colour, ls=line, marker=marker, ms=5, lw=1.4, label=label)
    axes[0].set(title="Error of the std, last sample (N(0, 1) data, η = 1)", ylabel="|relative error|")
    axes[1].set(title="Error of the std, worst intermediate state (N(0, 1) data, η = 1)")
    for axis in axes:
        axis.set_xlabel("steps T")
    finish(figure, axes, FOLDER / "marginals.png", axes)
    return slopes


def error_curves(name, eta):
    """(errors of the last state, worst errors) of one curve, each a list over LENGTHS."""
    last_errors = []
    worst_errors = []
    for steps in LENGTHS:
        sigmas = sigma_schedule(steps)
        sde = erratum_sde(eta, sigmas) if name == ERRATUM else SDE(name, eta, sigmas)
        last, worst = marginal_errors(sde)
        last_errors.append(last)
        worst_errors.append(worst)
    return last_errors, worst_errors


def last_slope(errors):
    """Slope of log error against log steps, over the four longest schedules: −1 is first order."""
    slope, _ = np.polyfit(np.log(LENGTHS[-4:]), np.log(errors[-4:]), 1)
    return slope


# ---------------------------------------------------------------------------------------------- Fig. 4
def measured_norms(sampler, policy, count=24):
    """E‖∇_θ log π‖ and E‖∇_v log π‖ over samples, [K] each: of every stochastic step, by autograd."""
    prompts = world.PROMPTS[:: len(world.PROMPTS) // count][:count]
    conditions = policy.encode(prompts)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(count, *policy.latent_shape, generator=generator)

    def velocity(x, sigma):
        return policy.velocity(x, sigma, conditions)

    walk = rollout(velocity, noise, sampler, generator)
    weights = list(policy.module.parameters())
    by_weights = []
    by_velocity = []
    for k in sampler.stochastic.nonzero().flatten().tolist():
        x = walk.states[:, k]
        v = velocity(x, sampler.sigmas[k].float().expand(count))
        mean, std = sampler.transition(x, v, k)
        log_probs = log_prob(walk.states[:, k + 1], mean, std)  # [count]
        (gradient,) = torch.autograd.grad(log_probs.sum(), v, retain_graph=True)
        by_velocity.append(gradient.flatten(1).norm(dim=1).mean())
        norms = [norm_by_weights(value, weights) for value in log_probs]
        by_weights.append(torch.stack(norms).mean())
    return torch.stack(by_weights).double(), torch.stack(by_velocity).double()


def norm_by_weights(value, weights):
    """‖∇_θ value‖ over all weights that the value depends on."""
    gradients = torch.autograd.grad(value, weights, retain_graph=True, allow_unused=True)
    squares = [gradient.square().sum() for gradient in gradients if gradient is not None]
    return torch.stack(squares).sum().sqrt()


def norms_before_and_after(sampler, policy):
    """Gradient norms of the stochastic steps, and what the equalizer makes of them: two dicts {name: [K]}."""
    by_weights, by_velocity = measured_norms(sampler, policy)
    scales = equalizer_scales(sampler)[sampler.stochastic]
    norms = {
        "‖∇_θ log π‖, network": by_weights,
        "‖∇_v log π‖": by_velocity,
        "N_t of Eq. 8": gradient_norms(sampler)[sampler.stochastic],
    }
    before = norms | {"1/Σ": 1 / sampler.std[sampler.stochastic]}
    after = {name: scales * values for name, values in norms.items()}
    return before, after


def gradient_norm_figure():
    """Draw Fig. 4. Returns the largest norm over the smallest of every curve."""
    policy = ToyPolicy()
    sigmas = sigma_schedule(STEPS)
    spreads = {}
    figure, axes = plt.subplots(2, 4, figsize=(16, 7.5), sharex=True, sharey="row", layout="constrained")
    for column, sde_type in enumerate(("sage_grpo", "flow_grpo", "dance_grpo", "cps")):
        sampler = SDE(sde_type, ETA, sigmas)
        before, after = norms_before_and_after(sampler, policy)
        for axis, words, curves in zip(axes[:, column], ("before", "after S_t"), (before, after), strict=True):
            for name, values in curves.items():
                spreads[f"{sde_type}, {name}, {words}"] = (values.max() / values.min()).item()
            draw_norms(axis, sampler, curves)
            axis.set_title(f"{sde_type}, {words}")
    for axis in axes[0]:
        axis.set_yscale("log")
    for axis in axes[:, 0]:
        axis.set_ylabel("norm / its median")
    for axis in axes[1]:
        axis.set_xlabel("step k")
    finish(figure, axes.flat, FOLDER / "fig4_gradient_norms.png", axes[0, :1])
    return spreads


def draw_norms(axis, sampler, curves):
    steps = sampler.stochastic.nonzero().flatten()
    for (name, values), (colour, line, marker) in zip(curves.items(), LOOKS, strict=False):
        axis.plot(steps, values / values.median(), color=colour, ls=line, marker=marker, ms=3.5, lw=1.4, label=name)


# ---------------------------------------------------------------------------------------------- Fig. 2
BOXES = {  # x and y of the middle, title, functions
    "prompts": (1.0, 3.0, "prompts, noise", ["draws.draw_prompts", "sde.randn"]),
    "rollout": (4.0, 3.0, "rollout, Eq. 7", ["sde.rollout", "SDE.transition", "sde.log_prob"]),
    "reward": (7.0, 3.0, "reward, Eq. 10", ["policy.decode", "rewards.composite_reward"]),
    "advantage": (10.0, 3.0, "advantage A_i", ["rewards.group_advantages"]),
    "equalizer": (4.0, 0.8, "micro: S_t, Eq. 8–9", ["sde.step_variances", "equalizer.equalizer_scales"]),
    "loss": (7.0, 0.8, "objective", ["grpo.clipped_policy_loss", "grpo.micro_batch_loss"]),
    "step": (10.0, 0.8, "policy θ", ["grpo.optimizer_step"]),
    "position": (7.0, -1.4, "macro: position, Eq. 11, 13", ["trust_region.gaussian_kl", "trust_region.Anchor"]),
    "velocity": (4.0, -1.4, "macro: velocity, Eq. 12, 15", ["trust_region.stepwise_kl_…", "trust_region.dual_kl"]),
}
ARROWS = [
    ("prompts", "rollout"),
    ("rollout", "reward"),
    ("reward", "advantage"),
    ("advantage", "loss"),
    ("rollout", "equalizer"),
    ("equalizer", "loss"),
    ("loss", "step"),
    ("position", "loss"),
    ("velocity", "loss"),
    ("step", "position"),
]
HALF_WIDTH = 1.25  # of a box
HALF_HEIGHT = 0.72
FACES = {"equalizer": "#DDEBF5", "position": "#FBE8D3", "velocity": "#FBE8D3"}  # the paper's two contributions


def pipeline():
    """Draw Fig. 2."""
    figure, axis = plt.subplots(figsize=(12, 5.4), layout="constrained")
    for begin, end in ARROWS:
        draw_arrow(axis, BOXES[begin], BOXES[end])
    for name, box in BOXES.items():
        draw_box(axis, box, FACES.get(name, "#F2F2F2"))
    axis.text(5.5, 4.0, "grpo.collect: once per iteration", ha="center", style="italic")
    below = "grpo.update: all trained steps of all samples, for each sample in its own random order"
    axis.text(7.0, -2.4, below, ha="center", style="italic")
    axis.set(xlim=(-0.5, 11.5), ylim=(-2.7, 4.3))
    axis.axis("off")
    figure.savefig(FOLDER / "fig2_pipeline.png", dpi=110)
    plt.close(figure)


def draw_arrow(axis, begin, end):
    """An arrow between two boxes, from edge to edge."""
    x0, y0, *_ = begin
    x1, y1, *_ = end
    dx = x1 - x0
    dy = y1 - y0
    inside = share_inside(dx, dy)
    tail = (x0 + dx * inside, y0 + dy * inside)
    head = (x1 - dx * inside, y1 - dy * inside)
    axis.annotate("", head, tail, arrowprops={"arrowstyle": "-|>", "lw": 1.5, "color": "0.3"})


def share_inside(dx, dy):
    """The share of the way (dx, dy), which starts in the middle of a box, that lies inside the box."""
    across = HALF_WIDTH / abs(dx) if dx != 0 else math.inf
    up = HALF_HEIGHT / abs(dy) if dy != 0 else math.inf
    return min(across, up)


def draw_box(axis, box, face):
    x, y, title, functions = box
    corner = (x - HALF_WIDTH, y - HALF_HEIGHT)
    axis.add_patch(plt.Rectangle(corner, 2 * HALF_WIDTH, 2 * HALF_HEIGHT, facecolor=face, edgecolor="0.3"))
    axis.text(x, y + 0.38, title, ha="center", va="center", weight="bold", fontsize=10)
    axis.text(x, y - 0.22, "\n".join(functions), ha="center", va="center", family="monospace", fontsize=8)


# ---------------------------------------------------------------------------------------------- a finished run
def default_run(run):
    """Draw the pages' pictures of a finished run. The videos are those of each prompt's first noise."""
    settings, log = read_run(run)
    before = np.load(run / "samples_before.npy")[:: settings["eval_noises"]]
    after = np.load(run / "samples_after.npy")[:: settings["eval_noises"]]
    pictures.side_by_side(before, after, world.PROMPTS, FOLDER / "default_run.gif", count=7)
    draw_default_run(log, FOLDER / "default_run.png")
    draw_annotated_curves(log, settings["clip_range"], FOLDER / "curves.png")
    print(f"wrote default_run.gif, default_run.png and curves.png in {FOLDER}/")


def read_run(run):
    """(settings, lines of metrics.jsonl) of a run. SystemExit where it is not a finished run of the toy."""
    needed = ("config.json", "metrics.jsonl", "samples_before.npy", "samples_after.npy")
    missing = [name for name in needed if not (run / name).is_file()]
    if missing:
        raise SystemExit(f"--run must be the folder of a finished run: {run} has no {', '.join(missing)}")
    settings, log = read_json(run / "config.json"), read_log(run)
    if settings["model"] != "toy":
        raise SystemExit(f"--run must be a run of the toy: the model of {run} is {settings['model']}")
    made = log[-1]["iteration"]
    if made < settings["iterations"] or "eval_reward" not in log[-1]:
        raise SystemExit(f"--run must be a finished run: {run} has made {made} of {settings['iterations']} iterations")
    return settings, log


def draw_default_run(log, path):
    """Two panels against the iteration: the scores of the evaluations, and the distance to the manifold."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), width_ratios=(4, 3), layout="constrained")
    scores, distance = axes
    pictures.draw_evaluations(scores, log)
    scores.set_title(f"Reward of ODE samples: {first_to_last(log, 'eval_reward')}", fontsize=11)
    scores.set_ylabel("score")
    scores.legend(fontsize=9, loc="lower right", ncols=2)
    iterations, values = pictures.series(log, "eval_distance")
    distance.plot(iterations, values, color=pictures.RED, marker="v", ms=5, lw=1.8)
    distance.set_title(f"Distance to the manifold: {first_to_last(log, 'eval_distance')}", fontsize=11)
    distance.set(ylabel="RMS (peak of a blob: 2)", ylim=(0, 1.1 * values.max()))
    for axis in axes:
        axis.set_xlabel("iteration")
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def draw_annotated_curves(log, clip_range, path):
    """The curves that every run draws, with notes on what to look for in them."""
    figure, ((reward, kl), (ratio, gradient)) = pictures.draw_curves(log, clip_range)
    iterations, quality = pictures.series(log, "eval_VQ")
    best = quality.argmax()
    first, last = (f"{quality[place]:.3f}" for place in (best, -1))
    peak = f"VQ peaks at iteration {iterations[best]}\n({first}) and ends at {last}"
    text = f"the reward rises; but {peak}: the first sign\nof over-optimisation"
    bottom, top = reward.get_ylim()
    reward.set_ylim(bottom, top + 0.2 * (top - bottom))  # room for the note
    note(reward, text, (iterations[best], quality[best]), (0.02, 0.82))
    iterations, position = pictures.series(log, "kl_position")
    refreshed = np.flatnonzero(position == 0)
    text = "a saw-tooth: 0 after each\nrefresh of the anchor"
    note(kl, text, (iterations[refreshed[len(refreshed) // 2]], 0), (0.31, 0.26))
    note(ratio, "ρ is 1 up to rounding: one optimizer step\nper iteration, so the clip never acts", None, (0.22, 0.62))
    _, norms = pictures.series(log, "grad_norm")
    text = f"steady: within a factor of {norms.max() / norms.min():.1f}.\nSpikes far above that announce collapse"
    note(gradient, text, None, (0.25, 0.12))
    figure.savefig(path, dpi=100)
    plt.close(figure)


def note(axis, text, point, place):
    """A text at a place in shares of the axis, with an arrow to a point of its data, if one is given."""
    box = {"boxstyle": "round", "facecolor": "lightyellow", "edgecolor": "gray"}
    arrow = None if point is None else {"arrowstyle": "->", "color": "gray"}
    looks = {"arrowprops": arrow, "fontsize": 9, "bbox": box, "textcoords": "axes fraction"}
    axis.annotate(text, point or place, place, "data" if point else "axes fraction", **looks)


def first_to_last(log, name):
    _, values = pictures.series(log, name)
    return f"{values[0]:.3f} → {values[-1]:.3f}"


# ---------------------------------------------------------------------------------------------- the command
def paper_figures():
    """All figures that need no run, and their numbers."""
    results = {"energy": exploration(), "slopes": marginals(), "spreads": gradient_norm_figure()}
    pipeline()
    (FOLDER / "figures.json").write_text(json.dumps(results, indent=1, ensure_ascii=False), encoding="utf-8")
    for title, numbers in results.items():
        print(title)
        for name, value in numbers.items():
            print(f"    {name:48} {three_digits(value)}")
    print(f"wrote the paper's figures and figures.json in {FOLDER}/")


def three_digits(value):
    """The text of a number, or of a dict of numbers."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {number:.3g}" for name, number in value.items())
    return f"{value:.3g}"


def main(arguments=None):
    parser = argparse.ArgumentParser(description="Draw the paper's figures, or the pages' pictures of a run.")
    parser.add_argument("--run", type=Path, help="a finished run of the toy, for the pages' pictures")
    options = parser.parse_args(arguments)
    FOLDER.mkdir(exist_ok=True)
    if options.run is None:
        paper_figures()
    else:
        default_run(options.run)


if __name__ == "__main__":
    main()
