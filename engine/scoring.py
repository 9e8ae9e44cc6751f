"""The border between a run and its reward, a function that somebody else wrote: see rewards.py for its contract.

`Scorer` makes of it what grpo.py calls: the contract checked, the time limited, the scores of all ranks together.
"""

import functools
import importlib.util
import os
import sys
import traceback
from pathlib import Path

import torch

from engine.watch import enter
from grpo import clock

MAX_SIZE = 1e6  # of a score. Anything larger is no opinion on a video, and beside it the others of a group look equal
TAKEN_NAMES = {"reward", "group", "ratio", "failed"}  # <name>_mean, <name>_std or eval_<name> is another metric


class Scorer:
    """A reward of a run. Every rank calls it at the same time, each with its own samples.

    causes    for each rank whose last call left a sample without a score, the first cause
    failures  this rank's own, of its last call
    seconds   {"reward_seconds", "wait_seconds"} of the last call: this rank's reward, its wait for the slowest rank
    """

    def __init__(self, reward, ranks, device, limit):
        """limit: seconds that one call of the reward may take before the run ends."""
        self.reward, self.ranks, self.device, self.limit = reward, ranks, device, limit
        self.names, self.causes, self.seconds = None, [], {}

    @property
    def failures(self):
        return getattr(self.reward, "failures", [])

    def __call__(self, videos, prompts):
        """{name: float64 [ranks·B]} of all ranks' samples. The names have the first rank's order.

        If the reward of one rank fails or breaks the contract, all ranks raise, and with the same cause, before a
        score crosses ranks.
        """
        started = clock(self.device)
        enter("its reward", self.limit)
        own, problem = call_reward(self.reward, videos, prompts, self.ranks.rank)
        scored = clock(self.device)
        enter("the exchange of the rewards")
        reports = self.ranks.exchange((problem, list(own), first_failure(self.reward, own)))
        self.seconds = {"reward_seconds": scored - started, "wait_seconds": clock(self.device) - scored}
        names, self.causes = check_reports(reports)
        if self.names is not None and set(names) != set(self.names):
            got = f"{', '.join(self.names)} first, then {', '.join(names)}"
            raise RuntimeError(f"a reward must return the same names at every call (rewards.py): got {got}")
        self.names = names
        return {name: self.ranks.gather(own[name].to(self.device)) for name in names}

    def check_failed(self, share, most):
        """Raise where a larger share of an iteration's samples than `most` could not be scored."""
        if share > most:
            raise RuntimeError(
                f"at most a share of {most} of the samples may fail to be scored (max_failed_rewards): got "
                f"{share:.3f}; first cause: {self.causes[0]}"
            )


# ---------------------------------------------------------------------------------------------- a reward of one's own
@functools.cache
def load_reward(text):
    """The function that --reward FILE.py:NAME names. The file is the user's own code and runs as such, once."""
    file, _, name = text.rpartition(":")
    path = Path(file)
    if path.suffix != ".py" or not name.isidentifier():
        raise ValueError(f"reward must name a function in a file, FILE.py:NAME: got {text!r}")
    if not path.is_file():
        raise FileNotFoundError(f"reward must name a file that is there: got {text!r}, and there is no {file}")
    spec = importlib.util.spec_from_file_location("own_reward", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # what the file pickles or decorates finds its own module
    beside = str(path.resolve().parent)
    sys.path.insert(0, beside)  # as for a script: it may import what lies beside it
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the user's code raises
        traceback.print_exc()
        raise ValueError(f"{path} must run: it raised {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(beside)  # not the first place: the file may have put another one there
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"{path} must define a function {name}: got {function!r}")
    return function


def try_reward(function, videos, prompt, weights):
    """ValueError where it breaks the contract on a video, or has no score for one of the weights."""
    scores, problem = call_reward(function, videos, [prompt] * len(videos), rank=int(os.environ.get("RANK", 0)))
    if problem:
        raise ValueError(f"the reward must keep its contract (rewards.py): {problem}")
    check_weights(weights, list(scores))


def check_weights(weights, names):
    """ValueError where a weight is of a score that the reward does not return."""
    unknown = sorted(weights.keys() - set(names))
    if unknown:
        raise ValueError(
            f"reward_weights must be of scores that the reward returns, {', '.join(names)}: got {', '.join(unknown)}; "
            f"such as --reward_weights {','.join(f'{name}=1' for name in names)}"
        )


# ---------------------------------------------------------------------------------------------- its contract
def check_reports(reports):
    """(names, first cause of each rank with a failed sample) of the ranks' (what is wrong, names, first cause)."""
    _, names, _ = reports[0]
    causes = []
    for rank, (problem, others, first) in enumerate(reports):
        if problem:
            raise RuntimeError(f"a reward must keep its contract (rewards.py): rank {rank}, {problem}")
        if set(others) != set(names):
            raise RuntimeError(
                f"a reward must return the same names on every rank: got {names} on rank 0 and {others} on rank {rank};"
                " return NaN for a score that cannot be computed"
            )
        if first:
            causes.append(f"rank {rank}, {first}")
    return names, causes


def call_reward(reward, videos, prompts, rank):
    """({name: float64 [B]}, "") of this rank, or ({}, what is wrong)."""
    given = list(prompts)  # a copy: the update needs the prompts as they are
    try:
        scores = reward(videos, given)
        problem = broken_rule(scores, len(prompts))
        if given != list(prompts):
            problem = "it changed the list of prompts: let it work on a copy"
        if problem:
            return {}, problem
        return {name: values.detach().double() for name, values in scores.items()}, ""
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # whatever the user's code raises, sys.exit() too: all ranks must hear of it
        cause = f"it raised {type(error).__name__}: {error}"
        print(f"\nrank {rank}: the reward must score videos: {cause}", file=sys.stderr)
        traceback.print_exc()
        return {}, cause


def broken_rule(scores, count):
    """What is wrong with the answer of a reward to `count` videos, and how to fix it; "" if it keeps the contract."""
    if not isinstance(scores, dict) or not scores:
        return f"it must return a dict of names and tensors: got {type(scores).__name__} {scores!r:.80}"
    for name, values in scores.items():
        if not isinstance(name, str) or not name or name in TAKEN_NAMES:
            return f"a name must be a text, and none of {sorted(TAKEN_NAMES)}: got {name!r}; rename it"
        if not isinstance(values, torch.Tensor) or values.layout != torch.strided or not values.is_floating_point():
            kind = values.dtype if isinstance(values, torch.Tensor) else type(values).__name__
            return f"{name} must be a dense tensor of floats: got {kind}; convert it with torch.as_tensor and .float()"
        if values.shape != (count,):
            return f"{name} must have one score per video, shape [{count}]: got {list(values.shape)}"
        for sample, value in enumerate(values.double().tolist()):
            if abs(value) > MAX_SIZE:  # false for NaN
                return (
                    f"sample {sample}: {name} must be NaN or of size up to {MAX_SIZE:g}: got {value}; "
                    "fix the reward, or let it return NaN for a video that it cannot score"
                )
    return ""


def first_failure(reward, scores):
    """Why a sample of this rank has no score; "" if all have one."""
    for cause in getattr(reward, "failures", []):
        return str(cause)
    for name, values in scores.items():
        for place in values.isnan().nonzero().flatten().tolist():
            return f"sample {place}: {name} is NaN, and the reward keeps no list of failures"
    return ""
