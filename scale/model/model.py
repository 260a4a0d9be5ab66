"""``ScaleModel``: control cells and a condition in, the perturbed population out.

Encoder, condition, set blocks and readout in one module, which is also a Megatron model chunk: on
several pipeline stages the first has encoder, summary and condition, the last has readout and
losses, and the set blocks are shared out. Every stage is given the batch: the masks, the pairs and
the path time are functions of it, so the stages agree on them without a message.

Shapes: B = sets in the batch, S = cells per set, U = cells of the summary draw, G = genes,
P = principal components, D = width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from scale.config import Head, ModelConfig, ObjectiveConfig, Precision, TimeLaw
from scale.model.backend import (
    MegatronModule,
    ModelType,
    block_config,
    choose_provider,
    pipeline_rank,
    pipeline_size,
    tensor_parallel_size,
)
from scale.model.condition import ConditionEncoder, ConditionIds
from scale.model.encoder import (
    PopulationSummary,
    build_encoder,
    replicated_on_stages,
    replicated_state,
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
    CellsInBlocks,
    Readout,
    SetBlocks,
    gather_cells,
    initialise_by_name,
    own_cells,
    spread_over_cells,
    whole_names,
)
from scale.model.masking import hide_genes
from scale.model.objective import Losses, Targets, check_masks, loss_names, weighted_losses
from scale.model.pairing import Pairs, pair, pair_in_order
from scale.model.sizes import (
    check_shares,
    count_parameters,
    first_stage_layers,
    forward_flops_per_cell,
)
from scale.model.stages import message_rows, relay
from scale.types import Batch, Vocabulary

NUM_COMPONENTS = 30
"""Principal components in which cells are paired."""


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
    recompute
        Compute gene and set blocks again for their gradients, and keep their inputs only.

    Raises
    ------
    ValueError
        If sizes cannot be shared over the ranks, or the backend is not there.
    """

    model_type = ModelType.encoder_or_decoder
    share_embeddings_and_output_weights = False

    def __init__(
        self,
        config: ModelConfig,
        objective: ObjectiveConfig,
        vocabulary: Vocabulary,
        *,
        seed: int,
        precision: Precision = Precision.fp32,
        recompute: bool = False,
    ) -> None:
        num_genes, num_stages = len(vocabulary.genes), pipeline_size()
        check_shares(
            config,
            world_size=dist.get_world_size(),
            tensor_size=tensor_parallel_size(),
            num_stages=num_stages,
        )
        block = block_config(
            hidden_size=config.hidden_size,
            num_layers=config.num_layers,
            num_heads=config.num_heads,
            ffn_hidden_size=config.ffn_hidden_size,
            precision=precision,
            qk_norm=config.qk_norm,
            recompute=recompute,
            first_stage_layers=first_stage_layers(config, num_genes, num_stages),
        )
        super().__init__(config=block)
        self.config_sizes = config
        self.objective = objective
        self.vocabulary = vocabulary
        self.seed = seed
        self.precision = precision
        self.pre_process = pipeline_rank() == 0
        self.post_process = pipeline_rank() == num_stages - 1
        dtype = block.params_dtype
        provider = choose_provider(config.backend)
        # Torch draws values that are overwritten below; the caller's generator stays as it was.
        with torch.random.fork_rng(devices=[]):
            if self.pre_process:
                self.encoder = build_encoder(
                    config, num_genes, precision, provider, recompute=recompute
                )
                self.summary = PopulationSummary(config.hidden_size, dtype)
                self.condition = ConditionEncoder(config, vocabulary)
            self.blocks = SetBlocks(block, provider)
            if self.post_process:
                ffn_size = config.ffn_hidden_size if config.gene_layers else None
                self.readout = Readout(config.hidden_size, ffn_size, num_genes, dtype)
        self.register_buffer("mean_G", torch.zeros(num_genes))
        self.register_buffer("basis_GP", torch.zeros(num_genes, NUM_COMPONENTS))
        initialise_by_name(
            self,
            seed,
            {"encoder.": config.gene_layers, "blocks.": config.num_layers},
            self.blocks.first_layer,
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

    def forward(self, batch: Batch) -> Losses | Tensor:
        """Return the loss of a batch; draws depend on the numbers of its sets alone.

        A pipeline stage before the last returns the message for the next one.
        """
        treated_BSG, treated_mask_BS = batch.treated_BSG, batch.treated_mask_BS
        if treated_BSG is None or treated_mask_BS is None:
            raise ValueError("the batch has no treated cells; call sample")
        if self.objective.head is Head.direct and not self.mean_G.any():
            raise ValueError(
                "objective.head=direct starts from the mean cell; set_statistics first"
            )
        is_full = check_masks(batch, treated_mask_BS)
        pairs = self._pairs(batch, treated_BSG, treated_mask_BS)
        if self.pre_process:
            cells = self._training_cells(batch, treated_BSG, pairs, is_full=is_full)
        else:
            assert self._input_tensor is not None, "a later stage is given a message"
            cells = CellsInBlocks.of_message(self._input_tensor, is_full=is_full)
        cells = self.blocks(cells)
        if not self.post_process:
            message_RBD: Tensor = cells.message(self.config.pipeline_dtype)
            return message_RBD
        predicted_BSG = self._endpoint(self._leave(cells), batch.control_BSG)
        mask_BS = batch.control_mask_BS if cells.mask_BS is None else cells.mask_BS
        targets = Targets(treated_BSG, treated_mask_BS, pairs)
        return weighted_losses(self.objective, predicted_BSG, mask_BS, targets)

    @torch.no_grad()
    def sample(self, batch: Batch, *, num_steps: int, guidance: float = 1.0) -> Tensor:
        """Return predicted cells [B, S, G] on the scale of the batch, never negative.

        A prediction depends on its own set alone: on its control cells, summary cells and
        condition, not on their order, on treated cells or on other sets. On several ranks that
        share a model this is a collective, and all of them have the cells.

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
        summary_BD = self._summarise(batch) if self.pre_process else None

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

    @property
    def loss_names(self) -> list[str]:
        """Names of the parts of the loss, in their order, on every stage."""
        return loss_names(self.objective)

    def freeze_encoder(self) -> None:
        """Leave the encoder, on the stage that has it, as it is."""
        if self.pre_process:
            self.encoder.requires_grad_(requires_grad=False)

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
        """Take the message of the pipeline stage before this one; None on the first."""
        if isinstance(input_tensor, list):
            input_tensor = input_tensor[0]
        self._input_tensor = input_tensor

    @staticmethod
    def message_rows(set_size: int) -> int:
        """Return the rows of a message between stages, over all ranks that share the cells."""
        return message_rows(set_size)

    def whole_named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield each parameter with its name in the model of one process."""
        return whole_names(self, self.blocks.first_layer)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None
    ) -> dict[str, Any]:
        """Return Megatron's sharded state: the set blocks are cut, everything else is whole.

        Set blocks have their number in the whole model as key, and their own as name.
        """
        state: dict[str, Any] = self.blocks.sharded_state_dict(
            f"{prefix}blocks.", sharded_offsets, metadata
        )
        for name, part in self.named_children():
            if part is not self.blocks:
                state |= replicated_state(part, f"{prefix}{name}.")
        buffers = {"mean_G": self.mean_G, "basis_GP": self.basis_GP}
        return state | replicated_on_stages(buffers, prefix)

    # --- inside -----------------------------------------------------------------------------------

    def _training_cells(
        self, batch: Batch, treated_BSG: Tensor, pairs: Pairs, *, is_full: bool
    ) -> CellsInBlocks:
        """Return the cells of a point on the path before the first block."""
        ids = ConditionIds.of(batch)
        if self.training:
            ids = ids.dropped(
                self.config_sizes,
                batch.set_index_B,
                self.seed,
                has_features=self.vocabulary.num_features > 0,
            )
        time_B = draw_time(self.objective, batch.set_index_B, self.seed)
        point = point_on_path(
            batch.control_BSG, batch.control_mask_BS, pairs.partners(treated_BSG), pairs, time_B
        )
        if self.training and self.objective.masked_gene_fraction > 0:
            fraction = self.objective.masked_gene_fraction
            point, batch = hide_genes(point, batch, fraction, self.seed)
        perturbed = self.condition.perturbed(ids)
        modulation_B6D = self.condition(ids, perturbed, self._summarise(batch), time_B)
        return self._enter(point, perturbed.sum_BD, modulation_B6D, is_full=is_full)

    def _summarise(self, batch: Batch) -> Tensor:
        encoded_BUD = self.encoder(own_cells(batch.summary_BUG))
        own_mask_BU = own_cells(batch.summary_mask_BU)
        summary_BD: Tensor = self.summary(encoded_BUD, own_mask_BU, batch.summary_mask_BU)
        return summary_BD

    def _enter(
        self, point: PathPoint, sum_BD: Tensor, modulation_B6D: Tensor, *, is_full: bool
    ) -> CellsInBlocks:
        x_BSD = self.encoder(own_cells(point.z_BSG))
        x_BSD = x_BSD + spread_over_cells(sum_BD)[:, None, :].to(x_BSD.dtype)
        return CellsInBlocks.enter(x_BSD, modulation_B6D, None if is_full else point.mask_BS)

    def _leave(self, cells: CellsInBlocks) -> Tensor:
        """Return the change of expression of every cell of a set, on all ranks that share it."""
        return gather_cells(self.readout(cells.x_BSD))

    def _change(
        self, point: PathPoint, ids: ConditionIds, summary_BD: Tensor | None, *, is_full: bool
    ) -> Tensor:
        """Return the change that is predicted from a point, on all ranks that share a model."""
        enter = None
        if summary_BD is not None:
            perturbed = self.condition.perturbed(ids)
            modulation_B6D = self.condition(ids, perturbed, summary_BD, point.time_B)

            def enter(sets: slice) -> CellsInBlocks:
                part = PathPoint(point.z_BSG[sets], point.mask_BS[sets], point.time_B[sets])
                sum_BD = perturbed.sum_BD[sets]
                return self._enter(part, sum_BD, modulation_B6D[sets], is_full=is_full)

        shape_BSG = (*point.mask_BS.shape, len(self.vocabulary.genes))
        return relay(enter, self.blocks, self._leave, shape_BSG=shape_BSG, is_full=is_full)

    def _endpoint(self, change_BSG: Tensor, control_BSG: Tensor) -> Tensor:
        if change_BSG.dtype == torch.bfloat16:
            change_BSG = change_BSG.float()
        return endpoint(self.objective.head, change_BSG, control_BSG, self.mean_G)

    def _pairs(self, batch: Batch, treated_BSG: Tensor, treated_mask_BS: Tensor) -> Pairs:
        """Pair cells, as far as anything on this stage depends on it."""
        moves = self.pre_process and self.objective.time is not TimeLaw.zero
        is_scored = self.post_process and self.objective.point_weight != 0
        if not (moves or is_scored):
            return pair_in_order(batch.control_mask_BS, treated_mask_BS)
        return pair(
            self.objective.pairing,
            batch.control_BSG,
            treated_BSG,
            batch.control_mask_BS,
            treated_mask_BS,
            self.basis_GP,
        )
