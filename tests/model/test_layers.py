"""Set blocks, encoder and initial weights against independent definitions."""

import logging
import math

import pytest
import torch
import torch.nn.functional as F
from example_sets import G, S, build, cells, shake, sizes

from scale.config import Backend, Precision
from scale.model.backend import RMSNorm, SDPACoreAttention, block_config, choose_provider
from scale.model.encoder import PopulationSummary
from scale.model.layers import CellsInBlocks, draw_by_name


def double(model):
    return model.double().eval()


def rms_norm(x, weight):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def plain_attention(x, weights, prefix, num_heads, mask):
    """Softmax attention written out; Megatron keeps q, k and v of a head together."""
    qkv = x @ weights[f"{prefix}.linear_qkv.weight"].T
    q, k, v = qkv.unflatten(-1, (num_heads, 3, -1)).unbind(-2)
    if f"{prefix}.q_layernorm.weight" in weights:
        q = rms_norm(q, weights[f"{prefix}.q_layernorm.weight"])
        k = rms_norm(k, weights[f"{prefix}.k_layernorm.weight"])
    scores = torch.einsum("bihe,bjhe->bhij", q, k) / math.sqrt(q.shape[-1])
    scores = scores.masked_fill(~mask[:, None, None, :], -torch.inf)
    mixed = torch.einsum("bhij,bjhe->bihe", scores.softmax(-1), v).flatten(2)
    return mixed @ weights[f"{prefix}.linear_proj.weight"].T


def plain_swiglu(x, weights, prefix):
    gate, up = (x @ weights[f"{prefix}.linear_fc1.weight"].T).chunk(2, -1)
    return (gate * gate.sigmoid() * up) @ weights[f"{prefix}.linear_fc2.weight"].T


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("is_full", [False, True])
def test_set_blocks_equal_plain_torch(qk_norm, is_full):
    model = double(shake(build(sizes(qk_norm=qk_norm))))
    weights = {k.removeprefix("blocks.stack."): v for k, v in model.named_parameters()}
    x = cells(3, S, 16, seed=1).double()
    modulation = cells(3, 6, 16, seed=2).double() - 0.3
    mask = torch.ones(3, S, dtype=torch.bool)
    if not is_full:
        mask[1, 5:] = False
    found = model.blocks(CellsInBlocks.enter(x, modulation, None if is_full else mask)).x_BSD
    for layer in range(2):
        p = f"layers.{layer}."
        rows = (modulation + weights[p + "modulation"])[:, :, None, :]
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = rows.unbind(1)
        normal = rms_norm(x, weights[p + "input_layernorm.weight"]) * (1 + scale_1) + shift_1
        x = x + gate_1 * plain_attention(normal, weights, p + "self_attention", 2, mask)
        normal = rms_norm(x, weights[p + "pre_mlp_layernorm.weight"]) * (1 + scale_2) + shift_2
        x = x + gate_2 * plain_swiglu(normal, weights, p + "mlp")
    expected = rms_norm(x, weights["final_layernorm.weight"])
    torch.testing.assert_close(found[mask], expected[mask], rtol=1e-10, atol=1e-10)


def test_patch_encoder_equals_plain_torch():
    model = double(shake(build(sizes(gene_layers=2))))
    encoder, weights = model.encoder, dict(model.encoder.named_parameters())
    x = cells(2, 3, G, seed=1).double()
    padded = F.pad(x.view(6, G), (0, 24 - G)).view(6, 4, 6)
    h = torch.einsum("ntp,tpe->nte", padded, weights["patch_TPE"]) + weights["identity_TE"]
    everything = torch.ones(6, 4, dtype=torch.bool)
    for layer in range(2):
        p = f"stack.layers.{layer}."
        normal = rms_norm(h, weights[p + "input_layernorm.weight"])
        h = h + plain_attention(normal, weights, p + "self_attention", 2, everything)
        h = h + plain_swiglu(
            rms_norm(h, weights[p + "pre_mlp_layernorm.weight"]), weights, p + "mlp"
        )
    n = rms_norm(h, weights["stack.final_layernorm.weight"])
    attention = (torch.einsum("re,nte->nrt", weights["seed_RE"], n) / math.sqrt(8)).softmax(-1)
    pooled = torch.einsum("nrt,nte->nre", attention, n).flatten(1)
    expected = (pooled @ weights["out.weight"].T).view(2, 3, 16)
    torch.testing.assert_close(encoder(x), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("gene_layers", [0, 1])
def test_encoder_treats_each_cell_alone(gene_layers):
    encoder = build(sizes(gene_layers=gene_layers)).encoder
    x = cells(2, 5, G, seed=1)
    whole = encoder(x)
    torch.testing.assert_close(encoder(x[:, [3]]), whole[:, [3]], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(encoder(x.flip(1)), whole.flip(1), rtol=1e-5, atol=1e-6)


def test_summary_is_the_mean_of_phi_and_ignores_order_and_padding():
    summary = PopulationSummary(16, torch.float32).double()
    x = cells(2, 6, 16, seed=1).double()
    mask = torch.arange(6) < torch.tensor([[6], [4]])
    found = summary(x, mask, mask)
    for i, n in enumerate((6, 4)):
        mean = summary.cell_2(F.silu(summary.cell_1(x[i, :n]))).mean(0)
        torch.testing.assert_close(found[i], summary.population(F.silu(mean)), rtol=1e-6, atol=1e-6)
    assert torch.equal(summary(x + 7.0 * ~mask[..., None], mask, mask), found)
    mixed = torch.stack([x[0].flip(0), x[1]])
    torch.testing.assert_close(summary(mixed, mask, mask), found)


def test_rms_norm_keeps_statistics_in_float32():
    config = block_config(
        hidden_size=16,
        num_layers=1,
        num_heads=2,
        ffn_hidden_size=24,
        precision=Precision.bf16,
    )
    norm = RMSNorm(config, 16)
    x = (1000 * cells(4, 16, seed=1)).bfloat16()
    expected = rms_norm(x.float(), 1.0)
    assert norm(x).dtype == torch.bfloat16
    torch.testing.assert_close(norm(x).float(), expected, rtol=2**-8, atol=1e-6)


def test_attention_refuses_packed_sequences():
    with pytest.raises(ValueError, match="packed"):
        SDPACoreAttention(None, 1, None, "self")(*[torch.ones(2, 1, 1, 2)] * 3, None, object())


# --- providers and initial weights ----------------------------------------------------------------


def test_the_choice_of_layers_is_logged_with_its_reason(caplog):
    caplog.set_level(logging.INFO, logger="scale.model.backend")
    choose_provider(Backend.auto)
    assert "torch SDPA (transformer_engine" in caplog.text
    with pytest.raises(ValueError, match="model.backend=te, but transformer_engine"):
        choose_provider(Backend.te)


def test_initial_weights_depend_on_seed_and_name_only():
    first, again, other = build(seed=1), build(sizes(num_layers=3), seed=1), build(seed=2)
    layer = "blocks.stack.layers.1.self_attention.linear_qkv.weight"
    weights = dict(first.named_parameters())
    assert torch.equal(weights[layer], dict(again.named_parameters())[layer])
    assert not torch.equal(weights[layer], dict(other.named_parameters())[layer])
    assert not torch.equal(weights[layer], weights[layer.replace("1", "0")])


def test_construction_leaves_the_generator_of_the_caller_alone():
    before = torch.get_rng_state()
    build()
    assert torch.equal(torch.get_rng_state(), before)


def test_initial_deviations():
    model = build(sizes(hidden_size=64, num_heads=4, ffn_hidden_size=256, num_layers=8))
    deviation = {n: p.std().item() for n, p in model.named_parameters() if p.numel() > 2000}
    layer = "blocks.stack.layers.3."
    assert deviation[layer + "self_attention.linear_qkv.weight"] == pytest.approx(1 / 32, rel=0.05)
    assert deviation[layer + "mlp.linear_fc1.weight"] == pytest.approx(1 / 32, rel=0.05)
    # output projections: divided by sqrt(2 L) = 4
    projection = deviation[layer + "self_attention.linear_proj.weight"]
    assert projection == pytest.approx(1 / 128, rel=0.05)
    assert deviation[layer + "mlp.linear_fc2.weight"] == pytest.approx(1 / 256, rel=0.05)
    assert deviation["condition.key.weight"] == pytest.approx(1 / 32, rel=0.05)
    assert deviation["condition.modulation.weight"] == 0


def test_draws_of_a_whole_weight():
    parameter = torch.nn.Parameter(torch.zeros(3, 4))
    assert torch.equal(draw_by_name("a", parameter, 1), draw_by_name("a", parameter, 1))
    assert not torch.equal(draw_by_name("a", parameter, 1), draw_by_name("b", parameter, 1))
