"""Path, time law, pairing and sampler."""

import math

import pytest
import torch
from example_sets import cells
from hypothesis import given, settings
from hypothesis import strategies as st

from scale.config import Head, ObjectiveConfig, Pairing, Prediction, Prior, Space, TimeLaw
from scale.model.flow import (
    PathPoint,
    bound,
    draw_start,
    draw_time,
    endpoint,
    guide,
    integrate,
    interpolate,
    point_on_path,
)
from scale.model.losses import SetDistances, point_loss
from scale.model.pairing import BLOCK_SIZE, pair, pair_by_transport, pair_in_order


def masks(*lengths, size):
    return torch.arange(size) < torch.tensor(lengths)[:, None]


# --- path -----------------------------------------------------------------------------------------


def test_path_begins_at_control_and_ends_at_partner():
    z0, z1 = cells(3, 4, 5, seed=1), cells(3, 4, 5, seed=2)
    z = interpolate(z0, z1, torch.tensor([0.0, 1.0, 0.25]))
    assert torch.equal(z[0], z0[0])
    assert torch.equal(z[1], z1[1])
    torch.testing.assert_close(z[2], 0.75 * z0[2] + 0.25 * z1[2])


def test_sets_at_zero_keep_all_cells_and_others_their_pairs():
    control, treated = masks(4, 4, size=4), masks(2, 2, size=4)
    pairs = pair_in_order(control, treated)
    z = cells(2, 4, 5)
    point = point_on_path(z, control, pairs.partners(z), pairs, torch.tensor([0.0, 0.5]))
    assert point.mask_BS.sum(1).tolist() == [4, 2]


def test_mix_has_its_share_of_zeros_and_is_a_function_of_the_set():
    index = torch.arange(4000)
    objective = ObjectiveConfig(zero_time_fraction=0.5)
    t = draw_time(objective, index, seed=1)
    share = (t == 0).float().mean().item()
    assert abs(share - 0.5) < 3 * math.sqrt(0.25 / 4000)
    later = t[t > 0]
    assert abs(later.mean().item() - 0.5) < 3 * math.sqrt(1 / 12 / len(later))
    assert torch.equal(draw_time(objective, index[1000:1010], seed=1), t[1000:1010])
    assert not torch.equal(draw_time(objective, index, seed=2), t)


def test_other_time_laws():
    index = torch.arange(1000)
    assert (draw_time(ObjectiveConfig(time=TimeLaw.zero), index, 1) == 0).all()
    t = draw_time(ObjectiveConfig(time=TimeLaw.uniform), index, 1)
    assert (t == 0).float().mean() < 0.01
    assert 0 <= t.min() < t.max() < 1


# --- sampler --------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_steps", [1, 2, 5, 10, 50])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-13)])
def test_any_number_of_steps_is_exact_for_the_exact_endpoint(num_steps, dtype, tolerance):
    # Z1 = A Z0 + b, so z_t = ((1 - t) I + t A) z0 + t b, and the endpoint of z_t is known.
    generator = torch.Generator().manual_seed(0)
    A = (torch.eye(5) + 0.3 * torch.randn(5, 5, generator=generator)).to(dtype)
    b = torch.randn(5, generator=generator).to(dtype)
    z0 = torch.randn(2, 7, 5, generator=generator).to(dtype)

    def exact(z, t):
        back = (1 - t) * torch.eye(5, dtype=dtype) + t * A
        return torch.linalg.solve(back, z - t * b, left=False) @ A + b

    z1 = z0 @ A + b
    found = integrate(exact, z0, num_steps)
    assert (found - z1).abs().max() < tolerance * z1.abs().max()


def test_the_last_step_lands_on_the_endpoint():
    target = cells(2, 3, 4, seed=5)
    assert torch.equal(integrate(lambda z, t: target, cells(2, 3, 4), 7), target)


def test_guidance_of_one_is_the_plain_change():
    p, null = cells(2, 3, 4, seed=1) - 0.5, cells(2, 3, 4, seed=2)
    assert torch.equal(guide(p, null, 1.0), p)
    torch.testing.assert_close(guide(p, null, 3.0), null + 3 * (p - null))


def at(z, t):
    return PathPoint(z, torch.ones(z.shape[:2], dtype=torch.bool), torch.as_tensor(t))


def test_heads():
    residual, direct = ObjectiveConfig(), ObjectiveConfig(head=Head.direct)
    change, control, mean = cells(2, 3, 4, seed=1) - 1.0, cells(2, 3, 4, seed=2), cells(4, seed=3)
    nothing = torch.zeros(2, 3, 4)
    assert torch.equal(endpoint(residual, nothing, control, mean, None), control)
    assert torch.equal(endpoint(direct, nothing, control, mean, None), mean.expand(2, 3, 4))
    below = endpoint(residual, change - 5, control, mean, None)
    assert (bound(Space.gene, below) == 0).all()
    assert torch.equal(bound(Space.latent, below), below)


def test_the_endpoint_of_a_velocity_is_that_of_the_straight_path():
    velocity = ObjectiveConfig(prediction=Prediction.velocity)
    z0, z1, t = cells(2, 3, 4, seed=1), cells(2, 3, 4, seed=2), torch.tensor([0.0, 0.7])
    point = at(interpolate(z0, z1, t), t)
    torch.testing.assert_close(endpoint(velocity, z1 - z0, z0, z0[0, 0], point), z1)


@pytest.mark.parametrize("num_steps", [1, 2, 5, 10])
def test_velocities_are_integrated_by_steps_of_euler(num_steps):
    # dz/dt = A z: Euler's steps multiply by I + A / K
    velocity = ObjectiveConfig(prediction=Prediction.velocity)
    z0, A = cells(2, 3, 4, seed=1).double(), 0.5 * cells(4, 4, seed=2).double()

    def end(z, t):
        return endpoint(velocity, z @ A, z0, z0[0, 0], at(z, [t, t]))

    step = torch.linalg.matrix_power(torch.eye(4, dtype=torch.float64) + A / num_steps, num_steps)
    torch.testing.assert_close(integrate(end, z0, num_steps), z0 @ step)


def test_noise_is_a_function_of_set_and_place():
    gaussian, index = ObjectiveConfig(prior=Prior.gaussian), torch.arange(4000)
    noise = draw_start(gaussian, cells(4000, 8, 20), index, seed=1)
    assert abs(noise.mean()) < 3 / math.sqrt(noise.numel())
    assert abs(noise.var() - 1) < 3 * math.sqrt(2 / noise.numel())
    assert abs((noise > 1.959964).float().mean() - 0.025) < 3 * math.sqrt(0.025 / noise.numel())
    # other batches, shorter sets
    assert torch.equal(draw_start(gaussian, cells(3, 5, 20), index[7:10], 1), noise[7:10, :5])
    assert not torch.equal(draw_start(gaussian, cells(4000, 8, 20), index, 2), noise)
    control = cells(3, 8, 20)
    assert draw_start(ObjectiveConfig(), control, index[:3], 1) is control


def test_point_loss_is_the_velocity_loss_times_the_square_of_what_is_left():
    # velocity (h - z_t) / (1 - t) against z1 - z0
    z0, z1, h = (cells(2, 6, 5, seed=i).double() for i in range(3))
    t = torch.tensor([0.25, 0.75], dtype=torch.float64)
    left = (1 - t)[:, None, None]
    velocity = (h - interpolate(z0, z1, t)) / left
    mask = torch.ones(2, 6, dtype=torch.bool)
    pairs = pair_in_order(mask, mask)
    x_loss = point_loss(SetDistances.between(h, z1, mask, mask, pairs))
    v_loss = point_loss(SetDistances.between(velocity, z1 - z0, mask, mask, pairs))
    torch.testing.assert_close(x_loss, (1 - t) ** 2 * v_loss)


# --- pairing --------------------------------------------------------------------------------------

BASIS = torch.linalg.qr(cells(6, 4, seed=7))[0]


def cost(control, treated, pairs):
    gap = (control - pairs.partners(treated)) @ BASIS
    return (gap.square().sum(-1) * pairs.has_partner_BS).sum(1)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 150), st.integers(2, 150), st.integers(0, 99))
def test_pairing_is_one_to_one_and_not_dearer_than_chance(num_control, num_treated, seed):
    size = 150
    control, treated = cells(2, size, 6, seed=seed), cells(2, size, 6, seed=seed + 1)
    w, v = masks(num_control, size, size=size), masks(num_treated, size, size=size)
    pairs = pair_by_transport(control, treated, w, v, BASIS)
    for i, expected in enumerate([min(num_control, num_treated), size]):
        partner = pairs.partner_BS[i, pairs.has_partner_BS[i]]
        assert len(partner) == expected == len(partner.unique())
        assert not pairs.has_partner_BS[i, ~w[i]].any()
        assert v[i, partner].all()
    if num_control == num_treated:
        in_order = pair_in_order(w, v)
        assert (cost(control, treated, pairs) <= cost(control, treated, in_order) + 1e-4).all()


def test_pairing_recovers_a_shuffled_copy():
    control = cells(3, BLOCK_SIZE, 6, seed=1) + cells(3, BLOCK_SIZE, 6, seed=2)
    control[:, :, 0] += torch.arange(BLOCK_SIZE)  # no two alike
    order = torch.randperm(BLOCK_SIZE, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(3, BLOCK_SIZE, dtype=torch.bool)
    all_B = torch.ones(3, dtype=torch.bool)
    pairs = pair(Pairing.ot, control, control[:, order] + 0.5, mask, mask, BASIS, all_B)
    torch.testing.assert_close(pairs.partners(control[:, order]), control)


def test_only_the_sets_that_need_it_are_assigned():
    control, treated = cells(4, 6, 6, seed=1), cells(4, 6, 6, seed=2)
    w, v = masks(6, 5, 6, 4, size=6), masks(6, 6, 3, 6, size=6)
    every = pair_by_transport(control, treated, w, v, BASIS)
    in_order = pair_in_order(w, v)
    needed_B = torch.tensor([True, False, True, False])
    pairs = pair(Pairing.ot, control, treated, w, v, BASIS, needed_B)
    for own, assigned, kept in zip(
        (pairs.partner_BS, pairs.has_partner_BS),
        (every.partner_BS, every.has_partner_BS),
        (in_order.partner_BS, in_order.has_partner_BS),
        strict=True,
    ):
        assert torch.equal(own[needed_B], assigned[needed_B])
        assert torch.equal(own[~needed_B], kept[~needed_B])


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_cell_that_is_not_finite_is_paired_and_reaches_the_loss(value):
    control, treated = cells(2, 5, 6, seed=1), cells(2, 5, 6, seed=2)
    control[1, 3, 0] = value
    mask = torch.ones(2, 5, dtype=torch.bool)
    pairs = pair_by_transport(control, treated, mask, mask, BASIS)
    assert pairs.has_partner_BS.all()
    assert pairs.partner_BS.sort().values.tolist() == [[0, 1, 2, 3, 4]] * 2
    loss_B = (control - pairs.partners(treated)).square().sum((1, 2))
    assert loss_B.isfinite().tolist() == [True, False]


def test_random_pairing_is_the_order_of_the_draws():
    w, v = masks(5, 3, size=6), masks(4, 6, size=6)
    all_B = torch.ones(2, dtype=torch.bool)
    pairs = pair(Pairing.random, cells(2, 6, 6), cells(2, 6, 6), w, v, BASIS, all_B)
    assert pairs.has_partner_BS.sum(1).tolist() == [4, 3]
    assert (pairs.partner_BS == torch.arange(6)).all()
