"""Losses: known values, unbiasedness, symmetries, masks, gradients."""

import math

import pytest
import torch
from example_sets import cells

from scale.model.losses import LOSSES, SetDistances
from scale.model.pairing import Pairs

NAMES = sorted(LOSSES)
INVARIANT = [n for n in NAMES if n != "point"]


def full(*shape):
    return torch.ones(shape, dtype=torch.bool)


def loss_of(name, a, y, w, v):
    """Cells are the partners of each other in their order, as far as both sets go."""
    partner = torch.arange(a.shape[1]).clamp(max=y.shape[1] - 1).expand(len(a), -1)
    pairs = Pairs(partner, v.gather(1, partner) & (torch.arange(a.shape[1]) < y.shape[1]))
    return LOSSES[name](SetDistances.between(a, y, w, v, pairs))


def energy_loss(a, y, w, v):
    return loss_of("energy", a, y, w, v)


def mmd_loss(a, y, w, v):
    return loss_of("mmd", a, y, w, v)


def column(*values):
    return torch.tensor(values)[None, :, None]


def gaussian_sets(num_sets, size, shift, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_sets, size, 1, generator=generator, dtype=torch.float64) + shift


@pytest.mark.parametrize(("scale", "shift", "expected"), [(1.0, 0.0, -1.0), (3.0, 5.0, -3.0)])
def test_energy_of_two_pairs(scale, shift, expected):
    # d across: 1, 3, 1, 1 -> 2 * 6 / 4 = 3; within: 2 and 2 -> 3 - 2 - 2 = -1
    a, y = column(0.0, 2.0) * scale + shift, column(1.0, 3.0) * scale + shift
    assert energy_loss(a, y, full(1, 2), full(1, 2)).item() == pytest.approx(expected, abs=1e-5)
    a, y = column(0.0, 2.0, 99.0) * scale + shift, column(1.0, 3.0, 0.0) * scale + shift
    mask = torch.tensor([[True, True, False]])
    assert energy_loss(a, y, mask, mask).item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_energy_is_unbiased(shift):
    # E|X - Y| of normals at distance 1, minus the mean distances within (2 / sqrt(pi) each)
    across = 2 / math.sqrt(math.pi) * math.exp(-1 / 4) + math.erf(1 / 2)
    expected = 2 * across - 4 / math.sqrt(math.pi) if shift else 0.0
    a, y = gaussian_sets(4000, 16, 0.0, 1), gaussian_sets(4000, 16, shift, 2)
    loss = energy_loss(a, y, full(4000, 16), full(4000, 16))
    error = loss.std().item() / math.sqrt(4000)
    assert abs(loss.mean().item() - expected) < 3 * error
    assert (loss < 0).any()  # a U-statistic is not clamped


def test_mmd_is_the_u_statistic_of_its_definition():
    a, y = (
        gaussian_sets(3, 7, 0.0, 4).expand(-1, -1, 2),
        gaussian_sets(3, 9, 1.0, 5).expand(-1, -1, 2),
    )
    n, m = [7, 5, 4], [9, 9, 6]
    w, v = torch.arange(7) < torch.tensor(n)[:, None], torch.arange(9) < torch.tensor(m)[:, None]
    loss = mmd_loss(a, y, w, v)
    for i in range(3):
        ai, yi = a[i, : n[i]], y[i, : m[i]]
        between = torch.cdist(yi, yi)[~torch.eye(m[i], dtype=torch.bool)] ** 2
        median = between.median()

        def k(p, q, median=median):
            squared = torch.cdist(p, q) ** 2
            return sum((-squared / (2 * s * median)).exp() for s in (0.5, 1, 2, 4)) / 4

        # the diagonals of the kernels within a set are ones
        within_a = (k(ai, ai).sum() - n[i]) / (n[i] * (n[i] - 1))
        within_y = (k(yi, yi).sum() - m[i]) / (m[i] * (m[i] - 1))
        torch.testing.assert_close(loss[i], within_a + within_y - 2 * k(ai, yi).mean())


def test_mmd_of_equal_laws_is_zero_on_average_and_of_others_not():
    a, y, far = (gaussian_sets(2000, 16, s, i) for s, i in ((0.0, 6), (0.0, 7), (1.0, 8)))
    mask = full(2000, 16)
    equal, different = mmd_loss(a, y, mask, mask), mmd_loss(a, far, mask, mask)
    error = equal.std().item() / math.sqrt(2000)
    # the widths are those of the observed set, which adds a bias of order 1 / n
    assert abs(equal.mean().item()) < 5 * error
    assert different.mean().item() > 50 * error


def test_mmd_of_normals_at_distance_one():
    # Differences within are normal of variance 2: E k = sqrt(h / (h + 2)) for a kernel of width h,
    # and that times exp(-1 / (2 (h + 2))) across. One width of 1 would give .177268.
    a, y = gaussian_sets(60, 256, 0.0, 9), gaussian_sets(60, 256, 1.0, 10)
    mask = full(60, 256)
    loss = mmd_loss(a, y, mask, mask)
    median = 2 * 0.454936  # of the squared difference: chi-squared with one degree of freedom
    expected = 0.0
    for h in (width * median for width in (0.5, 1.0, 2.0, 4.0)):
        expected += 2 / 4 * math.sqrt(h / (h + 2)) * (1 - math.exp(-1 / (2 * (h + 2))))
    assert abs(loss.mean().item() - expected) < 3 * loss.std().item() / math.sqrt(60)


def test_mean_and_point_by_hand():
    a = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [9.0, 9.0]]])
    y = torch.tensor([[[0.0, 0.0], [2.0, 2.0], [4.0, 4.0]]])
    w, v = torch.tensor([[True, True, False]]), full(1, 3)
    # means (2, 3) and (2, 2); the pairs (1, 2)-(0, 0) and (3, 4)-(2, 2)
    assert loss_of("mean", a, y, w, v).item() == pytest.approx(0.5)
    assert loss_of("point", a, y, w, v).item() == pytest.approx((1 + 4 + 1 + 4) / 4)


@pytest.mark.parametrize("name", INVARIANT)
def test_order_of_cells_does_not_matter(name):
    a, y = cells(2, 7, 5, seed=1), cells(2, 6, 5, seed=2)
    w, v = full(2, 7), full(2, 6)
    loss = loss_of(name, a, y, w, v)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(loss_of(name, a[:, order], y.flip(1), w, v), loss)


@pytest.mark.parametrize(
    "name", [n for n in NAMES if n != "mmd"]
)  # its width is the observed set's
def test_symmetric(name):
    a, y = cells(2, 7, 5, seed=1), cells(2, 7, 5, seed=2)
    w, v = full(2, 7), full(2, 7)
    torch.testing.assert_close(loss_of(name, a, y, w, v), loss_of(name, y, a, v, w))


@pytest.mark.parametrize("name", NAMES)
def test_padding_changes_nothing(name):
    a, y = cells(2, 7, 5, seed=1), cells(2, 7, 5, seed=2)
    w, v = torch.arange(7).expand(2, 7) < 5, torch.arange(7).expand(2, 7) < 5
    short = loss_of(name, a[:, :5], y[:, :5], w[:, :5], v[:, :5])
    assert torch.equal(loss_of(name, a, y, w, v), loss_of(name, a + 9.0 * ~w[..., None], y, w, v))
    torch.testing.assert_close(loss_of(name, a, y, w, v), short, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_gradient_against_finite_differences(name):
    a = cells(2, 5, 4, seed=1).double().requires_grad_()
    y = cells(2, 5, 4, seed=2).double()
    w, v = torch.arange(5).expand(2, 5) < 4, torch.arange(5).expand(2, 5) < 5
    assert torch.autograd.gradcheck(lambda x: loss_of(name, x, y, w, v), a)


def test_squared_distances_are_those_of_the_differences():
    a, y = cells(2, 5, 4, seed=1).double(), cells(2, 6, 4, seed=2).double()
    w, v = torch.arange(5).expand(2, 5) < 4, torch.arange(6).expand(2, 6) < 5
    sets = SetDistances.between(a, y, w, v)
    for table, p, q in (
        (sets.across_BST, a, y),
        (sets.predicted_BSS, a, a),
        (sets.observed_BTT, y, y),
    ):
        squared = (p[:, :, None] - q[:, None]).square().sum(-1)
        torch.testing.assert_close(table, squared, atol=1e-12, rtol=1e-12)


def test_gradient_of_squared_distances():
    # no table is masked: any function of the distances has its gradient
    a = cells(2, 5, 4, seed=1).double().requires_grad_()
    y = cells(2, 6, 4, seed=2).double()

    def tables(x):
        sets = SetDistances.between(x, y, full(2, 5), full(2, 6))
        return sets.across_BST.sin(), (1 + sets.predicted_BSS).log()

    assert torch.autograd.gradcheck(tables, a)


@pytest.mark.parametrize("name", NAMES)
def test_gradient_is_finite_where_cells_coincide(name):
    a = torch.zeros(1, 6, 5)
    a[:, 3:] = 1.0  # three equal cells twice, equal to observed ones too
    a.requires_grad_()
    mask = torch.arange(6)[None] < 5
    loss_of(name, a, a.detach().clone(), mask, mask).sum().backward()
    assert torch.isfinite(a.grad).all()
    assert (a.grad[:, 5] == 0).all()


def test_distances_keep_their_digits_far_from_zero():
    # 1,000 genes around log1p values of 3: the products alone would lose 4 of 7 digits.
    generator = torch.Generator().manual_seed(0)
    a = 3 + 0.1 * torch.randn(1, 32, 1000, generator=generator, dtype=torch.float64)
    y = 3 + 0.1 * torch.randn(1, 32, 1000, generator=generator, dtype=torch.float64)
    mask = full(1, 32)
    exact = energy_loss(a, y, mask, mask).item()
    assert energy_loss(a.float(), y.float(), mask, mask).item() == pytest.approx(exact, abs=1e-6)
