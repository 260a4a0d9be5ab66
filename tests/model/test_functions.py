"""Functions with gradients of their own against torch's, and products that lose no bits."""

import pytest
import torch
import torch.nn.functional as F

from scale.model import products
from scale.model.functions import attend, rms_norm, swiglu


def numbers(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=dtype)


def test_swiglu_and_its_gradient():
    x = numbers(3, 2, 10).requires_grad_()
    gate, up = x.chunk(2, -1)
    torch.testing.assert_close(swiglu(x), F.silu(gate) * up)
    assert torch.autograd.gradcheck(swiglu, x)


@pytest.mark.parametrize("scale", [1.0, 1e-4])  # the second: as small as epsilon lets it be
def test_rms_norm_and_its_gradient(scale):
    x, weight = (scale * numbers(4, 2, 6)).requires_grad_(), numbers(6, seed=1).requires_grad_()
    torch.testing.assert_close(rms_norm(x, weight, 1e-6), F.rms_norm(x, (6,), weight, 1e-6))
    gradients = [
        torch.autograd.grad(norm.sin().sum(), (x, weight))
        for norm in (rms_norm(x, weight, 1e-6), F.rms_norm(x, (6,), weight, 1e-6))
    ]
    for own, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(own, theirs, rtol=1e-9, atol=1e-9)


def test_a_modulated_norm_and_its_gradient():
    x, weight, shift = numbers(4, 2, 6), numbers(2, 6, seed=1), numbers(2, 6, seed=2)
    inputs = [tensor.requires_grad_() for tensor in (x, weight, shift)]
    expected = shift + weight * F.rms_norm(x, (6,), None, 1e-6)
    torch.testing.assert_close(rms_norm(x, weight, 1e-6, shift), expected)
    assert torch.autograd.gradcheck(lambda x, w, b: rms_norm(x, w, 1e-6, b), inputs)


def test_rms_norm_keeps_statistics_of_bf16_in_float32():
    x, weight = numbers(5, 64, dtype=torch.float32), torch.ones(64)
    exact = rms_norm(x.bfloat16().double(), weight.double(), 1e-6)
    narrow = rms_norm(x.bfloat16(), weight.bfloat16(), 1e-6)
    assert narrow.dtype == torch.bfloat16
    torch.testing.assert_close(narrow, exact.bfloat16(), rtol=2**-8, atol=0)


@pytest.fixture
def onednn():
    products.use_onednn()
    yield products.is_onednn()
    products.stop_onednn()


def test_products_lose_no_bits(onednn):
    for rows, inputs, outputs in ((512, 256, 704), (64, 2000, 256), (7, 33, 5)):
        a = numbers(rows, inputs, dtype=torch.float32)
        b = numbers(outputs, inputs, seed=1, dtype=torch.float32)
        exact = a.double() @ b.double().T
        assert (a @ b.T - exact).abs().max() < 1e-6 * exact.abs().max()


def test_what_torch_was_told_comes_back():
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    products.use_onednn()
    products.use_onednn()
    products.stop_onednn()
    assert matmul.fp32_precision == before
    assert not products.is_onednn()


@pytest.mark.parametrize("size", [8, 24])  # tables are held, and computed again
@pytest.mark.parametrize("is_masked", [False, True])
def test_attention_is_torchs(onednn, is_masked, size):
    inputs = [
        numbers(2, 3, size, 4, seed=i, dtype=torch.float32).requires_grad_() for i in range(3)
    ]
    mask = (torch.arange(size) < size - 2)[None, None, None, :] if is_masked else None
    own = attend(*inputs, mask, None)
    theirs = F.scaled_dot_product_attention(*inputs, attn_mask=mask)
    torch.testing.assert_close(own, theirs)
    gradients = [torch.autograd.grad(out.sin().sum(), inputs) for out in (own, theirs)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)
