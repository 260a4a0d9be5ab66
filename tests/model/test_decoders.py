"""The law of counts: its likelihood, its draws, and values made of counts."""

from dataclasses import replace

import numpy as np
import pytest
import scipy.stats
import torch
from example_sets import vocabulary

from scale.model.decoders import draw_counts, log_likelihood, to_counts, to_values


def test_log_likelihood_is_that_of_scipy():
    generator = torch.Generator().manual_seed(0)
    count = torch.randint(0, 40, (50,), generator=generator).double()
    mean = torch.rand(50, generator=generator).double() * 20 + 1e-3
    theta = torch.rand(50, generator=generator).double() * 5 + 0.05
    found = log_likelihood(count, mean.log(), theta.log())
    expected = scipy.stats.nbinom.logpmf(count.numpy(), theta.numpy(), (theta / (theta + mean)))
    np.testing.assert_allclose(found, expected, rtol=1e-10)


def test_log_likelihood_of_extreme_means_is_finite():
    count = torch.tensor([0.0, 0.0, 5.0])
    found = log_likelihood(count, torch.tensor([-60.0, 30.0, -60.0]), torch.tensor(1.0))
    assert torch.isfinite(found).all()
    assert found[0] == 0


@pytest.mark.parametrize(("mean", "theta"), [(0.3, 0.5), (4.0, 4.0), (50.0, 2.0)])
def test_draws_have_mean_and_variance_of_the_law(mean, theta):
    num_sets, num_cells, num_genes = 8, 250, 20
    log_mean = torch.full((num_sets, num_cells, num_genes), mean).log()
    log_theta = torch.full((num_genes,), theta).log()
    counts = draw_counts(log_mean, log_theta, torch.arange(num_sets), seed=1).double()
    assert torch.equal(counts, counts.round())
    law = scipy.stats.nbinom(theta, theta / (theta + mean))
    variance, kurtosis = (float(x) for x in law.stats("vk"))
    assert variance == pytest.approx(mean + mean**2 / theta)
    n = counts.numel()
    assert abs(counts.mean() - mean) < 4 * (variance / n) ** 0.5
    assert abs(counts.var() - variance) < 4 * variance * ((kurtosis + 2) / n) ** 0.5


def test_draws_of_a_set_do_not_depend_on_its_batch():
    log_mean, log_theta = torch.randn(5, 6, 7).abs(), torch.zeros(7)
    index = torch.tensor([3, 9, 4, 12, 0])
    counts = draw_counts(log_mean, log_theta, index, seed=1)
    assert torch.equal(draw_counts(log_mean[1:3], log_theta, index[1:3], seed=1), counts[1:3])
    assert not torch.equal(draw_counts(log_mean, log_theta, index, seed=2), counts)


def test_values_and_counts_are_each_others_inverse():
    names = replace(vocabulary(), target_sum=5000.0, value_scale=10.0)
    counts = torch.arange(24.0).view(2, 3, 4)
    library = torch.tensor([[500.0, 900.0, 20000.0]] * 2)
    values = to_values(counts, library, names)
    expected = np.log1p(counts.numpy() * 5000.0 / library.numpy()[:, :, None]) / 10.0
    np.testing.assert_allclose(values, expected, rtol=1e-6)
    assert torch.equal(to_counts(values, library, names), counts)
