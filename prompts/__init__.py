"""Prompt files. train.txt and eval.txt are a starter set, written for this project; bring your own with --prompts."""

import csv
import json
from pathlib import Path

STARTER_TRAIN, STARTER_EVAL = (str(Path(__file__).with_name(name)) for name in ("train.txt", "eval.txt"))


def read_prompts(path):
    """The prompts of a .txt (one a line), .csv (column `prompt`) or .jsonl (key `prompt`) file.

    ValueError with file and line number for bad UTF-8, an empty or repeated prompt, a missing column, a broken line.
    """
    path = Path(path)
    readers = {".txt": enumerate_lines, ".csv": read_csv, ".jsonl": read_jsonl}
    if path.suffix not in readers:
        raise ValueError(f"a prompt file must end in .txt, .csv or .jsonl: got {path}")
    if not path.is_file():
        raise FileNotFoundError(f"the prompt file must exist: got {path}")
    first_seen = {}
    for number, prompt in readers[path.suffix](path):
        prompt = prompt.strip()
        if not prompt:
            raise ValueError(f"{path}:{number}: a prompt must not be empty; remove the line")
        if prompt in first_seen:
            raise ValueError(f"{path}:{number}: every prompt must be there once: this one is on line {first_seen[prompt]}, too")
        first_seen[prompt] = number
    if not first_seen:
        raise ValueError(f"{path}: a prompt file must hold at least one prompt")
    return list(first_seen)


def enumerate_lines(path):
    """(line number, text) of each line, decoded one by one so that an error can name its line."""
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}:{number}: the file must be UTF-8: {error}") from None


def read_csv(path):
    reader = csv.reader((line + "\n" for _, line in enumerate_lines(path)), strict=True)
    try:
        header = next(reader, [])
        if "prompt" not in header:
            raise ValueError(f"{path}:1: the header must have a column `prompt`: got {header}")
        for row in reader:
            row = row or [""]  # csv makes no field of a blank line
            if len(row) != len(header):
                raise ValueError(f"{path}:{reader.line_num}: a row must have {len(header)} fields, like the header")
            yield reader.line_num, row[header.index("prompt")]
    except csv.Error as error:
        raise ValueError(f"{path}:{reader.line_num}: quotes must be closed, and doubled within quotes: {error}") from None


def read_jsonl(path):
    for number, line in enumerate_lines(path):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: every line must be one JSON object: {error}") from None
        if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
            raise ValueError(f'{path}:{number}: every line must be an object with a string "prompt": got {line}')
        yield number, row["prompt"]
