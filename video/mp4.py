"""mp4 files, read and written by the ffmpeg inside the imageio-ffmpeg wheel."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import torch

# No picture, and no playlist, which would read files that nobody named.
CONTAINERS = "mov,matroska,avi,mpegts,mpeg"
LINE_OF_FRAME = re.compile(r"\[Parsed_showinfo.* n: *\d+ pts: *(\S+) .* duration: *(\d+) .* s:(\d+)x(\d+) ")
LINE_OF_CLOCK = re.compile(r"\[Parsed_showinfo.* config in time_base: (\d+)/(\d+), frame_rate: (\d+)/(\d+)")


def read_video(path):
    """-> (uint8 [F, C, H, W], frames per second).

    Time stamps decide: a video of varying rate comes as its twin of constant rate, in which each frame is repeated for
    as long as it is shown.
    """
    pixels, told = decode(path)
    starts, last, declared, (width, height) = read_time_stamps(path, told)
    frames = np.frombuffer(pixels, np.uint8).reshape(-1, height, width, 3)
    if len(frames) != len(starts):
        raise ValueError(
            f"each frame must have a time stamp: {path} has {len(frames)} and {len(starts)}; encode it anew"
        )
    rate = constant_rate(starts, declared)
    steps = round(starts[-1] * rate + max(last * rate, 1))
    if steps * frames[0].nbytes > most_bytes():
        raise too_large(path)
    middles = (np.arange(steps) + 0.5) / rate
    shown = np.searchsorted(starts, middles, side="right") - 1
    return torch.from_numpy(frames[shown]).permute(0, 3, 1, 2), rate


def decode(path):
    """-> (bytes of all frames in RGB, what ffmpeg told of them). A damaged file is an error, not a shorter video."""
    import imageio_ffmpeg

    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-nostdin", "-loglevel", "level+info", "-xerror"]
    command += ["-format_whitelist", CONTAINERS, "-protocol_whitelist", "file", "-i", f"file:{path}"]
    command += ["-map", "0:V:0", "-vf", "showinfo=checksum=0", "-fps_mode", "passthrough"]
    command += ["-pix_fmt", "rgb24", "-fs", str(most_bytes()), "-f", "rawvideo", "-"]
    # In a session of its own: Ctrl-C and `timeout` send their signal to the whole group, and a run then still writes.
    # imageio does the like for the ffmpeg that encodes.
    done = subprocess.run(command, capture_output=True, start_new_session=True)
    told = done.stderr.decode(errors="replace")
    if done.returncode or not done.stdout:
        causes = re.findall(r"\[(?:error|fatal)\] (.*)", told)
        cause = causes[0] if causes else f"exit code {done.returncode}"
        rule = "a video must be a whole mp4, mov, mkv, webm, avi or mpeg file, with pictures that move"
        raise ValueError(f"{rule}: ffmpeg cannot read {path}: {cause}")
    if len(done.stdout) >= most_bytes():
        raise too_large(path)
    return done.stdout, told


def most_bytes():
    """What a video may take: a larger one would have the system kill this process, with all scores so far."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4


def too_large(path):
    rule = f"the frames of a video must fit in {most_bytes() / 2**30:.1f} GiB, a quarter of the memory"
    return ValueError(f"{rule}: those of {path} do not; cut it, or make it smaller")


def read_time_stamps(path, told):
    """-> (seconds at which each frame starts, how long the last one lasts, the file's own frame rate or 0, (W, H)).
    Some containers do not know the second, and say 0 or a tick."""
    lines = LINE_OF_FRAME.findall(told)
    sizes = {(int(width), int(height)) for _, _, width, height in lines}
    if len(sizes) != 1:
        raise ValueError(f"all frames of a video must have one size: {path} has {sorted(sizes)}; encode it anew")
    ticks = [int(start) for start, _, _, _ in lines if start != "NOPTS"]
    numerator, denominator, frames, seconds = map(int, LINE_OF_CLOCK.search(told).groups())
    starts = (np.array(ticks) - min(ticks, default=0)) * numerator / denominator
    if len(starts) != len(lines) or (np.diff(starts) < 0).any():
        raise ValueError(f"each frame must have a time stamp, none before the last frame's: {path}; encode it anew")
    last = int(lines[-1][1]) * numerator / denominator
    return starts, last, frames / max(seconds, 1), sizes.pop()


def constant_rate(starts, declared):
    """Frames per second where the frames are densest, so that the constant twin has each of them.

    A few that are denser still do not count, since clocks jitter. Where the file's own rate is nearly the same, it is
    the better one: some containers round time stamps to milliseconds.
    """
    spacings = np.diff(starts)
    spacings = spacings[spacings > 0]
    if not len(spacings):
        return declared or 1.0
    dense = np.quantile(spacings, 0.1, method="lower")
    similar = spacings[(spacings > dense / 2) & (spacings < dense * 1.5)]
    rate = float(1 / similar.mean())
    return declared if abs(declared / rate - 1) < 0.01 else rate


def write_video(path, video, fps):
    """uint8 [F, C, H, W] -> an mp4 that every player takes: H.264 in yuv420p, hence the even sides.
    Its frames are counted, because imageio ignores how ffmpeg ended: OSError where one is missing."""
    import imageio.v2 as imageio

    is_rgb = video.dtype == torch.uint8 and video.ndim == 4 and video.shape[1] == 3
    if not is_rgb or video.shape[2] % 2 or video.shape[3] % 2:
        got = f"{video.dtype} {tuple(video.shape)}"
        raise ValueError(f"a video must be uint8 [F, 3, H, W] with even sides: got {got}")
    frames = video.permute(0, 2, 3, 1).cpu().numpy()
    Path(path).unlink(missing_ok=True)  # what is counted below must be new
    try:
        imageio.mimwrite(path, frames, format="FFMPEG", fps=fps, codec="libx264", quality=9, macro_block_size=1)
        pixels, _ = decode(path)
        found = len(pixels) / frames[0].nbytes
        problem = f"{found:g} of {len(frames)} frames are in it" if found != len(frames) else ""
    except (OSError, RuntimeError, ValueError) as error:
        problem = f"{type(error).__name__}: {error}".strip().splitlines()[-1]
    if problem:
        Path(path).unlink(missing_ok=True)
        free = shutil.disk_usage(Path(path).parent).free
        raise OSError(f"a video must be written whole: {path} is not ({problem}); {free:,} bytes are free on its disk")


def check_videos(videos, prompts):
    """Every reward model here takes the same arguments."""
    is_video = videos.dtype == torch.uint8 and videos.ndim == 5 and videos.shape[2] == 3
    if not is_video or len(videos) != len(prompts):
        got = f"{videos.dtype} {tuple(videos.shape)}"
        raise ValueError(f"{len(prompts)} prompts need uint8 videos [B,F,3,H,W]: got {got}")
