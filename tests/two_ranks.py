"""Run by test_full_run.py under torch.distributed.run: the arguments of several train.py runs, separated by `/`."""

import sys

import torch
import torch.distributed as dist

import train

torch.set_num_threads(1)
runs, arguments = [[]], sys.argv[1:]
for argument in arguments:
    if argument == "/":
        runs.append([])
    else:
        runs[-1].append(argument)
for run in runs:
    train.main(run)
dist.destroy_process_group()
