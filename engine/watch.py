"""What each rank knows of the others: that they live, what they do and since when, and the first cause of a failure.

A rank that waits in a collective learns nothing from Python: the call returns when all ranks have come, or never. So
each rank has a thread that looks once a second at what the ranks have left in the store of torch.distributed. It ends
the rank where waiting makes no sense:
    another rank has failed, and left its cause in the store
    another rank of this machine has died (kill -9, out of memory)
    some rank takes longer for its reward than reward_timeout
    the store itself is gone, and with it torchrun
The rank that notices first prints the cause, in one line; the others end without a word. The same thread hears signals.

The rest ends by the time-out of the collectives (engine/ranks.py) or torchrun's heartbeat: a rank that hangs outside of
its reward, another machine that disappears.
"""

import atexit
import contextlib
import json
import math
import os
import select
import signal
import socket
import sys
import threading
import time
import traceback
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from video.streams import hush_libraries, keep_streams

BEAT = 1.0  # seconds between two looks
STORE_GONE_ENDS = 10  # seconds
PATIENCE = 5  # seconds for a rank that ends to say why
NO_FAILURE = "-"
# Ctrl-C, a scheduler, a dropped ssh, a scheduler that was told so, the limit of CPU time.
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)
# The rooms whose deliberate errors are one line.
OURS = ("grpo", "sde", "equalizer", "rewards", "trust_region", "engine", "video", "toy", "tiny", "prompts")


class Watch:
    """The thread of one rank, and what it shares with the main thread: the phase, and what a signal asks for."""

    def __init__(self):
        self.rank = 0
        self.world = 1
        self.store = None  # of torch.distributed; None on one process
        self.thread = None
        self.saves = False  # set by the main thread: from now on a signal asks for a stop after the iteration
        self.asked = None  # the first signal since then
        self.stop_at = math.inf  # this rank's clock when one from before ends it
        self.ended = False
        self.phase = {"number": 0, "name": "its start", "since": time.strftime("%H:%M:%S"), "limit": None}
        self.heard = {}  # rank -> its last message
        self.changed = {}  # rank -> this rank's clock when the other one's phase last changed
        self.handlers_before = {}  # signal -> what it did before

    def start(self, ranks):
        """Begin to watch; a second call changes nothing. Every rank must call it."""
        if self.thread is not None:
            return
        self.rank, self.world = ranks.rank, ranks.world
        if self.world > 1:
            # A client of its own: that of the process group is blocked while the main thread waits for a key.
            store = dist.distributed_c10d._get_default_store().clone()
            self.store = dist.PrefixStore("watch", store)
            self.store.set_timeout(timedelta(seconds=60))
            self.store.compare_set("failure", "", NO_FAILURE)
            self.tell()
            self.store.wait([str(rank) for rank in range(self.world)], timedelta(seconds=600))
        self.catch_signals()
        self.thread = threading.Thread(target=self.run, name="watch", daemon=True)
        self.thread.start()
        atexit.register(self.stop)

    def catch_signals(self):
        """Python handles a signal when the main thread returns from C, out of a collective for instance. But it writes
        the number to the wake-up socket at once, and the thread of the watch reads it there.
        """
        self.listen, self.wake = socket.socketpair()
        self.wake.setblocking(False)  # as signal.set_wakeup_fd wants it
        signal.set_wakeup_fd(self.wake.fileno(), warn_on_full_buffer=False)
        for number in STOPPING:
            # What nohup ignores stays so. Shells have background jobs ignore SIGINT, too, but `kill -INT` is meant.
            if number == signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN:
                self.handlers_before[number] = signal.signal(number, lambda number, frame: None) or signal.SIG_DFL

    def leave_child(self):
        """In a process forked from this one, say by a reward: it is no rank, and SIGTERM ends it, as before the run. It
        shares the wake-up socket, so that a signal to it would be taken for one to this rank.

        What a terminal sends to all of its processes it ignores: a run that stops after the iteration needs it until
        then.
        """
        atexit.unregister(self.stop)
        signal.set_wakeup_fd(-1)
        for number, handler in self.handlers_before.items():
            signal.signal(number, signal.SIG_IGN if number in (signal.SIGINT, signal.SIGHUP) else handler)
        self.listen.close()
        self.wake.close()
        self.__init__()

    def stop(self):
        """At the regular end of the process, so that the others do not take it for dead.

        While this waits, gloo's threads let go of the last collective's tensors. They need Python for that, and abort
        the process if Python has ended before (seen with torch 2.11, 2.13 and 2.15).
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
        return {"pid": os.getpid(), "node": node, "ended": self.ended, **self.phase}

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
            found = [] if self.ended else list(self.judge())
            if found:
                self.end(found[0][0], [pid for _, pid in found if pid is not None])
            for number in signals:
                if number in STOPPING:
                    self.hear(number)
            if time.monotonic() >= self.stop_at and not self.ended:
                self.end("stopped", code=130)

    def look(self):
        """Tell the others what this rank does, and read what they do. Ends this rank if another one has failed."""
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
            if message["number"] != self.heard.get(rank, {}).get("number"):
                self.changed[rank] = time.monotonic()
        self.heard = messages

    def judge(self):
        """(cause, pid to kill or None) for each rank, this one included, that has died or takes too long."""
        own_node = os.environ.get("GROUP_RANK")
        for rank, message in self.heard.items():
            if message["ended"]:
                continue
            doing = f"in {message['name']} since {message['since']}"
            is_neighbour = rank != self.rank and own_node is not None and message["node"] == own_node
            if is_neighbour and not is_alive(message["pid"]):
                yield (
                    f"rank {rank} (pid {message['pid']}) died without a word, last heard of {doing}. It was killed, "
                    "by hand or for want of memory (see dmesg); the last checkpoint is good",
                    None,
                )
            elif message["limit"] is not None and time.monotonic() - self.changed[rank] > message["limit"]:
                yield (
                    f"a reward may take {message['limit']:g} seconds (reward_timeout): rank {rank} is awaited, it has "
                    f"been {doing}. Look at what the reward waits for, or raise reward_timeout; the last checkpoint "
                    "is good",
                    message["pid"] if is_neighbour else None,
                )

    def hear(self, number):
        """A signal, also while the main thread waits in a collective. Before the loop there is nothing to save.

        Only Ctrl-C has a second meaning, and torchrun hands on a second one as SIGTERM: a terminal that closes sends
        SIGHUP twice, and some schedulers send SIGTERM to torchrun and to its ranks.
        """
        if not self.saves:
            # torchrun sends SIGTERM when another rank has ended, too, and this one may be about to say why.
            patience = 0 if number == signal.SIGINT or self.world == 1 else PATIENCE
            self.stop_at = min(self.stop_at, time.monotonic() + patience)
        elif self.asked is None:
            self.asked = number
            if self.rank == 0:
                say(f"\nstopping after this iteration; Ctrl-C again stops at once, loses it. Awaited: {self.awaited()}")
        elif signal.SIGINT in (number, self.asked):
            self.end("stopped at once, the iteration is lost", code=130)

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
    def end(self, cause, hanging=(), code=1):
        """End this process, and hanging ones by their pids: torchrun waits TORCH_ELASTIC_SHUTDOWN_TIMEOUT for them."""
        self.publish(cause)
        for pid in hanging:
            with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
                os.kill(pid, signal.SIGKILL)
        os._exit(code)

    def publish(self, cause):
        """Print the cause, unless another rank was first. Returns whether this rank was. The caller then ends it.

        Printed first, stored then: at the sight of it the other ranks end, and torchrun then ends all that are left.
        """
        self.ended = True
        line = f"rank {self.rank}: {cause}" if self.world > 1 else f"error: {cause}"
        with contextlib.suppress(RuntimeError):  # no store any more
            said = self.said_by_another(line)
            if said:
                record(said)
                return False
        say(f"\n{line}")
        record(line)
        if self.store is not None:
            with contextlib.suppress(RuntimeError):
                self.store.set("failure", line)
        return True

    def said_by_another(self, line):
        """What another rank has said; "" where it is this one's turn: a rank that claims it has it for PATIENCE."""
        holder = ""  # the store's word for nobody
        while self.store is not None:
            first = self.store.compare_set("claim", holder, line).decode()
            if first == line:
                break
            for _ in range(10 * PATIENCE):
                said = self.store.get("failure").decode()
                if said != NO_FAILURE:
                    return said
                time.sleep(0.1)
            holder = first
        return ""


WATCH = Watch()


# ---------------------------------------------------------------------------------------- forks
FORK = threading.local()  # of the thread that forks: its signal mask before


def hold_signals():
    """Until a forked process has left the watch, since a signal to it would meet this process's handlers there."""
    FORK.mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)


def let_signals():
    signal.pthread_sigmask(signal.SIG_SETMASK, FORK.mask)


def begin_child():
    if WATCH.thread is not None:
        WATCH.leave_child()
    let_signals()


os.register_at_fork(before=hold_signals, after_in_parent=let_signals, after_in_child=begin_child)


def enter(name, limit=None):
    """Say what this rank does from now on; with a limit in seconds, the run ends if it takes longer."""
    number = WATCH.phase["number"] + 1
    WATCH.phase = {"number": number, "name": name, "since": time.strftime("%H:%M:%S"), "limit": limit}
    with contextlib.suppress(RuntimeError):  # the store is gone, and the thread ends this rank for it
        WATCH.tell()  # now, since the thread may never come to it


# ---------------------------------------------------------------------------------------- the border of a process
def run_as_rank(main):
    """Run main. The first rank to fail says why in one line, and the exit code is 1, or 2 for a setting.

    An error that this project raises on purpose is that line alone. Any other keeps the traceback of its rank.
    """
    keep_streams()
    if sys.flags.optimize > 1:  # transformers cannot be imported without its docstrings
        os.environ.pop("PYTHONOPTIMIZE", None)
        os.execv(sys.executable, [sys.executable, *sys.argv])
    hush_libraries()
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
        time.sleep(PATIENCE)  # where a collective failed because another rank did, the watch now ends this one
    name = "" if ours else f"{type(error).__name__}: "
    if WATCH.publish(f"{name}{first_line(error)}") and not ours:
        traceback.print_exception(error)
    os._exit(1)  # a regular exit may wait for collectives whose other ranks are gone


def record(line):
    """Leave the cause for torchrun's report."""
    try:
        raise RuntimeError(line) from None
    except RuntimeError as error:
        get_error_handler().record_exception(error)


def is_ours(error):
    """Whether a `raise` of this project's own code made the error. A line of a library, or of a reward, is none."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    package = frame.f_globals["__name__"].partition(".")[0]
    return package in OURS and traceback.extract_tb(error.__traceback__)[-1].line.startswith("raise ")


def first_line(error):
    return " ".join(str(error).split("\n"))


def is_alive(pid):
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, 0)
        return True
    return False


def say(line):
    print(line, file=sys.stderr, flush=True)
