"""Paths in the latent space of an autoencoder: what is detached, scaled, drawn and decoded."""

import math
from dataclasses import replace

import pytest
import torch
from example_sets import B, G, S, batch, build, cells, shake, sizes, take

from scale.config import Decoder, Head, ObjectiveConfig, Pairing, Space, TimeLaw
from scale.model.decoders import to_counts
from scale.model.sizes import check_space

COUNTED = 2e4
"""A library at which values of the example are some counts."""
DECODERS = pytest.mark.parametrize("decoder", Decoder)


def paper(**changes):
    values = {
        "space": Space.latent,
        "head": Head.direct,
        "pairing": Pairing.random,
        "time": TimeLaw.uniform,
        "energy_weight": 0.0,
        "mean_weight": 0.0,
        "point_weight": 1.0,
        "latent_size": 5,
        "decoder": Decoder.negative_binomial,
        "reconstruction_weight": 1.0,
        "alignment_weight": 0.5,
        "whole_counts": False,
    }
    return ObjectiveConfig(**values | changes)


def counted(sets):
    library_BS = torch.full(sets.control_mask_BS.shape, COUNTED) * sets.control_mask_BS
    return replace(sets, control_library_BS=library_BS, treated_library_BS=library_BS)


def gradients(model, sets):
    model.zero_grad()
    model(sets).total.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


# --- training -------------------------------------------------------------------------------------


@DECODERS
@pytest.mark.parametrize("gene_layers", [0, 1])
def test_every_weight_gets_a_gradient_and_is_counted(decoder, gene_layers):
    model = shake(build(sizes(gene_layers=gene_layers), paper(decoder=decoder)))
    found = gradients(model, counted(batch()))
    assert found.keys() == dict(model.named_parameters()).keys()
    assert [name for name, gradient in found.items() if not gradient.any()] == []
    assert model.num_parameters() == sum(p.numel() for p in model.parameters())


def test_the_path_does_not_train_the_autoencoder_nor_the_autoencoder_the_path():
    sets = counted(batch(control_lengths=[8, 6, 8]))
    one, hundred, other = (
        gradients(shake(build(objective=paper(**changes))), sets)
        for changes in ({}, {"point_weight": 100.0}, {"reconstruction_weight": 7.0})
    )
    for name, gradient in one.items():
        if name.startswith("latent."):
            torch.testing.assert_close(hundred[name], gradient, rtol=0, atol=0)
        else:
            torch.testing.assert_close(hundred[name], 100 * gradient, rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(other[name], gradient, rtol=0, atol=0)


def test_latent_reference_cells_have_mean_0_and_deviation_1_whatever_the_weights():
    model = shake(build(objective=paper()), 0.5)
    scale = model.latent._scale()
    reference_NZ = model.latent._latent(model.latent.reference_NG[None], *scale)[0]
    torch.testing.assert_close(reference_NZ.mean(0), torch.zeros(5), rtol=0, atol=1e-4)
    torch.testing.assert_close(reference_NZ.std(0), torch.ones(5), rtol=1e-4, atol=0)


def test_loss_is_the_mean_over_sets_whatever_the_micro_batch():
    model = shake(build(objective=paper(energy_weight=1.0)))
    sets = counted(batch(control_lengths=[8, 5, 8], treated_lengths=[7, 8, 4]))
    parts = [model(take(sets, slice(i, i + 1))) for i in range(B)]
    whole = model(sets)
    assert list(whole.parts) == model.loss_names
    torch.testing.assert_close(torch.stack([p.total for p in parts]).mean(), whole.total)


def test_padded_rows_reach_neither_the_loss_nor_a_gradient():
    model = shake(build(objective=paper()))
    sets = counted(batch(control_lengths=[8, 5, 6], treated_lengths=[4, 8, 6]))
    garbage = replace(
        sets,
        control_BSG=sets.control_BSG + 2.0 * ~sets.control_mask_BS[..., None],
        treated_BSG=sets.treated_BSG + 2.0 * ~sets.treated_mask_BS[..., None],
    )
    found = gradients(model, garbage)
    for name, gradient in gradients(model, sets).items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5, msg=name)


def test_training_lowers_both_kinds_of_loss():
    model = build(objective=paper(decoder=Decoder.residual))
    sets = counted(batch())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    history = []
    for _ in range(40):
        optimizer.zero_grad()
        losses = model(sets)
        losses.total.backward()
        optimizer.step()
        history.append(losses.parts)
    for name in ("point", "reconstruction"):
        assert history[-1][name] < 0.7 * history[0][name], name


# --- prediction -----------------------------------------------------------------------------------


def test_the_residual_decoder_begins_at_the_control_cells():
    model = build(objective=paper(decoder=Decoder.residual, head=Head.residual))
    shake(model.latent)
    sets = batch(control_lengths=[8, 5, 2])
    for num_steps in (1, 3):
        found = model.sample(sets, num_steps=num_steps)
        torch.testing.assert_close(found, sets.control_BSG, rtol=0, atol=1e-5)


@DECODERS
def test_a_prediction_depends_on_its_own_set_alone(decoder):
    model = shake(build(objective=paper(decoder=decoder))).eval()
    sets = counted(batch(control_lengths=[8, 6, 8]))
    found = model.sample(sets, num_steps=3, seed=5)
    assert found.min() >= 0
    blind = replace(sets, treated_BSG=torch.full_like(sets.treated_BSG, math.nan))
    assert torch.equal(model.sample(blind, num_steps=3, seed=5), found)
    alone = model.sample(take(sets, slice(1, 2)), num_steps=3, seed=5)
    torch.testing.assert_close(alone, found[1:2], rtol=1e-5, atol=1e-5)
    is_drawn = decoder is Decoder.negative_binomial
    assert torch.equal(model.sample(sets, num_steps=3, seed=6), found) is not is_drawn


def test_drawn_cells_are_whole_counts_of_their_library():
    model = shake(build(objective=paper())).eval()
    sets = counted(batch())
    values = model.sample(sets, num_steps=1)
    counts = to_counts(values, sets.control_library_BS, model.vocabulary)
    share = torch.expm1(values.double()) / model.vocabulary.target_sum
    torch.testing.assert_close(share * COUNTED, counts.double(), rtol=1e-4, atol=1e-4)
    assert counts.max() > 1


# --- what is refused ------------------------------------------------------------------------------


def test_training_without_reference_cells_is_refused():
    model = build(objective=paper(), with_statistics=False)
    with pytest.raises(ValueError, match=r"objective.space=latent .* set_statistics"):
        model(counted(batch()))


def test_pipeline_stages_are_refused():
    check_space(ObjectiveConfig(), num_stages=2)
    check_space(paper(), num_stages=1)
    with pytest.raises(ValueError, match=r"pipeline_model_parallel_size \(2\) .*objective.space"):
        check_space(paper(), num_stages=2)


def test_few_reference_cells_are_repeated():
    model = build(objective=paper(decoder=Decoder.mean), with_statistics=False)
    few = cells(10, G, seed=4)
    model.latent.set_reference(few)
    assert torch.equal(model.latent.reference_NG[10:20], few)
    assert (S, len(model.latent.reference_NG)) == (8, 256)
