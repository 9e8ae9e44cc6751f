"""Where an iteration's time goes, in ratios. Both sides of a ratio are timed in one run, so it holds on any machine.

    python -m paper.bench                    all of it in some minutes on one core: results.json, a picture, a table
    python -m paper.bench --only step order  some of it
    python -m paper.bench --table            run nothing; print the table from results.json

    step        transition and log-probability of each sampler, divided by a plain Euler step
    outside     share of an iteration that is not the network: toy, miniature
    exponents   how FLOPs and seconds of an iteration grow with T, samples and frames; without the VAE
    checkpoint  writing and reading a checkpoint, divided by copying a file of the same size
    order       an iteration of grpo.py divided by one in the released loop's order of passes, in FLOPs and in seconds;
                without the VAE
    reward      a picture of what the arms of paper.rehearsal gained for their FLOPs; nothing is run
Things that are compared take turns. Each counts with the median of its times.
"""

import argparse
import math
import os
import shutil
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

import grpo
import train
from engine import checkpoint
from engine.config import parse
from engine.draws import generator
from engine.folder import Log
from engine.trace import CPU_ATTENTION
from paper import plots
from paper.ablate import read_results, write_results
from paper.claims import bench_table, ranked_arms
from sde import SDE, SDE_TYPES, log_prob, sigma_schedule
from tiny.hunyuan import build_tiny_hunyuan
from tiny.miniature import build_miniature
from toy.model import ToyPolicy
from toy.world import PROMPTS as BLOB_PROMPTS
from trust_region import Anchor
from video import hunyuan

TINY_SIZE = ("--frames", "9", "--height", "64", "--width", "64", "--eval_height", "64", "--eval_width", "64")


# ---------------------------------------------------------------------------------------------- measuring
def seconds(function):
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def in_turns(functions, rounds):
    """Median seconds of each function. The functions take turns; the first call of each does not count."""
    for function in functions:
        function()
    taken = [[seconds(function) for function in functions] for _ in range(rounds)]
    return [statistics.median(column) for column in zip(*taken, strict=True)]


def counted(function):
    """FLOPs of a call."""
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        function()
    return counter.get_total_flops()


class Setup:
    """A policy with all that an iteration of it needs. Its anchor is not the rollout's policy: see `iteration`."""

    def __init__(self, policy, config, prompts):
        self.policy, self.config = policy, config
        self.sde = config.sde()
        self.optimizers = train.make_optimizers(policy.module, config)
        self.anchor = Anchor(policy.module)
        count = config.batch_size // config.group_size
        self.prompts = [prompts[place % len(prompts)] for place in range(count) for _ in range(config.group_size)]

    def generators(self):
        return [generator(0, "bench", place) for place in range(self.config.batch_size)]

    def reward(self, videos, prompts):
        scores = torch.rand(3, len(prompts), generator=torch.Generator().manual_seed(0))
        return dict(zip(("VQ", "MQ", "TA"), scores, strict=True))

    def iteration(self):
        """An iteration as train.py makes it, with passes for the reference, as 9 of 10 iterations have."""
        batch = grpo.collect(self.policy, self.reward, self.prompts, self.sde, self.generators(), self.config, 1)
        orders = self.generators()
        grpo.update(self.policy, batch, self.config, self.optimizers, self.anchor, orders, 0, 1)

    def network_alone(self):
        """The same passes of the network, and nothing else."""
        config, copies = self.config, grpo.copies_in_rollout(self.config)
        conditions = self.policy.encode(self.prompts)
        x = torch.zeros(config.batch_size, *self.policy.latent_shape)
        sigma = torch.full((config.batch_size,), 0.5)
        with torch.no_grad():
            for _ in range(config.num_steps + config.trained_steps()):  # rollout and reference
                self.policy.velocity(x, sigma, conditions[::copies])
        for _ in range(config.trained_steps()):
            for rows in torch.arange(config.batch_size).split(config.micro_batch):
                chosen = [conditions[i] for i in rows[::copies]]
                self.policy.velocity(x[rows], sigma[rows], chosen).sum().backward()

    def released_order(self):
        """The released loop's passes, written from its description, one video after another. Each step has guidance's
        two branches in the rollout, two under the reference, and two with gradient. There is no decoding or reward."""
        with torch.no_grad():
            states = [torch.randn(1, *self.policy.latent_shape) for _ in self.prompts]
        for prompt, x in zip(self.prompts, states, strict=True):
            conditions = self.policy.encode([prompt])
            with torch.no_grad():
                path = [x]
                for k in range(self.config.num_steps):
                    sigma = self.sde.sigmas[k].to(x).expand(1)
                    mean, std = self.sde.transition(path[-1], self.policy.velocity(path[-1], sigma, conditions), k)
                    path.append(mean + std * torch.randn_like(mean))
            for k in self.sde.stochastic.nonzero().flatten().tolist():
                sigma = self.sde.sigmas[k].to(x).expand(1)
                with torch.no_grad(), self.anchor.swapped_in():
                    reference, _ = self.sde.transition(path[k], self.policy.velocity(path[k], sigma, conditions), k)
                mean, std = self.sde.transition(path[k], self.policy.velocity(path[k], sigma, conditions), k)
                (((mean - reference) / std).square().mean() - log_prob(path[k + 1], mean, std).sum()).backward()
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()


def settings(*options):
    config, _ = parse([*options, "--dry-run"])
    return config


def tiny_setup(folder, *options):
    config = settings("--preset", "paper", *TINY_SIZE, "--compute_dtype", "float32", "--batch_size", "4", *options)
    shape = hunyuan.latent_shape(config.frames, config.height, config.width)
    policy = hunyuan.load(
        str(folder), shape, folder.parent / "cache", micro_batch=config.micro_batch,
        guidance_gradient=config.guidance_gradient, checkpointing=config.checkpointing,
    )  # fmt: skip
    prompts = ["a cat"]  # one, so that all conditions have as many tokens
    policy.encode(prompts)
    policy.decode = lambda latents: latents  # beside so small a transformer the VAE would be most of it
    return Setup(policy, config, prompts)


# ---------------------------------------------------------------------------------------------- the benchmarks
def bench_step(folder, elements=10**6, rounds=15):
    """{sampler: time of transition and log-probability, divided by that of an Euler step}."""
    x, v, x_next = torch.randn(3, 1, elements)
    sigmas = sigma_schedule(20, 5.0)
    delta = (sigmas[6] - sigmas[5]).float()

    def step(sde):
        mean, std = sde.transition(x, v, 5)
        log_prob(x_next, mean, std)

    samplers = [SDE(name, 0.5, sigmas) for name in SDE_TYPES]
    euler, *times = in_turns([lambda: x + delta * v, *(partial(step, sde) for sde in samplers)], rounds)
    return {f"step and log π of {name} / Euler step": t / euler for name, t in zip(SDE_TYPES, times, strict=True)}


def bench_outside(folder, rounds=3, samples=None):
    """{preset: share of an iteration's time that is not the network's}."""
    shares = {}
    size = [] if samples is None else ["--group_size", "2", "--batch_size", str(samples), "--micro_batch", str(samples)]
    config = settings("--preset", "toy", *size)
    toy = Setup(ToyPolicy(), config, BLOB_PROMPTS)
    config = settings("--preset", "mini", *size)
    build_miniature(folder / "mini")
    shape = hunyuan.latent_shape(config.frames, config.height, config.width)
    policy = hunyuan.load(
        str(folder / "mini"), shape, folder / "cache", guidance_scale=3.0, micro_batch=config.micro_batch
    )
    for name, setup, turns in (
        ("toy", toy, 5 * rounds),  # its iteration is short
        ("miniature", Setup(policy, config, BLOB_PROMPTS), rounds),
    ):
        whole, network = in_turns([setup.iteration, setup.network_alone], turns)
        shares[f"share of an iteration outside the network, {name}"] = 1 - network / whole
    return shares


def bench_exponents(folder, rounds=5, base=(2, 4, 33)):
    """{what grows: exponents of FLOPs and seconds}. T, samples and frames of the video are doubled, one at a time."""
    model = build_tiny_hunyuan(folder / "exponents" / "tiny")
    base = dict(zip(("num_steps", "batch_size", "frames"), base, strict=True))
    doubled = {name: 2 * value for name, value in base.items()}
    doubled["frames"] -= 1
    iterations = []
    for changed in (base, *(base | {name: value} for name, value in doubled.items())):
        options = [part for key, value in changed.items() for part in (f"--{key}", str(value))]
        iterations.append(tiny_setup(model, "--micro_batch", str(base["batch_size"]), *options).iteration)
    flops = [counted(function) for function in iterations]
    times = in_turns(iterations, rounds)
    exponents = {}
    for place, (name, value) in enumerate(doubled.items(), start=1):
        growth = math.log(value / base[name])
        exponents[f"exponent of an iteration's FLOPs in {name}"] = math.log(flops[place] / flops[0]) / growth
        exponents[f"exponent of an iteration's seconds in {name}"] = math.log(times[place] / times[0]) / growth
    return exponents


def bench_checkpoint(folder, rounds=5, side=3000):
    """{save, load: seconds, divided by those of copying a file of the same size and flushing it to the disk}.

    The checkpoint has side² weights, their AdamW and their anchor. That is 144 MB, so that the bytes take the time, not
    the opening of files.
    """
    module = torch.nn.Linear(side, side, bias=False)
    optimizer = torch.optim.AdamW(module.parameters())
    module.weight.grad = torch.zeros_like(module.weight)
    optimizer.step()  # makes the moments
    parts = module, [optimizer], Anchor(module)
    run = folder / "run"
    run.mkdir()
    progress = {"iteration": 1, "optimizer_steps_made": 1, "line": {}, **Log(run).state(), "ranks": 1, "settings": {}}
    progress |= {"prompt_digests": {}, "file_digests": {}, "controller": {}}

    def save():
        shutil.rmtree(run / "checkpoints", ignore_errors=True)
        checkpoint.save(run / "checkpoints", *parts, progress)

    save()
    files = [path for path in run.rglob("*.safetensors")]
    (folder / "file").write_bytes(b"".join(path.read_bytes() for path in files))

    def copy():
        shutil.copyfile(folder / "file", folder / "copy")
        with open(folder / "copy", "rb+") as file:
            os.fsync(file.fileno())

    def load():
        checkpoint.load(checkpoint.choose(run), *parts)

    plain, saved, loaded = in_turns([copy, save, load], rounds)
    return {
        "checkpoint written / file copied": saved / plain,
        "checkpoint verified and read / file copied": loaded / plain,
    }


ORDERS = {
    "our defaults": (),
    "attention's output kept": ("--checkpointing", "attention"),
    "KL on a quarter of the steps": ("--kl_steps", "1"),
    "conditional gradient": ("--guidance_gradient", "conditional"),
    "all three": (*("--guidance_gradient", "conditional", "--checkpointing", "attention", "--kl_steps", "1"),),
}


def bench_order(folder, rounds=3, size=("--num_steps", "4")):
    """{our options: FLOPs and seconds of an iteration, divided by those of the released order}."""
    model = build_tiny_hunyuan(folder / "order" / "tiny")
    setups = {name: tiny_setup(model, *size, *options) for name, options in ORDERS.items()}
    released = tiny_setup(model, *size).released_order
    flops = counted(released)
    base, *times = in_turns([released, *(setup.iteration for setup in setups.values())], rounds)
    ratios = {}
    for (name, setup), t in zip(setups.items(), times, strict=True):
        ratios[f"FLOPs of an iteration, {name} / released order"] = counted(setup.iteration) / flops
        ratios[f"seconds of an iteration, {name} / released order"] = t / base
    return ratios


def bench_reward(folder, picture=Path("figures/reward_per_pass.png")):
    """Draw what every arm of the rehearsal gained for its FLOPs. Returns {arm: TFLOP of one of its runs}."""
    rehearsal = read_results().get("rehearsal", {})
    shown = {}
    for arm, entry in rehearsal.items():
        # Runs on several ranks have the FLOPs and the gain of those on one.
        if len(entry["seeds"]) > 1 and not arm.startswith("2 ranks"):
            shown[arm] = entry
    if not shown:
        print("no arm of paper.rehearsal has two seeds in results.json: no picture of reward per pass")
        return {}
    rows = [row for row in ranked_arms(rehearsal) if row.arm in shown]
    plots.reward_per_flop(rows, picture)
    return {f"TFLOP of a run, {row.arm}": row.tflop for row in rows}


BENCHES = {
    "step": bench_step,
    "outside": bench_outside,
    "exponents": bench_exponents,
    "checkpoint": bench_checkpoint,
    "order": bench_order,
    "reward": bench_reward,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="+", choices=BENCHES, default=list(BENCHES), help="the benchmarks to run [default: all]"
    )
    parser.add_argument("--table", action="store_true", help="run nothing; print the table from results.json")
    options = parser.parse_args()
    results = read_results()
    table = results.setdefault("bench", {})
    for name in [] if options.table else options.only:
        with tempfile.TemporaryDirectory() as folder:
            table[name] = {key: round(value, 4) for key, value in BENCHES[name](Path(folder)).items()}
        write_results(Path("results.json"), results)
        print(f"{name}: done", flush=True)
    print(bench_table(table))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
