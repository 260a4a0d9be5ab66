"""Norm, attention and feed-forward activation of a layer, as the torch provider has them.

Gradients are written out where that takes fewer passes over memory than autograd's.

Shapes: B = sets or patches in the batch, S = cells or tokens, T = those that are read, H = heads,
E = width of a head, F = width of a feed-forward part.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scale.model.products import by_mkl, is_onednn

NORM_EPSILON = 1e-6

NUM_KEPT = 4
"""Tensors of cells by width that attention keeps for its gradient: query, key, value, result."""


def swiglu(gate_and_up: Tensor) -> Tensor:
    r"""Return :math:`\mathrm{SiLU}(g) u` of the two halves [..., 2F] of a map's output.

    Source: Shazeer, GLU variants improve transformer (arXiv 2002.05202).
    """
    out: Tensor = _SwiGLU.apply(gate_and_up)  # type: ignore[no-untyped-call]
    return out


class SwiGLU(nn.Module):
    """:func:`swiglu` as Megatron's feed-forward part wants its activation.

    Megatron's own adds an offset of zero, and its gradient is put together of copies.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()

    def forward(self, gate_and_up: Tensor) -> Tensor:
        """Return SiLU(gate) up."""
        return swiglu(gate_and_up)

    def sharded_state_dict(self, *_: object, **__: object) -> dict[str, Any]:
        """Return nothing: there are no weights."""
        return {}


class _SwiGLU(torch.autograd.Function):
    """The gradients of both halves are written into one tensor, where autograd joins two."""

    @staticmethod
    def forward(ctx: Any, gate_and_up: Tensor) -> Tensor:
        gate, up = gate_and_up.chunk(2, dim=-1)
        active = F.silu(gate)
        ctx.save_for_backward(gate_and_up, active)
        return active * up

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gate_and_up, active = ctx.saved_tensors
        gate, up = gate_and_up.chunk(2, dim=-1)
        result = torch.empty_like(gate_and_up)
        to_gate, to_up = result.chunk(2, dim=-1)
        torch.mul(gradient, active, out=to_up)
        torch.ops.aten.silu_backward.grad_input(gradient * up, gate, grad_input=to_gate)
        return result


def rms_norm(x: Tensor, weight: Tensor, epsilon: float, shift: Tensor | None = None) -> Tensor:
    r"""Return :math:`x / \sqrt{\mathrm{mean}(x^2) + \epsilon} \cdot w + b` over the last dimension.

    Statistics are in float32 at least; the result has the dtype of ``x``. Torch has a kernel of its
    own on CUDA, and on a CPU a dozen operations.

    Parameters
    ----------
    x
        Rows to be normalised.
    weight, shift
        Of one row, or of the last dimensions of ``x``; no shift = 0.
    epsilon
        Added to the mean square.
    """
    if x.device.type == "cpu":
        wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
        factors = weight.to(wide.dtype), None if shift is None else shift.to(wide.dtype)
        normal: Tensor = _RMSNorm.apply(wide, *factors, epsilon)  # type: ignore[no-untyped-call]
        return normal.to(x.dtype)
    if weight.ndim == 1:
        normal = F.rms_norm(x, (x.shape[-1],), weight, epsilon)
        return normal if shift is None else normal + shift
    normal = F.rms_norm(x, (x.shape[-1],), None, epsilon)
    return normal * weight if shift is None else torch.addcmul(shift, normal, weight)


class _RMSNorm(torch.autograd.Function):
    """With n = x / rms, the gradient is (g w - n mean(g w n)) / rms: a third of autograd's time."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, shift: Tensor | None, epsilon: float
    ) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        inverse = (length.square_() / x.shape[-1]).add_(epsilon).rsqrt_()
        normal: Tensor = x * inverse
        ctx.save_for_backward(normal, inverse, weight)
        ctx.has_shift = shift is not None
        return normal * weight if shift is None else torch.addcmul(shift, normal, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        normal, inverse, weight = ctx.saved_tensors
        product = gradient * normal
        to_weight = product.sum_to_size(weight.shape)
        to_shift = gradient.sum_to_size(weight.shape) if ctx.has_shift else None
        minus_mean = product.mul_(weight).sum(-1, keepdim=True).div_(-weight.shape[-1])
        to_x = torch.mul(gradient, weight).addcmul_(normal, minus_mean).mul_(inverse)
        return to_x, to_weight, to_shift, None


def attend(
    query_BHSE: Tensor,
    key_BHSE: Tensor,
    value_BHSE: Tensor,
    mask: Tensor | None,
    scale: float | None,
) -> Tensor:
    """Return scaled dot product attention; ``mask`` is True where a key is seen.

    Torch's kernel never holds the tables of keys by queries, and computes them again for their
    gradient. On a CPU whole tables take a fifth less time, so they are held where they are no
    larger than the rest of what attention keeps. For larger ones that kernel multiplies small
    blocks, which takes four times as long by oneDNN as by MKL.
    """
    if query_BHSE.device.type == "cpu":
        width = query_BHSE.shape[-1]
        if key_BHSE.shape[2] <= NUM_KEPT * width:
            factor = 1 / math.sqrt(width) if scale is None else scale
            held: Tensor = _AttentionByTables.apply(query_BHSE, key_BHSE, value_BHSE, mask, factor)  # type: ignore[no-untyped-call]
            return held
        if is_onednn():
            blocked: Tensor = _AttentionByMKL.apply(query_BHSE, key_BHSE, value_BHSE, mask, scale)  # type: ignore[no-untyped-call]
            return blocked
    return F.scaled_dot_product_attention(
        query_BHSE, key_BHSE, value_BHSE, attn_mask=mask, scale=scale
    )


class _AttentionByTables(torch.autograd.Function):
    r"""Attention :math:`P V`, :math:`P = \mathrm{softmax}(c Q K^T)`, by products of all heads.

    With g the gradient of the result and that of the table before its softmax
    :math:`t = P \odot (g V^T - \mathrm{rowsum}(P \odot g V^T))`, those of Q, K and V are
    :math:`c t K`, :math:`c t^T Q` and :math:`P^T g`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query_BHSE: Tensor,
        key_BHSE: Tensor,
        value_BHSE: Tensor,
        mask: Tensor | None,
        scale: float,
    ) -> Tensor:
        # Products of batches that are not contiguous take longer than the copies.
        scaled_BHSE = torch.mul(query_BHSE, scale, out=query_BHSE.new_empty(query_BHSE.shape))
        key_BHTE, value_BHTE = key_BHSE.contiguous(), value_BHSE.contiguous()
        table_BHST = scaled_BHSE @ key_BHTE.mT
        if mask is not None:
            table_BHST.masked_fill_(~mask, -math.inf)
        weight_BHST = table_BHST.softmax(-1)
        ctx.save_for_backward(scaled_BHSE, key_BHTE, value_BHTE, weight_BHST)
        ctx.scale = scale
        return weight_BHST @ value_BHTE

    @staticmethod
    def backward(ctx: Any, gradient_BHSE: Tensor) -> tuple[Tensor | None, ...]:
        scaled_BHSE, key_BHTE, value_BHTE, weight_BHST = ctx.saved_tensors
        gradient_BHSE = gradient_BHSE.contiguous()
        to_value_BHTE = weight_BHST.mT @ gradient_BHSE
        to_weight_BHST = gradient_BHSE @ value_BHTE.mT
        to_table_BHST = torch._softmax_backward_data(
            to_weight_BHST, weight_BHST, -1, weight_BHST.dtype
        )
        to_query_BHSE = (to_table_BHST @ key_BHTE).mul_(ctx.scale)
        return to_query_BHSE, to_table_BHST.mT @ scaled_BHSE, to_value_BHTE, None, None


class _AttentionByMKL(torch.autograd.Function):
    """Attention whose forward and backward passes are each computed by MKL."""

    @staticmethod
    def forward(
        ctx: Any,
        query_BHSE: Tensor,
        key_BHSE: Tensor,
        value_BHSE: Tensor,
        mask: Tensor | None,
        scale: float | None,
    ) -> Tensor:
        inputs = query_BHSE, key_BHSE, value_BHSE
        needed = ctx.needs_input_grad[:3]
        own = [x.detach().requires_grad_(needs) for x, needs in zip(inputs, needed, strict=True)]
        with torch.enable_grad(), by_mkl():
            attended_BHSE = F.scaled_dot_product_attention(
                own[0], own[1], own[2], attn_mask=mask, scale=scale
            )
        ctx.inputs, ctx.attended_BHSE = own, attended_BHSE
        return attended_BHSE.detach()

    @staticmethod
    def backward(ctx: Any, gradient_BHSE: Tensor) -> tuple[Tensor | None, ...]:
        wanted = [x for x in ctx.inputs if x.requires_grad]
        with by_mkl():
            found = iter(torch.autograd.grad(ctx.attended_BHSE, wanted, gradient_BHSE))
        return (*(next(found) if x.requires_grad else None for x in ctx.inputs), None, None)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension, statistics in float32 at least.

    Megatron's own torch norm ignores ``params_dtype`` and refuses sequence parallelism.
    """

    def __init__(
        self, config: Any, hidden_size: int, eps: float = NORM_EPSILON, **_: object
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        # Read by Megatron, which then sums the gradient over ranks that hold different cells.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """Return x / rms(x) * weight in the dtype of ``x``."""
        return rms_norm(x, self.weight, self.eps)

    def modulated(self, x_SBD: Tensor, scale_BD: Tensor, shift_BD: Tensor) -> Tensor:
        """Return x / rms(x) * weight * (1 + scale) + shift."""
        return rms_norm(x_SBD, self.weight * (1 + scale_BD), self.eps, shift_BD)


class SDPACoreAttention(nn.Module):
    """Bidirectional attention by torch's scaled dot product attention, for Megatron's attention.

    Megatron's own torch attention materialises the scores: 2.5 times the memory at 1,024 cells.
    """

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        softmax_scale: float | None = None,
        **_: object,
    ) -> None:
        super().__init__()
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query_SBHE: Tensor,
        key_SBHE: Tensor,
        value_SBHE: Tensor,
        attention_mask: Tensor | None,
        packed_seq_params: object | None = None,
        **_: object,
    ) -> Tensor:
        """Return attended values [S, B, H E]; ``attention_mask`` is True where a key is hidden."""
        if packed_seq_params is not None:
            raise ValueError("packed sequences are not supported; sets have equal lengths")
        dtype = query_SBHE.dtype
        if dtype == torch.bfloat16 and query_SBHE.device.type == "cpu":
            # On a CPU torch takes twice as long for attention in bf16 as with fp32 inside.
            query_SBHE, key_SBHE, value_SBHE = (
                x_SBHE.float() for x_SBHE in (query_SBHE, key_SBHE, value_SBHE)
            )
        attended_BHSE = attend(
            query_SBHE.permute(1, 2, 0, 3),
            key_SBHE.permute(1, 2, 0, 3),
            value_SBHE.permute(1, 2, 0, 3),
            None if attention_mask is None else ~attention_mask,
            self.softmax_scale,
        )
        return attended_BHSE.permute(2, 0, 1, 3).flatten(2).to(dtype)
