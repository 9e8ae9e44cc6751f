"""What each rank of test_ranks.py does: several runs of train.py, one after another.

`muon-step FILE` in place of a run: one step of Muon on matrices whose gradients have full rank; see muon_step.
`host-memory SMALL MODEL FOLDER`: what loading a model costs; see host_memory.

Ranks are compared by rewards that do not depend on the videos. A reward sees uint8 pixels; one rank and two decode in
batches of other shapes, a matrix product then rounds its last bits otherwise, a pixel at the edge between two values
goes to the other one, and a reward model turns that into a difference of 1e-3. What is compared here is the algorithm.
"""

import ctypes
import os
import re
import threading
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard

import grpo
import train
from engine import build, pictures
from engine.config import Config

FAILED_PLACE = 2  # the sample that fails in runs whose name says so, by its place among all ranks' samples


def rewards_by_place(config, steps_made, first, videos, prompts):
    """Scores of a table, by a sample's place among those of all ranks and the optimizer steps made so far."""
    generator = torch.Generator().manual_seed(steps_made)
    table = torch.randn(3, 16, generator=generator)
    if "failed" in config.name:
        table[:, FAILED_PLACE] = torch.nan
    own = table[:, first : first + len(prompts)]
    return {"VQ": own[0], "MQ": own[1], "TA": own[2]}


def collect_with_rewards_by_place(policy, reward, prompts, sde, generators, config, steps_made, ranks, callback):
    """grpo.collect with that table in place of the reward model."""
    reward.reward = partial(rewards_by_place, config, steps_made, ranks.dp_rank * config.batch_size)
    return grpo.collect(policy, reward, prompts, sde, generators, config, steps_made, ranks, callback)


class Layers(torch.nn.Module):
    """Three linear layers under the name that train.make_optimizers looks for, each applied to the same input."""

    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList([torch.nn.Linear(48, width) for width in (32, 48, 33)])

    def forward(self, x):
        return [layer(x) for layer in self.blocks]


def full_rank_batch():
    """(module, x, pulls): the loss Σ layer(x)·pull has the gradient pullᵀ for a weight, of singular values 0.5 to 1."""
    torch.manual_seed(0)
    module, pulls = Layers(), []
    for layer in module.blocks:
        left, _ = torch.linalg.qr(torch.randn(48, 48))
        right, _ = torch.linalg.qr(torch.randn(layer.out_features, layer.out_features))
        values = torch.linspace(0.5, 1, layer.out_features)
        pulls.append(left[:, : layer.out_features] * values @ right)
    return module, torch.eye(48), pulls


def backward(module, x, pulls, share=slice(None)):
    outputs = module(x[share])
    sum((output * pull[share]).sum() for output, pull in zip(outputs, pulls, strict=True)).backward()


def muon_step(file, world=1, rank=0):
    """Save what one optimizer step adds to each weight. Weights and batch are shared out over the ranks."""
    module, x, pulls = full_rank_batch()
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    if world > 1:
        for layer in module.blocks:
            fully_shard(layer)
        fully_shard(module)
    optimizers = train.make_optimizers(module, Config(optimizer="muon", learning_rate=1e-2))
    backward(module, x, pulls, slice(rank * 48 // world, (rank + 1) * 48 // world))
    for optimizer in optimizers:
        optimizer.step()
    after = get_model_state_dict(module, options=StateDictOptions(full_state_dict=True))
    if rank == 0:
        torch.save({name: after[name] - before[name] for name in before}, file)


def anonymous_memory():
    """Bytes of this process without the pages of files, which the system may drop."""
    (kilobytes,) = re.findall(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))
    return 1024 * int(kilobytes)


def host_memory(small, model, folder):
    """Write how much more memory this rank takes, at most, while it loads and shards the model's transformer.

    The small model comes first, so that what PyTorch itself allocates at a first time does not count.
    """
    from video import hunyuan

    mesh = dist.init_device_mesh("cpu", (int(os.environ["WORLD_SIZE"]),))
    rank, shape = dist.get_rank(), hunyuan.latent_shape(5, 64, 48)
    hunyuan.load(small, shape, Path(folder) / "cache", mesh=mesh)
    ctypes.CDLL(None).malloc_trim(0)  # else it is first given pages that this process has freed, which count already
    before, done, seen = anonymous_memory(), threading.Event(), []

    def watch():
        while not done.wait(0.002):
            seen.append(anonymous_memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    policy = hunyuan.load(model, shape, Path(folder) / "cache", mesh=mesh)
    done.set()
    watcher.join()
    (Path(folder) / f"memory-{rank}").write_text(str(max(seen) - before), encoding="utf-8")
    state = get_model_state_dict(policy.module, options=StateDictOptions(full_state_dict=True))
    if rank == 0:
        torch.save(state, Path(folder) / "loaded.pt")


def obey_cpu_capability():
    """Under ATEN_CPU_CAPABILITY, attention by its plain kernel.

    On a CPU with AMX, the flash kernel of torch 2.13 packs bf16 for AVX-512 whatever that variable allows, and fails.
    """
    if "ATEN_CPU_CAPABILITY" in os.environ:
        from video.kernels import KERNELS

        torch.backends.cuda.enable_flash_sdp(False)  # despite its name it is for CPUs, too
        KERNELS["flash"] = KERNELS["math"]


def compare(run):
    """One run. The one named bf16-full makes videos and scores them. Of the others the training alone is compared."""
    from video import (
        hunyuan,  # here, since conftest.py imports this file for all tests, those of the paper's rooms among them
    )

    with ExitStack() as stack:
        if "bf16-full" not in run:
            for replaced in (
                patch.object(hunyuan.HunyuanPolicy, "decode", lambda policy, latents: latents),
                patch.object(build, "build_reward", lambda *arguments: (None, None)),
                patch.object(train, "run_evaluation", lambda *arguments: {}),
                patch.object(pictures, "report", lambda *arguments: None),
            ):
                stack.enter_context(replaced)
        train.main(run)


def main(runs):
    """Several runs of this rank, one after another; each is a list of train.py's arguments."""
    train.collect = collect_with_rewards_by_place
    for run in runs:
        if run[0] == "muon-step":
            dist.init_process_group("gloo")
            muon_step(run[1], dist.get_world_size(), dist.get_rank())
        elif run[0] == "host-memory":
            host_memory(*run[1:])
        else:
            compare(run)
