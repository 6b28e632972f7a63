"""Measures what routers do: how many tokens each expert gets, and how close the router's gradient is to the dense one.

Letters as in ``vectors``: T tokens, E experts, D model width; g = ∂loss/∂y, s_i = ⟨g, e_i⟩.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .adapters import MoeAdapter, moe_layers
from .layer import layers_of
from .vectors import chosen_experts, gates, no_autocast, wide_dtype


@dataclass(frozen=True)
class RouterGradient:
    """How the gradient of one layer's router weight [E, D] compares with the dense one.

    Relative errors are ‖dW − dW_dense‖ / ‖dW_dense‖. NaN where a gradient is zero.

    Attributes:
        layer: the layer's name.
        cosine: cosine similarity of the gradient with default vectors.
        relative_error: its relative error.
        topk_cosine: cosine similarity without default vectors, at the same g.
        topk_relative_error: its relative error.
        optimal_scale: the factor on the default vectors' term with the smallest error in dW; below 1/2 the
            gradient without default vectors is the closer one.
    """

    layer: str
    cosine: float
    relative_error: float
    topk_cosine: float
    topk_relative_error: float
    optimal_scale: float


class _Recorder:
    """Input, logits and g of each layer in one pass."""

    def __init__(self) -> None:
        self.passes: dict[nn.Module, dict[str, Tensor]] = {}

    def record(self, layer: nn.Module, x: Tensor, z: Tensor, index: Tensor, y: Tensor) -> None:
        found = {"x": x.detach(), "z": z.detach(), "index": index}
        self.passes[layer] = found
        if not y.requires_grad:
            raise RuntimeError(
                f"expected outputs with gradients, got none in {type(layer).__name__}; let the model's parameters require "
                "gradients"
            )
        y.register_hook(lambda g: found.update(g=g.detach()))


@contextlib.contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode in every module, and afterwards the mode that each had."""
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _forward(model: nn.Module, batch: Any) -> Any:
    return model(**batch) if isinstance(batch, Mapping) else model(batch)


def _model_loss(model: nn.Module, batch: Any) -> Tensor:
    """The model's own loss, without the auxiliary loss of transformers."""
    if not isinstance(batch, Mapping):
        raise TypeError(f"batch: expected a mapping with `input_ids`, got {type(batch).__name__}; or pass `loss`")
    inputs = {"labels": batch["input_ids"], **batch} if "input_ids" in batch else dict(batch)
    found = model(**{**inputs, "output_router_logits": False}).loss
    if found is None:
        raise ValueError("expected a model that returns a loss, got None; pass `loss`, a function of (model, batch)")
    return found


def router_gradient_similarity(
    model: nn.Module, batch: Any, *, loss: Callable[[nn.Module, Any], Tensor] | None = None, reference: str = "densemixer"
) -> list[RouterGradient]:
    """Compares each router's gradient with the one that sees every expert, at the same forward pass and g.

    One pass in evaluation mode (no dropout) with default vectors as in training but not updated; then every expert runs
    on every token, layer by layer. Gradients of parameters are left as they were.

    Args:
        model: a model with default vectors.
        batch: the keyword arguments of the model's forward; labels default to ``input_ids``.
        loss: computes the loss instead, as a function of (model, batch).
        reference: "densemixer", the gradient of DenseMixer; or "default", the method's own with e_i(x) in place of ê_i.
            They are equal unless the model renormalizes its weights.

    Raises:
        NotImplementedError: the weights are sharded over ranks, as by FSDP.
    """
    if reference not in ("densemixer", "default"):
        raise ValueError(f'reference: expected "densemixer" or "default", got {reference!r}; choose one of the two')
    layers, recorder = layers_of(model), _Recorder()
    if any(hasattr(p, "full_tensor") for p in model.parameters()):
        raise NotImplementedError(
            "expected whole weights on each rank, got weights sharded over ranks; measure a copy of the model without FSDP"
        )
    for layer in layers.values():
        layer.default_moe_state.recorder = recorder
    try:
        with _evaluation(model), torch.enable_grad():
            value = (loss or _model_loss)(model, batch)
            # Only the hooks on the layers' outputs are wanted, not the parameters' gradients.
            parameters = [p for p in model.parameters() if p.requires_grad]
            torch.autograd.grad(value, parameters, allow_unused=True)
        with _evaluation(model), torch.no_grad():
            return [_compare(name, layer, recorder.passes[layer], reference) for name, layer in layers.items()]
    finally:
        for layer in layers.values():
            layer.default_moe_state.recorder = None


def router_weight_gradients(layer: Any, x: Tensor, z: Tensor, g: Tensor, reference: str) -> dict[str, Tensor]:
    """Gradients of the router's weight [E, D] by "topk", "default" and "dense", for x [T, D], z [T, E] and g [T, D].

    dW = Σ_t dz xᵀ with dz in the closed forms of each method; autograd has no part in it.
    """
    state = layer.default_moe_state
    adapter, shape, wide = state.adapter, state.shape, wide_dtype(x.dtype)
    p, q, index = gates(z.to(wide), shape.top_k, shape.renormalize)
    on = torch.zeros_like(p).scatter(1, index, 1.0)
    g = g.to(wide)
    every = torch.stack([_scores(adapter, layer, x, g, i) for i in range(shape.num_experts)], dim=1)  # s [T, E]
    with no_autocast(x):
        vectors = g @ layer.default_vectors.to(wide).t()
        scores = {"topk": every * on, "default": every * on + vectors * (1 - on), "dense": every}

        def dz(s: Tensor, densemixer: bool) -> Tensor:
            if not shape.renormalize:
                return p * (s - (p * s).sum(1, keepdim=True))
            if densemixer:
                inner = on * (on * q * s).sum(1, keepdim=True) + ((1 - on) * p * s).sum(1, keepdim=True)
            else:
                inner = on * (q * s).sum(1, keepdim=True)
            return q * (s - inner)

        return {name: dz(s, name == "dense" and reference == "densemixer").t() @ x.to(wide) for name, s in scores.items()}


def _scores(adapter: MoeAdapter, layer: nn.Module, x: Tensor, g: Tensor, expert: int) -> Tensor:
    """⟨g, e_i(x)⟩ [T] of one expert."""
    index = torch.full((len(x),), expert, dtype=torch.long, device=x.device)
    return (g * adapter.experts(layer, x, index).to(g.dtype)).sum(dim=1)


def _compare(name: str, layer: Any, found: dict[str, Tensor], reference: str) -> RouterGradient:
    if "g" not in found:
        raise RuntimeError(f"{name}: expected a loss that depends on the layer, got one that does not; check `loss`")
    gradients = router_weight_gradients(layer, found["x"], found["z"], found["g"], reference)
    topk, default, dense = (gradients[k].double().cpu().flatten() for k in ("topk", "default", "dense"))

    def cosine(a: Tensor) -> float:
        return float(a @ dense / (a.norm() * dense.norm()))

    def error(a: Tensor) -> float:
        return float((a - dense).norm() / dense.norm())

    step = default - topk
    scale = float((dense - topk) @ step / (step @ step))
    return RouterGradient(name, cosine(default), error(default), cosine(topk), error(topk), scale)


def expert_load(model: nn.Module, batch: Any, *, adapters: Mapping[type, MoeAdapter] | None = None) -> dict[str, Tensor]:
    """How many tokens of a batch choose each expert: int64 [E] on the CPU, by the name of the MoE layer.

    One pass in evaluation mode without gradients. The model may have default vectors or not. Padding counts: the layers
    do not know of it.

    Args:
        model: a model of transformers as for ``default_moe``, or any with ``adapters``.
        batch: the keyword arguments of the model's forward, or its one argument.
        adapters: describes the MoE layers of other models, by class.
    """
    layers = moe_layers(model, adapters)
    loads: dict[str, Tensor] = {}

    def counter(name: str, adapter: MoeAdapter) -> Callable[..., None]:
        def count(layer: nn.Module, arguments: tuple[Tensor, ...], keywords: dict[str, Tensor]) -> None:
            shape = adapter.describe(layer)
            hidden = arguments[0] if arguments else next(iter(keywords.values()))
            z = adapter.logits(layer, hidden.reshape(-1, shape.hidden_size))
            index = chosen_experts(z.to(wide_dtype(z.dtype)).softmax(dim=-1), shape.top_k)
            load = torch.bincount(index.flatten().cpu(), minlength=shape.num_experts)
            loads[name] = loads.get(name, 0) + load

        return count

    hooks = [m.register_forward_pre_hook(counter(n, a), with_kwargs=True) for n, (m, a) in layers.items()]
    try:
        with _evaluation(model), torch.no_grad():
            _forward(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    return loads
