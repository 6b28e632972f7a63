"""Gives a model's MoE layers default vectors, and changes them afterwards."""

from __future__ import annotations

import contextlib
import dataclasses
import math
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
    """Gives every MoE layer of ``model`` default vectors, in place, and returns the model.

    For each token the experts that did not run contribute their default vector: y = Σ_A q_i e_i(x) + Σ_{i∉A} q_i ê_i,
    so that the router gets a gradient for every expert. ê is a moving average of each expert's outputs, a constant in
    the backward pass. It is updated before use in each forward pass in training mode with gradients enabled, and in no
    other. Parameters keep their names; each layer gets a buffer ``default_vectors`` [E, D] in float32, or float64 for a
    float64 model. Call this before the model is wrapped (DDP, FSDP, torch.compile).

    Args:
        model: a mixtral, olmoe, qwen2_moe or qwen3_moe of transformers, or any model with ``adapters``.
        beta: decay of the moving average per optimizer step, 0 <= beta < 1.
        weighted: whether a token counts in the average by its router probability, or all tokens alike.
        pass_forward: whether default vectors enter the output, or the router's gradient alone.
        weight_norm: what a weighted average is divided by: "sum_p", the sum of the probabilities, or "count".
        init_std: standard deviation of the vectors at the start; 0 starts at zero.
        use_at_evaluation: whether evaluation mode uses them; without ``pass_forward`` it never does.
        micro_batches: forward passes per optimizer step (gradient accumulation); each decays by beta^(1/n).
            ``set_micro_batches`` changes it.
        process_group: the ranks over which each average is taken; all ranks if torch.distributed is initialized.
            Each must run the same number of forward passes.
        adapters: describes the MoE layers of other models, by class.
        generator: draws the vectors at the start where ``init_std`` is not 0.

    Raises:
        TypeError: no MoE layer was found, its weights are not floating-point numbers, or an argument has another type.
        ValueError: a setting is out of range, or a layer has default vectors already.
    """
    settings = Settings(beta, weighted, weight_norm, pass_forward, use_at_evaluation, micro_batches)
    if not (isinstance(init_std, (int, float)) and 0 <= init_std < math.inf):
        raise ValueError(f"init_std: expected a number of at least 0, got {init_std!r}; 0 starts at zero")
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
        state = LayerState(name, adapter.describe(layer), adapter, settings, process_group)
        _check(layer, state)
        states.append((layer, state))
    for layer, state in states:
        _convert(layer, state, init_std, generator)
    if hasattr(model, "config"):
        model.config.default_moe = settings.to_dict()
    return model


def _check(layer: nn.Module, state: LayerState) -> None:
    """Raises before anything has been changed."""
    name = state.name
    if isinstance(layer, DefaultMoeLayer):
        raise ValueError(f"{name}: expected a layer without default vectors, got one that has them; call default_moe once")
    if "forward" in layer.__dict__:
        raise ValueError(
            f"{name}: expected the forward method of its class, got one set on the layer, as device_map and hooks of "
            "accelerate do; call default_moe before"
        )
    state.shape.check(name)
    if state.adapter is TRANSFORMERS:
        check_transformers(layer, name)
    dtype = next((p.dtype for p in layer.parameters()), torch.float32)
    if not dtype.is_floating_point or dtype.itemsize < 2:
        raise TypeError(
            f"{name}: expected weights in float32, float64, bfloat16 or float16, got {dtype}; load the model without "
            "quantization"
        )


def _convert(layer: Any, state: LayerState, init_std: float, generator: torch.Generator | None) -> None:
    parameter = next(layer.parameters(), torch.empty(0))
    size, dtype = (state.shape.num_experts, state.shape.hidden_size), wide_dtype(parameter.dtype)
    start = torch.zeros(size, dtype=dtype)
    if init_std:
        start = torch.randn(size, dtype=dtype, generator=generator) * init_std
    if state.adapter is TRANSFORMERS:
        layer.gate.__class__ = subclass(Float32Gate, type(layer.gate))
    layer.register_buffer(BUFFER, start.to(parameter.device))
    layer.default_moe_state = state
    layer.__class__ = subclass(DefaultMoeLayer, type(layer))


def remove_default_moe(model: Model) -> Model:
    """Undoes ``default_moe`` in place, and returns the model: its layers as they were, with the weights of now.

    Call it before the model is wrapped. Raises ValueError where there are no default vectors.
    """
    for layer in layers_of(model).values():
        layer.__class__ = original_class(layer, DefaultMoeLayer)
        if isinstance(getattr(layer, "gate", None), Float32Gate):
            layer.gate.__class__ = original_class(layer.gate, Float32Gate)
        del layer.default_vectors, layer.default_moe_state
    if hasattr(model, "config"):
        del model.config.default_moe
    return model


def set_micro_batches(model: nn.Module, micro_batches: int) -> None:
    """Says how many forward passes make an optimizer step from now on; each decays by beta^(1/n)."""
    for layer in layers_of(model).values():
        state = layer.default_moe_state
        state.settings = dataclasses.replace(state.settings, micro_batches=micro_batches)


def default_vectors(model: nn.Module) -> dict[str, Tensor]:
    """ê [E, D] of every layer by the layer's name; the tensors are the buffers themselves."""
    return {name: layer.default_vectors for name, layer in layers_of(model).items()}


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """A context in which forward passes in training mode use default vectors without updating them."""
    states = [layer.default_moe_state for layer in layers_of(model).values()]
    before = [state.frozen for state in states]
    for state in states:
        state.frozen = True
    try:
        yield
    finally:
        for state, value in zip(states, before, strict=True):
            state.frozen = value
