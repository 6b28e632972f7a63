"""Adds default vectors to a model's MoE layers, and changes or removes them."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import numbers
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .adapters import (
    TRANSFORMERS,
    Float32Gate,
    MoeAdapter,
    check_transformers,
    moe_layers,
    original_class,
    own_forward,
    routers,
    subclass,
)
from .layer import BUFFER, DefaultMoeLayer, LayerState, Settings, layers_of
from .vectors import wide_dtype

Model = TypeVar("Model", bound=nn.Module)


def default_moe(
    model: Model,
    beta: float = 0.9,
    weighted: bool = True,
    pass_forward: bool = True,
    *,
    weight_norm: str = "sum_p",
    init_std: float = 0.0,
    use_at_evaluation: bool = True,
    micro_batches: int = 1,
    process_group: Any = None,
    adapters: Mapping[type, MoeAdapter] | None = None,
    generator: torch.Generator | None = None,
) -> Model:
    """Adds default vectors to every MoE layer of ``model``, in place, and returns the model.

    For each token, the output of every expert that did not run is replaced by its default vector:
    y = Σ_A q_i e_i(x) + Σ_{i∉A} q_i ê_i. The router therefore gets a gradient for every expert. ê_i is a moving average of
    the outputs of expert i, and a constant in the backward pass. It is updated in each forward pass in training mode with
    gradients enabled, before the pass uses it, and in no other pass. Parameters keep their names. Each layer gets a buffer
    ``default_vectors`` [E, D] in float32, or float64 for a float64 model. Call this function before the model is wrapped
    (DDP, FSDP, torch.compile).

    Args:
        model: a mixtral, olmoe, qwen2_moe or qwen3_moe of transformers, or any model with ``adapters``.
        beta: decay of the moving average per optimizer step, 0 <= beta < 1.
        weighted: whether the average weights tokens by their router probability; otherwise all tokens have equal weight.
        pass_forward: whether default vectors are added to the output; otherwise they change only the router's gradient.
        weight_norm: the divisor of a weighted average: "sum_p", the sum of the probabilities, or "count", the number of
            tokens.
        init_std: standard deviation of the initial vectors; with 0, they are zero.
        use_at_evaluation: whether evaluation mode uses default vectors; without ``pass_forward`` it never uses them.
        micro_batches: number n of forward passes per optimizer step (gradient accumulation); the decay of each pass is
            beta^(1/n). ``set_micro_batches`` changes it.
        process_group: the ranks over which the averages are computed; if None and torch.distributed is initialized, all
            ranks. Each of these ranks must run the same number of forward passes.
        adapters: the adapters of the MoE layers of other models, by class.
        generator: the random number generator for the initial vectors if ``init_std`` is not 0.

    Raises:
        TypeError: the model has no MoE layers, its weights are not floating-point numbers, or an argument has the wrong
            type.
        ValueError: a setting is out of range, or a layer already has default vectors.
        NotImplementedError: the experts are distributed over ranks.
    """
    settings = Settings(beta, weighted, weight_norm, pass_forward, use_at_evaluation, micro_batches)
    if not (isinstance(init_std, numbers.Real) and 0 <= init_std < math.inf):
        raise ValueError(f"init_std: expected a number of at least 0, got {init_std!r}; with 0, vectors start at zero")
    if not (generator is None or isinstance(generator, torch.Generator)):
        raise TypeError(f"generator: expected a torch.Generator or None, got {type(generator).__name__}")
    distributed = torch.distributed
    if process_group is not None and not (
        distributed.is_available() and isinstance(process_group, distributed.ProcessGroup)
    ):
        raise TypeError(
            f"process_group: expected a torch.distributed.ProcessGroup or None, got {type(process_group).__name__}; for a "
            "DeviceMesh pass mesh.get_group()"
        )
    states = []
    for name, (layer, adapter) in moe_layers(model, adapters).items():
        state = LayerState(name, adapter, settings, process_group)
        _check(layer, state)
        states.append((layer, state))
    for layer, state in states:
        _convert(layer, state, float(init_std), generator)
    if hasattr(model, "config"):
        model.config.default_moe = settings.to_dict()
    return model


def _check(layer: nn.Module, state: LayerState) -> None:
    """Raises ValueError, TypeError or NotImplementedError if the layer cannot be converted. Does not convert it."""
    name = state.name
    if isinstance(layer, DefaultMoeLayer):
        raise ValueError(
            f"{name}: expected a layer without default vectors, got one that already has them; call default_moe only once"
        )
    known = state.adapter is TRANSFORMERS
    if not all([own_forward(module) for module in (layer, *(routers(layer) if known else ()))]):
        raise ValueError(
            f"{name}: expected the forward method of the layer's class, got one that was set on the layer itself, as by "
            "device_map and the hooks of accelerate; call default_moe before they are added"
        )
    state.adapter.describe(layer).check(name)
    if known:
        check_transformers(layer, name)
    dtype = next((p.dtype for p in layer.parameters()), torch.float32)
    if not dtype.is_floating_point or dtype.itemsize < 2:
        raise TypeError(
            f"{name}: expected weights in float32, float64, bfloat16 or float16, got {dtype}; load the model without "
            "quantization"
        )


def _convert(layer: Any, state: LayerState, init_std: float, generator: torch.Generator | None) -> None:
    parameter = next(layer.parameters(), torch.empty(0))
    shape, dtype = state.adapter.describe(layer), wide_dtype(parameter.dtype)
    size = (shape.num_experts, shape.hidden_size)
    start = torch.zeros(size, dtype=dtype)
    if init_std:
        start = torch.randn(size, dtype=dtype, generator=generator) * init_std
    if state.adapter is TRANSFORMERS:
        for router in routers(layer):
            router.__class__ = subclass(Float32Gate, type(router))
    layer.register_buffer(BUFFER, start.to(parameter.device))
    layer.default_moe_state = state
    layer.__class__ = subclass(DefaultMoeLayer, type(layer))


def remove_default_moe(model: Model) -> Model:
    """Removes the default vectors of ``model``, in place, and returns the model.

    Restores the original class of each layer. The weights keep their current values. Call this function before the model
    is wrapped (DDP, FSDP, torch.compile).

    Raises:
        ValueError: the model has no default vectors.
    """
    for layer in layers_of(model).values():
        for module in layer.modules():
            for mixin in (DefaultMoeLayer, Float32Gate):
                if isinstance(module, mixin):
                    own_forward(module)
                    module.__class__ = original_class(module, mixin)
        del layer.default_vectors, layer.default_moe_state
    if hasattr(getattr(model, "config", None), "default_moe"):
        del model.config.default_moe
    return model


def set_micro_batches(model: nn.Module, micro_batches: int) -> None:
    """Sets the number n of forward passes per optimizer step; the decay of each pass is then beta^(1/n).

    Raises:
        ValueError: the model has no default vectors, or ``micro_batches`` is not an integer of at least 1.
    """
    for layer in layers_of(model).values():
        state = layer.default_moe_state
        state.settings = dataclasses.replace(state.settings, micro_batches=micro_batches)


def default_vectors(model: nn.Module) -> dict[str, Tensor]:
    """Returns ê [E, D] of every layer, by the layer's name. The tensors are the buffers, not copies of them.

    Raises:
        ValueError: the model has no default vectors.
    """
    return {name: layer.default_vectors for name, layer in layers_of(model).items()}


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Context manager in which forward passes in training mode use default vectors but do not update them.

    Raises:
        ValueError: the model has no default vectors.
    """
    states = [layer.default_moe_state for layer in layers_of(model).values()]
    before = [state.frozen for state in states]
    for state in states:
        state.frozen = True
    try:
        yield
    finally:
        for state, value in zip(states, before, strict=True):
            state.frozen = value
