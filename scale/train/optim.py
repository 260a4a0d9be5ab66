"""Parameter groups, learning rate, AdamW in Megatron's wrappers, moving average of the weights.

The optimizer is built by hand: Megatron's factory decays every matrix, tables of names and of
modulation among them, and takes another AdamW when Transformer Engine happens to be installed.
"""

from __future__ import annotations

import math
import types
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from scale.config import OptimizerConfig, Precision
from scale.model.megatron_import import megatron_import

with megatron_import():
    from megatron.core import parallel_state
    from megatron.core.optimizer import (
        Float16OptimizerWithFloat16Params,
        FP32Optimizer,
        MegatronOptimizer,
        ParamKey,
        get_megatron_optimizer,
    )
    from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
    from megatron.core.optimizer.optimizer_config import ParamWithNamePredicate


def learning_rate(
    step: int, *, peak: float, warmup_steps: int, max_steps: int, final_fraction: float
) -> float:
    r"""Return the rate of optimizer step ``step`` (the first is 1): never loaded, always computed.

    .. math:: \eta(n) = \eta_{max} \frac{n}{w}, \; n \le w; \quad
        \eta(n) = \eta_{max} (f + (1 - f) \tfrac{1}{2} (1 + \cos \pi \frac{n - w}{N - w}))

    Examples
    --------
    >>> [
    ...     learning_rate(n, peak=1.0, warmup_steps=2, max_steps=4, final_fraction=0.1)
    ...     for n in (1, 2, 4)
    ... ]
    [0.5, 1.0, 0.1]
    """
    warmup = min(warmup_steps, max_steps)
    if step <= warmup:
        return peak * step / warmup
    done = min(1.0, (step - warmup) / max(1, max_steps - warmup))
    return peak * (final_fraction + (1.0 - final_fraction) * 0.5 * (1.0 + math.cos(math.pi * done)))


def decayed_parameters(model: nn.Module) -> set[str]:
    """Return the names of the parameters that weight decay acts on: the matrices of linear maps.

    Norms, biases and scales have one dimension; tables of names or of modulation and the seeds of
    pooling are rows that are looked up, not maps. A matrix is a ``weight`` of two dimensions
    outside of ``nn.Embedding``, or a stack of matrices (three dimensions).
    """
    names = set()
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            is_map = name == "weight" and not isinstance(module, nn.Embedding)
            if parameter.ndim >= 3 or (parameter.ndim == 2 and is_map):
                names.add(f"{prefix}.{name}" if prefix else name)
    return names


def build_optimizer(
    model: nn.Module, config: OptimizerConfig, *, lr: float, precision: Precision, distributed: bool
) -> MegatronOptimizer:
    """Return AdamW in Megatron's wrapper for the precision, with the gradients of a wrapped model.

    Parameters
    ----------
    model
        The chunk in Megatron's ``DistributedDataParallel``.
    config
        Decay, betas, clipping.
    lr
        Peak rate; :func:`set_rate` sets the rate of each step.
    precision
        bf16 weights get fp32 copies.
    distributed
        Spread the state over the data parallel ranks (ZeRO-1).
    """
    decayed = decayed_parameters(model)
    beta_1, beta_2 = config.betas
    settings = MegatronOptimizerConfig(
        optimizer="adam",
        lr=lr,
        min_lr=lr * config.final_lr_fraction,
        weight_decay=config.weight_decay,
        adam_beta1=beta_1,
        adam_beta2=beta_2,
        adam_eps=1e-8,
        clip_grad=config.clip_norm,
        bf16=precision is Precision.bf16,
        params_dtype=torch.bfloat16 if precision is Precision.bf16 else torch.float32,
        use_distributed_optimizer=distributed,
    )
    if distributed:
        return _spread_optimizer(model, settings, decayed)
    groups = [
        _group([p for n, p in _trained(model) if n in decayed], settings, decays=True),
        _group([p for n, p in _trained(model) if n not in decayed], settings, decays=False),
    ]
    adamw = torch.optim.AdamW(
        groups,
        lr=lr,
        betas=(beta_1, beta_2),
        eps=1e-8,
        weight_decay=config.weight_decay,
        fused=True,  # one pass over the state in place of ten: a third of the time on a CPU
    )
    wrapper: MegatronOptimizer
    if precision is Precision.bf16:
        wrapper = Float16OptimizerWithFloat16Params(adamw, settings, None, initialise_state)
    else:
        wrapper = FP32Optimizer(adamw, settings, initialise_state)
    wrapper.grad_stats_parallel_group = parallel_state.get_model_parallel_group()
    wrapper.tp_group = parallel_state.get_tensor_model_parallel_group()
    return wrapper


def set_rate(optimizer: MegatronOptimizer, *, lr: float, weight_decay: float) -> None:
    """Set rate and decay of every parameter group for the step to come."""
    for group in optimizer.param_groups:
        group["lr"] = lr
        group["weight_decay"] = weight_decay * group["wd_mult"]


@torch.no_grad()
def clip_gradients(optimizer: MegatronOptimizer, max_norm: float) -> float:
    r"""Scale the gradients, of all ranks alike, to a norm of at most ``max_norm``.

    .. math:: g \leftarrow g \min\left(1, \frac{m}{\| g \| + 10^{-6}}\right)

    The rule of Megatron's ``clip_grad_norm``, which goes from Python to each gradient several
    times: 1 % of a step on a CPU.

    Parameters
    ----------
    optimizer
        With prepared gradients. Which of them count, and over which ranks, is Megatron's to say.
    max_norm
        Largest norm.

    Returns
    -------
    float
        Norm of the gradient of the whole model before clipping; a collective.
    """
    counted = optimizer.get_main_grads_for_grad_norm()
    squared = torch.zeros_like(optimizer.get_loss_scale()).sum()
    if counted:
        squared = torch.stack(torch._foreach_norm(counted)).square_().sum()
    dist.all_reduce(squared, group=optimizer.get_grad_stats_parallel_group())
    norm = math.sqrt(float(squared))
    share = max_norm / (norm + 1e-6)
    if share < 1.0:
        own = [p.grad for p in optimizer.get_parameters() if p.grad is not None]
        torch._foreach_mul_(own, share)
    return norm


def initialise_state(optimizer: torch.optim.Optimizer, config: object = None) -> None:
    """Make the state of AdamW before a first step, so that a checkpoint has where to load into."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if not optimizer.state[parameter]:
                optimizer.state[parameter] = {
                    "step": _step_tensor(0.0, parameter),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }


def _step_tensor(step: float, parameter: Tensor) -> Tensor:
    """Return the number of updates of a parameter, beside which the fused AdamW wants it."""
    return torch.tensor(step, device=parameter.device)


def _trained(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((n, p) for n, p in model.named_parameters() if p.requires_grad)


def _group(
    parameters: list[nn.Parameter], settings: MegatronOptimizerConfig, *, decays: bool
) -> dict[str, Any]:
    # Loading a checkpoint finds its groups by the first four keys; both groups exist on every
    # rank, also where one is empty.
    return {
        "params": parameters,
        "wd_mult": 1.0 if decays else 0.0,
        "lr_mult": 1.0,
        "is_expert_parallel": False,
        "is_decoupled_lr": False,
        "default_config": True,
        "max_lr": settings.lr,
        "min_lr": settings.min_lr,
        "weight_decay": settings.weight_decay if decays else 0.0,
    }


def _spread_optimizer(
    model: nn.Module, settings: MegatronOptimizerConfig, decayed: set[str]
) -> MegatronOptimizer:
    """Return Megatron's DistributedOptimizer with the same two groups."""
    undecayed = ParamWithNamePredicate("undecayed", lambda parameter, name: name not in decayed)
    chained = get_megatron_optimizer(
        settings,
        [model],
        config_overrides={ParamKey(with_name_predicate=undecayed): {"wd_mult": 0.0}},
        use_gloo_process_groups=False,
    )
    (optimizer,) = chained.chained_optimizers
    for group in optimizer.param_groups:
        group["fused"] = True  # Megatron's factory does not ask for it
    return optimizer


def prepare_spread_state(optimizer: MegatronOptimizer) -> None:
    """Give a DistributedOptimizer the state that its loading expects to find.

    Megatron-core 0.16 to 0.19 makes it with Transformer Engine's optimizer only; with torch's it
    fails on the empty state, or goes on with other numbers.
    """
    initialise_state(optimizer.optimizer)


def load_spread_state(optimizer: MegatronOptimizer, state: dict[str, Any]) -> None:
    """Load the state of a DistributedOptimizer around torch's AdamW.

    Megatron-core leaves the step of a parameter out of what it sets, and lets all parameters share
    one step tensor, which AdamW would then count up once per parameter. Both are mended on this
    instance; no class is patched.
    """
    inner = optimizer.optimizer

    def keep_step(self: Any, parameter: nn.Parameter, tensors: dict[str, Tensor]) -> None:
        group, order = self.model_param_group_index_map[parameter]
        own = inner.state[inner.param_groups[group]["params"][order]]
        type(self)._set_main_param_and_optimizer_states(
            self, parameter, {**tensors, "step": own["step"]}
        )

    optimizer._set_main_param_and_optimizer_states = types.MethodType(keep_step, optimizer)
    try:
        optimizer.load_state_dict(state)
    finally:
        del optimizer._set_main_param_and_optimizer_states
    for group in inner.param_groups:
        for parameter in group["params"]:
            inner.state[parameter]["step"] = _step_tensor(float(group["step"]), parameter)


class MovingAverage:
    r"""Moving average of the weights in fp32, which validation and prediction use.

    .. math:: \bar\theta_{n+1} = \beta_n \bar\theta_n + (1 - \beta_n) \theta, \quad
        \beta_n = \min(\beta, (1 + n) / (10 + n))

    with n the updates so far: without the warm-up a run of 500 steps at 0.999 would keep 61 % of
    the initial weights.

    Parameters
    ----------
    model
        Its parameters are averaged, frozen ones too, so that the average is a whole model.
    decay
        :math:`\beta`.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._parameters = dict(model.named_parameters())
        self._decay = decay
        self.weights: dict[str, Tensor] = {}
        self.restart()

    @torch.no_grad()
    def restart(self) -> None:
        """Start the average at the present weights."""
        self.weights = {
            name: source.detach().to(torch.float32, copy=True)
            for name, source in zip(self._parameters, self._sources(), strict=True)
        }

    @torch.no_grad()
    def update(self, num_updates: int) -> None:
        """Take the present weights in; ``num_updates`` is the number of updates before this one."""
        beta = min(self._decay, (1.0 + num_updates) / (10.0 + num_updates))
        sources = [source.detach().float() for source in self._sources()]
        torch._foreach_lerp_(list(self.weights.values()), sources, 1.0 - beta)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Put the average into the model for a ``with`` block; afterwards its bits are back."""
        parameters = list(self._parameters.values())
        with torch.no_grad():
            own = [parameter.detach().clone() for parameter in parameters]
            _copy(self.weights.values(), parameters)
        try:
            yield
        finally:
            with torch.no_grad():
                _copy(own, parameters)

    def _sources(self) -> Iterator[Tensor]:
        # The fp32 copy of a bf16 weight is whole only where optimizer state is not spread.
        for parameter in self._parameters.values():
            main = getattr(parameter, "main_param", None)
            spread = getattr(parameter, "main_param_sharded", False)
            yield parameter if main is None or spread else main


def _copy(sources: Iterable[Tensor], targets: Iterable[Tensor]) -> None:
    for source, target in zip(sources, targets, strict=True):
        target.copy_(source)
