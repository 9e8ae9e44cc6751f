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

# Unicode's format characters (category Cf) are invisible, but for the signs of Arabic and Kaithi numbers.
VISIBLE_FORMAT = re.compile("[\u0600-\u0605\u06dd\u070f\u0890\u0891\u08e2\U000110bd\U000110cd]")
# Invisible, too, though Unicode calls them letters, marks, separators or a symbol: fillers, Braille's blank.
OTHER_INVISIBLE = re.compile("[\u115f\u1160\u17b4\u17b5\u2028\u2029\u2065\u2800\u3164\uffa0\ufff0-\ufff8]")
# Emoji and the scripts of Iran and India are spelled with joiners and variation selectors, so prompts may hold these.
JOINERS = "\u034f\u200c\u200d"
JOINING = re.compile(f"[{JOINERS}\u180b-\u180d\u180f\ufe00-\ufe0f\U000e0100-\U000e01ef]")


def read_prompts(path, repeats=False):
    """The prompts of a .txt (one a line), .csv (column `prompt`) or .jsonl (key `prompt`) file.

    Bad UTF-8, an empty or repeated prompt, a missing column, a broken line and what check_prompt refuses raise a
    ValueError with file and line. repeats: a prompt may be there more than once, as in a list of videos and prompts.
    """
    readers = {".txt": read_txt, ".csv": read_csv, ".jsonl": read_jsonl}
    suffix = Path(path).suffix
    if suffix not in readers:
        raise ValueError(f"a prompt file must end in .txt, .csv or .jsonl: got {path}")
    if not Path(path).is_file():
        raise FileNotFoundError(f"the prompt file must exist: got {path}")
    read = readers[suffix]
    prompts = {}  # line number -> prompt
    for number, text in read(path):
        prompt = text.strip()
        if not look(prompt):
            raise ValueError(f"{path}:{number}: a prompt must not be empty; remove the line")
        check_prompt(prompt, f"{path}:{number}")
        prompts[number] = prompt
    if not prompts:
        raise ValueError(f"{path}: a prompt file must hold at least one prompt")
    if not repeats:
        check_repeats(prompts, path)
    return list(prompts.values())


def check_prompt(prompt, place):
    """Raise on a text that the text encoders or VideoAlign would read as something else. place: its file and line."""
    character = unprintable(prompt, allowed="\t\n")
    if character:
        raise ValueError(f"{place}: a prompt must hold no character that cannot be seen: got {character}; remove it")
    token = CONTROL_TOKEN.search(prompt)
    if token:
        rule = "a prompt must not contain a control token of the encoders or of VideoAlign"
        raise ValueError(f"{place}: {rule}: got {token.group()}; remove it")
    size = len(prompt.encode())
    if size > LONGEST_PROMPT:
        rule = f"a prompt must have at most {LONGEST_PROMPT:,} bytes, since the text encoder reads 1,000 tokens of it"
        raise ValueError(f"{place}: {rule}: got {size:,}; shorten it")


def check_repeats(prompts, path):
    """Raise where two of {line number: prompt} look alike. All such lines are named, so that one edit is enough."""
    lines = {}  # look -> the lines that have it
    for number, prompt in prompts.items():
        lines.setdefault(look(prompt), []).append(number)
    groups = [", ".join(map(str, numbers)) for numbers in lines.values() if len(numbers) > 1]
    if groups:
        rule = "every prompt must be there once, and two must not differ in blanks or in Unicode's spelling alone"
        raise ValueError(f"{path}: {rule}: alike are lines {'; lines '.join(groups)}; keep one of each")


def look(prompt):
    """What a reader sees of a prompt. Upper and lower case stay apart: they look different, and Turkey is no turkey."""
    shown = unicodedata.normalize("NFKC", JOINING.sub("", prompt))
    return " ".join(shown.split())


def unprintable(text, allowed=""):
    """The first character of a text that cannot be seen or written, in words; "" where it has none."""
    if text.isprintable() and not OTHER_INVISIBLE.search(text):  # nearly all are, and this is much faster
        return ""
    for character in text:
        kind = kind_of_unprintable(character)
        if kind and character not in allowed:
            name = unicodedata.name(character, "")
            return f"the {kind} {character!a} {name}".rstrip()
    return ""


def kind_of_unprintable(character):
    category = unicodedata.category(character)
    if category == "Cc":
        return "control character"
    if "\udc80" <= character <= "\udcff":
        return "lone surrogate (in an argument: a byte outside the locale's encoding; try PYTHONUTF8=1)"
    if category == "Cs":
        return "lone surrogate"
    is_format = category == "Cf" and character not in JOINERS and not VISIBLE_FORMAT.match(character)
    if is_format or OTHER_INVISIBLE.match(character):
        return "invisible character"
    return ""


def read_txt(path):
    """(line number, text) of each line. A comment would be trained on as a prompt."""
    for number, line in enumerate_lines(path):
        if line.lstrip().startswith("#"):
            rule = "a .txt has no comments, so a line must not begin with #"
            raise ValueError(f"{path}:{number}: {rule}: got {line[:60]!r}; remove it, or use a .csv for such prompts")
        yield number, line


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
                rule = f"a row must have {len(header)} fields, like the header"
                raise ValueError(f"{path}:{reader.line_num}: {rule}: got {len(fields)}; quote a text with commas")
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
            raise ValueError(
                f'{path}:{number}: every line must be an object with a string "prompt": got {line[:200]!r}'
            )
        yield number, row["prompt"]
