"""A small Megatron model chunk and batches for it: what the engine needs and nothing more."""

import hashlib
import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from megatron.core.enums import ModelType
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer import MegatronModule, TransformerConfig
from torch import Tensor, nn

from scale.config import OptimizerConfig, Precision
from scale.types import ABSENT, Batch

G, D, F, S = 10, 8, 16, 4
OPTIMIZER = OptimizerConfig(lr=1e-2, warmup_steps=2, weight_decay=0.1, clip_norm=0.05)


@dataclass(frozen=True)
class ToyLosses:
    total: Tensor
    parts: dict[str, Tensor]
    num_sets: int


class ToyModel(MegatronModule):
    """Cells -> width -> a tensor parallel block -> genes; squared error to the treated cells."""

    def __init__(
        self, *, tensor_size: int = 1, precision: Precision = Precision.fp32, seed: int = 0
    ) -> None:
        dtype = torch.bfloat16 if precision is Precision.bf16 else torch.float32
        config = TransformerConfig(
            num_layers=1,
            hidden_size=D,
            num_attention_heads=2,
            use_cpu_initialization=True,
            sequence_parallel=tensor_size > 1,
            tensor_model_parallel_size=tensor_size,
            params_dtype=dtype,
            bf16=precision is Precision.bf16,
            gradient_accumulation_fusion=False,
        )
        super().__init__(config)
        self.pre_process = self.post_process = True
        self.share_embeddings_and_output_weights = False
        self.model_type = ModelType.encoder_or_decoder
        self.encoder = nn.Linear(G, D)
        self.table = nn.Embedding(3, D)
        options = {"config": config, "init_method": nn.init.zeros_, "bias": True}
        self.up = ColumnParallelLinear(D, F, gather_output=False, **options)
        self.down = RowParallelLinear(F, D, input_is_parallel=True, skip_bias_add=False, **options)
        self.readout = nn.Linear(D, G)
        self.register_buffer("mean_G", torch.zeros(G))
        # Acts on a rank's own cells: the gradient is summed over tensor parallel ranks.
        for module in (self.encoder, self.table, self.readout):
            for parameter in module.parameters():
                parameter.sequence_parallel = True
        self._tensor_size = tensor_size
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                parameter.copy_(named_weight(name, parameter, tensor_size, seed))

    loss_names = ("error", "double")

    def set_input_tensor(self, tensor: Tensor) -> None:
        pass

    def whole_named_parameters(self):
        return self.named_parameters()

    def message_rows(self, set_size: int) -> int:
        return set_size

    def forward(self, batch: Batch) -> ToyLosses:
        cells_SBG = batch.control_BSG.transpose(0, 1)
        own_SBG = cells_SBG
        if self._tensor_size > 1:
            from megatron.core import parallel_state

            own_SBG = cells_SBG.chunk(self._tensor_size)[
                parallel_state.get_tensor_model_parallel_rank()
            ]
        hidden = self.encoder(own_SBG) + self.table(batch.component_BJ[:, 0])
        wide, _ = self.up(hidden.to(self.config.params_dtype))
        change, _ = self.down(torch.nn.functional.gelu(wide))
        predicted_SBG = self.readout(hidden + change.float())
        if self._tensor_size > 1:
            predicted_SBG = gather_from_sequence_parallel_region(
                predicted_SBG, tensor_parallel_output_grad=False
            )
        error_B = (
            (cells_SBG + predicted_SBG - batch.treated_BSG.transpose(0, 1))
            .square()
            .mean(dim=(0, 2))
        )
        total = error_B.mean()
        return ToyLosses(
            total, {"error": total.detach(), "double": 2 * total.detach()}, len(error_B)
        )


def named_weight(name: str, parameter: Tensor, tensor_size: int, seed: int) -> Tensor:
    """Return the rank's share of a full weight that depends on its name and the seed only."""
    shape = list(parameter.shape)
    axis = getattr(parameter, "partition_dim", -1)
    is_shared = getattr(parameter, "tensor_model_parallel", False) and tensor_size > 1
    if is_shared:
        shape[axis] *= tensor_size
    key = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "little")
    values = np.random.Generator(np.random.PCG64(key)).standard_normal(math.prod(shape))
    full = torch.from_numpy(values.reshape(shape) * 0.2).float()
    if is_shared:
        from megatron.core import parallel_state

        full = full.chunk(tensor_size, dim=axis)[parallel_state.get_tensor_model_parallel_rank()]
    return full


def make_batch(first_set: int, num_sets: int) -> Batch:
    """Return sets whose cells depend on their number only."""
    sets = range(first_set, first_set + num_sets)
    control, treated = (
        torch.stack(
            [
                torch.from_numpy(
                    np.random.Generator(np.random.PCG64(10 * index + which)).random((S, G))
                ).float()
                for index in sets
            ]
        )
        for which in (0, 1)
    )
    everywhere = torch.ones(num_sets, S, dtype=torch.bool)
    index_B = torch.tensor(list(sets))
    return Batch(
        control_BSG=control,
        control_mask_BS=everywhere,
        summary_BUG=control,
        summary_mask_BU=everywhere,
        treated_BSG=treated + (index_B % 3)[:, None, None],
        treated_mask_BS=everywhere,
        control_library_BS=torch.ones(num_sets, S),
        treated_library_BS=torch.ones(num_sets, S),
        component_BJ=(index_B % 3)[:, None],
        dose_BJ=torch.full((num_sets, 1), math.nan),
        cell_type_B=torch.zeros(num_sets, dtype=torch.int64),
        batch_B=torch.full((num_sets,), ABSENT),
        is_control_B=torch.zeros(num_sets, dtype=torch.bool),
        condition_B=index_B % 3,
        set_index_B=index_B,
    )


def micro_batches(
    step: int, *, sets_per_batch: int, sets_per_micro_batch: int, rank: int, size: int
) -> list[Batch]:
    """Return a rank's share of global batch ``step`` (0 is the first), in Megatron's order."""
    b = sets_per_micro_batch
    return [
        make_batch(step * sets_per_batch + (j * size + rank) * b, b)
        for j in range(sets_per_batch // (b * size))
    ]


def with_nan(batch: Batch) -> Batch:
    """Return the batch with one value that is not a number."""
    control = batch.control_BSG.clone()
    control[0, 0, 0] = math.nan
    return replace(batch, control_BSG=control)
