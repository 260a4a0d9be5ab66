"""Layers over the cells of a set, how cells are shared out over ranks, and initial weights by name.

Megatron's blocks want the cells first; the transposition happens here and nowhere else.

Shapes: B = sets in the batch, S = cells per set (of this rank where ranks share the cells),
R = rows of a message between pipeline stages, D = width, G = genes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor, nn

from scale.draws import derive
from scale.model.backend import (
    RMSNorm,
    TransformerConfig,
    TransformerLayer,
    build_block,
    copy_to_tensor_model_parallel_region,
    first_layer,
    gather_from_sequence_parallel_region,
    tensor_parallel_rank,
    tensor_parallel_size,
)
from scale.model.functions import swiglu

NUM_MODULATIONS = 6
"""Shift, scale and gate of the attention, then of the feed-forward part."""

NUM_MESSAGE_ROWS = NUM_MODULATIONS + 1
"""Rows of a message between pipeline stages before its cells: the condition and the mask."""

# Of maps; rows of tables have deviation 1. At gain 1 what cells have in common drowns the
# perturbation: two simulated screens, tiny, 500 steps, energy distance over the control copy's .72
# and .86 at gain 1, .64 and .74 at .25, .76 on the second at .1.
INITIAL_GAIN = 0.25


class ConditionedLayer(TransformerLayer):  # type: ignore[misc]
    r"""Pre-norm layer whose norms and residual branches are modulated by the condition.

    .. math:: x \mathrel{+}= g_1 \, \mathrm{Attention}(\mathrm{RMSNorm}(x) (1 + a_1) + b_1), \quad
              x \mathrel{+}= g_2 \, \mathrm{SwiGLU}(\mathrm{RMSNorm}(x) (1 + a_2) + b_2)

    The six rows are those of the condition plus a table of the layer (adaLN-single): a matrix per
    layer would hold more than a quarter of the weights. They travel as Megatron's ``context``.
    """

    def __init__(self, config: TransformerConfig, *arguments: Any, **options: Any) -> None:
        super().__init__(config, *arguments, **options)
        table = torch.zeros(NUM_MODULATIONS, config.hidden_size, dtype=config.params_dtype)
        table[2::3] = 1.0  # gates
        self.modulation = constant_start(nn.Parameter(table))
        act_on_own_cells([self.modulation])

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        context: Tensor | None = None,
        **_: object,
    ) -> tuple[Tensor, Tensor | None]:
        """Return new cells [S, B, D] and the condition [B, 6, D], unchanged, for the next layer."""
        assert context is not None, "a conditioned layer needs the modulation"
        rows_B6D = (context + self.modulation).to(hidden_states.dtype)
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = rows_B6D.unbind(1)
        x_SBD = hidden_states
        normal_SBD = _modulated(self.input_layernorm, x_SBD, scale_1, shift_1)
        attended_SBD, _bias = self.self_attention(normal_SBD, attention_mask=attention_mask)
        x_SBD = torch.addcmul(x_SBD, gate_1, attended_SBD)
        return self._feed(x_SBD, shift_2, scale_2, gate_2), context

    def _feed(self, x_SBD: Tensor, shift_BD: Tensor, scale_BD: Tensor, gate_BD: Tensor) -> Tensor:
        """Return the cells after the feed-forward part."""
        fed_SBD, _bias = self.mlp(_modulated(self.pre_mlp_layernorm, x_SBD, scale_BD, shift_BD))
        return torch.addcmul(x_SBD, gate_BD, fed_SBD)


def _modulated(norm: nn.Module, x_SBD: Tensor, scale_BD: Tensor, shift_BD: Tensor) -> Tensor:
    if isinstance(norm, RMSNorm):
        return norm.modulated(x_SBD, scale_BD, shift_BD)
    return torch.addcmul(shift_BD, norm(x_SBD), 1 + scale_BD)  # Transformer Engine's


class LoneCellLayer(ConditionedLayer):
    """A conditioned layer without attention: no cell sees another one."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        context: Tensor | None = None,
        **_: object,
    ) -> tuple[Tensor, Tensor | None]:
        """Return new cells [S, B, D] and the condition [B, 6, D], unchanged, for the next layer."""
        assert context is not None, "a conditioned layer needs the modulation"
        rows_B6D = (context + self.modulation).to(hidden_states.dtype)
        return self._feed(hidden_states, *rows_B6D[:, 3:].unbind(1)), context


@dataclass(frozen=True, slots=True)
class CellsInBlocks:
    """Cells between two set blocks, with what each block needs beside them.

    Parameters
    ----------
    x_SBD
        This rank's cells.
    modulation_B6D
        The condition, for this rank's cells.
    mask_BS
        True for real cells, of the whole set; None where all are real, which keeps the fast
        attention kernels.
    """

    x_SBD: Tensor
    modulation_B6D: Tensor
    mask_BS: Tensor | None

    @classmethod
    def enter(cls, x_BSD: Tensor, modulation_B6D: Tensor, mask_BS: Tensor | None) -> CellsInBlocks:
        """Return encoded cells before the first block.

        The condition is equal on all ranks that share cells; its gradient is summed over them here,
        once for the blocks of all pipeline stages.
        """
        x_SBD = x_BSD.transpose(0, 1).contiguous()
        return cls(x_SBD, spread_over_cells(modulation_B6D), mask_BS)

    @property
    def x_BSD(self) -> Tensor:
        """Cells of this rank, set by set."""
        return self.x_SBD.transpose(0, 1)

    def message(self, dtype: torch.dtype) -> Tensor:
        """Return all of it in one tensor [R, B, D], as Megatron sends it to the next stage.

        Six rows are the condition, one is the mask of the whole set, the others are cells.
        """
        _, num_sets, width = self.x_SBD.shape
        mask_BD = self.x_SBD.new_ones(num_sets, width)
        if self.mask_BS is not None:
            mask_BD[:, : self.mask_BS.shape[1]] = self.mask_BS.to(mask_BD.dtype)
        rows = (self.modulation_B6D.transpose(0, 1), mask_BD[None], self.x_SBD)
        return torch.cat([row.to(dtype) for row in rows])

    @classmethod
    def of_message(cls, message_RBD: Tensor, *, is_full: bool) -> CellsInBlocks:
        """Return what an earlier stage sent.

        Parameters
        ----------
        message_RBD
            See :meth:`message`.
        is_full
            Whether all cells of all sets are real.
        """
        x_SBD = message_RBD[NUM_MESSAGE_ROWS:]
        modulation_B6D = message_RBD[:NUM_MODULATIONS].transpose(0, 1)
        if modulation_B6D.dtype == torch.bfloat16:
            modulation_B6D = modulation_B6D.float()  # layers add to it and sum its gradient
        mask_BS = None
        if not is_full:
            set_size = len(x_SBD) * tensor_parallel_size()
            mask_BS = message_RBD[NUM_MODULATIONS, :, :set_size] > 0.5
        return cls(x_SBD, modulation_B6D, mask_BS)


class SetBlocks(nn.Module):
    """The conditioned layers of this rank's stage: bidirectional, without positions."""

    def __init__(self, config: TransformerConfig, provider: Any, *, attends: bool = True) -> None:
        super().__init__()
        self.config = config
        layer = ConditionedLayer if attends else LoneCellLayer
        self.stack = build_block(config, provider, layer, attends=attends)
        self.first_layer = first_layer(config)

    def forward(self, cells: CellsInBlocks) -> CellsInBlocks:
        """Return the cells after these layers; the last stage normalises them."""
        mask_BS = cells.mask_BS
        x_SBD = self.stack(
            cells.x_SBD,
            attention_mask=None if mask_BS is None else ~mask_BS[:, None, None, :],
            context=cells.modulation_B6D,
        )
        return CellsInBlocks(x_SBD, cells.modulation_B6D, mask_BS)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None
    ) -> dict[str, Any]:
        """Return the stack's own sharded state."""
        state: dict[str, Any] = self.stack.sharded_state_dict(
            f"{prefix}stack.", sharded_offsets, metadata
        )
        return state


class Readout(nn.Module):
    """Cells of the set blocks -> change of expression; starts at zero.

    Parameters
    ----------
    hidden_size
        Width of a cell, D.
    ffn_hidden_size
        Width of the SwiGLU, or None for one linear map.
    num_genes
        Outputs, G.
    dtype
        Of the weights.
    """

    def __init__(
        self, hidden_size: int, ffn_hidden_size: int | None, num_genes: int, dtype: torch.dtype
    ) -> None:
        super().__init__()
        width = hidden_size if ffn_hidden_size is None else ffn_hidden_size
        self.gate_and_up = (
            None
            if ffn_hidden_size is None
            else nn.Linear(hidden_size, 2 * ffn_hidden_size, bias=False, dtype=dtype)
        )
        self.genes = nn.Linear(width, num_genes, dtype=dtype)
        for parameter in self.genes.parameters():
            constant_start(parameter)
            nn.init.zeros_(parameter)
        act_on_own_cells(self.parameters())

    def forward(self, x_BSD: Tensor) -> Tensor:
        """Return the change per gene in the dtype of the weights."""
        if self.gate_and_up is not None:
            x_BSD = swiglu(self.gate_and_up(x_BSD))
        change_BSG: Tensor = self.genes(x_BSD)
        return change_BSG


# --- cells shared by tensor parallel ranks -------------------------------------------------------


def own_cells(x_BS: Tensor) -> Tensor:
    """Return this rank's share of the cells (dimension 1)."""
    size = tensor_parallel_size()
    if size == 1:
        return x_BS
    if x_BS.shape[1] % size:
        raise ValueError(
            f"a set of {x_BS.shape[1]} cells cannot be shared by {size} ranks; add padding"
        )
    share = x_BS.shape[1] // size
    return x_BS.narrow(1, tensor_parallel_rank() * share, share)


def gather_cells(x_BSG: Tensor) -> Tensor:
    """Return the cells of all ranks that share a set; each rank's gradient is its own share.

    The loss is the same on each of these ranks, so the gradient is cut and not summed.
    """
    if tensor_parallel_size() == 1:
        return x_BSG
    gathered_SBG: Tensor = gather_from_sequence_parallel_region(
        x_BSG.transpose(0, 1).contiguous(), tensor_parallel_output_grad=False
    )
    return gathered_SBG.transpose(0, 1)


def spread_over_cells(x: Tensor) -> Tensor:
    """Return a value that all ranks have and each uses for its own cells; gradients are summed."""
    if tensor_parallel_size() == 1:
        return x
    spread: Tensor = copy_to_tensor_model_parallel_region(x)
    if spread.requires_grad:
        # Megatron sums a gradient in place, and loses the sum of one that is not contiguous (as of
        # a condition that a later pipeline stage used).
        spread.register_hook(Tensor.contiguous)  # type: ignore[no-untyped-call]
    return spread


def act_on_own_cells(parameters: Iterable[nn.Parameter]) -> None:
    """Mark weights that every rank holds whole and applies to its own cells.

    Megatron then sums their gradients over those ranks, and counts them once in the gradient norm:
    its linear maps call themselves parallel in a group of one, too.
    """
    for parameter in parameters:
        parameter.sequence_parallel = True  # type: ignore[attr-defined]
        parameter.tensor_model_parallel = False  # type: ignore[attr-defined]
        parameter.partition_dim = -1  # type: ignore[attr-defined]
        parameter.partition_stride = 1  # type: ignore[attr-defined]


# --- initial weights by name ----------------------------------------------------------------------


def constant_start(parameter: nn.Parameter) -> nn.Parameter:
    """Mark a parameter that keeps the value it was made with."""
    parameter.starts_constant = True  # type: ignore[attr-defined]
    return parameter


def embedding_start(parameter: nn.Parameter, deviation: float) -> nn.Parameter:
    """Mark a table or seed that starts with a given standard deviation."""
    parameter.initial_deviation = deviation  # type: ignore[attr-defined]
    return parameter


def whole_names(model: nn.Module, first_layer: int) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield each parameter with its name in the model of one process.

    A stage counts its set blocks from 0; ``first_layer`` is the number of its first one.
    """
    for name, parameter in model.named_parameters():
        head, found, tail = name.partition("blocks.stack.layers.")
        if found and not head:
            number, _, rest = tail.partition(".")
            name = f"{found}{first_layer + int(number)}.{rest}"
        yield name, parameter


@torch.no_grad()
def initialise_by_name(
    model: nn.Module, seed: int, num_layers: dict[str, int], first_layer: int = 0
) -> None:
    """Draw every matrix from a generator of its own, keyed by (seed, name).

    The whole matrix is drawn and then cut, so that every layout of ranks starts from the same
    weights. Matrices have standard deviation .25 / sqrt(inputs); output projections of a stack of
    L layers are divided by sqrt(2 L), so that depth does not add to the growth.

    Parameters
    ----------
    model
        Norms, biases and what :func:`constant_start` marked keep their values.
    seed
        Of the run.
    num_layers
        Layers, of all stages, by the prefix of a stack's names.
    first_layer
        Number of the first set block of this stage.
    """
    for name, parameter in whole_names(model, first_layer):
        if parameter.ndim < 2 or getattr(parameter, "starts_constant", False):
            continue
        deviation = getattr(parameter, "initial_deviation", None)
        if deviation is None:
            deviation = INITIAL_GAIN / math.sqrt(_inputs(parameter))
        if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
            layers = next(n for prefix, n in num_layers.items() if name.startswith(prefix))
            deviation /= math.sqrt(2 * layers)
        parameter.copy_(draw_by_name(name, parameter, seed).mul_(deviation))


def _inputs(parameter: nn.Parameter) -> int:
    """Return the inputs of a map [outputs, inputs], or of one per patch [T, inputs, width]."""
    size = int(parameter.shape[1])
    is_cut = getattr(parameter, "tensor_model_parallel", False)
    if is_cut and getattr(parameter, "partition_dim", -1) == 1:
        size *= tensor_parallel_size()
    return size


def draw_by_name(name: str, parameter: nn.Parameter, seed: int) -> Tensor:
    """Return this rank's share of standard normal numbers that depend on seed and name alone."""
    word = int.from_bytes(sha256(name.encode()).digest()[:8], "little")
    generator = torch.Generator().manual_seed(derive(seed, word) >> 1)
    shape = list(parameter.shape)
    size = tensor_parallel_size()
    if size == 1 or not getattr(parameter, "tensor_model_parallel", False):
        return torch.randn(shape, generator=generator)
    dim = parameter.partition_dim  # type: ignore[attr-defined]
    stride = parameter.partition_stride  # type: ignore[attr-defined]
    shape[dim] *= size
    whole = torch.randn(shape, generator=generator)
    # SwiGLU keeps gate and up halves on each rank (stride 2): each half is cut by itself.
    pieces = [part.chunk(size, dim)[tensor_parallel_rank()] for part in whole.chunk(stride, dim)]
    return torch.cat(pieces, dim)
