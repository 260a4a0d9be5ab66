"""A trained model taken to new names and other genes."""

from dataclasses import replace

import pytest
import torch
from example_sets import B, G, S, batch, build, cells, shake, sizes, vocabulary

from scale.config import Decoder, ObjectiveConfig, Space
from scale.model.model import ScaleModel
from scale.model.resize import extend_state
from scale.types import CheckpointError

BOTH = pytest.mark.parametrize("gene_layers", [0, 1])


# counts are drawn by the place of a gene, which changes
VALUES = ObjectiveConfig(whole_counts=False)


LATENT = ObjectiveConfig(
    space=Space.latent,
    latent_size=5,
    decoder=Decoder.residual,
    reconstruction_weight=1.0,
    whole_counts=False,
)


def fresh(names, gene_layers, objective=VALUES):
    return ScaleModel(sizes(gene_layers=gene_layers), objective, names, seed=11)


def moved(trained, names, gene_layers):
    model = fresh(names, gene_layers, trained.objective)
    state = extend_state(model.state_dict(), trained.state_dict(), vocabulary(), names)
    model.load_state_dict(state)
    return model.eval()


@BOTH
def test_the_same_vocabulary_gives_the_same_model(gene_layers):
    trained = shake(build(sizes(gene_layers=gene_layers), VALUES)).eval()
    model = moved(trained, vocabulary(), gene_layers)
    assert torch.equal(model.sample(batch(), num_steps=1), trained.sample(batch(), num_steps=1))


@BOTH
def test_new_names_start_apart_and_old_ones_stay(gene_layers):
    trained = shake(build(sizes(gene_layers=gene_layers), VALUES)).eval()
    old = vocabulary()
    new = replace(
        old,
        # drugs in another order, one new between them
        components=("<unknown>", "DMSO", "drug3", "new", "drug0", "drug1", "drug2", "drug4"),
        cell_types=(*old.cell_types, "HepG2", "HeLa"),
        batches=(*old.batches, "plate3"),
    )
    model = moved(trained, new, gene_layers)
    before, after = trained.condition, model.condition
    assert torch.equal(after.component_table[:2], before.component_table[:2])
    assert torch.equal(after.component_table[2], before.component_table[5])
    for table in (after.component_table, after.cell_type_table):
        # as far apart as rows are at the start of a training: 2 (rows are normal, 16 wide)
        assert torch.pdist(table.detach()).min() > 2.0
    assert torch.equal(after.batch_table[:3], before.batch_table)
    sets = batch()
    row = torch.tensor([0, 1, 4, 5, 6, 2, 7])
    renamed = replace(
        sets,
        component_BJ=torch.where(
            sets.component_BJ < 0, sets.component_BJ, row[sets.component_BJ.clamp(min=0)]
        ),
    )
    found = model.sample(renamed, num_steps=1)
    torch.testing.assert_close(found, trained.sample(sets, num_steps=1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("objective", [VALUES, LATENT], ids=["gene", "latent"])
def test_genes_move_with_their_names_in_the_linear_encoder(objective):
    trained = shake(build(objective=objective)).eval()
    old = vocabulary()
    order = torch.randperm(G, generator=torch.Generator().manual_seed(0))
    new = replace(old, genes=(*(old.genes[i] for i in order), "geneA", "geneB"))
    model = moved(trained, new, 0)
    sets = batch()

    def reordered(x_BSG):
        return torch.cat([x_BSG[..., order], cells(B, x_BSG.shape[1], 2)], -1)

    found = model.sample(
        replace(
            sets,
            control_BSG=reordered(sets.control_BSG),
            summary_BUG=reordered(sets.summary_BUG),
            treated_BSG=None,
        ),
        num_steps=1,
    )
    # whatever the values of the genes that it did not know
    expected = trained.sample(sets, num_steps=1)[..., order]
    torch.testing.assert_close(found[..., :G], expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(model.mean_G[:G], trained.mean_G[order])


def test_genes_move_with_their_names_in_patches_and_readout():
    trained = shake(build(sizes(gene_layers=1))).eval()
    old = vocabulary()
    # 13 of 20 genes stay, 17 are new: 5 patches of 6 in place of 4
    new = replace(old, genes=(*(f"new{i}" for i in range(17)), *old.genes[7:]))
    start = fresh(new, 1)
    model = moved(trained, new, 1)
    patches, before = model.encoder.patch_TPE.flatten(0, 1), trained.encoder.patch_TPE.flatten(0, 1)
    assert torch.equal(patches[17:30], before[7:20])
    assert (patches[:17] == 0).all()
    assert start.encoder.patch_TPE.flatten(0, 1)[:17].any()
    assert torch.equal(model.encoder.identity_TE[:4], trained.encoder.identity_TE)
    assert torch.equal(model.readout.genes.weight[17:], trained.readout.genes.weight[7:])
    assert (model.readout.genes.weight[:17] == 0).all()
    assert torch.equal(
        model.blocks.stack.layers[0].modulation, trained.blocks.stack.layers[0].modulation
    )
    sets = replace(
        batch(), control_BSG=cells(B, S, 30), summary_BUG=cells(B, 6, 30), treated_BSG=None
    )
    assert torch.equal(
        model.sample(sets, num_steps=1)[..., :17], sets.control_BSG[..., :17]
    )  # new genes stay as in the controls until they are trained


def test_other_sizes_are_refused():
    trained = build(sizes(hidden_size=32))
    model = build()
    with pytest.raises(CheckpointError, match=r"encoder.genes.weight has shape \(32, 20\)"):
        extend_state(model.state_dict(), trained.state_dict(), vocabulary(), vocabulary())
    deeper = build(sizes(num_layers=3))
    with pytest.raises(CheckpointError, match=r"lacks blocks.stack.layers.2"):
        extend_state(deeper.state_dict(), model.state_dict(), vocabulary(), vocabulary())


def test_a_new_name_with_features_starts_as_it_was_predicted():
    drugs = vocabulary()
    old = replace(drugs, feature_blocks=({"size": 3},), described=("new",))
    new = replace(old, components=(*drugs.components, "new"), described=())
    trained, model = (ScaleModel(sizes(), VALUES, names, seed=11) for names in (old, new))
    trained.condition.set_features(cells(len(old.row_of), 3, seed=4) + 0.1)
    shake(trained)
    # the file of the finetune has the new name only; the others come from the checkpoint
    given = torch.zeros(len(new.row_of), 3)
    given[-1] = trained.condition.features.feature_CV[-1]
    model.condition.set_features(given)
    model.load_state_dict(extend_state(model.state_dict(), trained.state_dict(), old, new))
    sets = replace(batch(), component_BJ=torch.tensor([[7, -1], [7, 2], [3, -1]]))
    found, expected = (m.eval().sample(sets, num_steps=1) for m in (model, trained))
    torch.testing.assert_close(found, expected)
