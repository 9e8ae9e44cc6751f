"""Video files of all kinds and their scores: each is read at the times that its frames are shown, or has a cause."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from PIL import Image

from tiny.videoalign import build_tiny_template, build_tiny_videoalign
from video import mp4, score
from video.mp4 import read_video, write_video
from video.videoalign import VideoAlign


def ffmpeg(*arguments):
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-nostdin", "-y", *map(str, arguments)]
    subprocess.run(command, check=True, timeout=300)


def smooth_video(frames=12, height=112, width=168):
    t, y, x = torch.meshgrid(torch.arange(frames), torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([4 * t + y, x, 100 + 3 * t], dim=1).clamp(0, 255).to(torch.uint8)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = build_tiny_videoalign(tmp_path_factory.mktemp("videoalign"), output_dim=1)
    return folder, build_tiny_template(tmp_path_factory.mktemp("repo"))


@pytest.fixture(scope="module")
def scorer(weights):
    return VideoAlign(*weights)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with a video in many containers, and with what is no video."""
    folder = tmp_path_factory.mktemp("files")
    good = folder / "good.mp4"
    write_video(good, smooth_video(frames=24), fps=24)
    ffmpeg("-i", good, "-c", "copy", "-movflags", "+faststart", folder / "moov_first.mp4")
    for name, codec in (
        ("a.mkv", "copy"),
        ("a.avi", "copy"),
        ("a.mov", "copy"),
        ("a.ts", "mpeg2video"),
        ("a.mpg", "mpeg2video"),
    ):
        ffmpeg("-i", good, "-c:v", codec, folder / name)
    ffmpeg("-display_rotation", 90, "-i", good, "-c", "copy", folder / "rotated.mp4")
    ffmpeg("-i", good, "-pix_fmt", "yuv420p10le", folder / "ten_bit.mp4")
    ffmpeg("-i", good, "-vf", "format=gray", "-c:v", "ffv1", folder / "grey.mkv")
    ffmpeg("-i", good, "-vf", "format=rgb24,crop=107:111", "-c:v", "ffv1", folder / "odd.mkv")
    ffmpeg("-i", good, folder / "animated.gif")
    ffmpeg("-f", "lavfi", "-i", "sine=d=1", folder / "audio.mp4")
    Image.new("RGB", (64, 64)).save(folder / "still.png")
    ffmpeg(
        "-f",
        "lavfi",
        "-i",
        "sine=d=1",
        "-i",
        folder / "still.png",
        "-map",
        0,
        "-map",
        1,
        "-c:v",
        "mjpeg",
        "-disposition:v:0",
        "attached_pic",
        folder / "cover.m4a",
    )
    ffmpeg("-i", good, "-frames:v", 1, folder / "one_frame.mp4")
    write_video(folder / "thin.mp4", smooth_video(frames=4, height=1600, width=16), fps=24)
    (folder / "cut.mp4").write_bytes(good.read_bytes()[:3000])
    whole = (folder / "moov_first.mp4").read_bytes()
    (folder / "cut_at_the_end.mp4").write_bytes(whole[: len(whole) * 3 // 4])
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "text.mp4").write_text("no video\n" * 100)
    (folder / "noise.mp4").write_bytes(np.random.default_rng(0).bytes(5000))
    (folder / "list.mp4").write_text("ffconcat version 1.0\nfile good.mp4\n")
    return folder


# ------------------------------------------------------------------------------------------- reading
def test_constant_rates_come_frame_by_frame(tmp_path):
    for fps in (8, 24, 30000 / 1001):
        write_video(tmp_path / "a.mp4", smooth_video(), fps)
        video, rate = read_video(tmp_path / "a.mp4")
        assert video.shape == (12, 3, 112, 168) and video.dtype == torch.uint8
        assert rate == pytest.approx(fps, rel=1e-9)
        assert (video.float() - smooth_video().float()).abs().mean() < 3
    with pytest.raises(ValueError, match="even sides"):
        write_video(tmp_path / "odd.mp4", smooth_video(width=111), fps=24)


@pytest.mark.parametrize("name", ["a.mkv", "a.avi", "a.mov", "a.ts", "a.mpg", "moov_first.mp4", "ten_bit.mp4"])
def test_a_video_is_the_same_in_every_container(files, name):
    video, fps = read_video(files / "good.mp4")
    other, other_fps = read_video(files / name)
    assert other.shape == video.shape and other_fps == fps == 24
    tolerance = 6 if name in ("a.ts", "a.mpg", "ten_bit.mp4") else 0  # these were encoded again
    assert (other.float() - video.float()).abs().mean() <= tolerance


@pytest.mark.parametrize(
    "name, shape", [("rotated.mp4", (24, 3, 168, 112)), ("grey.mkv", (24, 3, 112, 168)), ("odd.mkv", (24, 3, 111, 107))]
)
def test_rotated_grey_and_odd_videos(files, name, shape):
    video, fps = read_video(files / name)
    assert video.shape == shape and fps == 24


def test_names_that_ffmpeg_would_read_as_something_else(files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in (
        "http:a.mp4",
        "-y.mp4",
        "%03d.mp4",
        "a b'c.mp4",
        "läuf 東京.mp4",
        "new\nline.mp4",
        os.fsdecode(b"\xff.mp4"),
    ):
        Path(name).write_bytes((files / "good.mp4").read_bytes())
        assert len(read_video(name)[0]) == 24


UNREADABLE = {
    "cut.mp4": "moov atom not found",
    "cut_at_the_end.mp4": "a whole mp4",
    "empty.mp4": "a whole mp4",
    "text.mp4": "a whole mp4",
    "noise.mp4": "a whole mp4",
    "list.mp4": "Format not on whitelist",
    "audio.mp4": "matches no streams",
    "cover.m4a": "matches no streams",
    "animated.gif": "Format not on whitelist",
    "still.png": "Format not on whitelist",
}


@pytest.mark.parametrize("name, cause", UNREADABLE.items())
def test_what_is_no_whole_video_is_an_error(files, name, cause):
    with pytest.raises(ValueError, match=f"a whole mp4, .*: ffmpeg cannot read .*{name}: ") as error:
        read_video(files / name)
    assert cause in str(error.value) and "\n" not in str(error.value)


def write_varying(path, seconds):
    """A video whose frame k has a grey level of its own and is shown for seconds[k], a multiple of 1/24."""
    starts = np.cumsum([0, *seconds[:-1]])
    times = "+".join(f"eq(N\\,{place})*{round(24 * start)}" for place, start in enumerate(starts))
    pixels = b"".join(bytes([16 + 4 * place]) * 64 * 64 for place in range(len(seconds)))
    command = [
        imageio_ffmpeg.get_ffmpeg_exe(),
        "-v",
        "error",
        "-y",
        "-f",
        "rawvideo",
        "-pix_fmt",
        "gray",
        "-s",
        "64x64",
    ]
    command += ["-r", "24", "-i", "-", "-vf", f"setpts={times}", "-fps_mode", "passthrough", "-c:v", "libx264"]
    command += ["-qp", "0", "-bf", "0", "-pix_fmt", "yuv420p", str(path)]
    subprocess.run(command, input=pixels, check=True, timeout=300)


VARYING = [1 / 24] * 20 + [1 / 2] * 4 + [1 / 8] * 4


@pytest.mark.parametrize("container", ["mp4", "mkv"])
def test_of_a_varying_rate_the_frames_are_those_shown_at_each_time(tmp_path, container):
    path = tmp_path / f"a.{container}"
    write_varying(path, VARYING)
    video, fps = read_video(path)
    levels = video.float().mean(dim=(1, 2, 3)).round().int().tolist()
    in_order = sorted(set(levels))
    expected = np.repeat(np.arange(len(VARYING)), np.round(24 * np.array(VARYING)).astype(int)).tolist()
    last = 2  # this ffmpeg does not write how long the last frame lasts: it may be one step instead of three
    shown = [in_order.index(level) for level in levels]
    assert fps == 24 and len(in_order) == len(VARYING)
    assert len(expected) - last <= len(shown) <= len(expected) and shown == expected[: len(shown)]


def test_a_clock_that_jitters_is_a_constant_rate():
    starts = np.arange(90) / 30 + np.random.default_rng(0).uniform(-0.004, 0.004, 90)
    assert mp4.constant_rate(starts - starts[0], 90_000.0) == pytest.approx(30, rel=0.02)
    starts[40] = starts[39] + 1e-5  # two frames nearly at once
    assert mp4.constant_rate(starts - starts[0], 90_000.0) == pytest.approx(30, rel=0.02)


def test_time_stamps_that_span_hours_do_not_fill_the_memory(tmp_path):
    write_varying(tmp_path / "a.mp4", [1 / 24] * 10 + [36_000.0] * 2)
    with pytest.raises(ValueError, match="the frames of a video must fit in .* GiB, a quarter of the memory"):
        read_video(tmp_path / "a.mp4")


def test_a_varying_rate_scores_as_its_constant_twin(scorer, tmp_path):
    write_varying(tmp_path / "varying.mp4", VARYING)
    ffmpeg("-i", tmp_path / "varying.mp4", "-vf", "fps=24", "-c:v", "libx264", "-qp", 0, tmp_path / "twin.mp4")
    rows = [score.score_file(scorer, str(tmp_path / name), "a cat") for name in ("varying.mp4", "twin.mp4")]
    for name in score.COLUMNS:
        assert rows[0][name] == rows[1][name]


def test_the_umask_decides_who_may_read_a_video(tmp_path):
    before = os.umask(0o027)
    try:
        write_video(tmp_path / "a.mp4", smooth_video(), fps=24)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.mp4").stat().st_mode) == 0o640


# ------------------------------------------------------------------------------------------- the command
@pytest.fixture
def command(weights, tmp_path, monkeypatch):
    """A function that runs `python -m video.score VIDEO …` on a prompt file, and returns (JSON, exit code)."""

    def run(videos, prompts, output="scores.json"):
        (tmp_path / "prompts.txt").write_text(prompts, encoding="utf-8")
        told = {"prompts": tmp_path / "prompts.txt", "json": tmp_path / output}
        told |= {"videoalign": weights[0], "videoalign_repo": weights[1]}
        options = [word for name, value in told.items() for word in (f"--{name}", str(value))]
        arguments = ["score.py", *map(str, videos), *options]
        monkeypatch.setattr(sys, "argv", arguments)
        code = 0
        try:
            score.main()
        except SystemExit as end:
            code = end.code  # a text is printed by Python, and is exit code 1
        path = tmp_path / output
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None, code

    return run


def test_bad_files_are_rows_and_the_others_keep_their_scores(command, scorer, files, capsys):
    names = ["good.mp4", *UNREADABLE, "one_frame.mp4", "thin.mp4", "a.mkv"]
    rows, code = command([files / name for name in names], "a cat\n")
    assert code == "12 of 14 videos could not be scored; their causes are above"
    assert [row["video"] for row in rows] == [str(files / name) for name in names]
    causes = UNREADABLE | {"one_frame.mp4": "at least 2 frames: got 1", "thin.mp4": "1600 × 16 is too narrow"}
    for name, row in zip(names, rows):
        if name in causes:
            assert all(row[column] is None for column in score.COLUMNS)
            assert len(row["failures"]) == 1 and causes[name] in row["failures"][0]
    video, fps = read_video(files / "good.mp4")
    expected = scorer(video[None], ["a cat"], fps=fps)
    for row in (rows[0], rows[-1]):
        assert row["failures"] == []
        assert row["TA"] == pytest.approx(expected["TA"].item(), rel=5e-5)
        assert row["Overall"] == pytest.approx(row["VQ"] + row["MQ"] + row["TA"])
    shown = capsys.readouterr()
    header, *table = shown.out.splitlines()
    assert header.split() == [*score.COLUMNS, "video"]
    assert table[0].split() == [f"{rows[0][name]:.4f}" for name in score.COLUMNS] + [rows[0]["video"]]
    assert table[1].split()[:4] == ["nan"] * 4 and table[1].endswith(rows[1]["failures"][0])
    assert "14/14" in shown.err  # the progress bar


def test_each_file_is_scored_with_its_prompt_at_its_own_rate(command, scorer, tmp_path):
    write_video(tmp_path / "a.mp4", smooth_video(frames=40).flip(0), fps=8)
    write_video(tmp_path / "b.mp4", smooth_video(frames=40).flip(0), fps=24)
    rows, code = command([tmp_path / "a.mp4", tmp_path / "b.mp4"], "a dog\na dog\n")
    assert code == 0
    video, fps = read_video(tmp_path / "a.mp4")
    assert fps == 8
    expected = scorer(video[None], ["a dog"], fps=8)
    assert rows[0]["MQ"] == pytest.approx(expected["MQ"].item(), rel=5e-5)
    assert rows[0]["MQ"] != rows[1]["MQ"]  # of 5 s and of 1.7 s, not as many frames are read
    rows, _ = command([tmp_path / "a.mp4", tmp_path / "b.mp4"], "a cat\na dog\n")
    assert [row["prompt"] for row in rows] == ["a cat", "a dog"]


@pytest.mark.parametrize(
    "prompts, output, message",
    [
        ("one\ntwo\nthree\n", "a.json", "--prompts must hold 1 or 2 prompts, as many as videos: got 3"),
        ("one\n \n", "a.json", "prompts.txt:2: a prompt must not be empty"),
        ("one\n<|VQ_reward|>\n", "a.json", "prompts.txt:2: a prompt must not contain a control token"),
        ("one\n", "nowhere/a.json", "--json must be a file in a folder that is there and can be written"),
        ("one\n", ".", "--json must be a file in a folder that is there and can be written"),
    ],
)
def test_wrong_arguments_are_found_before_the_first_score(command, files, capsys, prompts, output, message):
    rows, code = command([files / "good.mp4", files / "cut.mp4"], prompts, output=output)
    assert (rows, code) == (None, 2)
    shown = capsys.readouterr()
    assert message in shown.err and shown.out == ""


def test_missing_videos_are_found_before_the_first_score(command, tmp_path, capsys):
    assert command([tmp_path / "none.mp4"], "one\n") == (None, 2)
    assert f"every video must be a file: there is no {tmp_path / 'none.mp4'}" in capsys.readouterr().err


def test_scores_so_far_are_kept_after_ctrl_c(command, files, monkeypatch):
    stock = score.read_video

    def interrupted(path):
        if "cut" in path:
            raise KeyboardInterrupt
        return stock(path)

    monkeypatch.setattr(score, "read_video", interrupted)
    with pytest.raises(KeyboardInterrupt):
        command([files / "good.mp4", files / "cut.mp4"], "one\n")
    monkeypatch.setattr(score, "read_video", stock)
    path = Path(sys.argv[sys.argv.index("--json") + 1])
    first, second = json.loads(path.read_text(encoding="utf-8"))
    assert first["VQ"] is not None and second["failures"] == ["not scored: the command ended before"]


def test_results_go_to_a_pipe_too(tmp_path):
    read_end, write_end = os.pipe()
    score.write_whole(f"/dev/fd/{write_end}", "[]\n")
    os.close(write_end)
    with open(read_end, encoding="utf-8") as pipe:
        assert pipe.read() == "[]\n"
    score.write_whole(tmp_path / "a.json", "[]\n")
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
