"""What a program shows: without failing where nobody can read it, and without the harmless warnings of libraries."""

import contextlib
import io
import logging
import os
import sys
import warnings

# What libraries warn of, though it is meant to be so: patterns of the text, and names of loggers.
HARMLESS_WARNINGS = (
    ".*torch.distributed is disabled",  # torch.distributed.checkpoint, on one process
    "FSDP2-wrapped module .* returned a view tensor",  # nothing here changes a velocity in place
)
HARMLESS_LOGGERS = ("diffusers.guiders.guider_utils",)  # "Guiders are currently an experimental feature": none is used


class Dropping(io.FileIO):
    """A file whose writes do not fail: what a closed terminal, an ended reader, a full disk cannot take is dropped."""

    def write(self, data):
        with contextlib.suppress(OSError):
            return super().write(data) or len(data)  # None where the file would make us wait
        return len(data)


def keep_streams():
    """From here on stdout and stderr take all that is written, whether or not it can be shown.

    Started with one of them closed (`>&-`), Python has None for it, and the next file to be opened would have its
    number, under which libraries write their messages. The null device has it instead.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    for name, number in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        raw = Dropping(os.devnull, "w") if stream is None else Dropping(number, "w", closefd=False)
        encoding = None if stream is None else stream.encoding
        # σ on a terminal of ASCII, or a file's name in any encoding, must not end a program, either.
        text = io.TextIOWrapper(io.BufferedWriter(raw), encoding, errors="backslashreplace", line_buffering=True)
        setattr(sys, name, text)


def hush_libraries():
    for text in HARMLESS_WARNINGS:
        warnings.filterwarnings("ignore", message=text)
    for name in HARMLESS_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
