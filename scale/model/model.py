"""``ScaleModel``: control cells and a condition in, the perturbed population out.

Encoder, condition, set blocks and readout in one module, which is also a Megatron model chunk.

Shapes: B = sets in the batch, S = cells per set, U = cells of the summary draw, G = genes,
P = principal components, D = width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scale.config import Head, ModelConfig, ObjectiveConfig, Precision, TimeLaw
from scale.model.backend import (
    MegatronModule,
    ModelType,
    block_config,
    choose_provider,
    tensor_parallel_size,
)
from scale.model.condition import ConditionEncoder, ConditionIds
from scale.model.encoder import (
    PopulationSummary,
    build_encoder,
    replicated_state,
    replicated_tensors,
)
from scale.model.flow import (
    PathPoint,
    draw_time,
    endpoint,
    guide,
    integrate,
    point_on_path,
)
from scale.model.layers import (
    Readout,
    SetBlocks,
    gather_cells,
    initialise_by_name,
    own_cells,
    spread_over_cells,
)
from scale.model.losses import LOSSES
from scale.model.pairing import Pairs, pair, pair_in_order
from scale.model.sizes import count_parameters, forward_flops_per_cell
from scale.types import Batch, Vocabulary

NUM_COMPONENTS = 30
"""Principal components in which cells are paired."""


@dataclass(frozen=True, slots=True)
class Losses:
    """Loss of a batch.

    Parameters
    ----------
    total
        Mean over the sets of the weighted sum of losses; has the gradient.
    parts
        Mean over the sets of each loss before its weight, without gradient.
    num_sets
        Sets in the batch, each with weight 1.
    """

    total: Tensor
    parts: dict[str, Tensor]
    num_sets: int


class ScaleModel(MegatronModule):  # type: ignore[misc]
    """Conditional transport of cell populations, trained on the endpoint in gene space.

    Parameters
    ----------
    config
        Sizes.
    objective
        Path, head, pairing and loss weights.
    vocabulary
        Genes and the names behind the integers of a batch.
    seed
        Of the initial weights and of all draws of the training path.
    precision
        Of encoder, set blocks and readout; condition and losses are float32.

    Raises
    ------
    ValueError
        If sizes cannot be shared over the tensor parallel ranks, or the backend is not there.
    """

    model_type = ModelType.encoder_or_decoder
    share_embeddings_and_output_weights = False
    pre_process = True
    post_process = True

    def __init__(
        self,
        config: ModelConfig,
        objective: ObjectiveConfig,
        vocabulary: Vocabulary,
        *,
        seed: int,
        precision: Precision = Precision.fp32,
    ) -> None:
        _check_shares(config)
        block = block_config(
            hidden_size=config.hidden_size,
            num_layers=config.num_layers,
            num_heads=config.num_heads,
            ffn_hidden_size=config.ffn_hidden_size,
            precision=precision,
            qk_norm=config.qk_norm,
        )
        super().__init__(config=block)
        self.config_sizes = config
        self.objective = objective
        self.vocabulary = vocabulary
        self.seed = seed
        self.precision = precision
        num_genes = len(vocabulary.genes)
        dtype = block.params_dtype
        provider = choose_provider(config.backend)
        # Torch draws values that are overwritten below; the caller's generator stays as it was.
        with torch.random.fork_rng(devices=[]):
            self.encoder = build_encoder(config, num_genes, precision, provider)
            self.summary = PopulationSummary(config.hidden_size, dtype)
            self.condition = ConditionEncoder(config, vocabulary)
            self.blocks = SetBlocks(block, provider)
            ffn_size = config.ffn_hidden_size if config.gene_layers else None
            self.readout = Readout(config.hidden_size, ffn_size, num_genes, dtype)
        self.register_buffer("mean_G", torch.zeros(num_genes))
        self.register_buffer("basis_GP", torch.zeros(num_genes, NUM_COMPONENTS))
        initialise_by_name(
            self, seed, {"encoder.": config.gene_layers, "blocks.": config.num_layers}
        )
        self._input_tensor: Tensor | None = None

    # --- what training and prediction call --------------------------------------------------------

    def set_statistics(self, mean_G: Any, basis_GP: Any) -> None:
        """Keep the mean training cell and the basis for pairing; saved with the weights.

        Parameters
        ----------
        mean_G
            Mean of the training cells' values.
        basis_GP
            Principal components as columns; fewer than 30 are filled up with zeros.
        """
        self.mean_G.copy_(torch.as_tensor(mean_G))
        basis = torch.as_tensor(basis_GP)
        if basis.shape[1] > NUM_COMPONENTS:
            raise ValueError(f"{basis.shape[1]} components; at most {NUM_COMPONENTS} are kept")
        self.basis_GP.zero_()
        self.basis_GP[:, : basis.shape[1]] = basis

    def forward(self, batch: Batch) -> Losses:
        """Return the loss of a batch; draws depend on the numbers of its sets alone."""
        treated_BSG, treated_mask_BS = batch.treated_BSG, batch.treated_mask_BS
        if treated_BSG is None or treated_mask_BS is None:
            raise ValueError("the batch has no treated cells; call sample")
        if self.objective.head is Head.direct and not self.mean_G.any():
            raise ValueError(
                "objective.head=direct starts from the mean cell; set_statistics first"
            )
        is_full = _check_masks(batch, treated_mask_BS)
        ids = ConditionIds.of(batch)
        if self.training:
            ids = ids.dropped(self.config_sizes, batch.set_index_B, self.seed)
        pairs = self._pairs(batch, treated_BSG, treated_mask_BS)
        partner_BSG = pairs.partners(treated_BSG)
        time_B = draw_time(self.objective, batch.set_index_B, self.seed)
        point = point_on_path(batch.control_BSG, batch.control_mask_BS, partner_BSG, pairs, time_B)
        change_BSG = self._change(point, ids, self._summarise(batch), is_full=is_full)
        predicted_BSG = self._endpoint(change_BSG, batch.control_BSG)
        masks = (point.mask_BS, pairs.has_partner_BS, treated_mask_BS)
        return self._losses(predicted_BSG, treated_BSG, partner_BSG, *masks)

    @torch.no_grad()
    def sample(self, batch: Batch, *, num_steps: int, guidance: float = 1.0) -> Tensor:
        """Return predicted cells [B, S, G] on the scale of the batch, never negative.

        A prediction depends on its own set alone: on its control cells, summary cells and
        condition, not on their order, on treated cells or on other sets.

        Parameters
        ----------
        batch
            Treated cells, if any, are not read. Rows of padding come out as zeros.
        num_steps
            Steps of the sampler; heads trained with the energy loss are best with 1.
        guidance
            1 = off; above, what sets the perturbation apart from the mean response is exaggerated.
        """
        if num_steps < 1:
            raise ValueError(f"num_steps ({num_steps}) must be at least 1")
        if num_steps > 1 and self.objective.time is TimeLaw.zero:
            raise ValueError(
                f"the model was trained with objective.time=zero; num_steps ({num_steps}) must be 1"
            )
        control_BSG, mask_BS = batch.control_BSG, batch.control_mask_BS
        is_full = bool(mask_BS.all())
        ids = ConditionIds.of(batch)
        summary_BD = self._summarise(batch)

        def endpoint_at(z_BSG: Tensor, time: float) -> Tensor:
            time_B = torch.full((len(z_BSG),), time, device=z_BSG.device)
            point = PathPoint(z_BSG, mask_BS, time_B)
            change_BSG = self._change(point, ids, summary_BD, is_full=is_full)
            if guidance != 1.0:
                null = ids.without_perturbation()
                null_BSG = self._change(point, null, summary_BD, is_full=is_full)
                change_BSG = guide(change_BSG, null_BSG, guidance)
            return self._endpoint(change_BSG, control_BSG)

        cells_BSG = integrate(endpoint_at, control_BSG, num_steps)
        return cells_BSG if is_full else cells_BSG * mask_BS[:, :, None]

    def num_parameters(self) -> int:
        """Return the number of trained parameters over all ranks."""
        return count_parameters(self.config_sizes, self.vocabulary)

    def flops_per_cell(self) -> float:
        """Return the floating point operations of a training step per treated cell.

        Three times the forward pass; the control cell and its share of the summary are included.
        """
        return 3 * forward_flops_per_cell(self.config_sizes, len(self.vocabulary.genes))

    # --- a chunk of Megatron's ------------------------------------------------------------------

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor | None] | None) -> None:
        """Take the tensor of an earlier pipeline stage; there is none, the model is one stage."""
        if isinstance(input_tensor, list):
            input_tensor = input_tensor[0]
        self._input_tensor = input_tensor

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None
    ) -> dict[str, Any]:
        """Return Megatron's sharded state: the set blocks are cut, everything else is whole."""
        state: dict[str, Any] = self.blocks.sharded_state_dict(
            f"{prefix}blocks.", sharded_offsets, metadata
        )
        for name in ("encoder", "summary", "condition", "readout"):
            state |= replicated_state(getattr(self, name), f"{prefix}{name}.")
        buffers = {"mean_G": self.mean_G, "basis_GP": self.basis_GP}
        return state | replicated_tensors(buffers, prefix)

    # --- inside -----------------------------------------------------------------------------------

    def _summarise(self, batch: Batch) -> Tensor:
        encoded_BUD = self.encoder(own_cells(batch.summary_BUG))
        own_mask_BU = own_cells(batch.summary_mask_BU)
        summary_BD: Tensor = self.summary(encoded_BUD, own_mask_BU, batch.summary_mask_BU)
        return summary_BD

    def _change(
        self, point: PathPoint, ids: ConditionIds, summary_BD: Tensor, *, is_full: bool
    ) -> Tensor:
        """Return the change of expression of every cell of a set, on all ranks that share it."""
        perturbed = self.condition.perturbed(ids)
        modulation_B6D = self.condition(ids, perturbed, summary_BD, point.time_B)
        x_BSD = self.encoder(own_cells(point.z_BSG))
        x_BSD = x_BSD + spread_over_cells(perturbed.sum_BD)[:, None, :].to(x_BSD.dtype)
        x_BSD = self.blocks(x_BSD, modulation_B6D, None if is_full else point.mask_BS)
        return gather_cells(self.readout(x_BSD))

    def _endpoint(self, change_BSG: Tensor, control_BSG: Tensor) -> Tensor:
        if change_BSG.dtype == torch.bfloat16:
            change_BSG = change_BSG.float()
        return endpoint(self.objective.head, change_BSG, control_BSG, self.mean_G)

    def _pairs(self, batch: Batch, treated_BSG: Tensor, treated_mask_BS: Tensor) -> Pairs:
        """Pair cells, as far as anything depends on it."""
        objective = self.objective
        if objective.time is TimeLaw.zero and objective.point_weight == 0:
            return pair_in_order(batch.control_mask_BS, treated_mask_BS)
        return pair(
            objective.pairing,
            batch.control_BSG,
            treated_BSG,
            batch.control_mask_BS,
            treated_mask_BS,
            self.basis_GP,
        )

    def _losses(
        self,
        predicted_BSG: Tensor,
        treated_BSG: Tensor,
        partner_BSG: Tensor,
        mask_BS: Tensor,
        has_partner_BS: Tensor,
        treated_mask_BS: Tensor,
    ) -> Losses:
        """Return the weighted sum over the losses whose weight is not 0."""
        total = predicted_BSG.new_zeros(())
        parts = {}
        for name, loss in LOSSES.items():
            weight = getattr(self.objective, f"{name}_weight")
            if weight == 0:
                continue
            if name == "point":
                loss_B = loss(predicted_BSG, partner_BSG, mask_BS, has_partner_BS)
            else:
                loss_B = loss(predicted_BSG, treated_BSG, mask_BS, treated_mask_BS)
            mean = loss_B.mean()
            parts[name] = mean.detach()
            total = total + weight * mean
        return Losses(total, parts, len(mask_BS))


def _check_shares(config: ModelConfig) -> None:
    size = tensor_parallel_size()
    for name in ("num_heads", "ffn_hidden_size", "set_size", "num_summary_cells"):
        value = getattr(config, name)
        if value % size:
            raise ValueError(
                f"parallel.tensor_model_parallel_size ({size}) must divide model.{name} ({value})"
            )


def _check_masks(batch: Batch, treated_mask_BS: Tensor) -> bool:
    """Return whether all sets are full; a set of one cell has no distances within.

    One transfer from the device for all that the host has to know.
    """
    num_control_B, num_treated_B = batch.control_mask_BS.sum(1), treated_mask_BS.sum(1)
    smallest_control, smallest_treated = torch.stack(
        [num_control_B.min(), num_treated_B.min()]
    ).tolist()
    if min(smallest_control, smallest_treated) < 2:
        too_small_B = (num_control_B < 2) | (num_treated_B < 2)
        numbers = batch.condition_B[too_small_B].tolist()
        raise ValueError(
            f"sets of conditions {numbers[:5]} have fewer than 2 control or treated cells; raise "
            "data.minimum_control_cells, or minimum_cells when the store is prepared"
        )
    set_size = batch.control_mask_BS.shape[1]
    return bool(smallest_control == set_size and smallest_treated == set_size)
