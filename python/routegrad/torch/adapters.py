"""What ``default_moe`` needs to know of an MoE layer, and the layers of transformers that it knows.

T tokens, E experts, K experts per token, D model width, R rows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .vectors import gates, no_autocast, wide_dtype


def _reshaped(layer: nn.Module, hidden: Tensor, y: Tensor, z: Tensor) -> Tensor:
    return y.reshape(hidden.shape)


@dataclass(frozen=True)
class MoeAdapter:
    """Describes a class of MoE layers by three callables and four numbers.

    The layer's ``forward`` must take the hidden states [..., D] alone. A number may be a callable of the layer.

    Attributes:
        logits: ``(layer, x [T, D]) -> z [T, E]``, the router's logits.
        experts: ``(layer, x [R, D], expert [R]) -> e [R, D]``, the output of expert ``expert[r]`` for row r, unweighted.
        output: ``(layer, hidden [..., D], y [T, D], z [T, E]) -> value``, what the layer's forward returns for the
            weighted sum y: here a shared expert is added. The default gives y the shape of ``hidden``.
        num_experts, hidden_size, top_k: E, D, K.
        renormalize: whether the chosen experts' weights are divided by their sum.
    """

    logits: Callable[[Any, Tensor], Tensor]
    experts: Callable[[Any, Tensor, Tensor], Tensor]
    output: Callable[[Any, Tensor, Tensor, Tensor], Any] = _reshaped
    num_experts: int | Callable[[Any], int] = 0
    hidden_size: int | Callable[[Any], int] = 0
    top_k: int | Callable[[Any], int] = 0
    renormalize: bool | Callable[[Any], bool] = False

    def describe(self, layer: nn.Module) -> Shape:
        """The numbers for one layer."""

        def number(value: Any) -> Any:
            return value(layer) if callable(value) else value

        return Shape(
            int(number(self.num_experts)),
            int(number(self.hidden_size)),
            int(number(self.top_k)),
            bool(number(self.renormalize)),
        )


@dataclass(frozen=True)
class Shape:
    """E, D, K of a layer, and whether it renormalizes."""

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
    """Placed before the class of a router, whose logits it computes in float32 (float64 for float64)."""

    def forward(self: Any, x: Tensor) -> Any:
        """z [T, E] of ``x`` [T, D], or what transformers 5 returns: z, weights [T, K], indices [T, K]."""
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
    """``base`` with the methods of ``mixin`` placed before its own."""
    return type(mixin.__name__ + base.__name__, (mixin, base), {"__module__": mixin.__module__})


def original_class(module: Any, mixin: type) -> type:
    """The class before which ``mixin`` was placed."""
    order = type(module).__mro__
    return order[order.index(mixin) + 1]


def new_instance(mixin: type, base: type) -> Any:
    """An empty instance, which copy and pickle fill."""
    cls = subclass(mixin, base)
    return cls.__new__(cls)


def _logits(layer: Any, x: Tensor) -> Tensor:
    z = layer.gate(x)
    return z[0] if isinstance(z, tuple) else z


def _experts(layer: Any, x: Tensor, expert: Tensor) -> Tensor:
    if not isinstance(layer.experts, nn.ModuleList):
        # Each row is a token with one expert of weight 1: any implementation of transformers' experts computes that.
        return layer.experts(x, expert.unsqueeze(1), x.new_ones(len(x), 1))
    order = expert.argsort(stable=True)
    counts = torch.bincount(expert, minlength=len(layer.experts)).tolist()
    # Experts without tokens run too: their gradients are zeros, which DDP waits for.
    outputs = [run(rows) for run, rows in zip(layer.experts, x[order].split(counts), strict=True)]
    return torch.cat(outputs)[order.argsort()]


def _output(layer: Any, hidden: Tensor, y: Tensor, z: Tensor) -> Any:
    shared = getattr(layer, "shared_expert", None)
    if shared is not None:
        x = hidden.reshape(-1, hidden.shape[-1])
        y = y + layer.shared_expert_gate(x).sigmoid() * shared(x)
    y = y.reshape(hidden.shape)
    # transformers 4 returns the logits too, which it then takes for the auxiliary loss.
    return (y, z) if isinstance(layer.experts, nn.ModuleList) else y


def _settings(layer: Any) -> Any:
    """The module that has ``top_k`` and ``num_experts``: the router in transformers 5, the layer in transformers 4."""
    return layer if isinstance(layer.gate, nn.Linear) else layer.gate


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
"""The MoE layers of mixtral, olmoe, qwen2_moe and qwen3_moe, in transformers 4 and 5."""

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
    """The MoE layers of ``model`` by name, each with the adapter that it was given, or that of its class.

    Raises TypeError if there are none, or if ``adapters`` is of another type.
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
            "without any; describe its MoE layers by adapters={LayerClass: MoeAdapter(...)}"
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
    """Raises where a layer of transformers does what the method does not describe."""
    if getattr(layer, "jitter_noise", 0):
        raise ValueError(
            f"{name}: expected router_jitter_noise 0, got {layer.jitter_noise}; default vectors need the input that "
            "the experts see: set config.router_jitter_noise = 0"
        )
    if getattr(layer.experts, "_is_expert_parallel", False):
        raise NotImplementedError(
            f"{name}: expected all experts on each rank, got expert parallelism; load the model without it"
        )
