"""Genes hidden in training: their share, where they are hidden, and where never."""

import math
from dataclasses import replace

import pytest
import torch
from example_sets import B, G, batch, build, cells, shake, sizes, take

from scale.config import ObjectiveConfig, Pairing, TimeLaw
from scale.model.masking import draw_visible

HALF = ObjectiveConfig(masked_gene_fraction=0.5)


def test_share_of_hidden_genes():
    fraction, shape = 0.3, (200, 50)
    hidden = ~draw_visible(torch.arange(shape[0]), shape[1], fraction, seed=1)
    # of all, of each gene over the sets, and of each set over the genes
    error = math.sqrt(fraction * (1 - fraction) / hidden.numel())
    assert abs(hidden.float().mean().item() - fraction) < 3 * error
    for axis, count in enumerate(shape):
        deviation = hidden.float().mean(axis).std().item()
        expected = math.sqrt(fraction * (1 - fraction) / count)
        assert deviation == pytest.approx(expected, rel=3 / math.sqrt(2 * shape[1 - axis]))


def test_what_is_hidden_depends_on_seed_and_number_of_the_set_alone():
    index = torch.arange(40) + 10**9
    visible = draw_visible(index, G, 0.5, seed=1)
    assert torch.equal(draw_visible(index[17:20], G, 0.5, seed=1), visible[17:20])
    assert not torch.equal(draw_visible(index, G, 0.5, seed=2), visible)
    assert len(visible.unique(dim=0)) == 40
    assert draw_visible(index, G, 0.0, seed=1).all()


def test_micro_batches_hide_the_same_genes():
    model = shake(build(objective=HALF))
    sets = batch(first_set=5)
    parts = [model(take(sets, slice(i, i + 1))).total for i in range(B)]
    torch.testing.assert_close(torch.stack(parts).mean(), model(sets).total)


@pytest.mark.parametrize("time", [TimeLaw.zero, TimeLaw.uniform])
def test_the_network_does_not_see_hidden_genes_and_the_endpoint_does(time):
    # in the order of the draws: the pairing sees all genes
    objective = replace(HALF, time=time, pairing=Pairing.random)
    model, sets = shake(build(objective=objective)), batch()
    visible = draw_visible(sets.set_index_B, G, 0.5, model.seed)
    seen = []
    model.readout.register_forward_hook(lambda *call: seen.append(call[-1]))

    def loss_with(garbage):
        garbage = garbage[:, None, :] * cells(B, 1, G, seed=5)
        changed = {
            name: getattr(sets, name) + garbage
            for name in ("control_BSG", "summary_BUG", "treated_BSG")
        }
        return model(replace(sets, **changed)).total.item()

    plain = loss_with(torch.zeros(B, G))
    assert loss_with(3.0 * ~visible) != plain
    loss_with(3.0 * visible)
    assert torch.equal(seen[1], seen[0])
    assert not torch.allclose(seen[2], seen[0])


def test_hidden_genes_are_trained_on():
    model, sets = shake(build(objective=HALF)), batch()
    hidden = ~draw_visible(sets.set_index_B, G, 0.5, model.seed)
    never_seen = hidden.all(0)
    assert never_seen.any()
    model(sets).total.backward()
    assert (model.encoder.genes.weight.grad[:, never_seen] == 0).all()
    assert (model.encoder.genes.weight.grad[:, ~never_seen] != 0).any(0).all()
    assert (model.readout.genes.weight.grad != 0).any(1).all()


def test_nothing_is_hidden_outside_training_or_at_zero():
    masked, plain = (shake(build(objective=o)) for o in (HALF, ObjectiveConfig()))
    sets = batch()
    assert masked(sets).total != plain(sets).total
    masked.eval()
    plain.eval()
    assert torch.equal(masked(sets).total, plain(sets).total)
    assert torch.equal(masked.sample(sets, num_steps=2), plain.sample(sets, num_steps=2))
    # with no names hidden either, training sees what validation sees
    named = sizes(condition_dropout=0.0, cell_type_dropout=0.0, batch_dropout=0.0)
    off = shake(build(named, ObjectiveConfig(masked_gene_fraction=0.0)))
    assert torch.equal(off.train()(sets).total, off.eval()(sets).total)


@pytest.mark.parametrize("fraction", [-0.1, 1.0])
def test_a_share_that_leaves_nothing_is_refused(fraction):
    with pytest.raises(ValueError, match=r"masked_gene_fraction \(.*\) must be in \[0, 1\)"):
        ObjectiveConfig(masked_gene_fraction=fraction)
