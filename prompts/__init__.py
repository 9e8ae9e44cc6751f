"""Prompt files. train.txt and eval.txt are a starter set, written for this project; blobs.txt is the miniature's.

train.py takes others with --prompts and --eval_prompts.
"""

import csv
import json
import re
import unicodedata
from pathlib import Path

STARTER_TRAIN = str(Path(__file__).with_name("train.txt"))
STARTER_EVAL = str(Path(__file__).with_name("eval.txt"))
BLOBS = str(Path(__file__).with_name("blobs.txt"))
# Such as <|im_end|>, which ends the prompt's turn, and <|video_pad|> and <|TA_reward|>, where VideoAlign reads scores.
CONTROL_TOKEN = re.compile(r"<\|\w+\|>")
LONGEST_PROMPT = 10_000  # bytes; 1,000 tokens of English are half of that. hunyuan.check_prompts counts the tokens


def read_prompts(path):
    """The prompts of a .txt (one a line), .csv (column `prompt`) or .jsonl (key `prompt`) file.

    Bad UTF-8, an empty or repeated prompt, a missing column, a broken line and what check_prompt refuses raise a
    ValueError with file and line.
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
        check_prompt(prompt, f"{path}:{number}")
        if prompt in first_seen:
            first = first_seen[prompt]
            raise ValueError(f"{path}:{number}: every prompt must be there once: this one is on line {first}, too")
        first_seen[prompt] = number
    if not first_seen:
        raise ValueError(f"{path}: a prompt file must hold at least one prompt")
    return list(first_seen)


def check_prompt(prompt, place):
    """Raise on a text that the text encoders or VideoAlign would read as something else. place: its file and line."""
    character = unprintable(prompt, allowed="\t\n")
    if character:
        rule = "a prompt must not contain control characters or lone surrogates"
        raise ValueError(f"{place}: {rule}: got {character!r}; remove it")
    token = CONTROL_TOKEN.search(prompt)
    if token:
        rule = "a prompt must not contain a control token of the encoders or of VideoAlign"
        raise ValueError(f"{place}: {rule}: got {token.group()}; remove it")
    size = len(prompt.encode())
    if size > LONGEST_PROMPT:
        rule = f"a prompt must have at most {LONGEST_PROMPT:,} bytes, since the text encoder reads 1,000 tokens of it"
        raise ValueError(f"{place}: {rule}: got {size:,}; shorten it")


def unprintable(text, allowed=""):
    """The first control character or lone surrogate of a text; "" where it has none."""
    for character in text:
        if unicodedata.category(character) in ("Cc", "Cs") and character not in allowed:
            return character
    return ""


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
        except (ValueError, RecursionError) as error:  # also an integer of 5,000 digits, and 100,000 brackets
            raise ValueError(f"{path}:{number}: every line must be one JSON object: {error}") from None
        if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
            raise ValueError(f'{path}:{number}: every line must be an object with a string "prompt": got {line:.200}')
        yield number, row["prompt"]
