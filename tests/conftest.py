import os

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the tests are about the CPU, whatever the machine has

import torch
from hypothesis import settings

import ranks
import train

settings.register_profile("repeatable", deadline=None, derandomize=True, max_examples=100)
settings.load_profile("repeatable")
torch.set_num_threads(min(2, torch.get_num_threads()))
train.settle_vector_math()
ranks.obey_cpu_capability()
