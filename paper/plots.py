"""The pictures of the ablation grid: Fig. 5, 7, 8 and Table 2 of the paper, on the toy. Bands and bars: 95% over seeds."""

import matplotlib

matplotlib.use("Agg")  # no display is needed

import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402

from paper.claims import HOT, SAMPLERS, interval, row  # noqa: E402
from pictures import BLACK, BLUE, GREEN, ORANGE, RED  # noqa: E402

# One colour, line and marker each, so that a picture also reads in grey.
LOOKS = [(BLUE, "-", "o"), (ORANGE, "--", "s"), (RED, "-.", "^"), (GREEN, ":", "D"), (BLACK, (0, (5, 1)), "v")]


def series(logs, name):
    """(updates, [seeds, updates]) of a logged number."""
    lines = [[(line["update"], line[name]) for line in log if name in line] for log in logs]
    return [update for update, _ in lines[0]], np.array([[value for _, value in seed] for seed in lines])


def band(axis, logs, name, look, text, marks=True):
    """Mean over seeds as a line, its 95% interval as a band."""
    colour, line, marker = look
    updates, values = series(logs, name)
    mean, half = interval(values)
    axis.fill_between(updates, mean - half, mean + half, color=colour, alpha=0.15, lw=0)
    axis.plot(updates, mean, color=colour, ls=line, marker=marker if marks else None, ms=4, lw=1.6, label=text)


def finish(figure, axes, path, legend):
    for axis in axes:
        axis.grid(alpha=0.3)
    for axis in legend:
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def equalizer(logs, path):
    """Fig. 5: learning with and without the temporal gradient equalizer."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), sharey=True, layout="constrained")
    for axis, options, words in zip(axes, ([], ["equalizer=False"]), ("on", "off"), strict=True):
        for sampler, look in zip(SAMPLERS, LOOKS, strict=True):
            band(axis, logs(row(sampler, *options)), "eval_reward", look, sampler)
        axis.set(title=f"Equalizer {words}", xlabel="rollout update", ylabel="reward of ODE samples (setting A)")
    finish(figure, axes, path, axes)


def kl_modes(logs, results, path):
    """Fig. 8: KL modes at a raised learning rate."""
    figure, axes = plt.subplots(2, 2, figsize=(11, 7.5), layout="constrained")
    (reward, spread), (distance, drift) = axes
    modes = ("none", "fixed", "stepwise", "moving", "dual")
    for place, (mode, look) in enumerate(zip(modes, LOOKS, strict=True)):
        name = HOT if mode == "dual" else f"kl_mode={mode},{HOT}"
        band(reward, logs(name), "eval_reward", look, mode)
        band(spread, logs(name), "reward_std", look, mode, marks=False)
        band(distance, logs(name), "eval_distance", look, mode)
        mean, half = interval(results["rows"][name]["drift"])
        drift.bar(place, mean, yerr=half, color=look[0], ecolor="0.5", capsize=4, width=0.6)
    reward.set(title="Reward of ODE samples", xlabel="rollout update", ylabel="reward (setting A)")
    spread.set(title="Std of the reward over a rollout's samples", xlabel="rollout update", ylabel="std")
    distance.set(title="Distance to the manifold of clean clips", xlabel="rollout update", ylabel="RMS (peak of a blob: 2)")
    drift.set(title="Drift: same noise, before against after", ylabel="RMS pixel change (peak of a blob: 2)")
    drift.set_xticks(range(len(modes)), modes)
    finish(figure, axes.flat, path, (reward, spread, distance))


def schedules(logs, path):
    """Fig. 7: schedules of λ_KL."""
    figure, axes = plt.subplots(1, 3, figsize=(14, 4), layout="constrained")
    for (text, name), look in zip(
        {"fixed": "kl_schedule=fixed", "two-stage": "base", "milder": "kl_schedule=milder"}.items(), LOOKS, strict=False
    ):
        band(axes[0], logs(name), "eval_reward", look, text)
        band(axes[1], logs(name), "kl_position", look, text, marks=False)
        band(axes[2], logs(name), "lambda_kl", look, text, marks=False)
    axes[0].set(title="Reward of ODE samples", ylabel="reward (setting A)")
    axes[1].set(title="KL to the moving anchor", ylabel="nats per element", yscale="log")
    axes[2].set(title="Schedule", ylabel="λ_KL", yscale="log")
    for axis in axes:
        axis.set_xlabel("rollout update")
    finish(figure, axes, path, axes)


def table_2(results, path):
    """Table 2: Overall, distance and diversity of trained models, sampler × KL × reward setting."""
    numbers = {"Overall": "VQ + MQ + TA", "distance": "RMS to the manifold", "diversity": "spread of places (pixels)"}
    figure, axes = plt.subplots(2, 3, figsize=(14, 7), sharex=True, sharey="col", layout="constrained")
    for line, setting in enumerate("AB"):
        for axis, (number, unit) in zip(axes[line], numbers.items(), strict=True):
            for shift, (mode, look) in enumerate(zip(("none", "fixed", "dual"), LOOKS, strict=False)):
                options = [f"kl_mode={mode}"] * (mode != "dual") + ["reward_setting=B"] * (setting == "B")
                rows = [results["rows"][row(sampler, *options)][number] for sampler in SAMPLERS]
                means, halves = zip(*map(interval, rows), strict=True)
                places = np.arange(len(rows)) + 0.2 * (shift - 1)
                axis.errorbar(places, means, halves, color=look[0], marker=look[2], ls="none", capsize=3, label=f"KL {mode}")
            axis.set(title=f"{number}, setting {setting}", ylabel=unit)
            axis.set_xticks(range(len(SAMPLERS)), list(SAMPLERS), fontsize=8)
    finish(figure, axes.flat, path, axes[0, :1])


def ablation_pictures(logs, results, folder):
    """All of them. logs(row) -> the logs of a row, one per seed."""
    folder.mkdir(exist_ok=True)
    equalizer(logs, folder / "fig5_equalizer.png")
    schedules(logs, folder / "fig7_schedules.png")
    kl_modes(logs, results, folder / "fig8_kl_modes.png")
    table_2(results, folder / "table2.png")
