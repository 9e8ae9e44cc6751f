"""Prompt files: three formats, and every fault with its line number."""

import pytest

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
        ("a.txt", "one\ntwo\n one\n", "a.txt:3: every prompt must be there once: this one is on line 1"),
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
    ],
)
def test_faults_are_named_with_their_line(tmp_path, name, content, message):
    with pytest.raises(ValueError) as error:
        read_prompts(write(tmp_path, name, content))
    assert message in str(error.value)


def test_a_missing_file_is_an_error():
    with pytest.raises(FileNotFoundError, match="the prompt file must exist: got nowhere.txt"):
        read_prompts("nowhere.txt")
