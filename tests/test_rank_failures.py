"""Two real ranks under torchrun, of which one fails in some way: one cause, in one line, and an end within seconds.

This file is also the script that the ranks run: `test_rank_failures.py FAULT FOLDER TIMEOUT`. The loop is train.py's,
with a linear policy, so that a launch takes seconds. Four of them run at a time.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import train
from config import Config
from watch import run_as_rank

ROOT = Path(train.__file__).parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
ENVIRONMENT["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = "3600"
FAULTS = ("order", "raises", "bug", "killed", "hangs", "frozen", "twice", "slow")
ITERATIONS = 3  # every fault happens in the second
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
        if self.fault == "bug" and self.passes > 12 and train.WATCH.rank == 1:  # the update of the second iteration
            raise KeyError("no such block")
        return self.module(x)

    def decode(self, x):
        return x


class Reward:
    """Good scores, but for the fault of the second rank in the second iteration. In the third all scores are equal."""

    def __init__(self, fault, folder):
        self.fault, self.folder, self.calls = fault, folder, 0

    def __call__(self, videos, prompts):
        self.calls += 1
        place = torch.arange(len(prompts)) + 10.0 * train.WATCH.rank
        scores = {"VQ": place, "MQ": place / 2, "TA": place**2}
        if self.calls == ITERATIONS:
            return {name: torch.ones(len(prompts)) for name in scores}
        if self.calls == 1 or train.WATCH.rank == 0:
            return scores
        (self.folder / "fault-at").write_text(str(time.time()))
        return self.faulty(scores)

    def faulty(self, scores):
        if self.fault == "order":
            return dict(reversed(scores.items()))
        if self.fault == "raises":
            raise TypeError("the server sent no scores")
        if self.fault == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.fault in ("hangs", "twice"):
            time.sleep(1000)
        if self.fault == "frozen":
            os.kill(os.getpid(), signal.SIGSTOP)
        if self.fault == "slow":
            time.sleep(SLOW)
        return scores


def script(fault, folder, timeout):
    torch.set_num_threads(1)
    config = Config(
        model="tiny", group_size=4, batch_size=2, micro_batch=2, num_steps=4, iterations=ITERATIONS, eval_every=100,
        kl_mode="none", runs=folder, name="run", reward_timeout=float(timeout), clip_range=10.0,
    )  # fmt: skip
    options = SimpleNamespace(dry_run=False, export=None, resume=None, preset="tiny")
    policy, reward = LinearPolicy(fault), Reward(fault, Path(folder))
    train.parse = lambda arguments: (config, options)
    train.build = lambda *arguments: (policy, reward, reward, ["a", "b"], [])
    train.run_evaluation = lambda *arguments: {}
    train.load_of_gpu = lambda *arguments: {}  # it counts the FLOPs of a transformer
    train.pictures.report = lambda *arguments: None
    run_as_rank(lambda: train.main([]))


# ------------------------------------------------------------------------------------------------ the tests
def start(fault, folder):
    timeout = "3" if fault in ("hangs", "frozen") else "600"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__]
    with open(folder / "shown", "w") as shown:
        return subprocess.Popen(
            [*command, fault, str(folder), timeout], cwd=ROOT, env=ENVIRONMENT, stdout=shown, stderr=subprocess.STDOUT
        )


def interrupt(process, folder, times):
    """Ctrl-C once the second rank is in its reward, which the first one awaits in a collective."""
    while not (folder / "fault-at").exists():
        assert process.poll() is None, (folder / "shown").read_text()
        time.sleep(0.1)
    for _ in range(times):
        time.sleep(1.5)
        process.send_signal(signal.SIGINT)


@pytest.fixture(scope="module")
def launches(tmp_path_factory):
    """{fault: (exit code, what was printed, folder, seconds from the fault to the end)}"""
    results = {}
    for faults in (FAULTS[:4], FAULTS[4:]):
        folders = {fault: tmp_path_factory.mktemp(fault) for fault in faults}
        processes = {fault: start(fault, folder) for fault, folder in folders.items()}
        if "twice" in faults:
            interrupt(processes["twice"], folders["twice"], times=2)
            interrupt(processes["slow"], folders["slow"], times=1)
        ends = wait(processes)
        for fault, folder in folders.items():
            fault_at = float((folder / "fault-at").read_text())
            shown = (folder / "shown").read_text()
            results[fault] = (processes[fault].returncode, shown, folder, ends[fault] - fault_at)
    return results


def wait(processes):
    """{fault: time at which its launch ended}; one that does not end is killed after two minutes."""
    ends = {}
    deadline = time.time() + 120
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
    "hangs": "a reward may take 3 seconds (reward_timeout): rank 1 is awaited, it has been in its reward since",
    "frozen": "a reward may take 3 seconds (reward_timeout): rank 1 is awaited, it has been in its reward since",
}


@pytest.mark.parametrize("fault", CAUSES)
def test_one_cause_in_one_line_and_an_end_in_time(launches, fault):
    code, shown, _, seconds = launches[fault]
    assert code == 1 and seconds < 60
    # What torchrun prints after it is its own: its stack and its report.
    printed, _, report = shown.partition("failed (exitcode")
    causes = [line for line in printed.splitlines() if CAUSES[fault] in line]
    assert len(causes) == 1 and causes[0].split("rank ")[1][0] in "01", printed
    assert printed.count("Traceback") == (1 if fault in ("raises", "bug") else 0), printed
    assert CAUSES[fault] in report
    assert "stopping after" not in shown


def test_a_traceback_is_that_of_the_rank_with_the_bug(launches):
    for fault, place in {"bug": "in velocity", "raises": "in faulty"}.items():
        _, shown, _, _ = launches[fault]
        assert shown.split("failed (exitcode")[0].count(place) == 1


def test_the_order_of_names_does_not_matter(launches):
    code, shown, folder, _ = launches["order"]
    assert code == 0, shown
    first, reversed_on_one_rank, _ = lines_of(folder)[1:]
    for name in ("VQ", "MQ", "TA"):
        assert first[f"{name}_mean"] == reversed_on_one_rank[f"{name}_mean"]
    assert first["TA_mean"] == (0 + 1 + 100 + 121) / 4


def test_an_iteration_without_spread_is_said_once(launches):
    _, shown, folder, _ = launches["order"]
    assert shown.count("this iteration teaches nothing") == 1
    assert [line["group_std"] > 0 for line in lines_of(folder)[1:]] == [True, True, False]


def test_the_first_interrupt_says_what_it_waits_for_and_saves(launches):
    _, shown, folder, seconds = launches["slow"]
    assert shown.count("stopping after this iteration") == 1
    assert "rank 1 in its reward since" in shown and "rank 0 in the exchange of the rewards since" in shown
    assert (folder / "run" / "checkpoints" / "iteration-000002").exists() and seconds >= SLOW
    before_fault, after_fault = shown.index("stopping after"), shown.index("iteration 2 of 3:")
    assert before_fault < after_fault  # it was said while the rank was awaited


def test_the_second_interrupt_stops_at_once(launches):
    code, shown, folder, seconds = launches["twice"]
    assert code != 0 and seconds < 60 and shown.count("stopped at once") == 1
    assert not (folder / "run" / "checkpoints").exists()


if __name__ == "__main__":
    script(*sys.argv[1:])
