"""Who provides the layers: the one door of the model to Megatron-core and Transformer Engine.

Two providers of the same modules under the same names: torch (Megatron's parallel linear maps,
torch's scaled dot product attention, an RMSNorm that knows sequence parallelism) and Transformer
Engine, taken only where it truly imports. Megatron classes and collectives that the other files of
the model need are re-exported here.

Shapes: S = cells per set, B = sets in the batch, H = heads, E = width of a head, D = width.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scale.config import Backend, Precision
from scale.model.functions import NORM_EPSILON, RMSNorm, SDPACoreAttention, SwiGLU
from scale.model.megatron_import import megatron_import

with megatron_import():
    from megatron.core import parallel_state
    from megatron.core.models.backends import LocalSpecProvider
    from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel import (
        copy_to_tensor_model_parallel_region,
        gather_from_sequence_parallel_region,
        reduce_from_tensor_model_parallel_region,
    )
    from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
    from megatron.core.transformer.enums import AttnMaskType, ModelType
    from megatron.core.transformer.mlp import MLP, MLPSubmodules
    from megatron.core.transformer.module import MegatronModule
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_block import (
        TransformerBlock,
        TransformerBlockSubmodules,
        get_num_layers_to_build,
    )
    from megatron.core.transformer.transformer_config import TransformerConfig
    from megatron.core.transformer.transformer_layer import (
        TransformerLayer,
        TransformerLayerSubmodules,
        get_transformer_layer_offset,
    )
    from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

__all__ = [
    "MegatronModule",
    "ModelType",
    "P2PCommunicator",
    "RMSNorm",
    "SDPACoreAttention",
    "TransformerBlock",
    "TransformerConfig",
    "TransformerLayer",
    "block_config",
    "build_block",
    "choose_provider",
    "copy_to_tensor_model_parallel_region",
    "first_layer",
    "gather_from_sequence_parallel_region",
    "last_stage",
    "make_sharded_tensors_for_checkpoint",
    "pipeline_group",
    "pipeline_rank",
    "pipeline_size",
    "reduce_from_tensor_model_parallel_region",
    "tensor_parallel_rank",
    "tensor_parallel_size",
]

logger = logging.getLogger(__name__)


def tensor_parallel_size() -> int:
    """Return how many ranks share each set block."""
    return int(parallel_state.get_tensor_model_parallel_world_size())


def tensor_parallel_rank() -> int:
    """Return which of them this one is."""
    return int(parallel_state.get_tensor_model_parallel_rank())


def pipeline_size() -> int:
    """Return into how many stages the set blocks are split."""
    return int(parallel_state.get_pipeline_model_parallel_world_size())


def pipeline_rank() -> int:
    """Return the stage of this rank; 0 is the first."""
    return int(parallel_state.get_pipeline_model_parallel_rank())


def pipeline_group() -> Any:
    """Return the ranks that hold the stages of one model."""
    return parallel_state.get_pipeline_model_parallel_group()


def last_stage() -> int:
    """Return the rank, in the world, of the last stage of this model."""
    return int(parallel_state.get_pipeline_model_parallel_last_rank())


# --- layers of the torch provider ---------------------------------------------------------------


class TorchSpecProvider(LocalSpecProvider):  # type: ignore[misc]
    """Megatron's parallel linear maps with torch attention and norms."""

    def core_attention(self) -> type:
        """Return the attention between projections."""
        return SDPACoreAttention

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False) -> type:  # noqa: FBT001, FBT002
        """Return the norm."""
        return RMSNorm


# --- choice -------------------------------------------------------------------------------------


def choose_provider(backend: Backend) -> Any:
    """Return the provider of layers and log once which it is and why.

    Raises
    ------
    ValueError
        If Transformer Engine was asked for and cannot be imported.
    """
    if backend is Backend.local:
        logger.info("layers: torch SDPA (asked for)")
        return TorchSpecProvider()
    missing = _why_no_transformer_engine()
    if missing is None:
        logger.info("layers: Transformer Engine")
        return _transformer_engine_provider()
    if backend is Backend.te:
        raise ValueError(f"model.backend=te, but {missing}; use model.backend=auto or local")
    logger.info("layers: torch SDPA (%s)", missing)
    return TorchSpecProvider()


def _why_no_transformer_engine() -> str | None:
    # Megatron's provider imports without Transformer Engine and then hands out empty classes, so
    # the package itself is tried; a broken installation raises RuntimeError or OSError.
    if not torch.cuda.is_available():
        return "transformer_engine needs a CUDA device"
    try:
        import transformer_engine.pytorch  # noqa: F401
    except ImportError:
        return "transformer_engine is not installed"
    except (RuntimeError, OSError) as error:
        return f"transformer_engine does not import: {error}"
    return None


def _transformer_engine_provider() -> Any:
    from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

    class TransformerEngineProvider(TESpecProvider):  # type: ignore[misc]
        """Transformer Engine's linear maps and norms; attention stays torch's.

        Its attention ignores a mask in a layer built without one, and sets carry masks only where
        they are not full.
        """

        def core_attention(self) -> type:
            return SDPACoreAttention

    return TransformerEngineProvider()


# --- building -----------------------------------------------------------------------------------


def block_config(
    *,
    hidden_size: int,
    num_layers: int,
    num_heads: int,
    ffn_hidden_size: int,
    precision: Precision,
    qk_norm: bool = False,
    recompute: bool = False,
    first_stage_layers: int | None = None,
) -> TransformerConfig:
    """Return Megatron's settings of a stack of pre-norm SwiGLU layers without bias or dropout.

    Parameters
    ----------
    hidden_size, num_layers, num_heads, ffn_hidden_size, qk_norm
        Sizes of the stack.
    precision
        Number format of weights and activations.
    recompute
        Keep the input of each layer only, and compute the layer again for its gradient.
    first_stage_layers
        Layers on the first pipeline stage, of a stack that the ranks of a model share; None = a
        stack that a rank holds whole.
    """
    is_shared = first_stage_layers is not None
    size = tensor_parallel_size() if is_shared else 1
    stages = pipeline_size() if is_shared else 1
    dtype = torch.bfloat16 if precision is Precision.bf16 else torch.float32
    return TransformerConfig(
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_attention_heads=num_heads,
        ffn_hidden_size=ffn_hidden_size,
        tensor_model_parallel_size=size,
        # More than one rank: they share cells wherever they do not share weights.
        sequence_parallel=size > 1,
        pipeline_model_parallel_size=stages,
        num_layers_in_first_pipeline_stage=first_stage_layers if stages > 1 else None,
        # What was sent on is kept by the stage that has it.
        deallocate_pipeline_outputs=stages > 1,
        recompute_granularity="full" if recompute else None,
        recompute_method="uniform" if recompute else None,
        recompute_num_layers=1 if recompute else None,
        bf16=precision is Precision.bf16,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        normalization="RMSNorm",
        layernorm_epsilon=NORM_EPSILON,
        qk_layernorm=qk_norm,
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=F.silu,
        # Not Transformer Engine's: this is how an MLP takes an activation that is a module.
        use_te_activation_func=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
        cuda_graph_scope=[],
        use_cpu_initialization=True,
        # Weights get their values by name; Megatron's own pass only sets their attributes.
        init_method=nn.init.zeros_,
        output_layer_init_method=nn.init.zeros_,
    )


def build_block(
    config: TransformerConfig,
    provider: Any,
    layer: type[TransformerLayer] = TransformerLayer,
    *,
    attends: bool = True,
) -> TransformerBlock:
    """Return this rank's stage of a stack of ``layer``; the last one ends with a norm.

    Norms and linear maps are separate modules with both providers, so that both save the same
    names and a modulation can stand between them. Without attention there is no norm before it.
    """
    norm, groups = provider.layer_norm(rms_norm=True), _process_groups(config)
    submodules = TransformerLayerSubmodules(
        self_attn_bda=_bias_dropout_add,
        pre_mlp_layernorm=norm,
        mlp=ModuleSpec(
            module=MLP,
            params={"ffn_hidden_size": config.ffn_hidden_size},
            submodules=MLPSubmodules(
                linear_fc1=provider.column_parallel_linear(),
                linear_fc2=provider.row_parallel_linear(),
                activation_func=SwiGLU,
            ),
        ),
        mlp_bda=_bias_dropout_add,
    )
    if attends:
        submodules.input_layernorm = norm
        submodules.self_attention = _attention(config, provider)
    specification = ModuleSpec(module=layer, submodules=submodules)
    num_layers = get_num_layers_to_build(config, pp_rank=groups.pp.rank())
    return TransformerBlock(
        config,
        TransformerBlockSubmodules(layer_specs=[specification] * num_layers, layer_norm=norm),
        # The stack of a stage reads what it is given, so that it is always told to be the first.
        post_process=groups.pp.rank() == groups.pp.size() - 1,
        pg_collection=groups,
    )


def _attention(config: TransformerConfig, provider: Any) -> ModuleSpec:
    qk_norm = provider.layer_norm(rms_norm=True, for_qk=True) if config.qk_layernorm else None
    return ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.no_mask},
        submodules=SelfAttentionSubmodules(
            linear_qkv=provider.column_parallel_linear(),
            core_attention=provider.core_attention(),
            linear_proj=provider.row_parallel_linear(),
            q_layernorm=qk_norm,
            k_layernorm=qk_norm,
        ),
    )


def first_layer(config: TransformerConfig) -> int:
    """Return the number, in the whole stack, of the first layer on this rank's stage."""
    return int(get_transformer_layer_offset(config))


def _bias_dropout_add(training: bool, fused: bool) -> Any:  # noqa: FBT001
    """Return Megatron's residual step for layers that have neither bias nor dropout."""

    def add(output_with_bias: tuple[Tensor, None], residual: Tensor, _: float) -> Tensor:
        return residual + output_with_bias[0]

    return add


def _process_groups(config: TransformerConfig) -> ProcessGroupCollection:
    groups = ProcessGroupCollection.use_mpu_process_groups()
    # Context parallelism is not offered, so its group is this rank alone.
    if config.tensor_model_parallel_size == 1:
        groups.tp = groups.cp
    if config.pipeline_model_parallel_size == 1:
        groups.pp = groups.cp
    return groups
