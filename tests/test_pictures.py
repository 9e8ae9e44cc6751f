"""The pictures of a run: which numbers and frames they show."""

import numpy as np
import torch
from PIL import Image

import pictures


def videos(count, frames, height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, frames, 3, height, width), dtype=np.uint8)


def test_series_skips_lines_without_the_number():
    log = [{"iteration": 0, "a": 1.0}, {"iteration": 1, "b": 5.0}, {"iteration": 2, "a": 3.0}]
    iterations, values = pictures.series(log, "a")
    assert iterations.tolist() == [0, 2] and values.tolist() == [1.0, 3.0]
    assert [len(part) for part in pictures.series(log, "missing")] == [0, 0]


def test_curves_of_a_log_with_one_evaluation_alone(tmp_path):
    log = [{"iteration": 0, "eval_reward": 0.5, "eval_VQ": 0.5}]
    pictures.curves(log, 1e-4, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 10_000


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
    picture = np.asarray(pictures.frame_side_by_side(before, after, ["a prompt"], pixels=48))
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
