"""Real ranks under torchrun, of which one or two fail in some way: one cause, in one line, and an end within seconds.
And signals, and output that goes away.

This file is also the script that the ranks run: `test_rank_failures.py FAULT FOLDER TIMEOUT`. The loop is train.py's,
with a linear policy, so that a launch takes seconds.
"""

import contextlib
import fcntl
import json
import multiprocessing
import os
import pty
import signal
import subprocess
import sys
import termios
import time
import traceback
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import forked
import pytest
import torch

import train
from engine import pictures, ranks, watch
from engine.config import Config
from engine.scoring import load_reward
from engine.watch import OURS, STOPPING, WATCH, is_ours, run_as_rank
from prompts import read_prompts
from sde import sigma_schedule
from toy import walk, world

ROOT = Path(train.__file__).parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
ENVIRONMENT["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = "3600"
MARK = "a warning that may not be in any file"
# {fault: number of ranks}. "hang": the second rank hangs and the third is frozen, while all of them are slow to speak.
FAULTS = {"raises": 2, "bug": 2, "killed": 2, "refused": 2, "hang": 3, "twice": 2, "slow": 2}
ITERATIONS = 4  # faults of the second rank happen in the second iteration; "slow" in the third, after another order
DELAY = 0.5  # seconds: of "hang", between a look and the judgement of it, 3 times that on the first rank
SLOW = 12.0  # seconds, so that the interrupts come before its end


# ------------------------------------------------------------------------------------------------ the script
class LinearPolicy:
    latent_shape = (6,)

    def __init__(self, fault):
        self.module, self.passes, self.fault = torch.nn.Linear(6, 6), 0, fault
        torch.nn.init.eye_(self.module.weight)

    def encode(self, prompts):
        return list(prompts)

    def velocity(self, x, sigma, cond):
        self.passes += 1
        if self.fault == "bug" and self.passes > 12 and WATCH.rank == 1:  # the update of the second iteration
            raise KeyError("no such block")
        return self.module(x)

    def decode(self, x):
        return x


class Reward:
    """Good scores, but for the fault. In the third iteration all scores are equal."""

    def __init__(self, fault, folder):
        self.fault, self.folder, self.calls = fault, folder, 0

    def __call__(self, videos, prompts):
        self.calls += 1
        place = torch.arange(len(prompts)) + 10.0 * WATCH.rank
        scores = {"VQ": place, "MQ": place / 2, "TA": place**2}
        if self.calls == 3:
            scores = {name: torch.ones(len(prompts)) for name in scores}
        if self.calls == (3 if self.fault == "slow" else 2) and WATCH.rank > 0:
            (self.folder / "fault-at").write_text(str(time.time()))
            self.fail()
        if self.fault == "slow" and self.calls == 2 and WATCH.rank == 1:
            return dict(reversed(scores.items()))
        if self.fault in ("signals", "output"):
            wait_for_test(self.folder)
        if self.fault == "output":
            warnings.warn(f"{MARK} of call {self.calls}", stacklevel=1)
            traceback.print_stack()
            with contextlib.suppress(OSError):
                os.write(2, MARK.encode())  # as the libraries in C++ do
        return scores

    def fail(self):
        if self.fault == "raises":
            raise TypeError("the server sent no scores")
        if self.fault == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.fault == "twice" or (self.fault == "hang" and WATCH.rank == 1):
            time.sleep(1000)
        if self.fault == "hang":
            os.kill(os.getpid(), signal.SIGSTOP)
        if self.fault == "slow":
            time.sleep(SLOW)


def wait_for_test(folder):
    (folder / "here").touch()
    wait_for(folder / "go")


def wait_for(path, process=None):
    deadline = time.time() + 300
    while not path.exists() and time.time() < deadline:
        assert process is None or process.poll() is None
        time.sleep(0.05)


def late(function, before=0.0, after=0.0):
    def called(*arguments):
        time.sleep(before)
        value = function(*arguments)
        time.sleep(after)
        return value

    return called


def build(fault, folder):
    """What train.build makes. It comes before the loop, where a signal finds nothing to save."""
    if fault == "refused":  # on all ranks; the first has yet to say so when torchrun ends it, as the second has ended
        (folder / "fault-at").write_text(str(time.time()))
        time.sleep(3 if WATCH.rank == 0 else 0)
        raise ranks.FolderError("the folder is not as it must be")
    if fault == "startup":
        wait_for_test(folder)
    policy, reward = LinearPolicy(fault), Reward(fault, folder)
    return policy, reward, reward, ["a", "b"], []


def script(fault, folder, timeout):
    torch.set_num_threads(1)
    count = int(os.environ.get("WORLD_SIZE", 1))
    config = Config(
        model="tiny", group_size=2 * count, batch_size=2, micro_batch=2, num_steps=4, iterations=ITERATIONS,
        kl_mode="none", runs=folder, name="run", reward_timeout=float(timeout), clip_range=10.0, eval_every=100,
    )  # fmt: skip
    options = SimpleNamespace(dry_run=False, export=None, resume=None, preset="tiny")
    train.parse = lambda arguments: (config, options)
    train.build = lambda *arguments: build(fault, Path(folder))
    train.run_evaluation = lambda *arguments: {}
    train.flops_of_a_pass = lambda *arguments: None  # there is no transformer
    pictures.report = lambda *arguments: None
    # Of "slow", the other ranks end while the first one draws, which does not mean that they have died.
    pictures.curves = late(lambda *arguments: None, before=2.5 if fault == "slow" else 0)
    if fault == "hang":
        # So the rank that hangs is the first to notice, and the first rank, which then kills it, should wait for it.
        watch.say = late(watch.say, before=4 * DELAY)
        WATCH.look = late(WATCH.look, after=3 * DELAY if os.environ.get("RANK") == "0" else DELAY)
    run_as_rank(lambda: train.main([]))
    (Path(folder) / f"ended-{WATCH.rank}").touch()


# ------------------------------------------------------------------------------------------------ whose error it is
def raised_by(call):
    try:
        call()
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


def own_raise():
    raise ValueError("of a reward, or of a script")


def error_of_video():
    from video.files import check_hub_id  # not above: it imports diffusers, and the ranks of these tests would wait

    check_hub_id("model", "nowhere", "a/b")


@pytest.mark.parametrize(
    "call, ours",
    [
        (lambda: sigma_schedule(0), True),
        (lambda: world.parse("a small red blob"), True),
        (error_of_video, True),
        (lambda: read_prompts("nowhere.txt"), True),
        (lambda: Config(eta="0.5"), True),
        (own_raise, False),
        (lambda: world.parse(None), False),  # a bug: no line of ours that says raise
        (lambda: json.loads("{"), False),  # a library's
    ],
)
def test_a_deliberate_error_of_any_room_is_one_line(call, ours):
    assert is_ours(raised_by(call)) == ours
    assert {"engine", "prompts", "tiny", "toy", "video"} <= set(OURS)  # every room


def test_an_error_of_a_users_reward_keeps_its_traceback(tmp_path):
    own = tmp_path / "own.py"
    own.write_text("def f(videos, prompts):\n    raise ValueError('no server')\n", encoding="utf-8")
    function = load_reward(f"{own}:f")
    assert not is_ours(raised_by(lambda: function(None, None)))


# ------------------------------------------------------------------------------------------------ the tests
def command_of(fault, folder):
    timeout = "3" if fault == "hang" else "600"
    return [sys.executable, __file__, fault, str(folder), timeout]


INTERRUPTS = {"twice": (signal.SIGINT, signal.SIGINT), "slow": (signal.SIGHUP, signal.SIGHUP)}  # a closing terminal's


def start(fault, folder):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={FAULTS[fault]}"]
    with open(folder / "shown", "w") as shown:
        return subprocess.Popen(
            [*torchrun, *command_of(fault, folder)[1:]], cwd=ROOT, env=ENVIRONMENT, stdout=shown, stderr=shown
        )


def interrupt(process, folder, *numbers):
    """Signals to torchrun once the second rank is in its reward, which the first one awaits in a collective."""
    while not (folder / "fault-at").exists():
        assert process.poll() is None, (folder / "shown").read_text()
        time.sleep(0.1)
    for number in numbers:
        time.sleep(1.5)
        process.send_signal(number)


@pytest.fixture(scope="module")
def launches(tmp_path_factory):
    """{fault: (exit code, what was printed, folder, seconds from the fault to the end)}"""
    results = {}
    names = list(FAULTS)
    for faults in (names[:4], names[4:]):
        folders = {fault: tmp_path_factory.mktemp(fault) for fault in faults}
        processes = {fault: start(fault, folder) for fault, folder in folders.items()}
        with ThreadPoolExecutor() as pool:  # while their ends are awaited
            for fault in INTERRUPTS.keys() & processes.keys():
                pool.submit(interrupt, processes[fault], folders[fault], *INTERRUPTS[fault])
            ends = wait(processes)
        for fault, folder in folders.items():
            fault_at = float((folder / "fault-at").read_text())
            shown = (folder / "shown").read_text()
            results[fault] = (processes[fault].returncode, shown, folder, ends[fault] - fault_at)
    return results


def wait(processes):
    """{fault: time at which its launch ended}; one that does not end is killed after five minutes."""
    ends = {}
    deadline = time.time() + 300
    while len(ends) < len(processes):
        for fault, process in processes.items():
            if time.time() > deadline and process.poll() is None:
                process.terminate()
            if fault not in ends and process.poll() is not None:
                ends[fault] = time.time()
        time.sleep(0.05)
    return ends


def lines_of(folder):
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


CAUSES = {
    "raises": "a reward must keep its contract (rewards.py): rank 1, it raised TypeError: the server sent no scores",
    "bug": "rank 1: KeyError: 'no such block'",
    "killed": "died without a word, last heard of in its reward since",
    "hang": "a reward may take 3 seconds (reward_timeout): rank",
}


@pytest.mark.parametrize("fault", CAUSES)
def test_one_cause_in_one_line_and_an_end_in_time(launches, fault):
    code, shown, _, seconds = launches[fault]
    assert code == 1 and seconds < 60
    # What torchrun prints after it is its own: its stack and its report.
    printed, _, report = shown.partition("failed (exitcode")
    causes = [line for line in printed.splitlines() if CAUSES[fault] in line]
    assert len(causes) == 1 and causes[0].split("rank ")[1][0] in "012", printed
    assert printed.count("Traceback") == (1 if fault in ("raises", "bug") else 0), printed
    assert CAUSES[fault] in report
    assert "stopping after" not in shown


def test_a_traceback_is_that_of_the_rank_with_the_bug(launches):
    for fault, place in {"bug": "in velocity\n", "raises": "in fail\n"}.items():
        _, shown, _, _ = launches[fault]
        assert shown.split("failed (exitcode")[0].count(place) == 1


def test_an_end_before_the_loop_leaves_the_first_rank_the_time_to_say_why(launches):
    code, shown, _, _ = launches["refused"]
    assert code != 0 and shown.count("train.py: error: the folder is not as it must be") == 1
    assert "stopped" not in shown and "died without a word" not in shown


def test_the_order_of_names_does_not_matter(launches):
    _, _, folder, _ = launches["slow"]
    first, reversed_on_one_rank, _ = lines_of(folder)[1:]
    for name in ("VQ", "MQ", "TA"):
        assert first[f"{name}_mean"] == reversed_on_one_rank[f"{name}_mean"]
    assert first["TA_mean"] == (0 + 1 + 100 + 121) / 4


def test_an_iteration_without_spread_is_said_once(launches):
    _, shown, folder, _ = launches["slow"]
    assert shown.count("this iteration taught nothing") == 1
    assert [line["group_std"] > 0 for line in lines_of(folder)[1:]] == [True, True, False]


def test_the_first_interrupt_says_what_it_waits_for_and_saves(launches):
    """A hangup in this case, twice and through torchrun. All ranks come to their regular end."""
    _, shown, folder, seconds = launches["slow"]
    assert shown.count("stopping after this iteration") == 1
    assert "rank 1 in its reward since" in shown and "rank 0 in the exchange of the rewards since" in shown
    assert (folder / "run" / "checkpoints" / "iteration-000003").exists() and seconds >= SLOW
    before_fault, after_fault = shown.index("stopping after"), shown.index(f"iteration 3 of {ITERATIONS}:")
    assert before_fault < after_fault  # it was said while the rank was awaited
    assert f"go on with: python train.py --resume {folder / 'run'}" in shown
    assert (folder / "ended-0").exists() and (folder / "ended-1").exists(), shown


def test_the_second_interrupt_stops_at_once(launches):
    code, shown, folder, seconds = launches["twice"]
    assert code != 0 and seconds < 60 and shown.count("stopped at once") == 1
    assert shown.count("stopping after this iteration") == 1
    assert not (folder / "run" / "checkpoints").exists()


# ------------------------------------------------------------------------------------------------ one process
def closed():
    os.closerange(0, 3)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


def lost():
    """stdout as of `| head -1`, when it has ended; stderr on a full disk."""
    reader, writer = os.pipe()
    os.dup2(writer, 1)
    os.dup2(os.open("/dev/full", os.O_WRONLY), 2)
    os.closerange(3, 50)  # the pipe's reader, too
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """{name: (process without torchrun, its folder)}. In its reward, or before the loop, each waits for a file `go`."""
    ours, terminal = pty.openpty()

    def take_terminal():
        os.setsid()
        fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # these tests may themselves run under nohup

    seen = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    on_terminal = {"stdin": terminal, "stdout": terminal, "stderr": terminal, "preexec_fn": take_terminal}
    walk = [sys.executable, "-m", "toy.walk", "--steps", "3"]
    score = [sys.executable, "-m", "video.score", "none.mp4", "--prompts", "none", "--videoalign", "none"]
    launched = {
        "signals": ("signals", seen),
        "startup": ("startup", seen),
        "terminal": ("signals", on_terminal),
        "closed": ("output", {"preexec_fn": closed}),
        "lost": ("output", {"preexec_fn": lost}),
        "walk": (walk, {"preexec_fn": lost}),
        "score": ([*score, "--videoalign_repo", "none"], {"preexec_fn": lost}),
    }
    started = {}
    for name, (command, options) in launched.items():
        folder = tmp_path_factory.mktemp(name)
        command = command_of(command, folder) if isinstance(command, str) else command
        started[name] = (subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, **options), folder)
    os.close(terminal)
    for name in ("signals", "startup", "terminal", "closed", "lost"):
        process, folder = started[name]
        wait_for(folder / "here", process)
    os.close(ours)  # which is how a terminal closes
    yield started
    for process, _ in started.values():
        process.kill()
        process.wait()


def saved(folder):
    """Iterations of a run that has saved the last of them."""
    done = lines_of(folder)[-1]["iteration"]
    assert (folder / "run" / "checkpoints" / f"iteration-{done:06d}").exists()
    return done


def test_every_signal_that_asks_for_an_end_saves_and_two_of_them_lose_no_iteration(processes):
    process, folder = processes["signals"]
    for number in [*STOPPING, *STOPPING]:
        if number != signal.SIGINT:
            process.send_signal(number)
    (folder / "go").touch()
    shown, _ = process.communicate(timeout=300)
    assert process.returncode == 0 and saved(folder) == 1, shown
    assert shown.count("stopping after this iteration") == 1
    assert f"go on with: python train.py --resume {folder / 'run'}" in shown
    assert {"SIGHUP", "SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2", "SIGXCPU"} == {number.name for number in STOPPING}


def test_before_the_loop_an_interrupt_ends_at_once(processes):
    process, _ = processes["startup"]
    process.send_signal(signal.SIGINT)
    shown, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and shown.endswith("\nerror: stopped\n")


def test_a_terminal_that_closes_ends_the_run_with_a_save(processes):
    process, folder = processes["terminal"]
    (folder / "go").touch()
    assert process.wait(timeout=300) == 0 and saved(folder) == 1


@pytest.mark.parametrize("name", ["closed", "lost"])
def test_output_that_goes_away_is_dropped_and_what_nohup_ignores_stays_ignored(processes, name):
    """With warnings, tracebacks, and messages of libraries that know nothing of Python's streams."""
    process, folder = processes[name]
    process.send_signal(signal.SIGHUP)
    (folder / "go").touch()
    assert process.wait(timeout=300) == 0 and saved(folder) == ITERATIONS
    for file in folder.rglob("*"):
        assert file.is_dir() or MARK.encode() not in file.read_bytes(), file


def help_out():
    """Ends with 3 where it is still a part of the watch, and else with what SIGTERM makes of it."""
    if signal.set_wakeup_fd(-1) != -1 or WATCH.thread is not None:
        os._exit(3)
    os.kill(os.getpid(), signal.SIGINT)  # a terminal's Ctrl-C, which reaches the run, too
    time.sleep(60)


def fork_children():
    """A run whose reward forks helpers, as multiprocessing.Pool does, and ends them, most of them at once."""
    WATCH.start(ranks.OneRank())
    WATCH.saves = True
    for wait in (0, 0, 0, 0, 0, 0, 0, 0, 1):
        helper = multiprocessing.get_context("fork").Process(target=help_out)
        helper.start()
        time.sleep(wait)
        helper.terminate()
        helper.join(timeout=50)
        assert helper.exitcode == -signal.SIGTERM
    time.sleep(2 * watch.BEAT)
    assert WATCH.asked is None
    os.kill(os.getpid(), signal.SIGUSR1)
    deadline = time.time() + 50
    while WATCH.asked is None and time.time() < deadline:
        time.sleep(0.05)
    assert WATCH.asked == signal.SIGUSR1


def test_a_signal_to_a_process_that_a_reward_forked_is_none_to_the_run(tmp_path):
    forked.finish(forked.start(1, tmp_path / "shown", fork_children))


def test_without_docstrings_a_run_starts_again_with_them(monkeypatch):
    """As transformers cannot be imported without. PYTHONOPTIMIZE=2 and -OO set the flag, and take them away."""
    started = []
    monkeypatch.setattr(os, "execv", lambda program, command: started.append((command, "PYTHONOPTIMIZE" in os.environ)))
    monkeypatch.setattr(watch, "keep_streams", lambda: None)
    monkeypatch.setattr(sys, "argv", ["train.py", "--preset", "tiny"])
    monkeypatch.setenv("PYTHONOPTIMIZE", "2")
    for optimize in (1, 2):
        monkeypatch.setattr(watch, "sys", SimpleNamespace(**vars(sys) | {"flags": SimpleNamespace(optimize=optimize)}))
        run_as_rank(lambda: None)
    assert started == [([sys.executable, "train.py", "--preset", "tiny"], False)]
    monkeypatch.setattr(walk, "__doc__", None)
    assert walk.main(["--steps", "3"]) == 0


def test_a_walk_ends_where_its_reader_does(processes):
    assert processes["walk"][0].wait(timeout=300) == -signal.SIGPIPE


def test_scoring_goes_on_without_a_reader(processes):
    assert processes["score"][0].wait(timeout=300) == 2  # the arguments': an error that nobody sees is not another


if __name__ == "__main__":
    script(*sys.argv[1:])
