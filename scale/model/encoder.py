"""A cell's genes -> one vector per cell, and a set of control cells -> one vector.

Both act on each cell alone before the sum over cells, so cells can be spread over ranks freely.

Shapes: B = sets in the batch, S = cells per set, U = cells of the summary draw, N = cells in all,
G = genes, T = gene-patch tokens, P = genes per patch, E = width of a token, R = pooling seeds,
D = width.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scale.config import ModelConfig, Precision
from scale.model.backend import (
    block_config,
    build_block,
    make_sharded_tensors_for_checkpoint,
    pipeline_rank,
    reduce_from_tensor_model_parallel_region,
    tensor_parallel_size,
)
from scale.model.layers import (
    INITIAL_GAIN,
    act_on_own_cells,
    constant_start,
    embedding_start,
)


def gene_ffn_size(gene_hidden_size: int) -> int:
    """Return the SwiGLU width of a gene block: 8/3 of the token's width, rounded up to 64."""
    return math.ceil(gene_hidden_size * 8 / 3 / 64) * 64


GENES_SPEED = 1 / 32
"""How fast a linear map of genes learns what cells look like, beside what perturbations do.

A step of Adam moves each weight as far, and this map has all genes as inputs: at full speed it
learns few contexts by heart before the effects that they share. On two simulated screens of 6 lines
(500 steps of tiny), 1 -> 1/32 took DE overlap from .40 and .51 to .44 and .52, DE precision from
.466 and .482 to .475 and .486; the price is energy distance, from .72 and .77 to .76 and .81.
"""


class LinearEncoder(nn.Module):
    """One linear map to the width of a cell.

    Parameters
    ----------
    hidden_size, num_inputs, dtype
        Width, genes (or numbers of a latent cell), dtype of the weights.
    speed
        Weights start larger by its inverse and are used times it: the same map, that a step of the
        optimizer changes by less.
    """

    def __init__(
        self, hidden_size: int, num_inputs: int, dtype: torch.dtype, *, speed: float = 1.0
    ) -> None:
        super().__init__()
        self.speed = speed
        self.genes = nn.Linear(num_inputs, hidden_size, dtype=dtype)
        nn.init.zeros_(self.genes.bias)
        constant_start(self.genes.bias)
        deviation = INITIAL_GAIN / math.sqrt(num_inputs) / speed
        embedding_start(self.genes.get_parameter("weight"), deviation)
        act_on_own_cells(self.parameters())

    def forward(self, x_BSG: Tensor) -> Tensor:
        """Return one vector per cell."""
        out_BSD = F.linear(x_BSG.to(self.genes.weight.dtype), self.genes.weight)
        return torch.add(self.genes.bias, out_BSD, alpha=self.speed)


class PatchEncoder(nn.Module):
    r"""A transformer over patches of genes inside each cell, pooled by learned seeds.

    .. math:: h_k = W_k x_{patch_k} + e_k, \quad n = \mathrm{Blocks}(h), \quad
              E(x) = W_o \, \mathrm{concat}_r \sum_k \mathrm{softmax}_k(s_r n_k / \sqrt{E}) \, n_k

    Patches have identity vectors, no rotary embedding. One seed would be a bottleneck of the
    token's width, so there are D / E of them.
    """

    def __init__(
        self,
        config: ModelConfig,
        num_genes: int,
        precision: Precision,
        provider: Any,
        *,
        recompute: bool,
    ) -> None:
        super().__init__()
        width, self.patch_size = config.gene_hidden_size, config.gene_patch_size
        self.num_patches = math.ceil(num_genes / self.patch_size)
        self.num_genes = num_genes
        block = block_config(
            hidden_size=width,
            num_layers=config.gene_layers,
            num_heads=config.gene_num_heads,
            ffn_hidden_size=gene_ffn_size(width),
            precision=precision,
            recompute=recompute,
        )
        dtype = block.params_dtype
        shape = (self.num_patches, self.patch_size, width)
        self.patch_TPE = nn.Parameter(torch.zeros(shape, dtype=dtype))
        identity = torch.zeros(self.num_patches, width, dtype=dtype)
        self.identity_TE = embedding_start(nn.Parameter(identity), 1.0)
        self.stack = build_block(block, provider)
        seeds = torch.zeros(config.hidden_size // width, width, dtype=dtype)
        self.seed_RE = embedding_start(nn.Parameter(seeds), 1.0)
        self.out = nn.Linear(config.hidden_size, config.hidden_size, bias=False, dtype=dtype)
        act_on_own_cells(self.parameters())

    def forward(self, x_BSG: Tensor) -> Tensor:
        """Return one vector per cell."""
        cells = x_BSG.shape[:-1]
        x_NG = x_BSG.reshape(-1, self.num_genes).to(self.patch_TPE.dtype)
        padding = self.num_patches * self.patch_size - self.num_genes
        if padding:
            x_NG = F.pad(x_NG, (0, padding))
        patch_TNP = x_NG.view(-1, self.num_patches, self.patch_size).transpose(0, 1)
        token_TNE = torch.baddbmm(self.identity_TE[:, None, :], patch_TNP, self.patch_TPE)
        token_TNE = self.stack(token_TNE, attention_mask=None)
        return self.out(self._pool(token_TNE)).view(*cells, -1)  # type: ignore[no-any-return]

    def _pool(self, token_TNE: Tensor) -> Tensor:
        """Return the seeds' weighted means of the tokens, one after the other [N, D]."""
        token_NTE = token_TNE.transpose(0, 1)
        score_NRT = self.seed_RE @ token_NTE.transpose(1, 2) / math.sqrt(self.seed_RE.shape[1])
        weight_NRT = at_least_float32(score_NRT).softmax(-1).to(token_NTE.dtype)
        return (weight_NRT @ token_NTE).flatten(1)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None
    ) -> dict[str, Any]:
        """Return all weights as whole tensors that every rank holds.

        The gene blocks live in a group of one rank and would each call themselves the main copy.
        """
        return replicated_state(self, prefix)


def build_encoder(
    config: ModelConfig,
    num_genes: int,
    precision: Precision,
    provider: Any,
    *,
    recompute: bool = False,
    speed: float = GENES_SPEED,
) -> LinearEncoder | PatchEncoder:
    """Return the encoder that the settings ask for; ``speed`` is that of a linear map."""
    if config.gene_layers:
        return PatchEncoder(config, num_genes, precision, provider, recompute=recompute)
    dtype = torch.bfloat16 if precision is Precision.bf16 else torch.float32
    return LinearEncoder(config.hidden_size, num_genes, dtype, speed=speed)


class PopulationSummary(nn.Module):
    r"""DeepSets over encoded control cells: unchanged by their order.

    .. math:: m = \rho\left( \sum_u w_u \phi(E(x_u)) / \sum_u w_u \right)

    with phi = Linear-SiLU-Linear on each cell and rho = SiLU-Linear on the mean. The cells are a
    second draw of controls: the transported ones beside their own path would give the target away.
    """

    def __init__(self, hidden_size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.cell_1 = nn.Linear(hidden_size, hidden_size, dtype=dtype)
        self.cell_2 = nn.Linear(hidden_size, hidden_size, dtype=dtype)
        self.population = nn.Linear(hidden_size, hidden_size)
        for parameter in self.parameters():
            if parameter.ndim == 1:
                nn.init.zeros_(parameter)
        act_on_own_cells(self.cell_1.parameters())
        act_on_own_cells(self.cell_2.parameters())

    def forward(self, encoded_BUD: Tensor, own_mask_BU: Tensor, mask_BU: Tensor) -> Tensor:
        """Return the summary of each set, the same on all ranks that share its cells.

        Parameters
        ----------
        encoded_BUD, own_mask_BU
            This rank's cells.
        mask_BU
            Real cells of the whole draw.
        """
        # The second map of phi is linear, so it is applied to the mean, for one row per set.
        inner_BUD = F.silu(self.cell_1(encoded_BUD))
        weight_B1U = (own_mask_BU / mask_BU.sum(1, keepdim=True).clamp(min=1)).to(inner_BUD.dtype)[
            :, None, :
        ]
        mean_BD = torch.bmm(weight_B1U, inner_BUD).squeeze(1)
        # Its bias counts with this rank's share of the cells.
        mean_BD = F.linear(mean_BD, self.cell_2.weight) + weight_B1U.sum(2) * self.cell_2.bias
        mean_BD = at_least_float32(mean_BD)
        if tensor_parallel_size() > 1:
            mean_BD = reduce_from_tensor_model_parallel_region(mean_BD)
        summary_BD: Tensor = self.population(F.silu(mean_BD))
        return summary_BD


def at_least_float32(x: Tensor) -> Tensor:
    """Return bf16 as float32, and everything else as it is."""
    return x.float() if x.dtype == torch.bfloat16 else x


def replicated_state(module: nn.Module, prefix: str) -> dict[str, Any]:
    """Return a sharded state of weights that all ranks hold whole."""
    state = module.state_dict(keep_vars=True)
    named = {name: state[name] for name in state if not name.endswith("_extra_state")}
    return replicated_tensors(named, prefix)


def replicated_tensors(tensors: dict[str, Tensor], prefix: str) -> dict[str, Any]:
    """Return a sharded state of tensors that all ranks of this stage hold whole."""
    result: dict[str, Any] = make_sharded_tensors_for_checkpoint(tensors, prefix)
    return result


def replicated_on_stages(tensors: dict[str, Tensor], prefix: str) -> dict[str, Any]:
    """Return a sharded state of tensors that all ranks of all pipeline stages hold whole."""
    result = replicated_tensors(tensors, prefix)
    return {
        name: replace(entry, replica_id=(pipeline_rank(), *entry.replica_id[1:]))
        for name, entry in result.items()
    }
