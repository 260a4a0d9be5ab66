"""Predicted cells of whole counts."""

from dataclasses import replace

import torch
from example_sets import batch, vocabulary

from scale.model.counts import whole_counts

TARGET_SUM = vocabulary().target_sum
NAMES = replace(vocabulary(), value_scale=2.0)


def value_of(count, library):
    """Values as a store has them."""
    return torch.log1p(count * TARGET_SUM / library[..., None]) / NAMES.value_scale


def measured(set_size, num_sets=2):
    """Return sets of measured control cells, of libraries between 500 and 5,000."""
    sets = batch(num_sets, set_size)
    generator = torch.Generator().manual_seed(5)
    library = torch.randint(500, 5000, (num_sets, set_size), generator=generator).float()
    rate = torch.rand(sets.control_BSG.shape, generator=generator) * 3.0
    count = torch.poisson(rate, generator)
    count[..., 0] *= 200.0
    return replace(sets, control_BSG=value_of(count, library), control_library_BS=library)


def test_measured_cells_stay_exactly_as_they_are():
    sets = measured(8)
    assert torch.equal(whole_counts(sets.control_BSG, sets, NAMES, seed=1), sets.control_BSG)
    assert not whole_counts(torch.zeros_like(sets.control_BSG), sets, NAMES, seed=1).any()


def test_values_are_those_of_one_of_the_two_neighbouring_counts():
    sets = measured(32)
    cells = (sets.control_BSG + torch.randn(sets.control_BSG.shape) * 0.3).relu()
    whole = whole_counts(cells, sets, NAMES, seed=1)
    library = sets.control_library_BS.double()

    def count_of(values):
        grown = torch.expm1(values.double() * NAMES.value_scale)
        return grown * library[..., None] / TARGET_SUM

    count = count_of(whole)
    assert (count.round() - count).abs().max() < 2e-3
    before = count_of(cells)
    assert ((count.round() - before).abs() < 1.0 + 1e-3).all()
    assert (whole[cells == 0] == 0).all()


def test_mean_is_kept_and_counting_adds_its_variance():
    num_cells = 4096
    sets = batch(1, num_cells)
    library = torch.full((1, num_cells), 1500.0)
    # cells of their own: draws follow the control cell
    count = torch.arange(num_cells).float()[None, :, None].expand(sets.control_BSG.shape)
    control = value_of(count, library)
    sets = replace(sets, control_BSG=control, control_library_BS=library)
    value_G = torch.linspace(0.01, 2.0, sets.control_BSG.shape[2])
    whole = whole_counts(value_G.expand_as(control), sets, NAMES, seed=7)[0].double()
    count = torch.arange(10_000).double()
    grid = value_of(count[None, :], library[0, :1].double())[0]
    place = torch.searchsorted(grid, value_G.double(), right=True)
    variance_G = (grid[place] - value_G) * (value_G - grid[place - 1])
    deviations = (whole.mean(0) - value_G) / (variance_G / num_cells).sqrt()
    assert deviations.abs().max() < 4.0  # of 20 genes
    assert deviations.square().mean() < 2.5
    torch.testing.assert_close(whole.var(0), variance_G, rtol=0.15, atol=0)
    # nor do genes or neighbouring cells draw together
    is_up = (whole > value_G).double()
    together = torch.corrcoef(is_up.T) - torch.eye(len(value_G))
    assert together.abs().max() < 4.5 / num_cells**0.5
    beside = torch.corrcoef(torch.stack([is_up[1:].ravel(), is_up[:-1].ravel()]))[0, 1]
    assert beside > -0.01  # shares differ by gene, so that it is above 0


def test_draws_follow_the_cell_and_not_its_place():
    sets = measured(8)
    cells = sets.control_BSG + 0.2
    whole = whole_counts(cells, sets, NAMES, seed=1)
    order = torch.randperm(8)
    other = replace(
        sets,
        control_BSG=sets.control_BSG[:, order],
        control_library_BS=sets.control_library_BS[:, order],
    )
    assert torch.equal(whole_counts(cells[:, order], other, NAMES, seed=1), whole[:, order])
    first = replace(
        batch(1, 5),
        control_BSG=sets.control_BSG[:1, :5],
        control_library_BS=sets.control_library_BS[:1, :5],
        set_index_B=sets.set_index_B[:1],
    )
    assert torch.equal(whole_counts(cells[:1, :5], first, NAMES, seed=1), whole[:1, :5])
    again = replace(sets, set_index_B=sets.set_index_B + 1)
    assert not torch.equal(whole_counts(cells, again, NAMES, seed=1), whole)
    assert not torch.equal(whole_counts(cells, sets, NAMES, seed=2), whole)
