"""The pictures that a run saves: its curves, and the same prompts and noise before and after training."""

import math
import textwrap

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib import font_manager
from PIL import Image, ImageDraw, ImageFont

matplotlib.use("Agg")  # no display is needed

# Okabe and Ito's colours, distinguishable under the common colour blindnesses.
BLUE, ORANGE, GREEN, RED, BLACK = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#000000"
SCORE_LOOKS = {"reward": (BLACK, "o"), "VQ": (BLUE, "s"), "MQ": (ORANGE, "^"), "TA": (GREEN, "D")}

FONT_SIZE = 12  # pixels
FONT = ImageFont.truetype(font_manager.findfont("DejaVu Sans"), FONT_SIZE)  # matplotlib brings this font along
LETTER = 0.6 * FONT_SIZE  # average width of a letter, in pixels
GAP = 6  # pixels between two videos
MOST_ROWS = 16  # of a contact sheet


# ------------------------------------------------------------------------------------------------ curves
def curves(log, clip_range, path):
    """Reward with its parts, KL with λ, ratio and gradient norm against the iteration. log: lines of metrics.jsonl."""
    figure, axes = plt.subplots(2, 2, figsize=(11, 7), sharex=True, layout="constrained")
    (reward, kl), (ratio, gradient) = axes
    draw_rewards(reward, log)
    draw_kl(kl, log)
    draw_ratio(ratio, log, clip_range)
    gradient.plot(*series(log, "grad_norm"), color=BLACK, lw=1.5)
    gradient.set(title="Gradient norm before clipping", ylabel="norm", ylim=(0, None))
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    for axis in axes[1]:
        axis.set_xlabel("iteration")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def series(log, name):
    """(iterations, values) of one logged number, as arrays. Lines of the log that lack it are left out."""
    having = [line for line in log if name in line]
    iterations = np.array([line["iteration"] for line in having])
    values = np.array([line[name] for line in having])
    return iterations, values


def draw_rewards(axis, log):
    for name, (colour, _) in SCORE_LOOKS.items():
        axis.plot(*series(log, f"{name}_mean"), color=colour, lw=1, alpha=0.5)
    draw_evaluations(axis, log)
    axis.set(title="Reward: rollouts (thin), ODE evaluation (markers)", ylabel="score")
    axis.legend(fontsize=8, loc="best")


def draw_evaluations(axis, log):
    """The scores of the ODE evaluations. Each has its own marker, so that the lines differ without colour, too."""
    for name, (colour, marker) in SCORE_LOOKS.items():
        axis.plot(*series(log, f"eval_{name}"), color=colour, marker=marker, ms=5, lw=1.8, label=name)


def draw_kl(axis, log):
    axis.plot(*series(log, "kl_position"), color=BLUE, lw=1.5, label="position (anchor)")
    axis.plot(*series(log, "kl_velocity"), color=ORANGE, lw=1.5, label="velocity (step-wise)")
    axis.set_yscale("symlog", linthresh=1e-9)  # the rollout-phase estimate can be negative
    axis.set(title="KL per element", ylabel="nats")
    axis.margins(y=0.2)  # room for the legend above the lines
    strength = axis.twinx()
    strength.plot(*series(log, "lambda_kl"), color=RED, ls="--", lw=1.2)
    strength.set(yscale="log")
    strength.set_ylabel("λ_KL (dashed)", color=RED)
    axis.legend(fontsize=8, loc="upper left", ncols=2)


def draw_ratio(axis, log, clip_range):
    iterations, mean = series(log, "ratio_mean")
    _, low = series(log, "ratio_min")
    _, high = series(log, "ratio_max")
    axis.fill_between(iterations, low - 1, high - 1, color=BLUE, alpha=0.2, label="min to max")
    axis.plot(iterations, mean - 1, color=BLUE, lw=1.5, label="mean")
    axis.axhline(clip_range, color=RED, ls="--", lw=1.2, label="clip range")
    axis.axhline(-clip_range, color=RED, ls="--", lw=1.2)
    # With one optimizer step per iteration every ratio is 1. The limits then keep the clip range in view.
    farthest = max([clip_range, *abs(low - 1), *abs(high - 1)])
    axis.set(title="Ratio ρ − 1", ylabel="ρ − 1", ylim=(-1.3 * farthest, 1.3 * farthest))
    axis.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))
    axis.legend(fontsize=8, loc="best")


# ------------------------------------------------------------------------------------------------ videos
def thumbnail(video, frames=8, longest=208):
    """A uint8 video [F, 3, H, W], reduced to at most `frames` frames and `longest` pixels a side."""
    count = min(frames, len(video))
    places = torch.linspace(0, len(video) - 1, count).round().long()
    chosen = video[places]
    scale = longest / max(video.shape[2:])
    if scale < 1:
        small = torch.nn.functional.interpolate(chosen.float(), scale_factor=scale, mode="area")
        chosen = small.round().to(torch.uint8)
    return chosen.cpu()


def to_image(frame):
    """uint8 [3, H, W] -> a picture of PIL."""
    return Image.fromarray(frame.transpose(1, 2, 0))


def contact_sheet(videos, prompts, path, columns=4):
    """A PNG with one row for each prompt: its text, and `columns` frames of uint8 videos [prompts, F, 3, H, W].

    More than MOST_ROWS prompts stand in blocks beside each other, read from top to bottom. Frames narrower than 60
    pixels are drawn larger, by a whole factor, so that text and picture can be read.
    """
    frames = np.linspace(0, videos.shape[1] - 1, columns).round().astype(int)
    enlarge = math.ceil(60 / videos.shape[4])
    height, width = (enlarge * size for size in videos.shape[3:])
    text_height = FONT_SIZE + 6
    row_height, block_width = text_height + height + GAP, columns * (width + GAP)
    blocks = math.ceil(len(videos) / MOST_ROWS)
    rows = math.ceil(len(videos) / blocks)
    canvas = Image.new("RGB", (blocks * block_width, rows * row_height), "white")
    draw = ImageDraw.Draw(canvas)
    for place, (video, prompt) in enumerate(zip(videos, prompts, strict=True)):
        left, top = place // rows * block_width, place % rows * row_height
        line = textwrap.shorten(prompt, int(block_width / LETTER), placeholder=" …")
        draw.text((left + 2, top + 1), line, "black", FONT)
        for column, frame in enumerate(frames):
            picture = to_image(video[frame]).resize((width, height), Image.Resampling.NEAREST)
            canvas.paste(picture, (left + column * (width + GAP), top + text_height))
    canvas.save(path)


def side_by_side(before, after, prompts, path, count=8, pixels=108, fps=8):
    """An animated GIF of `count` prompts, spread over the list: the video before training above the one after it.

    before, after: uint8 [prompts, F, 3, H, W], made from the same noise. pixels: width of one video.
    """
    count = min(count, len(prompts))
    chosen = np.linspace(0, len(prompts) - 1, count).round().astype(int)
    texts = [prompts[index] for index in chosen]
    pictures = []
    for frame in range(before.shape[1]):
        pictures.append(frame_side_by_side(before[chosen, frame], after[chosen, frame], texts, pixels))
    durations = [1000 // fps] * len(pictures)  # milliseconds
    durations[-1] = 500  # a pause shows where the motion ends and begins again
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=durations, loop=0)


def frame_side_by_side(before, after, prompts, pixels):
    """One picture of that GIF. before, after: uint8 [prompts, 3, H, W]."""
    height = round(pixels * before.shape[2] / before.shape[3])
    left = 54  # room for the words "before" and "after"
    text_height = 3 * (FONT_SIZE + 4)
    canvas_width = left + len(prompts) * (pixels + GAP)
    canvas_height = text_height + 2 * (height + GAP)
    canvas = Image.new("RGB", (canvas_width, canvas_height), "white")
    draw = ImageDraw.Draw(canvas)
    for column, prompt in enumerate(prompts):
        lines = textwrap.wrap(prompt, int(pixels / LETTER), max_lines=3, placeholder=" …")
        draw.multiline_text((left + column * (pixels + GAP), 0), "\n".join(lines), "black", FONT, spacing=2)
    rows = {"before": before, "after": after}
    for row, (label, frames) in enumerate(rows.items()):
        top = text_height + row * (height + GAP)
        draw.text((2, top + (height - FONT_SIZE) // 2), label, "black", FONT)
        for column, frame in enumerate(frames):
            picture = to_image(frame).resize((pixels, height), Image.Resampling.NEAREST)
            canvas.paste(picture, (left + column * (pixels + GAP), top))
    return canvas


# ------------------------------------------------------------------------------------------------ the end of a run
def report(run, log, config, prompts):
    """The end of a run: curves, videos, and the table before → after from the first and the last evaluation.

    The videos are those that the evaluations saved, for the first noise of each prompt. A score that is 0 both times
    gets no row.
    """
    curves(log, config.clip_range, run / "curves.png")
    before = np.load(run / "samples_before.npy")[:: config.eval_noises]
    after = np.load(run / "samples_after.npy")[:: config.eval_noises]
    side_by_side(before, after, prompts, run / "samples_before_after.gif")
    evaluations = [line for line in log if "eval_reward" in line]
    first = evaluations[0]
    last = evaluations[-1]
    heading = f"after {last['iteration']}"
    print(f"{'ODE samples':12} {'before':>8} {heading:>10}  change")
    for key in first:
        name = key.removeprefix("eval_")
        scored = first[key] != 0 or last[key] != 0
        if key.startswith("eval_") and scored:
            print(f"{name:12} {first[key]:8.4f} {last[key]:10.4f} {last[key] - first[key]:+8.4f}")
    print(f"{run}: metrics.jsonl, curves.png, samples_before_after.gif, checkpoints")
