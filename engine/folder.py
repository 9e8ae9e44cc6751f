"""The run folder: its place, its lock, its settings and its log. engine/checkpoint.py has what lies in checkpoints/.

    .lock           held by the launch that trains here
    config.json     the settings
    metrics.jsonl   the log, a line for each iteration

All of them are UTF-8, whatever the locale, and have the mode that the umask gives. What can be wrong with a run folder
is a FolderError: one message, the same on all ranks.
"""

import contextlib
import fcntl
import json
import math
import os
import shlex
import sys
from functools import partial
from pathlib import Path

from engine.ranks import FolderError, on_all_ranks, on_first_rank, own_rank
from video.json_file import read_json

LOG, LOCK = "metrics.jsonl", ".lock"


# ------------------------------------------------------------------------------------------------ place and lock
def open_run(resumed, runs, name, default):
    """The run folder, on every rank. A new run never writes into an existing folder; one without a name is called
    <default>-<n>.

    `torchrun --max-restarts` starts all ranks again with the same command, which must name the run: the folder of that
    name is then this launch's own. Each machine's agent counts its own restarts, so all counts are asked for.
    """
    restarts = on_all_ranks(lambda: int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)))
    return on_first_rank(_open_run, resumed, Path(runs), name, default, max(restarts) > 0)


def _open_run(resumed, runs, name, default, restarted):
    run = Path(resumed or runs / (name or _next_name(runs, default)))
    if restarted:
        print(f"a restart of this launch goes on in {run}", file=sys.stderr)
    elif not resumed and is_taken(run):
        raise FolderError(taken(run))
    run.mkdir(parents=True, exist_ok=True)
    return run


def _next_name(runs, default):
    names = [path.name.removeprefix(f"{default}-") for path in runs.glob(f"{default}-*")]
    numbers = [int(name) for name in names if name.isdecimal()]
    return f"{default}-{max(numbers, default=0) + 1}"


def is_taken(run):
    """Whether a new run may not have this folder. What a start leaves that failed before its first line is free."""
    left_by_a_start = {LOCK, "config.json", "tmp-config.json", "tiny", "mini"}
    is_free = run.is_dir() and {path.name for path in run.iterdir()} <= left_by_a_start
    return os.path.lexists(run) and not is_free


def taken(run):
    return f"{run} exists; continue it with --resume {shlex.quote(str(run))}, or choose another --name"


@contextlib.contextmanager
def locked(run):
    """The run folder is this launch's alone. The lock ends with the first rank's process, in whatever way that ends.

    Yields a check for every rank to call: FolderError where the folder at this place is no longer the one locked.
    """
    held = []
    on_first_rank(_lock, run, held)
    try:
        yield partial(on_first_rank, _check_lock, run, held)
    finally:
        for file in held:
            file.close()


def _lock(run, held):
    held.append(open(run / LOCK, "ab+"))
    try:
        fcntl.flock(held[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        rule = "one launch at a time may train in a run folder"
        raise FolderError(f"{rule}: another one does in {run}; stop it first, or choose another --name") from None
    except OSError as error:  # some network file systems have no locks
        print(f"warning: {run} cannot be locked, start no second launch in it: {error}", file=sys.stderr)


def _check_lock(run, held):
    """Files are written by their path: in a folder that another run has made there, they would mix with its own."""
    with contextlib.suppress(OSError):
        if os.path.samestat(os.fstat(held[0].fileno()), os.stat(run / LOCK)):
            return
    raise FolderError(
        f"a run's folder must stay where it is while it trains: the one that was {run.absolute()} has been moved, "
        "removed or replaced; nothing more was written. --resume it where it is now: it goes on from its newest "
        "checkpoint"
    )


# ------------------------------------------------------------------------------------------------ files
def write_whole(path, content):
    """Write bytes under a temporary name first: what stood there stays whole until the rename."""
    temporary = path.with_name(f"tmp-{path.name}")
    temporary.write_bytes(content)
    flush(temporary)
    os.replace(temporary, path)


def flush(path):
    """Force a file or folder to disk: a rename must not outrun the data that it names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def set_aside(path):
    """Give a file or folder a free name that nothing here reads."""
    number = 1
    while (aside := path.with_name(f"{path.name}.set-aside-{number}")).exists():
        number += 1
    return path.rename(aside)


@contextlib.contextmanager
def warn_of_failure(what, failures=OSError):
    """For what a run can do without, such as a picture: a warning on stderr where it fails, and the run goes on."""
    try:
        yield
    except failures as error:
        print(f"warning: {what} failed, the run goes on: {error!r}", file=sys.stderr, flush=True)


def strict_json(value):
    """JSON that every reader takes, in UTF-8: null for NaN and infinity, which JSON does not have."""
    return json.dumps(_finite(value), allow_nan=False).encode()


def _finite(value):
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_finite(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


# ------------------------------------------------------------------------------------------------ settings
def write_settings(run, settings):
    content = json.dumps(settings, indent=1, ensure_ascii=False).encode()
    on_first_rank(write_whole, run / "config.json", content)


def read_settings(run, known):
    """config.json of a run to continue; settings that this version does not know are refused, not dropped."""
    path = Path(run) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"--resume must name a run folder with a config.json: got {run}")
    settings = read_json(path, fix="put back what the run wrote")
    unknown = sorted(settings.keys() - set(known))
    if unknown:
        raise ValueError(f"{path} holds settings that this version does not know: {', '.join(unknown)}")
    return settings


# ------------------------------------------------------------------------------------------------ log
class Log:
    """metrics.jsonl, one line for each iteration, written by the first rank, at a cost that does not grow.

    What cannot be written, on a full disk say, waits for the next line. A checkpoint holds the line of its own
    iteration, the lines that wait, and the iteration that the log begins with. A run that goes on counts the lines
    before these; its first line then takes the place of all that followed, which happens again.
    """

    def __init__(self, run, progress=None, renew=False):
        """progress: that of a checkpoint; None begins a new log. renew: a damaged log is set aside for a new one."""
        self.path = Path(run) / LOG
        self.first, self.bytes, self.waiting = 0, 0, []
        self.renewed = progress is not None and on_first_rank(self._take_up, progress, renew)

    def _take_up(self, progress, renew):
        """Find the end of the lines that a checkpoint knows of. Returns whether a new log takes their place."""
        self.first, self.waiting = progress["log_first"], progress["log_waiting"]
        known = range(self.first, progress["iteration"] - len(self.waiting))
        try:
            self.bytes = end_of_lines(self.path, known) if known else 0
        except (OSError, ValueError, RecursionError) as error:
            problem = str(error)
        else:
            return False
        if not renew:
            raise FolderError(
                f"{self.path} must hold the lines of iterations {known[0]} to {known[-1]}: {problem}. Put it back, or "
                f"add `--allow {LOG}`: the file is set aside and a new log started; training does not read it"
            )
        if os.path.lexists(self.path):
            set_aside(self.path)
        self.first = progress["iteration"] - len(self.waiting)
        return True

    def append(self, line):
        if own_rank() != 0:
            return
        self.waiting.append(line)
        content = b"".join(strict_json(waiting) + b"\n" for waiting in self.waiting)
        with warn_of_failure(f"writing {self.path}"):
            with open(self.path, "r+b" if self.bytes else "wb") as file:
                file.seek(self.bytes)
                file.truncate()  # what a killed or failed write has left
                file.write(content)
            self.bytes += len(content)
            self.waiting = []

    def state(self):
        """What a checkpoint holds of the log; the rest is then on disk.

        Of lines that wait at most 1,000, for which a checkpoint has room: without the others, --allow is needed.
        """
        if own_rank() == 0 and self.bytes:
            with warn_of_failure(f"flushing {self.path}"):
                flush(self.path)
        return {"log_first": self.first, "log_waiting": self.waiting[-1000:]}


def end_of_lines(path, iterations):
    """The length of a log up to its line of the last of these iterations; ValueError where it does not begin so."""
    if not path.is_file():  # opening a pipe would wait for ever
        raise ValueError("it is missing")
    with open(path, "rb") as file:
        for iteration in iterations:
            text = file.readline()
            line = json.loads(text) if text.endswith(b"\n") else None
            if not isinstance(line, dict) or line.get("iteration") != iteration:
                raise ValueError(f"that of iteration {iteration} is missing or damaged")
        return file.tell()


def read_log(run):
    """The lines of a run's metrics.jsonl, NaN where one has null; a last one that was cut short, by a kill say, is
    left out.
    """
    path = Path(run) / LOG
    lines = []
    for number, text in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            line = json.loads(text)
            lines.append({name: math.nan if value is None else value for name, value in line.items()})
        except (ValueError, AttributeError) as error:
            raise FolderError(f"{path} must hold a JSON object in each line: line {number}, {error}") from None
    return lines


def tensorboard(run):
    """A TensorBoard writer where the package is installed and works, else None: metrics.jsonl holds the same."""
    with warn_of_failure("opening TensorBoard's log", Exception), contextlib.suppress(ImportError):
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(run / "tensorboard")
    return None
