"""`read_json` reads a JSON file that something else wrote: a model's configs, a run's settings, a checkpoint's sums.

`check_pointers` finds files of a download that are Git LFS's pointers instead.
"""

import json

MOST_BYTES = 2**24  # the largest that is read, an index of weights, has less than 1 MB


def read_json(path, fix="download it again"):
    """The object in a JSON file. Where there is none: an error that names the file and says how to fix it."""
    if not path.is_file():  # opening a pipe would wait for ever
        raise FileNotFoundError(f"{path.parent} must hold {path.name}: it is missing; {fix}")
    size = path.stat().st_size
    if size > MOST_BYTES:
        raise ValueError(f"{path} must be JSON of at most {MOST_BYTES:,} bytes: it has {size:,}; {fix}")
    try:
        content = json.loads(path.read_bytes(), parse_constant=_refuse_constant)
        json.dumps(content, ensure_ascii=False).encode()  # fails on half a surrogate pair, which no file can hold
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} must be JSON: {error}; {fix}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must be a JSON object: got {content!r:.60}; {fix}")
    return content


def _refuse_constant(name):
    raise ValueError(f"{name} is not JSON")


def check_pointers(folder):
    """Raise if a file below a folder is what Git leaves in its place without LFS."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.stat().st_size < 1000:  # a pointer has three lines
            if path.read_bytes().startswith(b"version https://git-lfs.github.com/spec/"):
                fix = f"run `git lfs pull` in {folder}, or download it with `hf download`"
                raise ValueError(f"{path} must be the file itself: it is a Git LFS pointer to it; {fix}")
