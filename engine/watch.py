"""What each rank knows of the others: that they live, what they do and since when, and the first cause of a failure.

A rank that waits in a collective learns nothing from Python: the call returns when all ranks have come, or never. So
each rank has a thread that looks around once a second. Through the store of torch.distributed it tells the others what
this rank does. It ends the rank where waiting makes no sense:
    another rank has failed, and left its cause in the store
    another rank has died (kill -9, out of memory), or is silent for SILENCE_ENDS seconds
    some rank takes longer for its reward than reward_timeout
    the store itself is gone, and with it torchrun
The rank that notices first prints the cause, in one line; the others end without a word. The same thread hears Ctrl-C.

What remains: a call that holds Python's lock for ever stops this thread, too. Then the other ranks end after
SILENCE_ENDS, or after reward_timeout if it happens in a reward. A whole machine that disappears is silent, too.
"""

import atexit
import contextlib
import json
import logging
import os
import select
import signal
import socket
import sys
import threading
import time
import traceback
import warnings
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

BEAT = 1.0  # seconds between two looks
# Seconds. Long, because a rank that holds Python's lock in one call, such as reading a large file, cannot be heard of.
SILENCE_ENDS = 600
STORE_GONE_ENDS = 10  # seconds
NO_FAILURE = "-"
# What libraries warn of, though it is meant to be so: patterns of the text, and names of loggers.
HARMLESS_WARNINGS = (
    ".*torch.distributed is disabled",  # torch.distributed.checkpoint, on one process
    "FSDP2-wrapped module .* returned a view tensor",  # nothing here changes a velocity in place
)
HARMLESS_LOGGERS = ("diffusers.guiders.guider_utils",)  # "Guiders are currently an experimental feature": none is used


class Watch:
    """The thread of one rank, and what it shares with the main thread: the phase, and whether a stop was asked for."""

    def __init__(self):
        self.rank = 0
        self.world = 1
        self.store = None  # of torch.distributed; None on one process
        self.thread = None
        self.asked = False  # for a stop after this iteration
        self.ended = False
        self.beats = 0
        self.phase = {"number": 0, "name": "its start", "since": time.strftime("%H:%M:%S"), "limit": None}
        self.heard = {}  # rank -> its last message
        self.changed = {}  # (rank, "beats" or "number") -> this rank's clock when that last changed
        self.listen, self.wake = socket.socketpair()
        self.wake.setblocking(False)  # as signal.set_wakeup_fd wants it

    def start(self, ranks):
        """Begin to watch; a second call changes nothing. Every rank must call it."""
        if self.thread is not None:
            return
        self.rank, self.world = ranks.process, ranks.processes
        if self.world > 1:
            # A client of its own: that of the process group is blocked while the main thread waits for a key.
            store = dist.distributed_c10d._get_default_store().clone()
            self.store = dist.PrefixStore("watch", store)
            self.store.set_timeout(timedelta(seconds=60))
            self.store.compare_set("failure", "", NO_FAILURE)
            self.tell()
            self.store.wait([str(rank) for rank in range(self.world)], timedelta(seconds=600))
        self.thread = threading.Thread(target=self.run, name="watch", daemon=True)
        self.thread.start()
        atexit.register(self.stop)

    def stop(self):
        """At the regular end of the process, so that the others do not take it for dead.

        While this waits, gloo's threads let go of the last collective's tensors. They need Python for that, and abort
        the process if Python has ended before (seen with torch 2.13).
        """
        self.ended = True
        self.wake.send(b"\0")
        self.thread.join(timeout=5)
        with contextlib.suppress(RuntimeError):  # the store has ended before us
            self.look()

    def tell(self):
        if self.store is not None:
            self.store.set(str(self.rank), json.dumps(self.message()))

    def message(self):
        node = os.environ.get("GROUP_RANK")  # ranks of the same node are children of the same torchrun
        return {"beats": self.beats, "pid": os.getpid(), "node": node, "ended": self.ended, **self.phase}

    # ---------------------------------------------------------------------------------------- the thread
    def run(self):
        store_seen = time.monotonic()
        while not self.ended:
            ready, _, _ = select.select([self.listen], [], [], BEAT)
            signals = self.listen.recv(16) if ready else b""
            try:
                self.look()
                store_seen = time.monotonic()
            except RuntimeError as error:
                if time.monotonic() - store_seen > STORE_GONE_ENDS and not self.ended:
                    self.end(f"torchrun, or the machine of rank 0, is gone: {first_line(error)}")
            if not self.ended:
                self.judge()
            for number in signals:
                self.hear(number)

    def look(self):
        """Tell the others what this rank does, and read what they do. Ends this rank if another one has failed."""
        self.beats += 1
        messages = {self.rank: self.message()}
        self.tell()
        if self.store is not None:
            keys = [str(rank) for rank in range(self.world)]
            *texts, failure = self.store.multi_get([*keys, "failure"])
            messages = {rank: json.loads(text) for rank, text in enumerate(texts)}
            if failure.decode() != NO_FAILURE and not self.ended:
                record(failure.decode())
                os._exit(1)  # the rank that failed has said why
        for rank, message in messages.items():
            before = self.heard.get(rank, {})
            for name in ("beats", "number"):
                if message[name] != before.get(name):
                    self.changed[rank, name] = time.monotonic()
        self.heard = messages

    def judge(self):
        """End this rank if one of them, itself included, has died, is silent or takes too long."""
        own_node = os.environ.get("GROUP_RANK")
        for rank, message in self.heard.items():
            if message["ended"]:
                continue
            doing = f"in {message['name']} since {message['since']}"
            is_neighbour = rank != self.rank and own_node is not None and message["node"] == own_node
            silent = time.monotonic() - self.changed[rank, "beats"]
            busy = time.monotonic() - self.changed[rank, "number"]
            if is_neighbour and not is_alive(message["pid"]):
                self.end(
                    f"rank {rank} (pid {message['pid']}) died without a word, last heard of {doing}. It was killed, "
                    "by hand or for want of memory (see dmesg); the last checkpoint is good"
                )
            if message["limit"] is not None and busy > message["limit"]:
                self.end(
                    f"a reward may take {message['limit']:g} seconds (reward_timeout): rank {rank} is awaited, it has "
                    f"been {doing}. Look at what the reward waits for, or raise reward_timeout; the last checkpoint "
                    "is good",
                    hanging=message["pid"] if is_neighbour else None,
                )
            if silent > SILENCE_ENDS:
                self.end(
                    f"rank {rank} is silent for {silent:.0f} s, last heard of {doing}; the last checkpoint is good",
                    hanging=message["pid"] if is_neighbour else None,
                )

    def hear(self, number):
        """Ctrl-C or SIGTERM. It works while the main thread waits in a collective."""
        if number not in (signal.SIGINT, signal.SIGTERM):
            return
        if self.asked:
            self.end("stopped at once, the iteration is lost", code=130)
        self.asked = True
        if self.rank == 0:
            say(f"\nstopping after this iteration; once more stops at once and loses it. Awaited: {self.awaited()}")

    def awaited(self):
        """What the ranks do, those in the same phase together, with the time at which the first of them began it."""
        phases = {}
        for rank, message in self.heard.items():
            phases.setdefault(message["name"], []).append((message["since"], rank))
        parts = []
        for name, entered in phases.items():
            ranks = ", ".join(str(rank) for _, rank in entered)
            parts.append(f"rank {ranks} in {name} since {min(entered)[0]}")
        return "; ".join(parts)

    # ---------------------------------------------------------------------------------------- the end
    def end(self, cause, hanging=None, code=1):
        """End this process, and a hanging one by its pid: torchrun waits TORCH_ELASTIC_SHUTDOWN_TIMEOUT for it."""
        self.publish(cause)
        if hanging is not None:
            os.kill(hanging, signal.SIGKILL)
        os._exit(code)

    def publish(self, cause):
        """Print the cause, unless another rank was first. Returns whether this rank was. The caller then ends it."""
        self.ended = True
        line = f"rank {self.rank}: {cause}"
        if self.store is not None:
            try:
                first = self.store.compare_set("failure", NO_FAILURE, line).decode()
            except RuntimeError:  # no store any more
                first = line
            if first != line:
                record(first)
                return False
        say(f"\n{line}" if self.world > 1 else f"\nerror: {cause}")
        record(line)
        return True


WATCH = Watch()


def enter(name, limit=None):
    """Say what this rank does from now on; with a limit in seconds, the run ends if it takes longer."""
    number = WATCH.phase["number"] + 1
    WATCH.phase = {"number": number, "name": name, "since": time.strftime("%H:%M:%S"), "limit": limit}
    with contextlib.suppress(RuntimeError):  # the store is gone, and the thread ends this rank for it
        WATCH.tell()  # now, since the thread may never come to it


class TimedReward:
    """A reward whose calls end the run if one of them takes longer than `limit` seconds. Else it is that reward."""

    def __init__(self, reward, limit):
        self.reward = reward
        self.limit = limit

    @property
    def failures(self):
        return getattr(self.reward, "failures", [])

    def __call__(self, videos, prompts):
        enter("its reward", self.limit)
        try:
            return self.reward(videos, prompts)
        finally:
            enter("the exchange of the rewards")


class Interrupt:
    """Ctrl-C (or SIGTERM) once: stop after this iteration, with a checkpoint. Twice: stop at once.

    Python runs a signal's handler when the main thread returns from C, out of a collective for instance. But it writes
    the signal's number to the wake-up socket at once, and the thread of the watch reads it there.
    """

    def __init__(self):
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, frame: None)
        signal.set_wakeup_fd(WATCH.wake.fileno(), warn_on_full_buffer=False)

    @property
    def asked(self):
        return WATCH.asked


# ---------------------------------------------------------------------------------------- the border of a process
def run_as_rank(main):
    """Run main. The first rank to fail says why in one line, and the exit code is 1, or 2 for a setting.

    An error that this project raises on purpose is that line alone. Any other keeps the traceback of its rank.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # σ on a terminal of ASCII must not end a run
    for text in HARMLESS_WARNINGS:
        warnings.filterwarnings("ignore", message=text)
    for name in HARMLESS_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        main()
    except KeyboardInterrupt:  # before the loop, or in its report: there is nothing to save
        WATCH.end("stopped", code=130)
    except SystemExit as error:
        if WATCH.thread is None or error.code == 2:
            raise  # all ranks exit, and the first has said why
        WATCH.end(error.code if isinstance(error.code, str) else f"sys.exit({error.code}) was called")
    except BaseException as error:
        leave(error)


def leave(error):
    ours = is_ours(error)
    if WATCH.world > 1 and not ours:
        time.sleep(5 * BEAT)  # where a collective failed because another rank did, the watch now ends this one
    name = "" if ours else f"{type(error).__name__}: "
    if WATCH.publish(f"{name}{first_line(error)}") and not ours:
        traceback.print_exception(error)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)  # a regular exit may wait for collectives whose other ranks are gone


def record(line):
    """Leave the cause for torchrun's report."""
    try:
        raise RuntimeError(line) from None
    except RuntimeError as error:
        get_error_handler().record_exception(error)


def is_ours(error):
    """Whether a `raise` of this project's own code made the error."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return Path(last.filename).parent == Path(__file__).parent and last.line.startswith("raise ")


def first_line(error):
    return " ".join(str(error).split("\n"))


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def say(line):
    print(line, file=sys.stderr, flush=True)
