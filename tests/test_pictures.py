"""The pictures of a run: which numbers and frames they show."""

import json

import numpy as np
import pytest
import torch
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib import font_manager
from PIL import Image

from engine import pictures
from engine.config import Config
from engine.presets import MINI
from engine.show import Display
from grpo import OneRank


def videos(count, frames, height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, frames, 3, height, width), dtype=np.uint8)


def test_series_skips_lines_without_the_number():
    log = [{"iteration": 0, "a": 1.0}, {"iteration": 1, "b": 5.0}, {"iteration": 2, "a": 3.0}]
    iterations, values = pictures.series(log, "a")
    assert iterations.tolist() == [0, 2] and values.tolist() == [1.0, 3.0]
    assert [len(part) for part in pictures.series(log, "missing")] == [0, 0]


def test_curves_of_a_log_with_one_evaluation_alone(tmp_path, drawn_curves):
    log = [{"iteration": 0, "eval_reward": 0.5, "eval_VQ": 0.5}]
    pictures.curves(log, 1e-4, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 10_000


def test_the_scores_of_ones_own_reward_are_drawn():
    log = [
        {"iteration": 0, "eval_calm": 1.0},
        {"iteration": 1, "reward_mean": 1.0, "reward_std": 0.0, "calm_mean": 2.0},
    ]
    assert pictures.score_looks(log) is pictures.SCORE_LOOKS
    log[1] |= {"calm_std": 0.0, "distance_mean": 1.0, "distance_std": 0.0, "group_std": 1.0}
    assert list(pictures.score_looks(log)) == ["reward", "calm"]
    log[1] |= {"VQ_mean": 0.0, "VQ_std": 0.0}
    assert list(pictures.score_looks(log)) == ["reward", "VQ", "calm"]


@pytest.mark.parametrize("value", [0.1, 0.09999999999999999])
def test_a_constant_lambda_has_an_axis_without_a_warning(value, recwarn, tmp_path, drawn_curves):
    names = ("reward_mean", "kl_velocity", "ratio_mean", "ratio_min", "ratio_max", "grad_norm")
    log = [{"iteration": number, **dict.fromkeys(names, 1.0), "lambda_kl": value} for number in (1, 2)]
    pictures.curves(log, 1e-4, tmp_path / "curves.png")
    assert [str(warning.message) for warning in recwarn] == []
    assert pictures.lambda_limits([{"lambda_kl": 0.0}, {}]) == (0.1, 10)


def test_thumbnails_are_small_and_toy_clips_stay_as_they_are():
    toy = torch.from_numpy(videos(1, 8, 12, 12)[0])
    assert torch.equal(pictures.thumbnail(toy), toy)
    ramp = torch.arange(81, dtype=torch.uint8)[:, None, None, None].expand(81, 3, 240, 416)
    small = pictures.thumbnail(ramp)
    assert small.shape == (8, 3, 120, 208) and small.dtype == torch.uint8
    places = [0, 11, 23, 34, 46, 57, 69, 80]  # eight frames, evenly from first to last
    assert small[:, 0, 0, 0].tolist() == places


def test_contact_sheet_shows_first_and_last_frame(tmp_path):
    made = videos(2, 5, 40, 60)
    pictures.contact_sheet(made, ["one", "two"], tmp_path / "sheet.png", columns=3)
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    row_height = sheet.shape[0] // 2
    bottom = row_height - pictures.GAP
    first = sheet[bottom - 40 : bottom, :60]
    last_left = 2 * (60 + pictures.GAP)
    last = sheet[row_height + bottom - 40 : row_height + bottom, last_left : last_left + 60]
    np.testing.assert_array_equal(first, made[0, 0].transpose(1, 2, 0))
    np.testing.assert_array_equal(last, made[1, 4].transpose(1, 2, 0))


def test_contact_sheet_of_many_prompts_has_blocks_beside_each_other(tmp_path):
    many = 2 * pictures.MOST_ROWS + 1  # so three blocks, of 11 rows each
    made = videos(many, 2, 40, 60)
    pictures.contact_sheet(made, ["a prompt"] * many, tmp_path / "sheet.png", columns=2)
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    row_height, block_width = sheet.shape[0] // 11, sheet.shape[1] // 3
    bottom = 2 * row_height - pictures.GAP
    seen = sheet[bottom - 40 : bottom, block_width : block_width + 60]  # the second block's second row
    np.testing.assert_array_equal(seen, made[12, 0].transpose(1, 2, 0))


def test_side_by_side_puts_after_below_before():
    before = np.zeros((1, 3, 12, 12), dtype=np.uint8)
    after = np.full((1, 3, 12, 12), 200, dtype=np.uint8)
    picture = np.asarray(pictures.frame_side_by_side(before, after, [("a prompt", pictures.FONT)], pixels=48))
    column = picture[:, -pictures.GAP - 24, 0]  # through the middle of the videos
    dark = np.flatnonzero(column == 0)
    grey = np.flatnonzero(column == 200)
    assert len(dark) == len(grey) == 48 and dark.max() < grey.min()


def test_the_movie_spreads_its_prompts_over_the_list(tmp_path):
    made = videos(10, 6, 12, 12)
    prompts = [f"prompt {number}" for number in range(10)]
    pictures.side_by_side(made, made, prompts, tmp_path / "movie.gif", count=4, pixels=24)
    with Image.open(tmp_path / "movie.gif") as movie:
        assert movie.n_frames == 6
        widths = movie.width
    (tmp_path / "movie.gif").unlink()
    pictures.side_by_side(made[:2], made[:2], prompts[:2], tmp_path / "movie.gif", count=4, pixels=24)
    with Image.open(tmp_path / "movie.gif") as movie:
        assert widths - movie.width == 2 * (24 + pictures.GAP)  # fewer prompts than `count`: all of them


# ------------------------------------------------------------------------------------------------ captions
FOREIGN = ["東京の夜、雨が降る", "a cat", "🦩 in the rain", "雪"]


@pytest.fixture
def fonts():
    """matplotlib's list of this machine's fonts, which a test may change: none here has Chinese or the flamingo."""
    stock = font_manager.fontManager.ttflist
    font_manager.fontManager.ttflist = [font for font in stock if "/mpl-data/" in font.fname]
    pictures.other_fonts.cache_clear()
    yield font_manager.fontManager
    font_manager.fontManager.ttflist = stock
    pictures.other_fonts.cache_clear()


def build_font(path, characters):
    """A font in which each of these characters is a full square."""
    pen = TTGlyphPen(None)
    pen.moveTo((0, 0))
    for corner in ((0, 1000), (1000, 1000), (1000, 0)):
        pen.lineTo(corner)
    pen.closePath()
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder([".notdef", "square"])
    builder.setupCharacterMap({ord(character): "square" for character in characters})
    builder.setupGlyf({".notdef": TTGlyphPen(None).glyph(), "square": pen.glyph()})
    builder.setupHorizontalMetrics({".notdef": (1000, 0), "square": (1000, 0)})
    builder.setupHorizontalHeader(ascent=1000, descent=0)
    builder.setupNameTable({"familyName": "Squares", "styleName": "Regular"})
    builder.setupOS2(sTypoAscender=1000, usWinAscent=1000)
    builder.setupPost()
    builder.save(path)


def sheet(tmp_path, prompts, name="sheet"):
    pictures.contact_sheet(videos(len(prompts), 2, 40, 80), prompts, tmp_path / f"{name}.png", columns=4)
    return np.asarray(Image.open(tmp_path / f"{name}.png"))


def test_a_prompt_without_a_font_is_a_number_and_a_line_beside(fonts, tmp_path):
    drawn = sheet(tmp_path, FOREIGN)
    listed = (tmp_path / "sheet.txt").read_text(encoding="utf-8")
    assert listed == "1: 東京の夜、雨が降る\n2: a cat\n3: 🦩 in the rain\n4: 雪\n"
    see = [f"prompt {number}: see sheet.txt" for number in (1, 2, 3, 4)]
    np.testing.assert_array_equal(drawn, sheet(tmp_path, [see[0], "a cat", see[2], see[3]], "expected"))
    assert not (tmp_path / "expected.txt").exists()


def test_the_movie_has_no_boxes_either(fonts, tmp_path):
    made = videos(4, 2, 12, 12)
    pictures.side_by_side(made, made, FOREIGN, tmp_path / "movie.gif")
    assert (tmp_path / "movie.txt").read_text(encoding="utf-8").splitlines()[0] == "1: 東京の夜、雨が降る"
    see = [f"prompt {number}: see movie.txt" for number in (1, 3, 4)]
    pictures.side_by_side(made, made, [see[0], "a cat", see[1], see[2]], tmp_path / "expected.gif")
    assert (tmp_path / "movie.gif").read_bytes() == (tmp_path / "expected.gif").read_bytes()


def test_a_font_of_the_machine_that_has_the_characters_is_taken(fonts, tmp_path):
    build_font(tmp_path / "squares.ttf", "東京雪 ")
    fonts.addfont(tmp_path / "squares.ttf")
    (tmp_path / "broken.ttf").write_bytes(b"no font")
    broken = font_manager.FontEntry(fname=str(tmp_path / "broken.ttf"), weight=400)
    gone = font_manager.FontEntry(fname=str(tmp_path / "gone.ttf"), weight=400)
    fonts.ttflist = [broken, gone, *fonts.ttflist]
    drawn = sheet(tmp_path, ["東京", "東京雪" * 99])
    assert not (tmp_path / "sheet.txt").exists()
    size = pictures.FONT_SIZE
    row = drawn[1 + size // 2, :, 0]  # through the middle of the first line of text
    assert (row[3 : 2 + 2 * size] == 0).all() and (row[3 + 2 * size :] == 255).all()
    second = drawn[len(drawn) // 2 + 1 + size // 2, :, 0]
    assert (second[3 : second.size - 4 * size] == 0).all()  # the long text is cut, not dropped


@pytest.mark.parametrize("text", ["a cat on a mat " * 9, "東京の夜" * 40, "東京の夜 " * 40, "x" * 500, "W" * 500, "a"])
@pytest.mark.parametrize("lines", [1, 3])
def test_captions_fit_their_place(text, lines):
    shown = pictures.wrapped(text, pictures.FONT, 200, lines)
    assert 1 <= len(shown.splitlines()) <= lines
    assert shown.strip("… ")
    for line in shown.splitlines():
        assert pictures.FONT.getlength(line) <= 1.15 * 200


# ------------------------------------------------------------------------------------------------ the end of a run
def log_of(iterations, evaluated):
    lines = [{"iteration": iteration} for iteration in iterations]
    for line in lines:
        if line["iteration"] in evaluated:
            line |= {"eval_reward": 0.1 * line["iteration"], "eval_VQ": 1.0, "eval_distance": 0}
    return lines


def test_the_table_compares_the_first_evaluation_with_the_last():
    heading, reward, quality = pictures.table(log_of(range(5), {0, 2, 4}), iterations=4).splitlines()
    assert heading.split() == ["ODE", "samples", "before", "after", "4", "change"]
    assert reward.split() == ["reward", "0.0000", "0.4000", "+0.4000"]
    assert quality.split() == ["VQ", "1.0000", "1.0000", "+0.0000"]  # of distance, 0 both times, there is no row


@pytest.mark.parametrize(
    "iterations, evaluated, lacking",
    [
        (range(2, 5), {2, 4}, "0"),  # the log was set aside, and a new one begins at iteration 2
        (range(4, 5), {4}, "0"),  # and here at the last one, which would change by nothing
        (range(3), {0, 2}, "4"),  # the disk was full at the end
        (range(1, 3), {2}, "0 and 4"),
        ([0, 1, 2, 3, 4], {0, 2}, "4"),
    ],
)
def test_no_table_without_the_first_and_the_last_evaluation(iterations, evaluated, lacking):
    told = pictures.table(log_of(iterations, evaluated), iterations=4)
    assert told == f"no table of before and after: metrics.jsonl lacks the evaluation of iteration {lacking}"


def test_the_table_is_there_though_the_pictures_fail(tmp_path, capsys):
    with pytest.raises(FileNotFoundError, match="samples_before.npy"):
        pictures.report(tmp_path, log_of(range(5), {0, 4}), Config(iterations=4), ["a cat"])
    assert "reward" in capsys.readouterr().out


@pytest.mark.parametrize("begin, has_verdict", [(0, True), (2, False)])
def test_no_verdict_from_a_log_that_begins_later(tmp_path, capsys, begin, has_verdict):
    lines = log_of(range(begin, 5), {0, 2, 4})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    Display(tmp_path, Config(model=MINI, iterations=4), OneRank(), 4).end(4, ["a cat"], 1)
    told = capsys.readouterr().out
    assert ("reference" in told) == has_verdict and ("no table" in told) != has_verdict


def test_prompts_of_several_lines_are_one_in_pictures_and_list(fonts, tmp_path):
    ((text, _),) = pictures.captions(["two\n lines"], tmp_path / "a.png")
    assert text == "two lines"
    pictures.captions(["two\n lines", "雪"], tmp_path / "a.png")
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "1: two lines\n2: 雪\n"
