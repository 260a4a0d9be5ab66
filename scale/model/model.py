"""``ScaleModel``: control cells and a condition in, the perturbed population out.

Encoder, condition, set blocks and readout in one module, which is also a Megatron model chunk: on
several pipeline stages the first has encoder, summary and condition, the last has readout and
losses, and the set blocks are shared out. Every stage is given the batch: the masks, the pairs and
the path time are functions of it, so the stages agree on them without a message.

In latent space (``objective.space``) an autoencoder stands around all of this: the path leads
through its latent cells, which take the place of the genes.

Shapes: B = sets in the batch, S = cells per set, U = cells of the summary draw, G = genes (or the
numbers of a latent cell, on the path), P = principal components, D = width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from scale.config import ModelConfig, ObjectiveConfig, Precision, Prior, Space
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
from scale.model.counts import whole_counts
from scale.model.encoder import (
    LinearEncoder,
    PatchEncoder,
    PopulationSummary,
    at_least_float32,
    build_encoder,
    replicated_on_stages,
    replicated_state,
)
from scale.model.flow import PathPoint, guide
from scale.model.latent import LatentSpace
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
from scale.model.objective import Losses, check_masks, loss_names
from scale.model.sizes import (
    check_shares,
    check_space,
    count_parameters,
    first_stage_layers,
    forward_flops_per_cell,
)
from scale.model.stages import message_rows, relay
from scale.model.transport import Transport
from scale.types import Batch, Vocabulary

NUM_COMPONENTS = 30
"""Principal components in which cells are paired."""


class ScaleModel(MegatronModule):  # type: ignore[misc]
    """Conditional transport of cell populations.

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
        is_latent = objective.space is Space.latent
        check_space(objective, num_stages=num_stages)
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
        self.transport = Transport(objective, seed)
        self.vocabulary = vocabulary
        self.seed = seed
        self.precision = precision
        self.pre_process = pipeline_rank() == 0
        self.post_process = pipeline_rank() == num_stages - 1
        dtype = block.params_dtype
        provider = choose_provider(config.backend)
        num_inputs = objective.latent_size or num_genes

        def encoder() -> LinearEncoder | PatchEncoder:
            if is_latent:
                return LinearEncoder(config.hidden_size, num_inputs, dtype)
            return build_encoder(config, num_genes, precision, provider, recompute=recompute)

        # Torch draws values that are overwritten below; the caller's generator stays as it was.
        with torch.random.fork_rng(devices=[]):
            self.latent: LatentSpace | None = None
            if is_latent:
                self.latent = LatentSpace(
                    config, objective, vocabulary, precision, provider, recompute=recompute
                )
            if self.pre_process:
                self.encoder = encoder()
                if objective.prior is Prior.gaussian:
                    self.point_encoder = encoder()
                self.summary = PopulationSummary(config.hidden_size, dtype)
                self.condition = ConditionEncoder(config, vocabulary)
            self.blocks = SetBlocks(block, provider, attends=config.cell_attention)
            if self.post_process:
                ffn_size = config.ffn_hidden_size if config.gene_layers else None
                self.readout = Readout(config.hidden_size, ffn_size, num_inputs, dtype)
        self.register_buffer("mean_G", torch.zeros(num_genes))
        self.register_buffer("basis_GP", torch.zeros(num_genes, NUM_COMPONENTS))
        initialise_by_name(
            self,
            seed,
            {
                "encoder.": config.gene_layers,
                "point_encoder.": config.gene_layers,
                "latent.encoder.": config.gene_layers,
                "blocks.": config.num_layers,
            },
            self.blocks.first_layer,
        )
        self._input_tensor: Tensor | None = None

    # --- what training and prediction call --------------------------------------------------------

    def set_statistics(self, mean_G: Any, basis_GP: Any, reference_NG: Any = None) -> None:
        """Keep what is known of the training cells before the first step; saved with the weights.

        Parameters
        ----------
        mean_G
            Mean of the training cells' values.
        basis_GP
            Principal components, in which cells are paired, as columns; fewer than 30 are filled
            up with zeros.
        reference_NG
            Some training cells, in latent space: the scale of latent cells is theirs.
        """
        self.mean_G.copy_(torch.as_tensor(mean_G))
        basis = torch.as_tensor(basis_GP)
        if basis.shape[1] > NUM_COMPONENTS:
            raise ValueError(f"{basis.shape[1]} components; at most {NUM_COMPONENTS} are kept")
        self.basis_GP.zero_()
        self.basis_GP[:, : basis.shape[1]] = basis
        if self.latent is not None:
            self.latent.set_reference(torch.as_tensor(reference_NG))

    def forward(self, batch: Batch) -> Losses | Tensor:
        """Return the loss of a batch; draws depend on the numbers of its sets alone.

        A pipeline stage before the last returns the message for the next one.
        """
        treated_BSG, treated_mask_BS = batch.treated_BSG, batch.treated_mask_BS
        if treated_BSG is None or treated_mask_BS is None:
            raise ValueError("the batch has no treated cells; call sample")
        is_full = check_masks(batch, treated_mask_BS)
        has_path = self.pre_process or (self.post_process and self.transport.is_velocity)
        pairs = self.transport.pairs(
            batch, self.basis_GP, moves=has_path, is_scored=self.post_process
        )
        latent = None if self.latent is None else self.latent.encode(batch)
        sets = batch if latent is None else latent.batch
        path = self.transport.path(sets, pairs) if has_path else None
        if self.pre_process:
            assert path is not None, "the first stage has the path"
            cells = self._training_cells(sets, path.point, is_full=is_full)
        else:
            assert self._input_tensor is not None, "a later stage is given a message"
            cells = CellsInBlocks.of_message(self._input_tensor, is_full=is_full)
        cells = self.blocks(cells)
        if not self.post_process:
            message_RBD: Tensor = cells.message(self.config.pipeline_dtype)
            return message_RBD
        change_BSG = at_least_float32(self._leave(cells))
        mask_BS = batch.control_mask_BS if cells.mask_BS is None else cells.mask_BS
        losses = self.transport.losses(change_BSG, sets, path, mask_BS, pairs, self._start_G)
        if self.latent is not None and latent is not None:
            losses += self.latent.losses(latent, batch, self.seed)
        return losses

    @torch.no_grad()
    def sample(
        self, batch: Batch, *, num_steps: int, guidance: float = 1.0, seed: int = 0
    ) -> Tensor:
        """Return predicted cells [B, S, G] on the scale of the batch, never negative.

        A prediction depends on its own set alone: on its control cells, summary cells and
        condition, not on their order, on treated cells or on other sets. On several ranks that
        share a model this is a collective, and all of them have the cells.

        Where the path starts at noise, or the decoder draws counts, it also depends on the seed
        and the number of the set.

        Parameters
        ----------
        batch
            Treated cells, if any, are not read. Rows of padding come out as zeros.
        num_steps
            Steps of the sampler; heads trained with the energy loss are best with 1.
        guidance
            1 = off; above, what sets the perturbation apart from the mean response is exaggerated.
        seed
            Of noise and counts.
        """
        sets = batch if self.latent is None else self.latent.of_controls(batch)
        mask_BS, is_full = batch.control_mask_BS, bool(batch.control_mask_BS.all())
        ids = ConditionIds.of(batch)
        summary_BD = self._summarise(sets) if self.pre_process else None

        def change_at(point: PathPoint) -> Tensor:
            change_BSG = self._change(point, ids, summary_BD, is_full=is_full)
            if guidance == 1.0:
                return change_BSG
            null = ids.without_perturbation()
            null_BSG = self._change(point, null, summary_BD, is_full=is_full)
            return guide(change_BSG, null_BSG, guidance)

        cells_BSG = self.transport.end(
            change_at, sets, self._start_G, num_steps=num_steps, seed=seed
        )
        if self.latent is not None:
            cells_BSG = self.latent.cells(cells_BSG, sets, batch, seed)
        if self.objective.whole_counts:
            cells_BSG = whole_counts(cells_BSG, batch, self.vocabulary, seed)
        return cells_BSG if is_full else cells_BSG * mask_BS[:, :, None]

    @property
    def loss_names(self) -> list[str]:
        """Names of the parts of the loss, in their order, on every stage."""
        return loss_names(self.objective)

    def freeze_encoder(self) -> None:
        """Leave the encoder, on the stage that has it, as it is."""
        encoder = self if self.latent is None else self.latent
        if self.pre_process:
            encoder.encoder.requires_grad_(requires_grad=False)

    def num_parameters(self) -> int:
        """Return the number of trained parameters over all ranks."""
        return count_parameters(self.config_sizes, self.vocabulary, self.objective)

    def flops_per_cell(self) -> float:
        """Return the floating point operations of a training step per treated cell.

        Three times the forward pass; the control cell and its share of the summary are included.
        """
        num_genes = len(self.vocabulary.genes)
        return 3 * forward_flops_per_cell(self.config_sizes, num_genes, self.objective)

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

    @property
    def _start_G(self) -> Tensor:
        """Where the direct head starts: the mean cell, which is 0 in latent space."""
        start_G: Tensor = self.mean_G if self.latent is None else self.mean_G.new_zeros(())
        return start_G

    def _training_cells(self, sets: Batch, point: PathPoint, *, is_full: bool) -> CellsInBlocks:
        """Return the cells of a point on the path before the first block."""
        ids = ConditionIds.of(sets)
        if self.training:
            ids = ids.dropped(
                self.config_sizes,
                sets.set_index_B,
                self.seed,
                num_features=self.vocabulary.num_features,
            )
            if self.objective.masked_gene_fraction > 0:
                fraction = self.objective.masked_gene_fraction
                point, sets = hide_genes(point, sets, fraction, self.seed)
        perturbed = self.condition.perturbed(ids)
        modulation_B6D = self.condition(ids, perturbed, self._summarise(sets), point.time_B)
        return self._enter(point, perturbed.sum_BD, modulation_B6D, is_full=is_full)

    def _summarise(self, batch: Batch) -> Tensor:
        encoded_BUD = self.encoder(own_cells(batch.summary_BUG))
        own_mask_BU = own_cells(batch.summary_mask_BU)
        summary_BD: Tensor = self.summary(encoded_BUD, own_mask_BU, batch.summary_mask_BU)
        return summary_BD

    def _enter(
        self, point: PathPoint, sum_BD: Tensor, modulation_B6D: Tensor, *, is_full: bool
    ) -> CellsInBlocks:
        if point.beside_BSG is None:
            x_BSD = self.encoder(own_cells(point.z_BSG))
        else:
            x_BSD = self.encoder(own_cells(point.beside_BSG))
            x_BSD = x_BSD + self.point_encoder(own_cells(point.z_BSG))
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
                part, sum_BD = point.of_sets(sets), perturbed.sum_BD[sets]
                return self._enter(part, sum_BD, modulation_B6D[sets], is_full=is_full)

        shape_BSG = point.z_BSG.shape
        change_BSG = relay(enter, self.blocks, self._leave, shape_BSG=shape_BSG, is_full=is_full)
        return at_least_float32(change_BSG)
