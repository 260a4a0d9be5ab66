"""What a training costs: arithmetic against what the device can do, and memory of a rank.

A cell is a treated cell of a set; its control cell and its share of the summary come with it, in
the count of operations too.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, replace

import torch

from scale.config import ModelConfig, Precision
from scale.model.sizes import count_parameters, first_stage_layers
from scale.types import Vocabulary

_CEILING_SIZE = 8192
"""Rows and columns of the matrices: large enough that their product is bound by arithmetic."""
_PRODUCTS = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Accounting:
    """Costs of a model on the ranks of a run.

    Parameters
    ----------
    num_parameters
        Trained parameters over all ranks.
    flops_per_cell
        Floating point operations per treated cell of a training step, three forward passes;
        recomputed activations do not count.
    world_size
        Ranks that share the work.
    ceiling_tflops_per_second
        What the device of a rank reaches in a matrix product, from :func:`measure_ceiling`; None on
        a CPU, where no MFU is told.
    """

    num_parameters: int
    flops_per_cell: float
    world_size: int
    ceiling_tflops_per_second: float | None

    def record(self) -> dict[str, float | None]:
        """Return the figures for run.json."""
        return {
            "parameters": self.num_parameters,
            "flops_per_cell": self.flops_per_cell,
            "ceiling_tflops_per_second": self.ceiling_tflops_per_second,
        }

    def metrics(self, cells_per_second: float) -> dict[str, float]:
        r"""Return the arithmetic of a rank, and the share of what its device can do.

        .. math:: \mathrm{MFU} = \frac{\mathrm{cells/s} \cdot \mathrm{FLOP/cell}}
            {\mathrm{ranks} \cdot \mathrm{ceiling}}

        Examples
        --------
        >>> Accounting(
        ...     num_parameters=1,
        ...     flops_per_cell=2e9,
        ...     world_size=2,
        ...     ceiling_tflops_per_second=400.0,
        ... ).metrics(200_000.0)
        {'train/tflops_per_second': 200.0, 'train/mfu': 0.5}
        """
        reached = cells_per_second * self.flops_per_cell / self.world_size / 1e12
        told = {"train/tflops_per_second": reached}
        if self.ceiling_tflops_per_second is not None:
            told["train/mfu"] = reached / self.ceiling_tflops_per_second
        return told

    def describe(self) -> str:
        """Return the figures in words."""
        text = f"{self.num_parameters:,} parameters, {self.flops_per_cell / 1e6:,.3g} MFLOP"
        text += " per cell and step"
        if self.ceiling_tflops_per_second is None:
            return text
        ceiling = f"{self.ceiling_tflops_per_second:,.0f} TFLOP/s"
        return f"{text}; MFU is told against {ceiling}, measured in a matrix product here"


def measure_ceiling(
    device: torch.device, precision: Precision, *, size: int = _CEILING_SIZE
) -> float:
    """Return the TFLOP/s of a square matrix product: the median of five rounds of ten products.

    Parameters
    ----------
    device
        Where to multiply; of CUDA the peak of memory is set back after.
    precision
        Of the factors; fp32 is full fp32, as in training.
    size
        Rows and columns; three such matrices stand in memory.
    """
    is_cuda = device.type == "cuda"
    dtype = torch.bfloat16 if precision is Precision.bf16 else torch.float32
    left, right, product = (torch.randn(size, size, device=device).to(dtype) for _ in range(3))

    def seconds_of_a_round() -> float:
        started = time.perf_counter()
        for _ in range(_PRODUCTS):
            torch.mm(left, right, out=product)
        if is_cuda:
            torch.cuda.synchronize(device)
        return (time.perf_counter() - started) / _PRODUCTS

    seconds_of_a_round()  # the first one chooses kernels
    seconds = statistics.median(seconds_of_a_round() for _ in range(5))
    if is_cuda:
        del left, right, product
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    return 2 * size**3 / seconds / 1e12


# --- memory -------------------------------------------------------------------------------------


def parameters_per_rank(
    config: ModelConfig, vocabulary: Vocabulary, *, tensor_size: int = 1, num_stages: int = 1
) -> int:
    """Return the trained parameters of the rank that has most of them.

    Parameters
    ----------
    config, vocabulary
        Sizes of the model and its names.
    tensor_size
        Tensor parallel ranks: they share the linear maps of the set blocks, and each has the rest.
    num_stages
        Pipeline stages: the first has encoder and condition, the last the readout.
    """
    width, ffn, genes = config.hidden_size, config.ffn_hidden_size, len(vocabulary.genes)
    total = count_parameters(config, vocabulary)
    layer = count_parameters(replace(config, num_layers=2), vocabulary)
    layer -= count_parameters(replace(config, num_layers=1), vocabulary)
    outside = total - config.num_layers * layer
    shared = (4 * width * width if config.cell_attention else 0) + 3 * width * ffn
    layer -= shared - shared // tensor_size
    if num_stages == 1:
        return outside + config.num_layers * layer
    first = first_stage_layers(config, genes, num_stages)
    later = (config.num_layers - first) // (num_stages - 1)
    readout = 2 * width * ffn + (ffn + 1) * genes if config.gene_layers else (width + 1) * genes
    on_last = readout + width  # with the norm after the last block
    return max(outside - on_last + first * layer, on_last + later * layer)


def state_bytes(num_parameters: int, precision: Precision, *, optimizer_ranks: int = 1) -> float:
    """Return the bytes that a rank holds for its parameters, without activations.

    Weights, gradients (fp32), moving average (fp32), and AdamW: two moments, and in bf16 fp32
    copies of the weights. The condition encoder stays in fp32; it is counted like the rest.

    Parameters
    ----------
    num_parameters
        Of this rank.
    precision
        Of the weights.
    optimizer_ranks
        Data parallel ranks that AdamW's share is spread over (``parallel.distributed_optimizer``).

    Examples
    --------
    >>> state_bytes(1, Precision.fp32), state_bytes(1, Precision.bf16)
    (20.0, 22.0)
    >>> state_bytes(1, Precision.bf16, optimizer_ranks=8)
    11.5
    """
    weight, adamw = (2, 12) if precision is Precision.bf16 else (4, 8)
    return num_parameters * (weight + 4 + 4 + adamw / optimizer_ranks)
