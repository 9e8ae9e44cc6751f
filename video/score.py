"""Score video files with VideoAlign: `python -m video.score a.mp4 b.mp4 … --prompts FILE` prints a table.

A file that cannot be scored is a row with its cause; the others keep their scores, and the exit code is 1.
"""

import argparse
import json
import math
import os
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from prompts import read_prompts
from video.mp4 import read_video
from video.streams import keep_streams
from video.videoalign import DIMENSIONS, VideoAlign, check_folder

COLUMNS = (*DIMENSIONS, "Overall")


def main():
    args, prompts = parse_arguments()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    videoalign = VideoAlign(args.videoalign, args.videoalign_repo, device)
    print("".join(f"{name:>9}" for name in COLUMNS), " video")
    results = [
        failed(path, prompt, "not scored: the command ended before") for path, prompt in zip(args.videos, prompts)
    ]
    try:
        for place in tqdm(range(len(results)), unit="video"):
            results[place] = score_file(videoalign, args.videos[place], prompts[place])
            with tqdm.external_write_mode():
                print(as_line(results[place]), flush=True)
    finally:  # also after Ctrl-C
        if args.json:
            write_whole(args.json, json.dumps(results, indent=2) + "\n")
    failures = sum(bool(result["failures"]) for result in results)
    if failures:
        sys.exit(f"{failures} of {len(results)} videos could not be scored; their causes are above")


def parse_arguments():
    """-> (the options, one prompt for each video). Whatever can be wrong before the first score is found here."""
    parser = argparse.ArgumentParser(description="Score video files with VideoAlign: a table, and JSON with --json.")
    parser.add_argument("videos", nargs="+", help="mp4, mov, mkv, webm, avi or mpeg files")
    parser.add_argument(
        "--prompts", required=True, help=".txt, .csv or .jsonl: one prompt for each video in this order, or one for all"
    )
    parser.add_argument("--videoalign", required=True, help="folder of the checkpoint, KwaiVGI/VideoReward")
    parser.add_argument("--videoalign_repo", required=True, help="clone of https://github.com/KwaiVGI/VideoAlign")
    parser.add_argument("--json", help="file to write the scores to; null where there is none")
    args = parser.parse_args()
    try:
        prompts = read_prompts(args.prompts, repeats=True)
        if args.json:
            check_output(Path(args.json))
        check_folder(Path(args.videoalign), args.videoalign_repo)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if len(prompts) not in (1, len(args.videos)):
        parser.error(f"--prompts must hold 1 or {len(args.videos)} prompts, as many as videos: got {len(prompts)}")
    missing = [path for path in args.videos if not Path(path).is_file()]
    if missing:
        parser.error(f"every video must be a file: there is no {', '.join(missing)}")
    if len(prompts) == 1:
        prompts = prompts * len(args.videos)
    return args, prompts


def check_output(path):
    """Raise unless this file can be written. What stands there stays."""
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise ValueError(f"--json must be a file in a folder that is there and can be written: got {path}")


def score_file(videoalign, path, prompt):
    """A row of the results: {"video", "prompt", "VQ", "MQ", "TA", "Overall", "failures"}."""
    try:
        video, fps = read_video(path)
        batch = videoalign(video[None], [prompt], fps=fps)
    except (OSError, ValueError, RuntimeError, MemoryError) as error:  # torch out of memory is a RuntimeError
        return failed(path, prompt, str(error) or type(error).__name__)
    scores = {name: values.item() for name, values in batch.items()}
    scores["Overall"] = sum(scores.values())
    if not math.isfinite(scores["Overall"]):
        causes = [cause.removeprefix("sample 0: ") for cause in videoalign.failures]
        return failed(path, prompt, *causes)
    return {"video": path, "prompt": prompt, **scores, "failures": []}


def failed(path, prompt, *causes):
    """The row of a video without scores. JSON has no NaN, so they are null."""
    return {"video": path, "prompt": prompt, **dict.fromkeys(COLUMNS), "failures": list(causes)}


def as_line(result):
    scores = [math.nan if result[name] is None else result[name] for name in COLUMNS]
    return " ".join(["".join(f"{score:9.4f}" for score in scores), "", result["video"], *result["failures"]])


def write_whole(path, text):
    """Under another name first, so that nobody takes half a file for a whole one. Not so for a pipe or device."""
    path = Path(path)
    if path.exists() and not path.is_file():
        path.write_text(text, encoding="utf-8")
        return
    path = path.resolve()  # a link stays one
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


if __name__ == "__main__":
    keep_streams()
    main()
