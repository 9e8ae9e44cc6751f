"""Every random draw of a run: generators by (seed, purpose, iteration, sample), prompts in a new order each epoch.

A run draws nothing else, but for a LoRA's first weights (video/hunyuan.py), the weights of the small models that it
writes itself (tiny/), and the numbers with which attention's kernels are timed (video/kernels.py). These fork or leave
alone PyTorch's global generator.
"""

import hashlib

import torch


def generator(*key):
    """A torch.Generator of its own for each purpose: its seed is a hash of the key, e.g. (seed, "noise", iteration,
    sample).

    No generator lives from one iteration to the next, so the counters of a checkpoint restore them all, and a sample's
    noise does not depend on the number of ranks. On the CPU, so that it does not depend on the device either.
    """
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def sample_generators(config, purpose, iteration, ranks):
    """One generator for each of this rank's samples, by its place among the samples of all ranks.

    So neither noise nor order depends on the number of ranks. PyTorch reads 32 bits of a seed on the CPU, so two of a
    run's draws are alike as often as random numbers of 32 bits are.
    """
    first = ranks.dp_rank * config.batch_size
    return [generator(config.seed, purpose, iteration, place) for place in range(first, first + config.batch_size)]


def draw_prompts(prompts, count, seed, iteration):
    """The prompts of one iteration: the list in a new order each epoch, read without gaps."""
    places = range(iteration * count, (iteration + 1) * count)
    orders = {}
    for epoch in {place // len(prompts) for place in places}:
        orders[epoch] = torch.randperm(len(prompts), generator=generator(seed, "prompts", epoch)).tolist()
    return [prompts[orders[place // len(prompts)][place % len(prompts)]] for place in places]


def own_prompts(prompts, config, iteration, ranks):
    """The prompt of each of this rank's samples: every drawn prompt stands G times in a row among all ranks'
    samples.
    """
    drawn = draw_prompts(prompts, config.batch_size * ranks.dp_world // config.group_size, config.seed, iteration)
    first = ranks.dp_rank * config.batch_size
    return [drawn[place // config.group_size] for place in range(first, first + config.batch_size)]
