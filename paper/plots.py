"""The pictures of the ablation grid (Fig. 5, 7, 8 and Table 2 of the paper, on the toy) and of the miniature's arms.
Bands and bars are 95% intervals over the seeds.
"""

import matplotlib

matplotlib.use("Agg")  # no display is needed

import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402

from engine.pictures import BLACK, BLUE, GREEN, ORANGE, RED, series  # noqa: E402
from paper.claims import NAMES, interval  # noqa: E402
from trust_region import KL_MODES  # noqa: E402

# One colour, line and marker each, so that a picture also reads in grey.
LOOKS = [(BLUE, "-", "o"), (ORANGE, "--", "s"), (RED, "-.", "^"), (GREEN, ":", "D"), (BLACK, (0, (5, 1)), "v")]


def band(axis, logs, name, look, text, marks=True):
    """Draw the mean over seeds as a line and its 95% interval as a band."""
    colour, line, marker = look
    iterations, _ = series(logs[0], name)
    mean, half = interval([series(log, name)[1] for log in logs])
    axis.fill_between(iterations, mean - half, mean + half, color=colour, alpha=0.15, lw=0)
    axis.plot(iterations, mean, color=colour, ls=line, marker=marker if marks else None, ms=4, lw=1.6, label=text)


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
    for axis, row, words in zip(axes, ("dual,A", "equalizer off"), ("on", "off"), strict=True):
        for (sampler, title), look in zip(NAMES.items(), LOOKS, strict=True):
            band(axis, logs(f"{sampler},{row}"), "eval_reward", look, title)
        axis.set(title=f"Equalizer {words}", xlabel="iteration", ylabel="reward of ODE samples (setting A)")
    finish(figure, axes, path, axes)


def kl_modes(logs, results, path):
    """Fig. 8: KL modes, each at its best λ_KL, with one optimizer step per iteration (above) and with nine (below)."""
    figure, axes = plt.subplots(2, 4, figsize=(17, 7.5), layout="constrained")
    for (reward, spread, distance, drift), steps in zip(axes, (1, 9), strict=True):
        for place, (mode, look) in enumerate(zip(KL_MODES, LOOKS, strict=True)):
            row = f"kl,{steps},{mode}"
            band(reward, logs(row), "eval_reward", look, mode)
            band(spread, logs(row), "group_std", look, mode, marks=False)
            band(distance, logs(row), "eval_distance", look, mode)
            mean, half = interval(results["rows"][row]["drift"])
            drift.bar(place, mean, yerr=half, color=look[0], ecolor="0.5", capsize=4, width=0.6)
        words = f"optimizer steps per iteration: {steps}"
        reward.set(title=f"Reward of ODE samples\n{words}", xlabel="iteration", ylabel="reward (setting A)")
        spread.set(title=f"Std of the reward within groups\n{words}", xlabel="iteration", ylabel="std")
        distance.set(title=f"Distance to the manifold\n{words}", xlabel="iteration", ylabel="RMS (peak of a blob: 2)")
        drift.set(title=f"Drift: same noise, before against after\n{words}", ylabel="RMS pixel change")
        drift.set_xticks(range(len(KL_MODES)), KL_MODES)
    finish(figure, axes.flat, path, axes[:, :3].flat)


def tuning(results, path):
    """Overall against λ_KL for each KL mode in both recipes, on the mean of the tuning seeds."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), sharey=True, layout="constrained")
    for axis, steps in zip(axes, (1, 9), strict=True):
        for mode, (colour, line, marker) in zip(KL_MODES[1:], LOOKS[1:], strict=True):
            entries = results["tuning"][f"kl,{steps},{mode}"]
            lambdas = [entry["settings"]["kl_lambda"] for entry in entries]
            means = [np.mean(entry["Overall"]) for entry in entries]
            axis.semilogx(lambdas, means, color=colour, ls=line, marker=marker, ms=5, lw=1.6, label=mode)
        axis.set(title=f"Optimizer steps per iteration: {steps}", xlabel="λ_KL", ylabel="VQ + MQ + TA of ODE samples")
    finish(figure, axes, path, axes)


def schedules(logs, path):
    """Fig. 7: schedules of λ_KL."""
    rows = {
        "fixed": "sage,dual,A",
        "two-stage": "schedule,two_stage",
        "ramp": "schedule,ramp",
        "milder": "schedule,milder",
        "controller": "schedule,controller,1e-5",
    }
    figure, axes = plt.subplots(1, 3, figsize=(14, 4), layout="constrained")
    for (text, row), look in zip(rows.items(), LOOKS, strict=False):
        band(axes[0], logs(row), "eval_reward", look, text)
        band(axes[1], logs(row), "kl_position", look, text, marks=False)
        band(axes[2], logs(row), "lambda_kl", look, text, marks=False)
    axes[0].set(title="Reward of ODE samples", ylabel="reward (setting A)")
    axes[1].set(title="KL to the moving anchor", ylabel="nats per element")
    axes[1].set_yscale("symlog", linthresh=1e-5)  # it is 0 right after a refresh
    axes[2].set(title="Schedule", ylabel="λ_KL", yscale="log")
    for axis in axes:
        axis.set_xlabel("iteration")
    finish(figure, axes, path, axes)


def table_2(results, path):
    """Table 2: Overall, distance and diversity of trained models, sampler × KL × reward setting."""
    numbers = {"Overall": "VQ + MQ + TA", "distance": "RMS to the manifold", "diversity": "spread of places (pixels)"}
    samplers = [name for name in NAMES if f"{name},none,A" in results["rows"]]
    figure, axes = plt.subplots(2, 3, figsize=(14, 7), sharex=True, sharey="col", layout="constrained")
    for line, setting in zip(axes, "AB", strict=True):
        for axis, (number, unit) in zip(line, numbers.items(), strict=True):
            for place, (mode, look) in enumerate(zip(("none", "fixed", "dual"), LOOKS, strict=False)):
                for column, sampler in enumerate(samplers):
                    mean, half = interval(results["rows"][f"{sampler},{mode},{setting}"][number])
                    text = f"KL {mode}" if column == 0 else None
                    x = column + 0.2 * (place - 1)
                    axis.errorbar(x, mean, half, color=look[0], marker=look[2], ls="none", capsize=3, label=text)
            axis.set(title=f"{number}, setting {setting}", ylabel=unit)
            axis.set_xticks(range(len(samplers)), [NAMES[sampler] for sampler in samplers], fontsize=8)
    finish(figure, axes.flat, path, axes[0, :1])


def reward_per_flop(rows, path):
    """What each arm of the miniature gained, in all and per TFLOP. rows: those of claims.ranked_arms, from the top."""
    rows = rows[::-1]  # an axis counts from below
    figure, axes = plt.subplots(1, 2, figsize=(12, 1.5 + 0.3 * len(rows)), sharey=True, layout="constrained")
    for place, row in enumerate(rows):
        gains = np.array([run["after"] - run["before"] for run in row.runs])
        colour = BLUE if row.arm == "short run" else ORANGE if "trained" in row.arm else BLACK
        for axis, numbers in zip(axes, (gains, gains / row.tflop), strict=True):
            mean, half = interval(numbers)
            # The interval of two seeds is wider than the picture, so their two runs are drawn instead.
            if len(gains) > 2:
                axis.errorbar(mean, place, xerr=half, color=colour, marker="o", ms=5, capsize=3)
            else:
                axis.plot(numbers, [place] * len(gains), color=colour, marker="x", ls="none", ms=6)
    for axis, unit in zip(axes, ("", " per TFLOP"), strict=True):
        axis.set_xlabel(f"gain in reward{unit}")
        axis.axvline(0, color=BLACK, lw=0.8)
    axes[0].set_yticks(range(len(rows)), [f"{row.arm}: {row.tflop:.2f} TFLOP" for row in rows])
    axes[0].set_ylim(-0.7, len(rows) - 0.3)
    for axis in axes:
        axis.axhspan(-0.7, sum(row.elsewhere for row in rows) - 0.5, color="0.93")
    axes[1].plot([], [], color=BLUE, marker="o", label="the short run, which all are compared with")
    axes[1].plot([], [], color=ORANGE, marker="o", label="trains only some samples of each group")
    axes[1].fill_between([], [], color="0.93", label="another guidance, so another reward to start from")
    figure.legend(loc="outside upper center", ncols=3, fontsize=9, frameon=False)
    finish(figure, axes, path, [])


def ablation_pictures(logs, results, folder):
    """Draw all pictures of the grid. logs(row) -> the logs of a row, one per seed."""
    folder.mkdir(exist_ok=True)
    equalizer(logs, folder / "fig5_equalizer.png")
    schedules(logs, folder / "fig7_schedules.png")
    kl_modes(logs, results, folder / "fig8_kl_modes.png")
    tuning(results, folder / "tuning.png")
    table_2(results, folder / "table2.png")
