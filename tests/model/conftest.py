"""A process group of one for the tests of the model, started and stopped once per file."""

import pytest
import torch

from scale.config import ParallelConfig
from scale.runtime import World
from scale.train import parallel


@pytest.fixture(autouse=True, scope="module")
def alone():
    torch.set_num_threads(1)
    parallel.start(ParallelConfig(), World(0, 1, 0), seed=1, device=torch.device("cpu"))
    yield
    parallel.stop()
