"""Ranks without a launch: processes forked from the test's own, which has imported what costs each launch seconds.

Launches themselves are tested in test_rank_failures.py.
"""

import gc
import os
import socket
import sys

import torch.distributed as dist
import torch.multiprocessing


def start(count, output, work, *arguments):
    """Begin work(*arguments) on each of `count` ranks. What they print goes to the file `output`."""
    given = (count, free_port(), output, work, arguments)
    return torch.multiprocessing.start_processes(rank, given, nprocs=count, join=False, start_method="fork")


def rank(number, count, port, output, work, arguments):
    gc.freeze()  # what was imported lives for ever: a collection that walks it copies its pages
    if count > 1:
        world = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "RANK": number, "LOCAL_RANK": number}
        os.environ.update({name: str(value) for name, value in world.items()})
        os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = open(1, "w", buffering=1, closefd=False, encoding="utf-8")
    sys.stderr = open(2, "w", buffering=1, closefd=False, encoding="utf-8")
    work(*arguments)
    if dist.is_initialized():
        dist.destroy_process_group()


def finish(ranks):
    """Wait for them; raise the first error, with its traceback."""
    while not ranks.join(timeout=600):
        pass


def exit_codes(ranks):
    """Wait for them, each to its own end."""
    for process in ranks.processes:
        process.join(timeout=600)
    return [process.exitcode for process in ranks.processes]


def free_port():
    with socket.socket() as any_port:
        any_port.bind(("127.0.0.1", 0))
        return any_port.getsockname()[1]
