import os

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the tests are about the CPU, whatever the machine has

import pytest
import torch
from hypothesis import settings

import ranks
import train

settings.register_profile("repeatable", deadline=None, derandomize=True, max_examples=100)
settings.load_profile("repeatable")
torch.set_num_threads(min(2, torch.get_num_threads()))
train.settle_vector_math()
ranks.obey_cpu_capability()


@pytest.fixture(scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # matrices this small lose time to a second thread
    yield
    torch.set_num_threads(before)
