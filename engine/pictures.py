"""The pictures that a run saves: its curves, and the same prompts and noise before and after training."""

import itertools
import math
import textwrap
from functools import cache
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib import font_manager, ft2font
from PIL import Image, ImageDraw, ImageFont

matplotlib.use("Agg")  # no display is needed

# Okabe and Ito's colours, distinguishable under the common colour blindnesses.
BLUE, ORANGE, GREEN, RED, BLACK = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#000000"
SCORE_LOOKS = {"reward": (BLACK, "o"), "VQ": (BLUE, "s"), "MQ": (ORANGE, "^"), "TA": (GREEN, "D")}
OTHER_LOOKS = [(BLUE, "s"), (ORANGE, "^"), (GREEN, "D"), (RED, "v")]  # of the scores of one's own reward

FONT_SIZE = 12  # pixels
FONT_FILE = font_manager.findfont("DejaVu Sans")  # matplotlib brings this font along
FONT = ImageFont.truetype(FONT_FILE, FONT_SIZE)
LETTER = 0.6 * FONT_SIZE  # average width of a letter, in pixels
GAP = 6  # pixels between two videos
MOST_ROWS = 16  # of a contact sheet


# ------------------------------------------------------------------------------------------------ curves
def curves(log, clip_range, path):
    figure, _ = draw_curves(log, clip_range)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_curves(log, clip_range):
    """(figure, its axes) of reward with its parts, KL with λ, ratio and gradient norm. log: lines of metrics.jsonl."""
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
    return figure, axes


def series(log, name):
    """(iterations, values) of one logged number, as arrays. Lines of the log that lack it are left out."""
    having = [line for line in log if name in line]
    iterations = np.array([line["iteration"] for line in having])
    values = np.array([line[name] for line in having])
    return iterations, values


def score_looks(log):
    """{score of the log: (colour, marker)}"""
    logged = {name for line in log for name in line}
    scores = [name.removesuffix("_std") for name in sorted(logged) if name.endswith("_std")]
    own = [name for name in scores if f"{name}_mean" in logged and name not in ("reward", "distance")]
    if set(own) <= SCORE_LOOKS.keys():
        return SCORE_LOOKS
    return {"reward": SCORE_LOOKS["reward"]} | dict(zip(own, itertools.cycle(OTHER_LOOKS), strict=False))


def draw_rewards(axis, log):
    for name, (colour, _) in score_looks(log).items():
        axis.plot(*series(log, f"{name}_mean"), color=colour, lw=1, alpha=0.5)
    draw_evaluations(axis, log)
    axis.set(title="Reward: rollouts (thin), ODE evaluation (markers)", ylabel="score")
    axis.legend(fontsize=8, loc="best")


def draw_evaluations(axis, log):
    """The scores of the ODE evaluations. Each has its own marker, so that the lines differ without colour, too."""
    for name, (colour, marker) in score_looks(log).items():
        axis.plot(*series(log, f"eval_{name}"), color=colour, marker=marker, ms=5, lw=1.8, label=name)


def draw_kl(axis, log):
    axis.plot(*series(log, "kl_position"), color=BLUE, lw=1.5, label="position (anchor)")
    axis.plot(*series(log, "kl_velocity"), color=ORANGE, lw=1.5, label="velocity (step-wise)")
    axis.set_yscale("symlog", linthresh=1e-9)  # the rollout-phase estimate can be negative
    axis.set(title="KL per element", ylabel="nats")
    axis.margins(y=0.2)  # room for the legend above the lines
    strength = axis.twinx()
    strength.plot(*series(log, "lambda_kl"), color=RED, ls="--", lw=1.2)
    strength.set(ylim=lambda_limits(log), yscale="log")
    strength.set_ylabel("λ_KL (dashed)", color=RED)
    axis.legend(fontsize=8, loc="upper left", ncols=2)


def lambda_limits(log):
    """A decade around λ_KL, of which matplotlib can make no axis where it is constant or 0."""
    values = [line["lambda_kl"] for line in log if line.get("lambda_kl", 0) > 0] or [1.0]
    return min(values) / 10, max(values) * 10


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
    for place, (video, (text, font)) in enumerate(zip(videos, captions(prompts, path), strict=True)):
        left, top = place // rows * block_width, place % rows * row_height
        draw.text((left + 2, top + 1), wrapped(text, font, block_width, lines=1), "black", font)
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
    texts = captions([prompts[index] for index in chosen], path)
    pictures = []
    for frame in range(before.shape[1]):
        pictures.append(frame_side_by_side(before[chosen, frame], after[chosen, frame], texts, pixels))
    durations = [1000 // fps] * len(pictures)  # milliseconds
    durations[-1] = 500  # a pause shows where the motion ends and begins again
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=durations, loop=0)


def frame_side_by_side(before, after, texts, pixels):
    """One picture of that GIF. before, after: uint8 [prompts, 3, H, W]. texts: a caption and its font for each."""
    height = round(pixels * before.shape[2] / before.shape[3])
    left = 54  # room for the words "before" and "after"
    text_height = 3 * (FONT_SIZE + 4)
    canvas_width = left + len(texts) * (pixels + GAP)
    canvas_height = text_height + 2 * (height + GAP)
    canvas = Image.new("RGB", (canvas_width, canvas_height), "white")
    draw = ImageDraw.Draw(canvas)
    for column, (text, font) in enumerate(texts):
        place = (left + column * (pixels + GAP), 0)
        draw.multiline_text(place, wrapped(text, font, pixels, lines=3), "black", font, spacing=2)
    rows = {"before": before, "after": after}
    for row, (label, frames) in enumerate(rows.items()):
        top = text_height + row * (height + GAP)
        draw.text((2, top + (height - FONT_SIZE) // 2), label, "black", FONT)
        for column, frame in enumerate(frames):
            picture = to_image(frame).resize((pixels, height), Image.Resampling.NEAREST)
            canvas.paste(picture, (left + column * (pixels + GAP), top))
    return canvas


# ------------------------------------------------------------------------------------------------ captions
def captions(prompts, path):
    """[(text, font)] for the prompts of a picture. A prompt that no font of this machine can draw would be boxes: its
    number stands there, and a .txt beside the picture lists the prompts."""
    texts = [" ".join(prompt.split()) for prompt in prompts]
    fonts = [font_for(text) for text in texts]
    if None not in fonts:
        return list(zip(texts, fonts))
    listed = Path(path).with_suffix(".txt")
    listed.write_text("".join(f"{number}: {text}\n" for number, text in enumerate(texts, start=1)), encoding="utf-8")
    made = []
    for number, (text, font) in enumerate(zip(texts, fonts), start=1):
        made.append((text, font) if font else (f"prompt {number}: see {listed.name}", FONT))
    return made


def font_for(text):
    """A font of this machine that has all characters of a text; None where there is none."""
    needed = {ord(character) for character in text if not character.isspace()}
    for path in (FONT_FILE, *other_fonts()):
        font, characters = load_font(path)
        if needed <= characters:
            return font
    return None


@cache
def other_fonts():
    """The files of this machine's fonts, upright and of normal weight first."""
    fonts = sorted(font_manager.fontManager.ttflist, key=lambda font: (font.style != "normal", font.weight != 400))
    return [font.fname for font in fonts if "LastResort" not in font.fname]  # that one consists of boxes


@cache
def load_font(path):
    """(font, the characters that it has). One that cannot be drawn at this size, as emoji made of pixels, has none."""
    try:
        return ImageFont.truetype(path, FONT_SIZE), set(ft2font.FT2Font(path).get_charmap())
    except (OSError, RuntimeError):
        return FONT, set()


def wrapped(text, font, pixels, lines):
    """A text in at most so many lines of so many pixels. Where it is longer, it ends in …"""
    letters = int(pixels / max(LETTER, font.getlength(text) / len(text)))
    longest = max(len(word) for word in text.split())
    # textwrap would drop such a word whole: of a Chinese text, all.
    if longest > letters and len(text) > lines * letters:
        text = f"{text[: lines * letters - 1]}…"
    return "\n".join(textwrap.wrap(text, letters, max_lines=lines, placeholder=" …"))


# ------------------------------------------------------------------------------------------------ the end of a run
def report(run, log, config, prompts):
    """The end of a run: the table before → after, curves, and videos.

    The videos are those that the evaluations saved, for the first noise of each prompt.
    """
    print(table(log, config.iterations))
    curves(log, config.clip_range, run / "curves.png")
    before = np.load(run / "samples_before.npy")[:: config.eval_noises]
    after = np.load(run / "samples_after.npy")[:: config.eval_noises]
    side_by_side(before, after, prompts, run / "samples_before_after.gif")
    print(f"{run}: metrics.jsonl, curves.png, samples_before_after.gif, checkpoints")


def table(log, iterations):
    """The scores before → after. A score that is 0 both times gets no row."""
    lacking = missing_evaluations(log, iterations)
    if lacking:
        return f"no table of before and after: metrics.jsonl lacks the evaluation of iteration {' and '.join(lacking)}"
    evaluated = {line["iteration"]: line for line in log if "eval_reward" in line}
    first, last = evaluated[0], evaluated[iterations]
    heading = f"after {iterations}"
    rows = [f"{'ODE samples':12} {'before':>8} {heading:>10}  change"]
    for key in first:
        name = key.removeprefix("eval_")
        scored = first[key] != 0 or last[key] != 0
        if key.startswith("eval_") and scored:
            rows.append(f"{name:12} {first[key]:8.4f} {last[key]:10.4f} {last[key] - first[key]:+8.4f}")
    return "\n".join(rows)


def missing_evaluations(log, iterations):
    """Which of the first and the last iteration have no evaluation in a log, which may have been set aside or cut."""
    evaluated = [line["iteration"] for line in log if "eval_reward" in line]
    return [str(iteration) for iteration in (0, iterations) if iteration not in evaluated]
