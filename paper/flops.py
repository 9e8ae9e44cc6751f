"""FLOPs of a run of the miniature, counted from its settings. Its log's `tflops` times its seconds gives the same."""

import dataclasses
import functools
import math

from engine import plan
from engine.config import parse
from engine.presets import MINI
from tiny import miniature


@functools.cache
def architecture():
    return miniature.transformer().config


def iterations_with_reference(config):
    """In how many iterations of a run the anchor differs from the rollout's policy, and so needs passes of its own."""
    if config.kl_mode == "fixed":
        return config.iterations - 1
    return config.iterations - math.ceil(config.iterations / plan.iterations_per_anchor(config))


@functools.cache
def run_tflop(options):
    """TFLOP of the transformer in all iterations of `train.py --preset mini` with these options, on all ranks together.

    options: a tuple of command-line options. Evaluations, VAE and rewards are not counted.
    """
    config, _ = parse(["--preset", MINI, *options, "--dry-run"])
    forward = plan.training_flops(config, architecture())
    passes = plan.iteration_flops(config, forward)
    flops = config.iterations * (passes["rollout"] + passes["update"])
    if config.has_anchor:
        # Of a fixed anchor the plan gives the passes of one such iteration; of a moving one, a mean over iterations.
        held = plan.iteration_flops(dataclasses.replace(config, kl_mode="fixed"), forward)
        flops += iterations_with_reference(config) * held["reference"]
    return flops / 1e12
