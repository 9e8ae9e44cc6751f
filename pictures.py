"""The pictures that a run saves: its curves, and the same prompts and noise before and after training."""

import textwrap

import matplotlib

matplotlib.use("Agg")  # no display is needed

import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image, ImageDraw, ImageFont  # noqa: E402

# Okabe and Ito's colours, distinguishable under the common colour blindnesses.
BLUE, ORANGE, GREEN, RED, BLACK = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#000000"


def curves(log, clip_range, path):
    """reward with its parts, KL with λ, ratio, gradient norm, each against the iteration. log: lines of metrics.jsonl."""
    iterations = [line for line in log if "reward_mean" in line]
    evaluations = [line for line in log if "eval_reward" in line]
    figure, ((reward, kl), (ratio, gradient)) = plt.subplots(2, 2, figsize=(11, 7), sharex=True, layout="constrained")

    def series(name, lines=iterations):
        points = [(line["iteration"], line[name]) for line in lines if line.get(name) is not None]
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
    ratio.set(title="Ratio ρ − 1", ylabel="ρ − 1", xlabel="iteration")

    gradient.plot(*series("grad_norm"), color=BLACK, lw=1.5)
    gradient.set(title="Gradient norm before clipping", ylabel="norm", xlabel="iteration", ylim=(0, None))
    for axis in (reward, kl, ratio):
        axis.legend(fontsize=8, loc="lower right")
    for axis in (reward, kl, ratio, gradient):
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def thumbnail(video, frames=8, longest=208):
    """uint8 [F, 3, H, W] -> the same with at most `frames` frames and `longest` pixels a side; a toy clip stays as it is."""
    chosen = video[torch.linspace(0, len(video) - 1, min(frames, len(video))).round().long()]
    scale = longest / max(video.shape[2:])
    if scale < 1:
        chosen = torch.nn.functional.interpolate(chosen.float(), scale_factor=scale, mode="area").round().to(torch.uint8)
    return chosen.cpu()


def contact_sheet(videos, prompts, path, columns=4):
    """A PNG with one row for each prompt: its text, and `columns` frames of uint8 videos [prompts, F, 3, H, W]."""
    chosen = np.linspace(0, videos.shape[1] - 1, columns).round().astype(int)
    height, width = videos.shape[3:]
    label, gap = 16, 6
    canvas = Image.new("RGB", (columns * (width + gap), len(videos) * (height + label + gap)), "white")
    draw = ImageDraw.Draw(canvas)
    for row, (video, prompt) in enumerate(zip(videos, prompts, strict=True)):
        top = row * (height + label + gap)
        line = textwrap.shorten(prompt, canvas.width // 6, placeholder=" …")
        draw.text((2, top + 1), line, "black", ImageFont.load_default(11))
        for column, frame in enumerate(chosen):
            canvas.paste(Image.fromarray(video[frame].transpose(1, 2, 0)), (column * (width + gap), top + label))
    canvas.save(path)


def side_by_side(before, after, prompts, path, count=8, pixels=108, fps=8):
    """An animated GIF: `count` prompts, spread over the list, above them the video before and below the one after.

    before, after: uint8 [prompts, F, 3, H, W], made from the same noise. pixels: width of one video.
    """
    chosen = np.linspace(0, len(prompts) - 1, min(count, len(prompts))).round().astype(int)
    gap, text, left, tall = 6, 48, 46, round(pixels * before.shape[3] / before.shape[4])
    width, height = left + len(chosen) * (pixels + gap), text + 2 * (tall + gap)
    font = ImageFont.load_default(11)
    pictures = []
    for frame in range(before.shape[1]):
        canvas = Image.new("RGB", (width, height), "white")
        draw = ImageDraw.Draw(canvas)
        for row, (label, videos) in enumerate({"before": before, "after": after}.items()):
            top = text + row * (tall + gap)
            draw.text((4, top + tall // 2 - 6), label, "black", font)
            for column, index in enumerate(chosen):
                picture = Image.fromarray(videos[index, frame].transpose(1, 2, 0))
                place = left + column * (pixels + gap), top
                canvas.paste(picture.resize((pixels, tall), Image.Resampling.NEAREST), place)
        for column, index in enumerate(chosen):
            words = textwrap.wrap(prompts[index], 18, max_lines=3, placeholder=" …")
            draw.multiline_text((left + column * (pixels + gap), 2), "\n".join(words), "black", font)
        pictures.append(canvas)
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=1000 // fps, loop=0)


def report(run, log, config, prompts):
    """The end of a run: curves, pictures, and the table before → after from the first and the last evaluation.

    The samples are those that the evaluations saved. Each prompt's first noise is shown. A score that was 0 and is 0 has
    no row.
    """
    curves(log, config.clip_range, run / "curves.png")
    before = np.load(run / "samples_before.npy")[:: config.eval_noises]
    after = np.load(run / "samples_after.npy")[:: config.eval_noises]
    side_by_side(before, after, prompts, run / "samples_before_after.gif")
    evaluations = [line for line in log if "eval_reward" in line]
    first, last = evaluations[0], evaluations[-1]
    heading = f"after {last['iteration']}"
    print(f"{'ODE samples':12} {'before':>8} {heading:>10}  change")
    for name in first:
        if name.startswith("eval_") and (first[name] or last[name]):
            before, after = (np.nan if line[name] is None else line[name] for line in (first, last))  # null: not measured
            print(f"{name[5:]:12} {before:8.4f} {after:10.4f} {after - before:+8.4f}")
    print(f"{run}: metrics.jsonl, curves.png, samples_before_after.gif, checkpoints")
