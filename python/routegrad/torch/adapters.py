"""Describes MoE layers for ``default_moe``, and contains the description of the supported layers of transformers.

Notation: T tokens, E experts, K experts per token, D model width, R rows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .vectors import gates, no_autocast, wide_dtype


def _reshaped(layer: nn.Module, hidden: Tensor, y: Tensor, z: Tensor) -> Tensor:
    return y.reshape(hidden.shape)


@dataclass(frozen=True)
class MoeAdapter:
    """Describes a class of MoE layers by three callables and four values.

    The layer's ``forward`` must take the hidden states [..., D] as its only argument. Instead of each of the four values,
    a function that takes the layer and returns the value can be given.

    Attributes:
        logits: ``(layer, x [T, D]) -> z [T, E]``; returns the router's logits.
        experts: ``(layer, x [R, D], expert [R]) -> e [R, D]``; returns the output of expert ``expert[r]`` for each row r,
            not multiplied by the router's weight.
        output: ``(layer, hidden [..., D], y [T, D], z [T, E]) -> value``; returns the result of the layer's forward for
            the weighted sum y. A shared expert is added here. The default reshapes y to the shape of ``hidden``.
        num_experts, hidden_size, top_k: E, D and K.
        renormalize: whether the weights of the chosen experts are divided by their sum.
    """

    logits: Callable[[Any, Tensor], Tensor]
    experts: Callable[[Any, Tensor, Tensor], Tensor]
    output: Callable[[Any, Tensor, Tensor, Tensor], Any] = _reshaped
    num_experts: int | Callable[[Any], int] = 0
    hidden_size: int | Callable[[Any], int] = 0
    top_k: int | Callable[[Any], int] = 0
    renormalize: bool | Callable[[Any], bool] = False

    def describe(self, layer: nn.Module) -> Shape:
        """Returns the four values for one layer."""

        def number(value: Any) -> Any:
            return value(layer) if callable(value) else value

        return Shape(
            int(number(self.num_experts)),
            int(number(self.hidden_size)),
            int(number(self.top_k)),
            bool(number(self.renormalize)),
        )


class Shape(NamedTuple):
    """The values E, D and K of a layer, and whether it renormalizes the weights of the chosen experts."""

    num_experts: int
    hidden_size: int
    top_k: int
    renormalize: bool

    def check(self, name: str) -> None:
        """Raises ValueError unless 1 <= K <= E and D >= 1."""
        if not (1 <= self.top_k <= self.num_experts and self.hidden_size >= 1):
            raise ValueError(
                f"{name}: expected 1 <= top_k <= num_experts and hidden_size >= 1, got top_k {self.top_k}, num_experts "
                f"{self.num_experts}, hidden_size {self.hidden_size}; set them in the layer's MoeAdapter"
            )


class Float32Gate:
    """Mixin for the class of a router. Computes the logits in float32, or in float64 for float64 inputs."""

    def forward(self: Any, x: Tensor) -> Any:
        """Returns the logits z [T, E] of ``x`` [T, D]; for a router of transformers 5 also weights and indices [T, K]."""
        wide = wide_dtype(x.dtype)
        bias = getattr(self, "bias", None)
        with no_autocast(x):
            z = F.linear(x.to(wide), self.weight.to(wide), None if bias is None else bias.to(wide))
            if isinstance(self, nn.Linear):
                return z
            _, q, index = gates(z, self.top_k, getattr(self, "norm_topk_prob", True))
            return z, q.gather(1, index), index

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        return new_instance, (Float32Gate, original_class(self, Float32Gate)), self.__dict__


@functools.cache
def subclass(mixin: type, base: type) -> type:
    """Returns a class that inherits from ``mixin`` and ``base``, in this order."""
    return type(mixin.__name__ + base.__name__, (mixin, base), {"__module__": mixin.__module__})


def original_class(module: Any, mixin: type) -> type:
    """Returns the class of ``module`` without ``mixin``."""
    order = type(module).__mro__
    return order[order.index(mixin) + 1]


def new_instance(mixin: type, base: type) -> Any:
    """Returns an instance without attributes; copy and pickle set them."""
    cls = subclass(mixin, base)
    return cls.__new__(cls)


def _logits(layer: Any, x: Tensor) -> Tensor:
    z = layer.gate(x)
    return z[0] if isinstance(z, tuple) else z


def _experts(layer: Any, x: Tensor, expert: Tensor) -> Tensor:
    if not isinstance(layer.experts, nn.ModuleList):
        # Each row is passed as a token with one expert of weight 1, so every experts implementation of transformers works.
        return layer.experts(x, expert.unsqueeze(1), x.new_ones(len(x), 1))
    order = expert.argsort(stable=True)
    counts = torch.bincount(expert, minlength=len(layer.experts)).tolist()
    # Experts without tokens also run: their gradients are then zeros and not None, as DDP requires.
    outputs = [run(rows) for run, rows in zip(layer.experts, x[order].split(counts), strict=True)]
    return torch.cat(outputs)[order.argsort()]


def _output(layer: Any, hidden: Tensor, y: Tensor, z: Tensor) -> Any:
    shared = getattr(layer, "shared_expert", None)
    if shared is not None:
        x = hidden.reshape(-1, hidden.shape[-1])
        y = y + layer.shared_expert_gate(x).sigmoid() * shared(x)
    y = y.reshape(hidden.shape)
    # In transformers 4 the layer also returns the logits, for the auxiliary loss.
    return (y, z) if isinstance(layer.experts, nn.ModuleList) else y


def _settings(layer: Any) -> Any:
    """Returns the module with ``top_k`` and ``num_experts``: the router in transformers 5, the layer in transformers 4."""
    return layer if isinstance(layer.experts, nn.ModuleList) else layer.gate


def routers(layer: Any) -> list[nn.Module]:
    """Returns the modules that compute the logits of a layer of transformers: the gate, or with PEFT the modules in it."""
    # A router of transformers 5 has top_k; a wrapper of PEFT also has the attributes of the module that it contains.
    modules = layer.gate.modules()
    return [m for m in modules if isinstance(m, nn.Linear) or (hasattr(m, "top_k") and next(m.children(), None) is None)]


def own_forward(module: nn.Module) -> bool:
    """Returns whether ``module`` has the forward method of its class.

    Removes a copy of this method in the module itself, as transformers 4 leaves it after a pass that returns router logits.
    """
    found = module.__dict__.get("forward")
    if getattr(found, "__func__", None) is type(module).forward:
        del module.forward
    return "forward" not in module.__dict__


def _num_experts(layer: Any) -> int:
    return _settings(layer).num_experts


def _hidden_size(layer: Any) -> int:
    return layer.gate.weight.shape[1]


def _top_k(layer: Any) -> int:
    return _settings(layer).top_k


def _renormalize(layer: Any) -> bool:
    # mixtral has no such setting and always renormalizes.
    return getattr(_settings(layer), "norm_topk_prob", True)


TRANSFORMERS = MoeAdapter(_logits, _experts, _output, _num_experts, _hidden_size, _top_k, _renormalize)
"""The adapter for the MoE layers of mixtral, olmoe, qwen2_moe and qwen3_moe, in transformers 4 and 5."""

_KNOWN = {
    f"transformers.models.{package}.modeling_{package}.{name}": TRANSFORMERS
    for package, name in [
        ("mixtral", "MixtralSparseMoeBlock"),
        ("olmoe", "OlmoeSparseMoeBlock"),
        ("qwen2_moe", "Qwen2MoeSparseMoeBlock"),
        ("qwen3_moe", "Qwen3MoeSparseMoeBlock"),
    ]
}


def moe_layers(model: Any, adapters: Mapping[type, MoeAdapter] | None) -> dict[str, tuple[Any, MoeAdapter]]:
    """Returns the MoE layers of ``model`` by name, each with its adapter.

    The adapter is the one that the layer was converted with, else the one of its class in ``adapters`` or of transformers.

    Raises:
        TypeError: the model has no MoE layers, or ``adapters`` has the wrong type.
    """
    adapters = {} if adapters is None else adapters
    if not isinstance(adapters, Mapping) or not all(
        isinstance(cls, type) and isinstance(adapter, MoeAdapter) for cls, adapter in adapters.items()
    ):
        raise TypeError(f"adapters: expected a dict of layer classes and their MoeAdapter, got {adapters!r}")
    modules = model.named_modules() if isinstance(model, nn.Module) else ()
    found = {name: (layer, _adapter_of(layer, adapters)) for name, layer in modules}
    layers = {name: (layer, adapter) for name, (layer, adapter) in found.items() if adapter is not None}
    if not layers:
        raise TypeError(
            f"expected a model with MoE layers of mixtral, olmoe, qwen2_moe or qwen3_moe, got {type(model).__name__} "
            "without any; describe its MoE layers with adapters={LayerClass: MoeAdapter(...)}"
        )
    return layers


def _adapter_of(layer: Any, adapters: Mapping[type, MoeAdapter]) -> MoeAdapter | None:
    if hasattr(layer, "default_moe_state"):
        return layer.default_moe_state.adapter
    for base in type(layer).__mro__:
        found = adapters.get(base) or _KNOWN.get(f"{base.__module__}.{base.__qualname__}")
        if found is not None:
            return found
    return None


def check_transformers(layer: Any, name: str) -> None:
    """Checks that ``default_moe`` supports a layer of transformers.

    Raises:
        ValueError: the layer adds noise to the router's input.
        NotImplementedError: the experts are distributed over ranks.
    """
    if getattr(layer, "jitter_noise", 0):
        raise ValueError(
            f"{name}: expected router_jitter_noise 0, got {layer.jitter_noise}; default vectors need the exact input of the "
            "experts: set config.router_jitter_noise = 0"
        )
    if getattr(layer.experts, "_is_expert_parallel", False):
        raise NotImplementedError(
            f"{name}: expected all experts on each rank, got expert parallelism; load the model without it"
        )
