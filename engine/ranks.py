"""The ranks of a run: how they are launched, meet, speak with each other, and fail together."""

import hashlib
import os
import signal
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from engine.presets import TOY
from engine.watch import STOPPING, WATCH
from grpo import OneRank
from video.parallel import context_group, device_mesh, own_rank, reduce_between_machines

# Variables of torchrun that are read here, and the lowest value of each.
LAUNCH_NUMBERS = {"WORLD_SIZE": 1, "RANK": 0, "LOCAL_WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_PORT": 1}
LAUNCH_FIX = "start with torchrun, which sets them all, or unset it"


class FolderError(ValueError):
    """What is wrong with a run folder or its disk, and how to fix it."""


def on_all_ranks(work, *arguments):
    """[what work returns on each rank]. Where it fails on one of them, all raise its error, and none waits for it."""
    try:
        outcome = (work(*arguments), None)
    except (OSError, ValueError) as error:
        outcome = (None, str(error))
    outcomes = [outcome]
    if dist.is_initialized():
        outcomes = [None] * dist.get_world_size()
        dist.all_gather_object(outcomes, outcome)
    for _, problem in outcomes:
        if problem is not None:
            raise FolderError(problem)
    return [value for value, _ in outcomes]


def on_first_rank(work, *arguments):
    """What work returns on the first rank, which alone does it, on all ranks."""

    def work_of_first():
        return work(*arguments) if own_rank() == 0 else None

    return on_all_ranks(work_of_first)[0]


class AllRanks:
    """`ranks` of a run under torch.distributed.

    rank, world          torchrun's. Rank 0 writes and prints
    dp_rank, dp_world    data-parallel: what samples are shared out by. Ranks that share the tokens of a sample have
                         one dp_rank
    context              the process group that shares the tokens of its samples (parallel.py); None: each has its own
    """

    def __init__(self, context=None):
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.context = context
        self.sharers = 1 if context is None else context.size()
        self.dp_rank, self.dp_world = self.rank // self.sharers, self.world // self.sharers

    def gather(self, tensor):
        """The values of all dp_ranks, concatenated in their order; of ranks that share samples the first one's."""
        parts = [torch.empty_like(tensor) for _ in range(self.world)]
        dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts[:: self.sharers])

    def exchange(self, value):
        """A list of the values of all ranks; a value is any small object. It goes over the CPU."""
        values = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def before_backward(self, module, last):
        """Let gradients go from machine to machine once for each optimizer step, with its last backward pass."""
        reduce_between_machines(module, last)


def check_launch_variables():
    """Raise on an environment that torchrun cannot have made: of a scheduler's script, say, that sets half of it."""
    numbers = {}
    for name, lowest in LAUNCH_NUMBERS.items():
        given = os.environ.get(name)
        if given is None:
            continue
        if not given.isdecimal() or int(given) < lowest:
            raise ValueError(f"{name} must be a whole number from {lowest} on: got {given!r}; {LAUNCH_FIX}")
        numbers[name] = int(given)
    for rank, world in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE")):
        if numbers.get(rank, 0) >= numbers.get(world, 1):
            got = f"{numbers[rank]} and {os.environ.get(world)}"
            raise ValueError(f"{rank} must be less than {world}, which is 1 unless it is set: got {got}; {LAUNCH_FIX}")
    if numbers.get("WORLD_SIZE", 1) > 1:
        missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
        if missing:
            rule = f"WORLD_SIZE {numbers['WORLD_SIZE']} needs {', '.join(missing)}, too"
            raise ValueError(f"{rule}: got none; {LAUNCH_FIX}")


def check_agreement(ranks, facts):
    """FolderError on all ranks, with the first of the facts {name: value} that is another one on some rank.

    Facts are what the caller says, and the code itself. Paths are among them: one command starts all ranks, so another
    path is another file. A machine's own disk can be mounted, or linked, under one name on all machines.
    """
    own = {**facts, **code_digests()}
    first, *others = ranks.exchange(own)
    for rank, theirs in enumerate(others, start=1):
        for name in {**first, **theirs}:
            if first.get(name) != theirs.get(name):
                raise FolderError(
                    f"all ranks must have the same settings, files and code: got {name} {first.get(name)!r} on rank 0 "
                    f"and {theirs.get(name)!r} on rank {rank}; start them with one command, from copies that are alike"
                )


def code_digests():
    """{file: its SHA-256} of the code that a run can come to."""
    root = Path(__file__).parent.parent
    files = []
    for room in ("", "engine", "prompts", "tiny", "toy", "video"):
        files += (root / room).glob("*.py")
    digests = {}
    for file in sorted(files):
        digests[str(file.relative_to(root))] = short_digest(file)
    return digests


def short_digest(path):
    return f"SHA-256 {hashlib.sha256(path.read_bytes()).hexdigest():.12}…"


def launch_on_all_gpus(config):
    """`python train.py` on a machine with several GPUs becomes torchrun on all of them.

    After Ctrl-C torchrun kills its ranks in 30 s, unless told otherwise: too soon for the end of an iteration and its
    checkpoint. It gives the same hour to ranks whose neighbour has died; they end by themselves: see engine/watch.py.
    It hands on the signals that it is told to: by default SIGHUP, even where nohup ignores it, and not SIGUSR1, of
    which it dies.
    """
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "3600")
    count = torch.cuda.device_count()
    if config.model != TOY and count > 1 and "RANK" not in os.environ:
        heard = [number.name for number in STOPPING if signal.getsignal(number) != signal.SIG_IGN]
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
        launcher += ["--signals-to-handle", ",".join(["SIGQUIT", *heard])]
        os.execv(sys.executable, [sys.executable, *launcher, *sys.argv])


def join_ranks(backend, timeout):
    """init_process_group, for restarts, too.

    torchrun's store outlives a restart, and PyTorch (2.11 to 2.15) looks up the ranks' addresses in it under the same
    names each time: a rank that comes before another then connects to the one that has died. On one machine the count
    of restarts keeps them apart; each machine counts for itself, so that several cannot agree on such a name.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or os.environ["GROUP_WORLD_SIZE"] != "1":
        dist.init_process_group(backend, timeout=timeout)
        return
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    store = dist.PrefixStore(f"start-{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group(backend, timeout=timeout, store=store, rank=rank, world_size=world)


def setup_ranks(config, facts):
    """(ranks, device, mesh) of this process; the mesh is None on one process. facts: see check_agreement.

    A collective fails after reward_timeout and half an hour more: one rank may be in its reward that long while the
    others wait for it, and half an hour leaves room for a save or a slow disk. That is for hangs that watch.py does not
    see. NCCL then ends the process, by PyTorch's default for TORCH_NCCL_ASYNC_ERROR_HANDLING, 3.
    """
    local = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local) if torch.cuda.is_available() and config.model != TOY else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        WATCH.start(OneRank())
        return OneRank(), device, None
    timeout = timedelta(seconds=config.reward_timeout + 1800)
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        join_ranks(backend, timeout)
    WATCH.start(AllRanks())
    check_agreement(AllRanks(), facts)  # before the first call that waits for ranks with the same settings
    ranks = AllRanks(context_group(config.context_parallel, timeout))
    return ranks, device, device_mesh(device.type, config.replicate)
