"""What a run shows while it goes and at its end: a progress bar or lines, warnings, TensorBoard, pictures, a table."""

import shlex
import sys

import torch
from tqdm import tqdm

from engine import pictures
from engine.config import departures
from engine.folder import read_log, tensorboard, warn_of_failure
from engine.plan import measured_tflops, training_flops
from engine.presets import MINI, TOY
from grpo import RATIO_CAUSES


class Display:
    """The first rank's; the other ranks' shows nothing."""

    def __init__(self, run, config, ranks, iteration):
        self.run, self.config = run, config
        self.first = ranks.rank == 0
        self.board = tensorboard(run) if self.first else None
        hidden = not (self.first and sys.stderr.isatty())
        self.bar = tqdm(initial=iteration, total=config.iterations, desc=run.name, disable=hidden)

    def rollout_step(self, k):
        self.bar.set_postfix_str(f"rollout step {k + 1} of {self.config.num_steps}")

    def iteration(self, line):
        if not self.first:
            return
        warn(line, self.config.clip_range)
        if "eval_reward" in line and line["iteration"] < self.config.iterations:  # the last ones come at the end
            draw_curves(self.run, self.config)
        self.bar.update()
        kl = line.get("kl_position", line["kl_velocity"])
        self.bar.set_postfix(reward=f"{line['reward_mean']:.3f}", kl=f"{kl:.1e}")
        if self.bar.disable:  # where stderr is a file, a bar would fill it with its redrawings
            print(in_one_line(line, kl, self.bar.total), file=sys.stderr, flush=True)
        if self.board is not None:
            with warn_of_failure("writing TensorBoard's log", Exception):
                for name, value in line.items():
                    if name != "allowed":
                        self.board.add_scalar(name, value, line["iteration"])

    def end(self, iteration, eval_prompts, world_size):
        """Draw the run, which is saved by now. Where a file that the pictures show is damaged, there are none."""
        self.bar.close()
        if not self.first:
            return
        run, config = self.run, self.config
        if iteration < config.iterations:
            draw_curves(run, config)
            print(f"stopped after iteration {iteration}; go on with: python train.py --resume {shlex.quote(str(run))}")
            return
        with warn_of_failure("drawing the run's pictures", Exception):
            pictures.report(run, read_log(run), config, eval_prompts)
        if config.model == MINI:
            from tiny import miniature

            log = read_log(run)
            if not pictures.missing_evaluations(log, config.iterations):
                print(miniature.verdict(log, departures(config, world_size), lora=config.lora_rank > 0))


def warn(line, clip_range):
    """Say what an iteration's line of the log shows to be wrong."""
    if line["groups_without_spread"] == 1:
        print("\nthis iteration taught nothing: no group has two different rewards", file=sys.stderr)
    error = line["first_ratio_error"]
    if error > clip_range:
        print(
            f"\nbefore the first optimizer step the ratio was off by {error:.2e}, more than the clip range of "
            f"{clip_range:.0e}, so some samples were clipped for nothing. {RATIO_CAUSES}",
            file=sys.stderr,
        )


def in_one_line(line, kl, total):
    """An iteration, for a log file."""
    seconds = sum(value for name, value in line.items() if name.endswith("_seconds"))
    numbers = f"reward {line['reward_mean']:.4f}, KL {kl:.1e}, gradient norm {line['grad_norm']:.3g}"
    evaluated = f", evaluated {line['eval_reward']:.4f}" if "eval_reward" in line else ""
    return f"iteration {line['iteration']} of {total}: {numbers}, {seconds:.1f} s{evaluated}"


def draw_curves(run, config):
    with warn_of_failure("drawing the curves", Exception):
        pictures.curves(read_log(run), config.clip_range, run / "curves.png")


def flops_of_a_pass(config, policy):
    """plan.pass_flops of a video of the rollouts, by the policy's own sizes; None for the toy."""
    return None if config.model == TOY else training_flops(config, policy.module.config)


def throughput(config, forward, line, device, ranks):
    """What the last iteration made of a GPU, or of a CPU. forward: flops_of_a_pass.

    tflops         of the video model: FLOPs of the passes that the line counts, by the seconds of rollout and update
    peak_gpu_gib   of a GPU: the most that tensors took since the last call, on the rank with most
    """
    if forward is None:
        return {}
    rate = {"tflops": measured_tflops(config, line, forward)}
    if device.type != "cuda":
        return rate
    peak = torch.cuda.max_memory_allocated(device) / 2**30
    torch.cuda.reset_peak_memory_stats(device)
    return rate | {"peak_gpu_gib": max(ranks.exchange(peak))}
