"""The pictures that a run saves: its curves, and the same prompts and noise before and after training."""

import matplotlib

matplotlib.use("Agg")  # no display is needed

import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
from PIL import Image, ImageDraw, ImageFont  # noqa: E402

# Okabe and Ito's colours, distinguishable under the common colour blindnesses.
BLUE, ORANGE, GREEN, RED, BLACK = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#000000"


def curves(log, clip_range, path):
    """reward with its parts, KL with λ, ratio, gradient norm, each against the rollout update. log: lines of metrics.jsonl."""
    updates = [line for line in log if "reward_mean" in line]
    evaluations = [line for line in log if "eval_reward" in line]
    figure, ((reward, kl), (ratio, gradient)) = plt.subplots(2, 2, figsize=(11, 7), sharex=True, layout="constrained")

    def series(name, lines=updates):
        points = [(line["update"], line[name]) for line in lines if name in line]
        return np.array(points).reshape(-1, 2).T

    for name, colour in {"reward": BLACK, "VQ": BLUE, "MQ": ORANGE, "TA": GREEN}.items():
        reward.plot(*series(f"{name}_mean"), color=colour, lw=1, alpha=0.5)
        reward.plot(*series(f"eval_{name}", evaluations), color=colour, marker="o", ms=4, lw=1.8, label=name)
    reward.set(title="Reward: rollouts (thin), ODE evaluation (dots)", ylabel="score")

    for name, colour, label in (
        ("kl_position", BLUE, "position (anchor)"),
        ("kl_velocity", ORANGE, "velocity (step-wise)"),
    ):
        kl.plot(*series(name), color=colour, lw=1.5, label=label)
    kl.set_yscale("symlog", linthresh=1e-9)  # the rollout-phase estimate can be negative
    kl.set(title="KL per element", ylabel="nats")
    strength = kl.twinx()
    strength.plot(*series("lambda_kl"), color=RED, ls="--", lw=1.2)
    strength.set(yscale="log", ylabel="λ_KL (dashed)")

    x, mean = series("ratio_mean")
    ratio.fill_between(x, series("ratio_min")[1] - 1, series("ratio_max")[1] - 1, color=BLUE, alpha=0.2, label="min to max")
    ratio.plot(x, mean - 1, color=BLUE, lw=1.5, label="mean")
    for side in (-clip_range, clip_range):
        ratio.axhline(side, color=RED, ls="--", lw=1.2, label="clip range" if side > 0 else None)
    ratio.set(title="Ratio ρ − 1", ylabel="ρ − 1", xlabel="rollout update")

    gradient.plot(*series("grad_norm"), color=BLACK, lw=1.5)
    gradient.set(title="Gradient norm before clipping", ylabel="norm", xlabel="rollout update", yscale="log")
    for axis in (reward, kl, ratio):
        axis.legend(fontsize=8)
    for axis in (reward, kl, ratio, gradient):
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def side_by_side(before, after, prompts, path, count=8, pixels=108, fps=8):
    """An animated GIF: `count` prompts, spread over the list, above them the video before and below the one after.

    before, after: uint8 [prompts, F, 3, H, W], made from the same noise.
    """
    chosen = np.linspace(0, len(prompts) - 1, count).round().astype(int)
    gap, text, left = 6, 34, 46
    width, height = left + count * (pixels + gap), text + 2 * (pixels + gap)
    font = ImageFont.load_default(11)
    pictures = []
    for frame in range(before.shape[1]):
        canvas = Image.new("RGB", (width, height), "white")
        draw = ImageDraw.Draw(canvas)
        for row, (label, videos) in enumerate({"before": before, "after": after}.items()):
            top = text + row * (pixels + gap)
            draw.text((4, top + pixels // 2 - 6), label, "black", font)
            for column, index in enumerate(chosen):
                picture = Image.fromarray(videos[index, frame].transpose(1, 2, 0))
                place = left + column * (pixels + gap), top
                canvas.paste(picture.resize((pixels, pixels), Image.Resampling.NEAREST), place)
        for column, index in enumerate(chosen):
            words = prompts[index].replace("a ", "", 1).split(" blob moves ")
            draw.multiline_text((left + column * (pixels + gap), 3), "\n".join(words), "black", font)
        pictures.append(canvas)
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=1000 // fps, loop=0)
