"""Random draws: golden values, three forms of one primitive, and that they are uniform."""

import numpy as np
import torch

from scale.draws import derive, mix64, mix64_array, mix64_tensor, uniform


def test_golden_values():
    # Changing these changes the order of training data: a new plan version.
    assert mix64(0) == 0xE220A8397B1DCDAF
    assert derive(42, 1, 2, 3, 4) == 0x4A90A635F990002D


def test_the_three_forms_of_mix64_agree():
    values = [0, 1, 2**31, 2**63 - 1, 2**63, 2**64 - 1, *(derive(7, i) for i in range(200))]
    expected = [mix64(v) for v in values]
    array = np.array(values, dtype=np.uint64)
    assert mix64_array(array).tolist() == expected
    signed = torch.from_numpy(array.view(np.int64).copy())
    assert mix64_tensor(signed).numpy().view(np.uint64).tolist() == expected


def test_uniform_is_uniform_and_depends_on_each_argument():
    index = torch.arange(20_000)
    draws = uniform(index, seed=3, purpose=11)
    assert draws.dtype == torch.float32
    assert draws.min() >= 0
    assert draws.max() < 1
    counts = torch.histc(draws, bins=50, min=0, max=1)
    chi2 = float(((counts - 400) ** 2 / 400).sum())
    assert chi2 < 49 + 4 * np.sqrt(2 * 49)
    for other in (
        uniform(index, seed=4, purpose=11),
        uniform(index, seed=3, purpose=12),
        uniform(index, seed=3, purpose=11, draw=1),
    ):
        assert abs(float(torch.corrcoef(torch.stack([draws, other]))[0, 1])) < 0.03
    assert torch.equal(draws[500:600], uniform(index[500:600], seed=3, purpose=11))
