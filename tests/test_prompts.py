"""Prompt files: three formats, and every fault with its line number."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prompts import STARTER_EVAL, STARTER_TRAIN, read_prompts


def write(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_starter_sets_are_clean_and_apart():
    train, evaluation = read_prompts(STARTER_TRAIN), read_prompts(STARTER_EVAL)
    assert len(train) == 64 and len(evaluation) == 16 and not set(train) & set(evaluation)


@pytest.mark.parametrize(
    "name, content",
    [
        ("a.txt", "a cat, asleep\nein größerer Hund\n"),
        ("b.txt", b"\xef\xbb\xbfa cat, asleep\r\nein gr\xc3\xb6\xc3\x9ferer Hund"),  # with a BOM and Windows line ends
        ("a.csv", 'id,prompt\n1,"a cat, asleep"\n2,ein größerer Hund\n'),
        ("a.jsonl", '{"prompt": "a cat, asleep"}\n{"prompt": "ein gr\\u00f6\\u00dferer Hund", "id": 2}\n'),
    ],
)
def test_formats_agree(tmp_path, name, content):
    assert read_prompts(write(tmp_path, name, content)) == ["a cat, asleep", "ein größerer Hund"]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.txt", "one\n\nthree\n", "a.txt:2: a prompt must not be empty"),
        ("a.txt", b"one\ntw\xff\n", "a.txt:2: the file must be UTF-8"),
        ("a.txt", "", "a.txt: a prompt file must hold at least one prompt"),
        ("a.csv", "text\nhello\n", "a.csv:1: the header must have a column `prompt`"),
        ("a.csv", "id,prompt\n1,one\n2\n", "a.csv:3: a row must have 2 fields"),
        ("a.csv", "id,prompt\n1,one,more\n", "a.csv:2: a row must have 2 fields"),
        ("a.csv", "prompt\none\n\nthree\n", "a.csv:3: a prompt must not be empty"),
        ("a.csv", 'prompt\none\n"two\nthree\n', "a.csv:4: quotes must be closed"),
        ("a.jsonl", '{"prompt": "one"}\n{"prompt": \n', "a.jsonl:2: every line must be one JSON object"),
        ("a.jsonl", '{"text": "one"}\n', 'a.jsonl:1: every line must be an object with a string "prompt"'),
        ("a.json", "[]", "must end in .txt, .csv or .jsonl"),
        (
            "a.txt",
            "one\na\0b\n",
            "a.txt:2: a prompt must hold no character that cannot be seen: got the control character '\\x00'",
        ),
        ("a.txt", "one\na\x1b[31mb\n", "a.txt:2: a prompt must hold no character that cannot be seen"),
        ("a.txt", b"one\n\xed\xa0\x80\n", "a.txt:2: the file must be UTF-8"),
        ("a.csv", "prompt\na\x07b\n", "a.csv:2: a prompt must hold no character that cannot be seen"),
        ("a.jsonl", '{"prompt": "a \\ud800 b"}', "cannot be seen: got the lone surrogate '\\ud800'; remove it"),
        ("a.jsonl", '{"prompt": "a\\rb"}', "got the control character '\\r'; remove it"),
        (
            "a.txt",
            b"A red ball\n\xef\xbb\xbfA red ball\n",
            "a.txt:2: a prompt must hold no character that cannot be seen",
        ),
        ("a.txt", "\ufeff\ufeffone", "got the invisible character '\\ufeff' ZERO WIDTH NO-BREAK SPACE; remove it"),
        (
            "a.txt",
            "# my prompts\n\na cat\n",
            "a.txt:1: a .txt has no comments, so a line must not begin with #: got '# my",
        ),
        ("a.txt", "a cat\n  #a dog\n", "a.txt:2: a .txt has no comments"),
        ("a.txt", "one\n\u200d\n", "a.txt:2: a prompt must not be empty"),
        (
            "a.txt",
            "one\nthe\u2028end\n",
            "a.txt:2: a prompt must hold no character that cannot be seen: got the invisible",
        ),
        ("a.txt", "one\n<|VQ_reward|>\n", "a.txt:2: a prompt must not contain a control token of the encoders"),
        ("a.txt", "a <|im_end|> b", "got <|im_end|>; remove it"),
        ("a.csv", 'prompt\n"a ""b"" <|video_pad|>"\n', "a.csv:2: a prompt must not contain a control token"),
        ("a.txt", "x" * 20_000, "a.txt:1: a prompt must have at most 10,000 bytes"),
        ("a.csv", "prompt\n" + "x" * 200_000, "a.csv:2: quotes must be closed"),
        ("a.csv", "", "a.csv:1: the header must have a column `prompt`: got []"),
        ("a.csv", "prompt\n", "a.csv: a prompt file must hold at least one prompt"),
        ("a.jsonl", "[" * 100_000, "a.jsonl:1: every line must be one JSON object"),
        ("a.jsonl", '{"prompt": ' + "9" * 5000 + "}", "a.jsonl:1: every line must be one JSON object"),
        ("a.jsonl", '{"prompt": null}', 'a.jsonl:1: every line must be an object with a string "prompt"'),
        ("a.jsonl", '["prompt"]', 'a.jsonl:1: every line must be an object with a string "prompt"'),
        ("a.jsonl", '{"prompt": "one"}\n\n{"prompt": "two"}', "a.jsonl:2: every line must be one JSON object"),
    ],
)
def test_faults_are_named_with_their_line(tmp_path, name, content, message):
    with pytest.raises(ValueError) as error:
        read_prompts(write(tmp_path, name, content))
    assert message in str(error.value)


@pytest.mark.parametrize(
    "character", "\u00ad\u061c\u180e\u200b\u200e\u202e\u2060\u2064\u2067\U000e0041\u1160\u2029\u2800\u3164\uffa0"
)
@pytest.mark.parametrize("name, form", [("a.txt", "{}"), ("a.csv", "prompt\n{}"), ("a.jsonl", '{{"prompt": "{}"}}')])
def test_invisible_characters_are_refused_wherever_they_stand(tmp_path, name, form, character):
    for text in (f"{character}a ball", f"a b{character}all", f"a ball{character}"):
        path = write(tmp_path, name, form.format(text))
        if text.strip() == "a ball":  # a separator at the ends goes with the blanks
            assert read_prompts(path) == ["a ball"]
            continue
        with pytest.raises(ValueError, match=rf"{name}:[12]: .* got the invisible character '\\[xuU]"):
            read_prompts(path)


@pytest.mark.parametrize(
    "prompt",
    [
        "👩\u200d🚀 on the moon",  # an astronaut is woman, joiner, rocket
        "a red heart ❤\ufe0f",
        "می\u200cخواهم",  # Persian spells its verbs with the non-joiner
        "क्\u200dष",
        "سورة \u06dd١",  # a format character that is seen
        "mañana or man\u0303ana",
        "東京の夜\u3000雨",
        "#sunset",
    ],
)
def test_what_scripts_and_emoji_need_stays_as_it_is(tmp_path, prompt):
    assert read_prompts(write(tmp_path, "a.csv", f"prompt\n{prompt}\n")) == [prompt]


@pytest.mark.parametrize(
    "first, second",
    [
        ("A red ball", " A red ball \t"),
        ("A red ball", "A red  ball"),
        ("A red ball", "A\u00a0red\u2003ball"),
        ("A red ball", "A red b\u200dall"),
        ("A red ball", "A red ball\ufe0f"),
        ("A red ball", "Ａ ｒｅｄ ｂａｌｌ"),
        ("a caf\u00e9", "a cafe\u0301"),
        ("a ﬁsh", "a fish"),
    ],
)
def test_prompts_that_look_alike_are_one(tmp_path, first, second):
    path = write(tmp_path, "a.txt", f"{first}\n{second}\n")
    with pytest.raises(ValueError, match="a.txt: every prompt must be there once.*: alike are lines 1, 2; keep one"):
        read_prompts(path)
    assert len(read_prompts(path, repeats=True)) == 2


def test_all_repeated_prompts_are_named_at_once(tmp_path):
    path = write(tmp_path, "a.txt", "one\ntwo\nOne\none\n two\nthree\none\n")
    with pytest.raises(ValueError, match="alike are lines 1, 4, 7; lines 2, 5; keep one of each"):
        read_prompts(path)
    assert read_prompts(path, repeats=True) == ["one", "two", "One", "one", "two", "three", "one"]


def test_an_argument_outside_the_locale_is_no_control_character():
    program = "import sys, prompts; print(prompts.unprintable(sys.argv[1]))"
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0"}
    root = Path(__file__).parent.parent
    command = [sys.executable, "-c", program, "läuf"]
    told = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, timeout=300).stdout
    assert told.startswith(
        "the lone surrogate (in an argument: a byte outside the locale's encoding; try PYTHONUTF8=1)"
    )


def test_a_missing_file_is_an_error():
    with pytest.raises(FileNotFoundError, match="the prompt file must exist: got nowhere.txt"):
        read_prompts("nowhere.txt")


PIECES = [b"a cat", b"prompt", b"\n", b"\r\n", b",", b'"', b'{"prompt": "', b'"}', b"\xff", b"\xef\xbb\xbf", b"\0"]
joined = st.lists(st.sampled_from(PIECES) | st.binary(max_size=3), max_size=12).map(b"".join)
contents = st.binary(max_size=60) | joined


@given(contents, st.sampled_from([".txt", ".csv", ".jsonl"]))
def test_any_bytes_are_prompts_or_one_error(tmp_path_factory, content, suffix):
    path = tmp_path_factory.getbasetemp() / f"any{suffix}"
    path.write_bytes(content)
    try:
        prompts = read_prompts(path)
    except ValueError as error:
        assert str(error).startswith(str(path))
    else:
        assert prompts and len(set(prompts)) == len(prompts)
        for prompt in prompts:
            assert prompt == prompt.strip() != "" and prompt.encode().decode() == prompt
