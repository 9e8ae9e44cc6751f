"""Prompt files. train.txt and eval.txt are a starter set, written for this project.

train.py takes others with --prompts and --eval_prompts.
"""

import csv
import json
from pathlib import Path

STARTER_TRAIN = str(Path(__file__).with_name("train.txt"))
STARTER_EVAL = str(Path(__file__).with_name("eval.txt"))


def read_prompts(path):
    """The prompts of a .txt (one a line), .csv (column `prompt`) or .jsonl (key `prompt`) file.

    Bad UTF-8, an empty or repeated prompt, a missing column and a broken line raise a ValueError with file and line.
    """
    readers = {".txt": enumerate_lines, ".csv": read_csv, ".jsonl": read_jsonl}
    suffix = Path(path).suffix
    if suffix not in readers:
        raise ValueError(f"a prompt file must end in .txt, .csv or .jsonl: got {path}")
    if not Path(path).is_file():
        raise FileNotFoundError(f"the prompt file must exist: got {path}")
    read = readers[suffix]
    first_seen = {}  # prompt -> its line
    for number, text in read(path):
        prompt = text.strip()
        if not prompt:
            raise ValueError(f"{path}:{number}: a prompt must not be empty; remove the line")
        if prompt in first_seen:
            first = first_seen[prompt]
            raise ValueError(f"{path}:{number}: every prompt must be there once: this one is on line {first}, too")
        first_seen[prompt] = number
    if not first_seen:
        raise ValueError(f"{path}: a prompt file must hold at least one prompt")
    return list(first_seen)


def enumerate_lines(path):
    """(line number, text) of each line. Lines are decoded one by one, so that an error can name its line."""
    for number, line in enumerate(Path(path).read_bytes().splitlines(), start=1):
        encoding = "utf-8-sig" if number == 1 else "utf-8"  # the first line may begin with a byte order mark
        try:
            text = line.decode(encoding)
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}:{number}: the file must be UTF-8: {error}") from None
        yield number, text


def read_csv(path):
    """(line number, text) of the column `prompt` in each row."""
    reader = csv.reader((line + "\n" for _, line in enumerate_lines(path)), strict=True)
    try:
        header = next(reader, [])
        if "prompt" not in header:
            raise ValueError(f"{path}:1: the header must have a column `prompt`: got {header}")
        for row in reader:
            fields = row or [""]  # csv gives a blank line no field at all
            if len(fields) != len(header):
                raise ValueError(f"{path}:{reader.line_num}: a row must have {len(header)} fields, like the header")
            yield reader.line_num, fields[header.index("prompt")]
    except csv.Error as error:
        rule = "quotes must be closed, and doubled within quotes"
        raise ValueError(f"{path}:{reader.line_num}: {rule}: {error}") from None


def read_jsonl(path):
    """(line number, text) of the key `prompt` in each line's object."""
    for number, line in enumerate_lines(path):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: every line must be one JSON object: {error}") from None
        if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
            raise ValueError(f'{path}:{number}: every line must be an object with a string "prompt": got {line}')
        yield number, row["prompt"]
