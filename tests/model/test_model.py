"""The whole model: laws of its predictions, its loss, its counts and its state."""

import math
from dataclasses import replace

import pytest
import torch
from example_sets import B, G, S, U, batch, build, cells, in_float64, shake, sizes, take
from torch.utils.flop_counter import FlopCounterMode

from scale.config import Fusion, Head, ObjectiveConfig, Pairing, Precision, TimeLaw
from scale.model.condition import ConditionIds
from scale.model.encoder import LinearEncoder
from scale.model.layers import initialise_by_name
from scale.model.sizes import forward_flops_per_cell

BOTH = pytest.mark.parametrize("gene_layers", [0, 1])


@pytest.fixture(scope="module")
def model(alone):
    return shake(build()).eval()


# --- prediction -----------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("num_steps", [1, 3])
def test_a_fresh_model_returns_the_control_cells(gene_layers, num_steps):
    model = build(sizes(gene_layers=gene_layers))
    sets = batch(control_lengths=[8, 5, 2])
    for guidance in (1.0, 2.0):
        found = model.sample(sets, num_steps=num_steps, guidance=guidance)
        assert torch.equal(found, sets.control_BSG)


def test_a_fresh_direct_head_returns_the_mean_cell_and_learns():
    model = build(objective=ObjectiveConfig(head=Head.direct, whole_counts=False))
    assert torch.equal(model.sample(batch(), num_steps=1)[1, 2], model.mean_G)
    model(batch()).total.backward()
    assert model.readout.genes.weight.grad.abs().max() > 0


def test_a_direct_head_without_a_mean_cell_is_refused():
    model = build(objective=ObjectiveConfig(head=Head.direct), with_statistics=False)
    with pytest.raises(ValueError, match="set_statistics"):
        model(batch())


@BOTH
def test_cells_commute_with_the_model(gene_layers):
    model = shake(build(sizes(gene_layers=gene_layers))).eval()
    sets = batch()
    order = torch.randperm(S, generator=torch.Generator().manual_seed(0))
    mixed = replace(
        sets, control_BSG=sets.control_BSG[:, order], summary_BUG=sets.summary_BUG.flip(1)
    )
    found = model.sample(mixed, num_steps=1)
    expected = model.sample(sets, num_steps=1)[:, order]
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@BOTH
def test_padding_changes_nothing(gene_layers):
    model = shake(build(sizes(gene_layers=gene_layers))).eval()
    sets = batch(control_lengths=[8, 5, 3])
    found = model.sample(sets, num_steps=2)
    hidden = ~sets.control_mask_BS[:, :, None]
    assert (found[hidden.expand_as(found)] == 0).all()
    garbage = replace(
        sets,
        control_BSG=sets.control_BSG + 50.0 * hidden,
        summary_BUG=torch.cat([sets.summary_BUG, cells(B, 2, G, seed=77)], 1),
        summary_mask_BU=torch.arange(U + 2).expand(B, -1) < U,
    )
    torch.testing.assert_close(model.sample(garbage, num_steps=2), found, rtol=0, atol=1e-6)
    short = replace(
        sets,
        control_BSG=sets.control_BSG[:, :5],
        control_mask_BS=sets.control_mask_BS[:, :5],
        treated_BSG=None,
        treated_mask_BS=None,
        control_library_BS=sets.control_library_BS[:, :5],
        treated_library_BS=None,
    )
    torch.testing.assert_close(
        model.sample(short, num_steps=2)[1:], found[1:, :5], rtol=1e-5, atol=1e-5
    )


def test_a_prediction_does_not_see_treated_cells_or_other_sets(model):
    sets = batch(control_lengths=[8, 6, 8])
    found = model.sample(sets, num_steps=3, guidance=1.5)
    blind = replace(sets, treated_BSG=None, treated_mask_BS=None, treated_library_BS=None)
    assert torch.equal(model.sample(blind, num_steps=3, guidance=1.5), found)
    nothing = replace(sets, treated_BSG=torch.full_like(sets.treated_BSG, math.nan))
    assert torch.equal(model.sample(nothing, num_steps=3, guidance=1.5), found)
    alone = take(sets, slice(1, 2))
    torch.testing.assert_close(
        model.sample(alone, num_steps=3, guidance=1.5), found[1:2], rtol=1e-5, atol=1e-5
    )


def test_at_time_zero_the_output_does_not_depend_on_treated_cells():
    objective = ObjectiveConfig(time=TimeLaw.zero, pairing=Pairing.ot, mean_weight=1.0)
    model = shake(build(objective=objective))
    seen = []
    model.readout.register_forward_hook(lambda *call: seen.append(call[-1]))
    sets = batch()
    treated = sets.treated_BSG.clone().requires_grad_()
    model(replace(sets, treated_BSG=treated))
    (gradient,) = torch.autograd.grad(seen[0].sum(), treated, allow_unused=True)
    assert gradient is None or gradient.abs().max() == 0


def test_predictions_are_never_negative_and_guidance_of_one_is_off(model):
    sets = batch()
    plain = model.sample(sets, num_steps=1)
    assert plain.min() >= 0
    assert torch.equal(model.sample(sets, num_steps=1, guidance=1.0), plain)
    assert not torch.allclose(model.sample(sets, num_steps=1, guidance=3.0), plain)


def test_the_perturbation_matters():
    # counts of so few molecules would hide a small change
    model = shake(build(objective=ObjectiveConfig(whole_counts=False))).eval()
    sets = batch()
    other = replace(sets, component_BJ=(sets.component_BJ + 1) % 7)
    difference = model.sample(other, num_steps=1) - model.sample(sets, num_steps=1)
    assert (difference.abs().amax((1, 2)) > 1e-4).all()


def test_steps_that_make_no_sense_are_refused(model):
    with pytest.raises(ValueError, match=r"num_steps \(0\)"):
        model.sample(batch(), num_steps=0)
    zero = build(objective=ObjectiveConfig(time=TimeLaw.zero))
    with pytest.raises(ValueError, match="objective.time=zero"):
        zero.sample(batch(), num_steps=2)


# --- loss -----------------------------------------------------------------------------------------


def test_total_is_the_weighted_sum_of_parts():
    model = shake(build(objective=ObjectiveConfig(mean_weight=0.5, point_weight=0.3)))
    losses = model(batch(control_lengths=[8, 6, 8], treated_lengths=[8, 8, 4]))
    assert losses.num_sets == B
    assert list(losses.parts) == ["energy", "mean", "point"]
    weighted = losses.parts["energy"] + 0.5 * losses.parts["mean"] + 0.3 * losses.parts["point"]
    torch.testing.assert_close(losses.total.detach(), weighted)
    assert not any(part.requires_grad for part in losses.parts.values())


def test_loss_is_the_mean_over_sets_whatever_the_micro_batch():
    model = shake(build())
    sets = batch(num_sets=3)
    parts = [model(take(sets, slice(i, i + 1))).total for i in range(3)]
    torch.testing.assert_close(torch.stack(parts).mean(), model(sets).total)


@BOTH
def test_padded_rows_do_not_reach_the_loss_or_its_gradient(gene_layers):
    model = shake(
        build(sizes(gene_layers=gene_layers), ObjectiveConfig(mean_weight=1.0, mmd_weight=0.5))
    )
    sets = batch(control_lengths=[8, 5, 6], treated_lengths=[4, 8, 6])

    def loss_and_gradient(these):
        model.zero_grad()
        losses = model(these)
        losses.total.backward()
        return losses.total.detach(), [p.grad.clone() for p in model.parameters()]

    loss, gradient = loss_and_gradient(sets)
    garbage = replace(
        sets,
        control_BSG=sets.control_BSG + 5.0 * ~sets.control_mask_BS[..., None],
        treated_BSG=sets.treated_BSG + 5.0 * ~sets.treated_mask_BS[..., None],
    )
    other_loss, other_gradient = loss_and_gradient(garbage)
    torch.testing.assert_close(other_loss, loss, rtol=1e-6, atol=1e-6)
    for one, two in zip(gradient, other_gradient, strict=True):
        torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-5)


def test_every_weight_gets_a_gradient():
    model = shake(build(sizes(gene_layers=1)))
    model(batch()).total.backward()
    silent = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []


@pytest.mark.parametrize("recompute", [False, True])
def test_recompute_calls_blocks_again_for_their_gradient_only(recompute):
    model = build(sizes(gene_layers=1), recompute=recompute)
    calls = []
    for stack in (model.encoder.stack, model.blocks.stack):
        stack.layers[0].register_forward_hook(lambda *_: calls.append(1))
    model(batch()).total.backward()
    # the encoder works on the cells and on the summary
    assert len(calls) == 3 * (1 + recompute)
    calls.clear()
    model.eval().sample(batch(), num_steps=1)
    assert len(calls) == 3


def test_gradient_of_the_whole_model_against_finite_differences():
    model = shake(build(objective=ObjectiveConfig(mean_weight=1.0, mmd_weight=0.3))).double()
    sets = in_float64(batch(control_lengths=[8, 6, 8], treated_lengths=[8, 8, 5]))
    losses = model(sets)
    losses.total.backward()
    generator = torch.Generator().manual_seed(0)
    for name in (
        "encoder.genes.weight",
        "summary.cell_1.weight",
        "condition.component_table",
        "condition.dose_scale.weight",
        "blocks.stack.layers.0.self_attention.linear_qkv.weight",
        "blocks.stack.layers.1.modulation",
        "readout.genes.bias",
    ):
        parameter = dict(model.named_parameters())[name]
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        slope = (parameter.grad * direction).sum()
        with torch.no_grad():
            values = []
            for sign in (1, -1):
                parameter.add_(direction, alpha=sign * 1e-5)
                values.append(model(sets).total)
                parameter.add_(direction, alpha=-sign * 1e-5)
        # a step over the kink of a ReLU would show as 1e-3; the point loss sums over few of them
        torch.testing.assert_close((values[0] - values[1]) / 2e-5, slope, rtol=1e-4, atol=1e-7)


def test_sets_too_small_for_a_distance_are_refused(model):
    with pytest.raises(ValueError, match=r"conditions \[2\] have fewer than 2"):
        model(batch(treated_lengths=[8, 8, 1]))
    with pytest.raises(ValueError, match="no treated cells"):
        model(replace(batch(), treated_BSG=None, treated_mask_BS=None))


def test_the_same_seed_gives_the_same_bits():
    def run():
        model = build(sizes(gene_layers=1))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for i in range(3):
            optimizer.zero_grad()
            losses = model(batch(first_set=i * B))
            losses.total.backward()
            optimizer.step()
        return losses.total.item()

    assert run() == run()


def test_training_lowers_the_loss():
    model = build(objective=ObjectiveConfig(pairing=Pairing.ot))
    sets = batch()
    shifted = replace(sets, treated_BSG=sets.control_BSG + 0.5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    history = []
    for _ in range(30):
        optimizer.zero_grad()
        losses = model(shifted)
        losses.total.backward()
        optimizer.step()
        history.append(losses.total.item())
    assert history[-1] < 0.3 * history[0]


def test_bf16_is_near_fp32():
    exact = shake(build(sizes(gene_layers=1)))
    rounded = shake(build(sizes(gene_layers=1), precision=Precision.bf16))
    assert rounded.readout.genes.weight.dtype == torch.bfloat16
    assert rounded.condition.time[0].weight.dtype == torch.float32
    sets = batch(control_lengths=[8, 6, 8])
    one, two = exact(sets), rounded(sets)
    assert two.total.dtype == torch.float32
    torch.testing.assert_close(two.total, one.total, rtol=2e-2, atol=1e-3)
    two.total.backward()
    assert all(torch.isfinite(p.grad).all() for p in rounded.parameters())
    assert rounded.sample(sets, num_steps=1).dtype == torch.float32


# --- counts and state -----------------------------------------------------------------------------


@pytest.mark.parametrize("qk_norm", [False, True])
@BOTH
def test_parameters_are_as_many_as_the_formula_says(gene_layers, qk_norm):
    model = build(sizes(gene_layers=gene_layers, qk_norm=qk_norm))
    assert model.num_parameters() == sum(p.numel() for p in model.parameters())


def test_parameters_of_features_and_of_fusion_by_sum():
    model = build(sizes(fusion=Fusion.sum), with_features=True)
    assert model.num_parameters() == sum(p.numel() for p in model.parameters())


@BOTH
def test_flops_are_as_many_as_the_formula_says(gene_layers):
    # Wide enough that the condition, one vector per set, does not matter beside the cells.
    config = sizes(gene_layers=gene_layers, set_size=64, num_summary_cells=32, num_layers=3)
    model = shake(build(config)).eval()
    sets = batch(num_sets=1, set_size=64)
    sets = replace(
        sets,
        summary_BUG=cells(1, 32, G, seed=1),
        summary_mask_BU=torch.ones(1, 32, dtype=torch.bool),
    )
    ids = ConditionIds.of(sets)
    with torch.no_grad():
        perturbed = model.condition.perturbed(ids)
        whole = count_flops(lambda: model.sample(sets, num_steps=1))
        condition = count_flops(lambda: model.condition.perturbed(ids)) + count_flops(
            lambda: model.condition(ids, perturbed, torch.zeros(1, 16), torch.zeros(1))
        )
    expected = forward_flops_per_cell(config, G)
    # what the formula leaves out: the summary's maps of one row per set
    assert (whole - condition - 4 * 16 * 16) / 64 == pytest.approx(expected, rel=1e-3)
    assert model.flops_per_cell() == 3 * expected


def count_flops(call):
    def attention(query, key, value, *_, **__):
        return 4 * math.prod(query[:3]) * key[2] * value[3]

    name = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    with FlopCounterMode(display=False, custom_mapping={name: attention}) as counter:
        call()
    return counter.get_total_flops()


@BOTH
def test_sharded_state_names_every_weight_once(gene_layers):
    model = build(sizes(gene_layers=gene_layers))
    state = model.sharded_state_dict(metadata={"non_homogeneous_layers": True})
    named = {k for k in state if not k.endswith("_extra_state")}
    assert named == {k for k in model.state_dict() if not k.endswith("_extra_state")}
    assert all(state[k].key == k for k in named if hasattr(state[k], "key"))


def test_statistics_are_kept_with_the_weights():
    model = build()
    other = build(with_statistics=False)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.mean_G, model.mean_G)
    assert torch.equal(other.basis_GP, model.basis_GP)
    assert model.basis_GP[:, 5:].abs().max() == 0
    with pytest.raises(ValueError, match="31 components"):
        model.set_statistics(torch.zeros(G), torch.zeros(G, 31))


# --- speed of the encoder -------------------------------------------------------------------------


def test_a_slower_encoder_starts_as_the_same_map_and_learns_less_in_a_step():
    def step(speed):
        encoder = LinearEncoder(16, 20, torch.float32, speed=speed)
        initialise_by_name(encoder, seed=4, num_layers={})
        x = cells(2, 8, 20)
        before = encoder(x)
        optimizer = torch.optim.Adam(encoder.parameters(), lr=1e-3)
        before.square().sum().backward()
        encoder.genes.bias.grad = None
        optimizer.step()
        return before.detach(), (encoder(x) - before).detach()

    (first, change), (slow, small) = step(1.0), step(1 / 32)
    torch.testing.assert_close(slow, first)
    torch.testing.assert_close(small * 32, change, rtol=1e-3, atol=1e-5)
