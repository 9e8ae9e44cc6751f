"""What read_json refuses, each in one line that names the file and says how to fix it."""

import os

import pytest

from video.json_file import MOST_BYTES, read_json

REFUSED = {
    "cut": (b'{"a": 1', "must be JSON: "),
    "binary": (b"\xff\xfe", "must be JSON: "),
    "NaN": (b'{"a": NaN}', "must be JSON: NaN is not JSON"),
    "infinity": (b'{"a": [-Infinity]}', "must be JSON: -Infinity is not JSON"),
    "half a surrogate pair": (b'{"a": "\\ud800"}', "must be JSON: "),
    "brackets": (b"[" * 100_000, "must be JSON: "),
    "a list": (b"[1, 2]", "must be a JSON object: got [1, 2]"),
    "too long": (b" " * MOST_BYTES + b"{}", "must be JSON of at most 16,777,216 bytes: it has 16,777,218"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_json_object_is_refused(tmp_path, case):
    content, message = REFUSED[case]
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ValueError) as error:
        read_json(path, fix="save it again")
    assert str(error.value).startswith(f"{path} {message}") and str(error.value).endswith("; save it again")


def test_an_object_is_read_and_a_missing_file_named(tmp_path):
    (tmp_path / "a.json").write_text('{"é": [null, 1e-3]}', encoding="utf-8")
    assert read_json(tmp_path / "a.json") == {"é": [None, 0.001]}
    os.mkfifo(tmp_path / "pipe")  # to open it would wait for ever
    for name in ("none.json", "pipe"):
        with pytest.raises(FileNotFoundError, match=f"must hold {name}: it is missing; download it again"):
            read_json(tmp_path / name)
