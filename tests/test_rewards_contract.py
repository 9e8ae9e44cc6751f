"""Rewards: a correct batch, or one error that names rank, sample and value. And mp4 files on a full disk."""

import asyncio
import math
import os
import resource
import subprocess

import imageio_ffmpeg
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_grpo import LinearPolicy, T, generators

from engine.config import Config
from engine.scoring import MAX_SIZE, Scorer, broken_rule
from grpo import OneRank, collect, evaluate
from sde import SDE, sigma_schedule
from video.mp4 import write_video

B = 8
CONFIG = Config(group_size=4, batch_size=B, micro_batch=B, kl_mode="none", max_failed_rewards=0.5)
NAMES = ("VQ", "MQ", "TA")
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
ALL_KINDS = (*FLOATS, torch.int64, torch.bool, torch.uint8, torch.complex64, torch.float8_e4m3fn)

extremes = st.sampled_from([math.nan, math.inf, -math.inf, 1e300, 1e6, -1.1e6])
numbers = st.one_of(st.floats(-10, 10), st.floats(), extremes)
shapes = st.one_of(st.just((B,)), st.lists(st.integers(0, B + 1), max_size=3).map(tuple))
names = st.one_of(st.sampled_from([*NAMES, "reward", "group", ""]), st.text(max_size=3), st.integers(), st.none())


@st.composite
def tensors(draw):
    shape = draw(shapes)
    values = draw(st.lists(numbers, min_size=math.prod(shape), max_size=math.prod(shape)))
    tensor = torch.tensor(values, dtype=torch.float64).reshape(shape)
    kind = draw(st.sampled_from(ALL_KINDS))
    if kind not in FLOATS:
        tensor = tensor.nan_to_num(0, 1, 1).clamp(-1, 1)
    return tensor.to(kind)


objects = st.one_of(tensors(), st.none(), st.floats(), st.text(max_size=3), st.lists(st.floats(), max_size=B))
good = st.dictionaries(st.sampled_from(NAMES), tensors(), min_size=3)
answers = st.one_of(good, st.dictionaries(names, objects, max_size=4), objects)


def collected(answer):
    policy, sde = LinearPolicy(), SDE("sage_grpo", 0.5, sigma_schedule(T))
    scorer = Scorer(lambda videos, prompts: answer, OneRank(), "cpu", 60.0)
    batch = collect(policy, scorer, ["a"] * B, sde, generators(0), CONFIG)
    scorer.check_failed(batch.metrics["reward_failed"], CONFIG.max_failed_rewards)
    return batch


def score(reward, prompts, ranks=OneRank()):
    """(scores, first causes) of a reward's answer."""
    scorer = Scorer(reward, ranks, "cpu", 60.0)
    return scorer(None, prompts), scorer.causes


@given(answers)
def test_any_answer_is_a_clean_error_or_a_correct_batch(answer):
    try:
        batch = collected(answer)
    except (RuntimeError, ValueError) as error:
        rules = ("must keep its contract", "may fail to be scored", "did not return")
        assert any(rule in str(error) for rule in rules) and "it raised" not in str(error)
        return
    for name in NAMES:
        values = answer[name].double()
        assert values.shape == (B,) and not (values.abs() > MAX_SIZE).any()
        known = values[values.isfinite()]
        if len(known):
            assert batch.metrics[f"{name}_mean"] == pytest.approx(known.mean().item(), rel=1e-9, abs=1e-9)
    assert batch.advantages.isfinite().all() and batch.advantages.abs().max() <= CONFIG.max_advantage
    scored = torch.stack([answer[name].double() for name in NAMES]).isfinite().all(dim=0)
    assert torch.equal(batch.valid, scored) and (batch.advantages[~scored] == 0).all()


@pytest.mark.parametrize(
    "answer, rule",
    [
        ([0.5] * 2, "it must return a dict of names and tensors: got list"),
        ({}, "it must return a dict of names and tensors: got dict {}"),
        ({"reward": torch.zeros(2)}, "a name must be a text, and none of"),
        ({"VQ": [0.5, 0.5]}, "VQ must be a dense tensor of floats: got list"),
        ({"VQ": torch.zeros(2).long()}, "VQ must be a dense tensor of floats: got torch.int64"),
        ({"VQ": torch.zeros(2).to_sparse()}, "VQ must be a dense tensor of floats: got torch.float32"),
        ({"VQ": torch.zeros(2, 1)}, r"VQ must have one score per video, shape \[2\]: got \[2, 1\]"),
        ({"VQ": torch.tensor([0, math.inf])}, "sample 1: VQ must be NaN or of size up to 1e.06: got inf; fix"),
        ({"VQ": torch.tensor([0, -1e30])}, "sample 1: VQ must be NaN or of size up to 1e.06: got -1.0"),
    ],
)
def test_a_broken_rule_is_named(answer, rule):
    with pytest.raises(RuntimeError, match=f"a reward must keep its contract .*: rank 0, {rule}"):
        score(lambda videos, prompts: answer, ["a", "b"])


class FirstOfTwo(OneRank):
    """What the first rank sees; `other` is the report of the second: (what is wrong, names, failures)."""

    world = 2

    def __init__(self, other):
        self.other = other

    def exchange(self, value):
        return [value, self.other]


@pytest.mark.parametrize(
    "other, cause",
    [
        (("sample 1: VQ must be NaN or …", [], ""), r"keep its contract .*: rank 1, sample 1: VQ must be NaN or …"),
        (("", ["VQ", "more"], ""), r"same names on every rank: got \['VQ'\] on rank 0 and \['VQ', 'more'\] on rank 1"),
    ],
)
def test_a_rank_raises_for_what_another_one_did(other, cause):
    with pytest.raises(RuntimeError, match=cause):
        score(lambda videos, prompts: {"VQ": torch.zeros(2)}, ["a", "b"], FirstOfTwo(other))


def test_the_cause_of_a_failed_sample_comes_with_its_rank():
    ranks = FirstOfTwo(("", ["MQ", "VQ"], "sample 0: the video is black"))
    scores, causes = score(lambda videos, prompts: {"VQ": torch.zeros(1), "MQ": torch.ones(1)}, ["a"], ranks)
    assert causes == ["rank 1, sample 0: the video is black"] and list(scores) == ["VQ", "MQ"]


@pytest.mark.parametrize("error", [SystemExit(0), SystemExit("bye"), asyncio.CancelledError()])
def test_a_reward_that_exits_is_named(error):
    def leaving(videos, prompts):
        raise error

    with pytest.raises(RuntimeError, match=f"rank 0, it raised {type(error).__name__}"):
        score(leaving, ["a"])


def test_the_names_of_a_reward_may_not_change_between_calls():
    calls = iter([{"VQ": torch.zeros(8), "MQ": torch.zeros(8), "TA": torch.zeros(8)}, {"VQ": torch.zeros(8)}])
    ode, noise = SDE("sage_grpo", 0.0, sigma_schedule(T, 5.0)), [*generators(0), *generators(8)]
    policy, prompts = LinearPolicy(), ["a"] * 16
    scorer = Scorer(lambda videos, prompts: next(calls), OneRank(), "cpu", 60.0)
    with pytest.raises(RuntimeError, match="same names at every call .*: got VQ, MQ, TA first, then VQ"):
        evaluate(policy, scorer, prompts, policy.latent_shape, ode, noise, CONFIG)


def test_a_failed_sample_without_a_cause_is_named():
    answer = {"VQ": torch.zeros(2), "MQ": torch.tensor([0, math.nan])}
    _, causes = score(lambda videos, prompts: answer, ["a", "b"])
    assert causes == ["rank 0, sample 1: MQ is NaN, and the reward keeps no list of failures"]


def test_a_good_answer_passes():
    assert broken_rule({"VQ": torch.tensor([math.nan, 1e6]), "more": torch.zeros(2).half()}, 2) == ""


def test_a_reward_may_not_change_the_prompts():
    prompts = ["a", "b"]

    def careless(videos, prompts):
        prompts[0] = "x"
        return {"VQ": torch.zeros(2)}

    with pytest.raises(RuntimeError, match="it changed the list of prompts: let it work on a copy"):
        score(careless, prompts)
    assert prompts == ["a", "b"]


def test_an_exception_of_a_reward_keeps_its_traceback(capsys):
    def broken(videos, prompts):
        raise KeyError("VQ")

    with pytest.raises(RuntimeError, match="rank 0, it raised KeyError: 'VQ'"):
        score(broken, ["a"])
    shown = capsys.readouterr().err
    assert shown.startswith("\nrank 0: the reward must score videos: it raised KeyError") and "in broken" in shown


def test_an_mp4_that_does_not_fit_the_disk_is_an_error(tmp_path):
    """A limit on the size of a file stands for a full disk."""
    video = torch.randint(0, 256, (24, 3, 112, 168), dtype=torch.uint8)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    write_video(tmp_path / "video.mp4", video, fps=24)  # a whole one stood there before
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 * 1024, before[1]))
    try:
        with pytest.raises(OSError, match=r"must be written whole: .*video.mp4 is not \(.*\); [\d,]+ bytes are free"):
            write_video(tmp_path / "video.mp4", video, fps=24)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    write_video(tmp_path / "video.mp4", video, fps=24)


def test_a_signal_to_a_runs_group_does_not_reach_ffmpeg(tmp_path, monkeypatch):
    """Ctrl-C of a terminal, `timeout`, some schedulers: a run that stops after its iteration still writes videos."""
    imageio_ffmpeg.get_ffmpeg_exe()  # once for a process, it tries the program out
    groups = []

    class Noted(subprocess.Popen):
        def __init__(self, *arguments, **named):
            super().__init__(*arguments, **named)
            groups.append(os.getpgid(self.pid))

    monkeypatch.setattr(subprocess, "Popen", Noted)
    write_video(tmp_path / "video.mp4", torch.zeros(2, 3, 16, 16, dtype=torch.uint8), fps=24)
    assert len(groups) == 2 and os.getpgrp() not in groups  # it writes, and counts what it has written
