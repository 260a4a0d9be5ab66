"""Each test of this room begins without process groups."""

import pytest

from scale.train import parallel


@pytest.fixture(autouse=True)
def _no_groups():
    """Leave the groups of models that earlier tests loaded for prediction."""
    while parallel._started:
        parallel.stop()
