"""Learning rate, groups of weight decay, moving average."""

import math

import numpy as np
import pytest
import torch
from ranks import RankContext, run_ranks
from torch import nn

from scale.train.optim import MovingAverage, decayed_parameters, learning_rate


def rate(step, **changes):
    settings = {"peak": 3e-4, "warmup_steps": 100, "max_steps": 1000, "final_fraction": 0.1}
    return learning_rate(step, **(settings | changes))


def test_rate_rises_linearly_and_falls_by_a_cosine():
    assert rate(1) == pytest.approx(3e-6)
    assert rate(50) == pytest.approx(1.5e-4)
    assert rate(100) == 3e-4
    assert rate(550) == pytest.approx(3e-4 * (0.1 + 0.9 / 2))
    assert rate(1000) == pytest.approx(3e-5)
    assert rate(2000) == pytest.approx(3e-5)
    falling = [rate(n) for n in range(100, 1001)]
    assert falling == sorted(falling, reverse=True)


def test_rate_of_short_runs_is_finite():
    assert rate(5, max_steps=5) == 3e-4
    assert rate(1, max_steps=1, warmup_steps=0) == pytest.approx(3e-5)
    assert all(math.isfinite(rate(n, max_steps=100)) for n in range(1, 102))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 4)
        self.norm = nn.LayerNorm(4)
        self.names = nn.Embedding(5, 4)
        self.modulation = nn.Parameter(torch.zeros(6, 4))
        self.patch = nn.Parameter(torch.zeros(2, 4, 3))


def test_decay_is_for_matrices_only():
    assert decayed_parameters(nn.Sequential(Block())) == {"0.linear.weight", "0.patch"}


def test_average_has_its_closed_form():
    model = nn.Linear(2, 1, bias=False)
    average = MovingAverage(model, decay=0.5)
    expected = model.weight.detach().double()
    with torch.no_grad():
        model.weight.fill_(0.0)
    # beta is 1/10, 2/11, ..., and 0.5 from n = 8 on.
    factor = 1.0
    for n in range(20):
        average.update(n)
        factor *= min(0.5, (1 + n) / (10 + n))
    torch.testing.assert_close(
        average.weights["weight"].double(), expected * factor, rtol=1e-5, atol=0
    )


def test_applied_average_leaves_the_bits_of_the_weights():
    torch.manual_seed(0)
    model = nn.Linear(7, 5).to(torch.bfloat16)
    average = MovingAverage(model, decay=0.999)
    before = model.weight.detach().clone()
    with torch.no_grad():
        model.weight.mul_(1.5)
    own = model.weight.detach().clone()
    with average.applied():
        assert torch.equal(model.weight, before)
    assert torch.equal(model.weight, own)
    assert average.weights["weight"].dtype is torch.float32


def three_updates(context: RankContext):
    """Weights before, the gradients of three steps, weights and average after."""
    from toy_model import OPTIMIZER, ToyModel, micro_batches

    from scale.train.engine import Engine

    def values(tensors):
        return {name: tensor.detach().double().numpy().copy() for name, tensor in tensors}

    with context.layout() as layout:
        model = ToyModel(tensor_size=1)
        engine = Engine(model, layout, OPTIMIZER, lr=1e-2)
        before, gradients = values(model.named_parameters()), []
        for n in range(3):
            sets = micro_batches(n, sets_per_batch=2, sets_per_micro_batch=2, rank=0, size=1)
            engine.gradients(sets)
            gradients.append(values((k, p.main_grad) for k, p in model.named_parameters()))
            engine.step(sets, step=n + 1, lr=1e-2 / (n + 1))
        after, average = values(model.named_parameters()), values(engine.average.weights.items())
        return OPTIMIZER, decayed_parameters(model), before, gradients, after, average


def test_an_update_is_adamw_on_clipped_gradients(tmp_path):
    told = run_ranks(three_updates, 1, tmp_path)[0]
    settings, decayed, weights, gradients, after, average = told
    first, second = settings.betas
    expected_average = dict(weights)
    moments = dict.fromkeys(weights, (0.0, 0.0))
    for n, gradient in enumerate(gradients):
        rate = 1e-2 / (n + 1)
        norm = math.sqrt(sum((g**2).sum() for g in gradient.values()))
        clip = min(1.0, settings.clip_norm / norm)
        for name, g in gradient.items():
            m = first * moments[name][0] + (1 - first) * clip * g
            v = second * moments[name][1] + (1 - second) * (clip * g) ** 2
            moments[name] = m, v
            shrunk = weights[name]
            if name in decayed:
                shrunk = shrunk * (1 - rate * settings.weight_decay)
            change = m / (1 - first ** (n + 1)) / (np.sqrt(v / (1 - second ** (n + 1))) + 1e-8)
            weights[name] = shrunk - rate * change
            beta = min(settings.ema_decay, (1 + n) / (10 + n))
            expected_average[name] = beta * expected_average[name] + (1 - beta) * weights[name]
    assert 0 < len(decayed) < len(weights)
    for name, weight in weights.items():
        # fp32 against float64; a step moves a weight by about 1e-2
        np.testing.assert_allclose(after[name], weight, atol=2e-6, err_msg=name)
        np.testing.assert_allclose(average[name], expected_average[name], atol=2e-6, err_msg=name)


def clipped_twice(context: RankContext, max_norm: float):
    """Norm and gradients after clipping, by this package and by Megatron."""
    from toy_model import OPTIMIZER, ToyModel, micro_batches

    from scale.train.engine import Engine
    from scale.train.optim import clip_gradients

    told = []
    with context.layout(tensor_size=2) as layout:
        model = ToyModel(tensor_size=2)
        engine = Engine(model, layout, OPTIMIZER, lr=1e-2)
        for is_own in (True, False):
            engine.gradients(
                micro_batches(0, sets_per_batch=2, sets_per_micro_batch=2, rank=0, size=1)
            )
            engine.optimizer.prepare_grads()
            clip = engine.optimizer
            norm = clip_gradients(clip, max_norm) if is_own else clip.clip_grad_norm(max_norm)
            told.append((norm, [p.main_grad.numpy().copy() for p in model.parameters()]))
    return told


@pytest.mark.parametrize("max_norm", [0.05, 1e6])
def test_clipping_is_megatrons(tmp_path, max_norm):
    # ranks of one model have the same norm, and different gradients of what is cut
    norms = set()
    for (norm, own), (expected, theirs) in run_ranks(clipped_twice, 2, tmp_path, max_norm):
        assert norm == pytest.approx(expected, rel=1e-6)
        for a, b in zip(own, theirs, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6)
        norms.add(norm)
    assert len(norms) == 1
