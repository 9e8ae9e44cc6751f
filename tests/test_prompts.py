"""Prompt files: three formats, and every fault with its line number."""

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
        ("a.txt", "one\na\0b\n", "a.txt:2: a prompt must not contain control characters"),
        ("a.txt", "one\na\x1b[31mb\n", "a.txt:2: a prompt must not contain control characters"),
        ("a.txt", b"one\n\xed\xa0\x80\n", "a.txt:2: the file must be UTF-8"),
        ("a.csv", "prompt\na\x07b\n", "a.csv:2: a prompt must not contain control characters"),
        ("a.jsonl", '{"prompt": "a \\ud800 b"}', "control characters or lone surrogates: got '\\ud800'"),
        ("a.jsonl", '{"prompt": "a\\rb"}', "a.jsonl:1: a prompt must not contain control characters"),
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
