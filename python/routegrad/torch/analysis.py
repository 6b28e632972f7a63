"""Measures routers: how many tokens each expert gets, and how close the router's gradient is to the dense gradient.

Notation as in ``vectors``: T tokens, E experts, D model width. In addition, g = ∂loss/∂y and s_i = ⟨g, e_i⟩.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .adapters import TRANSFORMERS, MoeAdapter, moe_layers
from .layer import DefaultMoeLayer, layers_of
from .vectors import chosen_experts, gates, in_backward, no_autocast, wide_dtype


@dataclass(frozen=True)
class RouterGradient:
    """Compares the gradient of one layer's router weight [E, D] with the dense gradient.

    Relative errors are ‖dW − dW_dense‖ / ‖dW_dense‖. Values are NaN if a gradient is zero.

    Attributes:
        layer: the layer's name.
        cosine: cosine similarity of the gradient that uses default vectors to the dense gradient.
        relative_error: relative error of the gradient that uses default vectors.
        topk_cosine: cosine similarity of the gradient without default vectors to the dense gradient, for the same g.
        topk_relative_error: relative error of the gradient without default vectors.
        optimal_scale: the factor on the term of the default vectors that minimizes the error of dW. If it is below 1/2,
            the gradient without default vectors is closer to the dense gradient.
    """

    layer: str
    cosine: float
    relative_error: float
    topk_cosine: float
    topk_relative_error: float
    optimal_scale: float


class _Recorder:
    """Records the input, the logits, the chosen experts and g of each pass of each layer."""

    def __init__(self) -> None:
        self.passes: dict[nn.Module, list[dict[str, Tensor]]] = {}

    def record(self, layer: nn.Module, x: Tensor, z: Tensor, index: Tensor, y: Tensor) -> None:
        if in_backward():
            return  # A recomputation for gradient checkpointing is not another pass.
        found = {"x": x.detach(), "z": z.detach(), "index": index}
        self.passes.setdefault(layer, []).append(found)
        if not y.requires_grad:
            raise RuntimeError(
                f"expected layer outputs that require gradients, got one that does not from {type(layer).__name__}; set "
                "requires_grad on the model's parameters"
            )
        y.register_hook(lambda g: found.update(g=g.detach()))


@contextlib.contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    """Sets evaluation mode in every module, and restores the mode of each module at the end.

    Compiled modules run without compilation, since code that was compiled before a hook was added does not call the hook.
    """
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    stance = getattr(torch.compiler, "set_stance", None)  # None before PyTorch 2.6.
    try:
        with stance("force_eager") if stance else contextlib.nullcontext():
            yield
    finally:
        for module, training in modes:
            module.training = training


def _forward(model: nn.Module, batch: Any) -> Any:
    return model(**batch) if isinstance(batch, Mapping) else model(batch)


def _model_loss(model: nn.Module, batch: Any) -> Tensor:
    """Returns the model's own loss, without the auxiliary loss of transformers."""
    if not isinstance(batch, Mapping):
        raise TypeError(f"batch: expected a mapping with `input_ids`, got {type(batch).__name__}; pass one, or pass `loss`")
    inputs = {"labels": batch["input_ids"], **batch} if "input_ids" in batch else dict(batch)
    found = model(**{**inputs, "output_router_logits": False}).loss
    if found is None:
        raise ValueError("expected a model that returns a loss, got None; pass `loss`, a function of (model, batch)")
    return found


def router_gradient_similarity(
    model: nn.Module, batch: Any, *, loss: Callable[[nn.Module, Any], Tensor] | None = None, reference: str = "densemixer"
) -> list[RouterGradient]:
    """Compares each router's gradient with the dense gradient, for which every expert runs, in the same forward pass.

    Runs one pass in evaluation mode (no dropout), without compilation. The pass uses default vectors as in training, but
    does not update them. Then every expert runs on every token, one layer after another. If ``loss`` runs several passes,
    their gradients are added. The gradients of the parameters do not change.

    Args:
        model: a model with default vectors.
        batch: the keyword arguments of the model's forward as a mapping; ``labels`` defaults to ``input_ids``.
        loss: a function of (model, batch) that computes the loss; the model's own loss if None.
        reference: the dense gradient: "densemixer", the gradient of DenseMixer, or "default", the gradient of Default MoE
            with e_i(x) in place of ê_i. They are equal unless the model renormalizes its weights.

    Returns:
        The comparison for each layer with default vectors.

    Raises:
        ValueError: the model has no default vectors or returns no loss, or ``reference`` is unknown.
        TypeError: ``batch`` is not a mapping, and ``loss`` is None.
        NotImplementedError: the weights are sharded over ranks, for example by FSDP.
    """
    if reference not in ("densemixer", "default"):
        raise ValueError(f'reference: expected "densemixer" or "default", got {reference!r}; choose one of the two')
    layers, recorder = layers_of(model), _Recorder()
    if any(hasattr(p, "full_tensor") for p in model.parameters()):
        raise NotImplementedError(
            "expected all weights on each rank, got weights sharded over ranks; measure a copy of the model without FSDP"
        )
    for layer in layers.values():
        layer.default_moe_state.recorder = recorder
    try:
        with _evaluation(model), torch.enable_grad():
            value = (loss or _model_loss)(model, batch)
            # This runs the hooks on the layers' outputs; the gradients of the parameters are not used.
            parameters = [p for p in model.parameters() if p.requires_grad]
            torch.autograd.grad(value, parameters, allow_unused=True)
        with _evaluation(model), torch.no_grad():
            return [_compare(name, layer, recorder.passes.get(layer, []), reference) for name, layer in layers.items()]
    finally:
        for layer in layers.values():
            layer.default_moe_state.recorder = None


def router_weight_gradients(layer: Any, x: Tensor, z: Tensor, g: Tensor, reference: str) -> dict[str, Tensor]:
    """Returns the gradients of the router's weight [E, D] by "topk", "default" and "dense".

    The arguments are x [T, D], z [T, E] and g [T, D]. dW = Σ_t dz xᵀ, where dz is computed with the formula of each method
    and without autograd.
    """
    state = layer.default_moe_state
    adapter, shape, wide = state.adapter, state.adapter.describe(layer), wide_dtype(x.dtype)
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
    """Returns ⟨g, e_i(x)⟩ [T] for one expert i."""
    index = torch.full((len(x),), expert, dtype=torch.long, device=x.device)
    return (g * adapter.experts(layer, x, index).to(g.dtype)).sum(dim=1)


def _compare(name: str, layer: Any, passes: list[dict[str, Tensor]], reference: str) -> RouterGradient:
    used = [found for found in passes if "g" in found]
    if not used:
        raise RuntimeError(f"{name}: expected a loss that depends on the layer, got one that does not; check `loss`")
    gradients = [router_weight_gradients(layer, found["x"], found["z"], found["g"], reference) for found in used]
    topk, default, dense = (sum(g[k].double().cpu().flatten() for g in gradients) for k in ("topk", "default", "dense"))

    def cosine(a: Tensor) -> float:
        return float(a @ dense / (a.norm() * dense.norm()))

    def error(a: Tensor) -> float:
        return float((a - dense).norm() / dense.norm())

    step = default - topk
    scale = float((dense - topk) @ step / (step @ step))
    return RouterGradient(name, cosine(default), error(default), cosine(topk), error(topk), scale)


def _choices(layer: Any, adapter: MoeAdapter, x: Tensor, top_k: int) -> Tensor:
    """Returns the experts [T, K] that the layer chooses for ``x`` [T, D].

    Without default vectors, a layer of transformers chooses with torch.topk, whose choice among equal logits is its own.
    """
    if adapter is TRANSFORMERS and not isinstance(layer, DefaultMoeLayer):
        found = layer.gate(x)
        if isinstance(found, tuple):
            return found[2]
        return found.softmax(dim=1, dtype=torch.float).topk(top_k, dim=-1).indices
    z = adapter.logits(layer, x)
    return chosen_experts(z.to(wide_dtype(z.dtype)).softmax(dim=-1), top_k)


def expert_load(model: nn.Module, batch: Any, *, adapters: Mapping[type, MoeAdapter] | None = None) -> dict[str, Tensor]:
    """Counts how many tokens of a batch choose each expert.

    Runs one pass in evaluation mode, without gradients and without compilation. The model can have default vectors or not.
    Padding tokens are counted like other tokens, since an MoE layer has no information about padding.

    Args:
        model: a model of transformers that ``default_moe`` supports, or any model with ``adapters``.
        batch: the keyword arguments of the model's forward as a mapping, or its only argument.
        adapters: the adapters of the MoE layers of other models, by class.

    Returns:
        The counts for each MoE layer, by the layer's name; int64 [E] on the CPU.

    Raises:
        TypeError: the model has no MoE layers, or ``adapters`` has the wrong type.
        RuntimeError: an MoE layer did not run.
    """
    layers = moe_layers(model, adapters)
    loads: dict[str, Tensor] = {}

    def counter(name: str, adapter: MoeAdapter) -> Callable[..., None]:
        def count(layer: nn.Module, arguments: tuple[Tensor, ...], keywords: dict[str, Tensor]) -> None:
            shape = adapter.describe(layer)
            hidden = arguments[0] if arguments else next(iter(keywords.values()))
            index = _choices(layer, adapter, hidden.reshape(-1, shape.hidden_size), shape.top_k)
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
    missing = layers.keys() - loads.keys()
    if missing:
        raise RuntimeError(
            f"{min(missing)}: expected a pass that runs this layer, got one that does not; pass a batch for which every MoE "
            "layer runs, and before PyTorch 2.6 a model that is not compiled"
        )
    return loads
