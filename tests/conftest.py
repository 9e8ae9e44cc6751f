import os

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the tests are about the CPU, whatever the machine has
os.environ["HF_HUB_OFFLINE"] = "1"  # and about what is here, in each process
# Each worker of pytest-xdist has a core; matrices this small lose time to a second thread. Processes that a test starts
# inherit it.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from hypothesis import settings

import ranks
from engine import pictures
from video.numerics import settle_vector_math

settings.register_profile("repeatable", deadline=None, derandomize=True, max_examples=100)
settings.load_profile("repeatable")
torch.set_num_threads(1)
settle_vector_math()
ranks.obey_cpu_capability()

DRAW = pictures.curves
pictures.curves = lambda *arguments: None  # more than half of a small run's time


@pytest.fixture
def drawn_curves(monkeypatch):
    """A test that asks for this has its runs draw their curves."""
    monkeypatch.setattr(pictures, "curves", DRAW)


@pytest.fixture(scope="module")
def always_drawn_curves():
    """The same for all tests of a file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pictures, "curves", DRAW)
        yield


LONGEST = ("test_ranks.py", "test_miniature.py", "test_rank_failures.py", "test_checkpoint.py")


def pytest_collection_modifyitems(items):
    """The longest files first: a worker takes one file after another, and none should begin a long one at the end."""
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(LONGEST)))
