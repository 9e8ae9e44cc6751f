"""Train a video flow model with SAGE-GRPO.

    python train.py                        the toy, on a laptop, in about two minutes
    python train.py --resume runs/toy-1    go on where a run stopped, bit for bit
    python train.py --dry-run              print settings and batch arithmetic, start nothing
"""

import argparse
import dataclasses
import hashlib
import json
import signal
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import checkpoint

from grpo import GRPOConfig, OneProcess, collect, optimizer_steps, option, update
from rewards import composite_reward
from sde import SDE, SDE_TYPES, randn, rollout, sigma_schedule
from toy import pictures
from trust_region import Anchor, kl_weights


@dataclass
class Config(GRPOConfig):
    """All settings of a run. Defaults are the paper's, in brackets; a preset overrides some, an option overrides both."""

    model: str = option("toy", "the policy: toy")
    name: str = option("", "run folder under --runs [default: the preset's name and a number]")
    runs: str = option("runs", "folder that holds the runs")
    seed: int = option(0, "seed of every random draw")
    updates: int = option(100, "rollout updates in all [paper: judged after 100]")
    batch_size: int = option(2, "samples per rank and rollout update; a group may span ranks [paper: 2]")
    num_steps: int = option(20, "T, sampling steps of a rollout [paper: 20]")
    shift: float = option(5.0, "shift of the sigma schedule [paper: 5]")
    sde_type: str = option("sage_grpo", "sampler of Table 1, or our exact [paper: sage_grpo]", SDE_TYPES)
    eta: float = option(0.5, "η, exploration scale; at most 1 for cps [released code: 0.5]")
    noisy_last_step: bool = option(True, "inject noise in the last step, too, and train it [released code: on]")
    window: int = option(0, "steps with noise per rollout, at a place drawn anew each update; 0 = all [paper: 0]")
    learning_rate: float = option(1e-5, "learning rate of AdamW, constant, no weight decay [paper: 1e-5]")
    eval_every: int = option(10, "updates between evaluations: fixed prompts and noise, ODE sampling")
    eval_steps: int = option(40, "sampling steps of an evaluation [paper: 40]")
    eval_noises: int = option(1, "noises per evaluation prompt")
    checkpoint_every: int = option(10, "updates between checkpoints")
    keep_checkpoints: int = option(2, "newest checkpoints that are kept")

    def check(self):
        super().check()
        for name in ("updates", "batch_size", "eval_every", "eval_steps", "eval_noises", "checkpoint_every", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1: got {getattr(self, name)}")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be positive: got {self.learning_rate}")
        if not self.eta > 0:
            raise ValueError(f"eta must be positive to explore at all: got {self.eta}")
        if self.batch_size % self.group_size:
            raise ValueError(
                f"group_size must divide batch_size × ranks: got {self.group_size} and {self.batch_size} × 1; "
                f"use batch_size {self.group_size} or a multiple of it"
            )
        if self.model != "toy":
            raise ValueError(f"model must be toy: got {self.model!r}")
        optimizer_steps(self.batch_size, self.trained_steps(), self)

    def sde(self):
        return SDE(self.sde_type, self.eta, sigma_schedule(self.num_steps, self.shift), self.noisy_last_step)

    def trained_steps(self):
        stochastic = int(self.sde().stochastic.sum())
        if not 0 <= self.window <= stochastic or stochastic == 0:
            raise ValueError(
                f"the rollout needs stochastic steps, and window at most as many: got window {self.window} and {stochastic} "
                f"stochastic of {self.num_steps} steps; raise num_steps or keep noisy_last_step"
            )
        return self.window or stochastic


PRESETS = {
    "toy": dict(  # measured on the toy, see the README; the rest is the paper's
        model="toy", group_size=16, batch_size=128, micro_batch=128, accumulation=1,  # 8 prompts × 16, one step per pass
        reward_setting="A",  # its three scores lie in [0, 1], and their mean is what the table shows
        updates=70, num_steps=10, noisy_last_step=False, learning_rate=2e-4,
        anchor_every=90, kl_velocity="closed_form", kl_lambda=0.03, kl_lambda_early=3e-4, kl_switch=35,
        eval_steps=10, eval_noises=2,
    ),
}  # fmt: skip


# ------------------------------------------------------------------------------------------------ configuration
def parse(arguments):
    """(config, namespace) from the command line. Unknown options, and options that a resumed run cannot take, are refused."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--preset", choices=PRESETS, help="settings to start from [default: toy]")
    parser.add_argument("--resume", metavar="RUN", help="run folder to continue; takes --updates and nothing else")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved settings and the arithmetic, and stop")
    for field in dataclasses.fields(Config):
        kind = {"type": field.type} if field.type is not bool else {"action": argparse.BooleanOptionalAction}
        if field.metadata["choices"]:
            kind["choices"] = field.metadata["choices"]
        help_text = field.metadata["help"].replace("%", "%%") + f" (default {field.default!r})"
        parser.add_argument(f"--{field.name}", default=argparse.SUPPRESS, help=help_text, **kind)
    options = parser.parse_args(arguments)
    given = {k: v for k, v in vars(options).items() if k not in ("preset", "resume", "dry_run")}
    try:
        if options.resume:
            config = resumed_config(Path(options.resume), given, options.preset)
        else:
            config = Config(**PRESETS[options.preset or "toy"] | given)
        config.check()
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    return config, options


def resumed_config(run, given, preset):
    """The settings of a run to continue: its own, except for a new number of updates."""
    if not (run / "config.json").is_file():
        raise FileNotFoundError(f"--resume must name a run folder with a config.json: got {run}")
    refused = sorted(given.keys() - {"updates"}) + (["preset"] if preset else [])
    if refused:
        raise ValueError(f"--resume continues a run with its own settings; only --updates may change: got {', '.join(refused)}")
    saved = json.loads((run / "config.json").read_text())
    unknown = sorted(saved.keys() - {field.name for field in dataclasses.fields(Config)})
    if unknown:
        raise ValueError(f"{run / 'config.json'} holds settings that this version does not know: {', '.join(unknown)}")
    return Config(**saved | given)


def arithmetic(config):
    """What a run of these settings does, in numbers, before anything is spent."""
    trained = config.trained_steps()
    steps = optimizer_steps(config.batch_size, trained, config)
    return "\n".join(
        [
            f"samples per update       {config.batch_size} = {config.batch_size // config.group_size} prompts × {config.group_size}",
            f"trained steps            {trained} of {config.num_steps}",
            f"micro-batches per update {config.batch_size // config.micro_batch * trained}"
            f" = {config.batch_size} / {config.micro_batch} × {trained}",
            f"optimizer updates        {steps} per update, {steps * config.updates} in all",
            f"anchor refresh           every {config.anchor_every} optimizer updates = {config.anchor_every / steps:g} updates",
        ]
    )


def new_run(config):
    """Create the run folder; an existing one is never written into."""
    if config.name:
        run = Path(config.runs) / config.name
        if run.exists():
            raise SystemExit(f"{run} exists; continue it with --resume {run}, or choose another --name")
    else:
        numbers = [int(p.name[4:]) for p in Path(config.runs).glob("toy-*") if p.name[4:].isdigit()]
        run = Path(config.runs) / f"toy-{max(numbers, default=0) + 1}"
    run.mkdir(parents=True)
    return run


# ------------------------------------------------------------------------------------------------ randomness
def generator(*key):
    """A torch.Generator of its own for each purpose: its seed is a hash of the key, e.g. (seed, "noise", update, sample).

    No generator lives from one update to the next, so the counters of a checkpoint restore them all, and a sample's
    noise does not depend on the number of ranks. On the CPU, so that it does not depend on the device either.
    """
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def draw_prompts(prompts, count, seed, update_index):
    """The prompts of one update: the list in a new order each epoch, read without gaps."""
    places = range(update_index * count, (update_index + 1) * count)
    orders = {
        epoch: torch.randperm(len(prompts), generator=generator(seed, "prompts", epoch)).tolist()
        for epoch in {place // len(prompts) for place in places}
    }
    return [prompts[orders[place // len(prompts)][place % len(prompts)]] for place in places]


def draw_window(sde, length, seed, update_index):
    """This update's SDE: noise on `length` neighbouring steps, drawn among the stochastic ones; the same for all groups."""
    if not length:
        return sde
    starts = [k for k in range(sde.num_steps - length + 1) if sde.stochastic[k : k + length].all()]
    pick = torch.randint(len(starts), (), generator=generator(seed, "window", update_index))
    return sde.window(starts[pick], length)


# ------------------------------------------------------------------------------------------------ evaluation
def evaluate(policy, reward, prompts, config):
    """Score ODE samples of fixed prompts and noise. Returns (metrics, the first noise's videos [prompts, F, C, H, W])."""
    prompts = [prompt for prompt in prompts for _ in range(config.eval_noises)]
    generators = [generator(config.seed, "eval", i) for i in range(len(prompts))]
    conditions = policy.encode(prompts)
    noise = randn((len(prompts), *policy.latent_shape), generators)
    ode = SDE(config.sde_type, 0.0, sigma_schedule(config.eval_steps, config.shift))
    samples = rollout(lambda x, sigma: policy.velocity(x, sigma, conditions), noise, ode, generators).states[:, -1]
    videos = policy.decode(samples)
    scores = reward(videos, prompts)
    scores = {"reward": composite_reward(scores, config.reward_setting), **scores}
    return {f"eval_{name}": values.nanmean().item() for name, values in scores.items()}, videos[:: config.eval_noises]


# ------------------------------------------------------------------------------------------------ the run
class Interrupt:
    """Ctrl-C (or SIGTERM) once: stop after this update, with a checkpoint. Twice: stop at once."""

    def __init__(self):
        self.asked = False
        for name in (signal.SIGINT, signal.SIGTERM):
            signal.signal(name, self._ask)

    def _ask(self, number, frame):
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        print("\nstopping after this update; once more stops at once and loses it", file=sys.stderr, flush=True)


def read_log(run, last_update):
    """metrics.jsonl up to an update: what a killed run logged beyond its checkpoint is cut off, since it happens again."""
    path = run / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    kept = [line for line in lines if line["update"] <= last_update]
    path.write_text("".join(json.dumps(line) + "\n" for line in kept))
    return kept


def main(arguments=None):
    config, options = parse(arguments)
    print(json.dumps(asdict(config), indent=1, ensure_ascii=False) if options.dry_run else "", end="\n" if options.dry_run else "")
    print(arithmetic(config))
    if options.dry_run:
        return

    from toy import world
    from toy.model import ToyPolicy

    policy, reward, prompts, eval_prompts = ToyPolicy(), world.rewards, world.PROMPTS, world.PROMPTS
    optimizer = torch.optim.AdamW(policy.module.parameters(), lr=config.learning_rate, weight_decay=0.0)
    w_pos, _ = kl_weights(config.kl_mode, config.beta_pos, config.beta_vel)
    anchor = Anchor(policy.module, None if config.kl_mode == "fixed" else config.anchor_every) if w_pos else None
    sde, gather = config.sde(), OneProcess()

    done = optimizer_updates = 0
    if options.resume:
        run = Path(options.resume)
        progress = checkpoint.load(checkpoint.latest(run / "checkpoints"), policy.module, optimizer, anchor)
        done, optimizer_updates = progress["update"], progress["optimizer_updates"]
    else:
        run = new_run(config)
    (run / "config.json").write_text(json.dumps(asdict(config), indent=1, ensure_ascii=False))
    log = read_log(run, done)

    def write(line):
        log.append(line)
        with open(run / "metrics.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")

    if not log:
        scores, videos = evaluate(policy, reward, eval_prompts, config)
        write({"update": 0, **scores})
        np.save(run / "samples_before.npy", videos.numpy())

    interrupt = Interrupt()
    bar = tqdm(range(done, config.updates), initial=done, total=config.updates, desc=run.name, dynamic_ncols=True)
    for index in bar:
        groups = draw_prompts(prompts, config.batch_size // config.group_size, config.seed, index)
        mine = [(g, i) for g in range(len(groups)) for i in range(config.group_size)]
        noises = [generator(config.seed, "noise", index, g, i) for g, i in mine]
        orders = [generator(config.seed, "order", index, g, i) for g, i in mine]
        update_sde = draw_window(sde, config.window, config.seed, index)
        batch = collect(
            policy, reward, [groups[g] for g, _ in mine], update_sde, noises, config, optimizer_updates, gather
        )
        metrics, optimizer_updates = update(
            policy, batch, config, optimizer, anchor, orders, index, optimizer_updates, gather
        )
        metrics = {"update": index + 1, **batch.metrics, **metrics, "optimizer_updates": optimizer_updates}
        last = index + 1 == config.updates or interrupt.asked
        if last or (index + 1) % config.eval_every == 0:
            scores, videos = evaluate(policy, reward, eval_prompts, config)
            metrics |= scores
        write(metrics)
        bar.set_postfix(reward=f"{metrics['reward_mean']:.3f}", kl=f"{metrics.get('kl_position', metrics['kl_velocity']):.1e}")
        if last or (index + 1) % config.checkpoint_every == 0:
            progress = {"update": index + 1, "optimizer_updates": optimizer_updates}
            checkpoint.save(
                run / "checkpoints", policy.module, optimizer, anchor, progress, config.keep_checkpoints
            )
        if interrupt.asked:
            break
    bar.close()

    np.save(run / "samples_after.npy", evaluate(policy, reward, eval_prompts, config)[1].numpy())
    pictures.curves(log, config.clip_range, run / "curves.png")
    pictures.side_by_side(
        np.load(run / "samples_before.npy"), np.load(run / "samples_after.npy"), eval_prompts, run / "samples_before_after.gif"
    )
    if interrupt.asked:
        print(f"stopped after update {log[-1]['update']}; go on with: python train.py --resume {run}")
    print(table(log))
    print(f"{run}: metrics.jsonl, curves.png, samples_before_after.gif, checkpoints")


def table(log):
    """Before → after, from the first and the last evaluation."""
    evaluations = [line for line in log if "eval_reward" in line]
    first, last = evaluations[0], evaluations[-1]
    names = [name for name in first if name.startswith("eval_")]
    rows = [f"{'ODE samples':12} {'before':>8} {'after ' + str(last['update']):>10}  change"]
    rows += [f"{n[5:]:12} {first[n]:8.4f} {last[n]:10.4f} {last[n] - first[n]:+8.4f}" for n in names]
    return "\n".join(rows)


if __name__ == "__main__":
    main()
