"""The mixin that ``default_moe`` adds to the class of an MoE layer: forward and backward pass with default vectors."""

from __future__ import annotations

import dataclasses
import math
import numbers
import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .adapters import MoeAdapter, new_instance, original_class
from .vectors import expert_sums, gates, in_backward, mix, no_autocast, update_default_vectors, wide_dtype

BUFFER = "default_vectors"
"""The name of the buffer that contains ê [E, D]; checkpoints of routegrad use the same name."""


@dataclass(frozen=True)
class Settings:
    """The settings of ``default_moe``; its docstring describes them."""

    beta: float = 0.9
    weighted: bool = True
    weight_norm: str = "sum_p"
    pass_forward: bool = True
    use_at_evaluation: bool = True
    micro_batches: int = 1

    def __post_init__(self) -> None:
        if not (isinstance(self.beta, numbers.Real) and 0 <= self.beta < 1):
            raise ValueError(f"beta: expected 0 <= beta < 1, got {self.beta!r}; the paper uses 0.65 to 0.999")
        object.__setattr__(self, "beta", float(self.beta))  # Also a NumPy scalar becomes a number that JSON can store.
        if self.weight_norm not in ("sum_p", "count"):
            raise ValueError(f'weight_norm: expected "sum_p" or "count", got {self.weight_norm!r}; choose one of the two')
        for name in ("weighted", "pass_forward", "use_at_evaluation"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name}: expected True or False, got {getattr(self, name)!r}; pass a bool")
        count = self.micro_batches
        if isinstance(count, bool) or not isinstance(count, numbers.Integral) or count < 1:
            raise ValueError(
                f"micro_batches: expected an integer of at least 1, got {count!r}; pass the number of "
                "forward passes per optimizer step"
            )

    @property
    def decay(self) -> float:
        """The decay of one forward pass: after the n passes of an optimizer step, the total decay is β."""
        return math.pow(self.beta, 1 / self.micro_batches)

    def to_dict(self) -> dict[str, Any]:
        """Returns the settings for ``config.default_moe``. ``micro_batches`` is omitted, as it belongs to a training run."""
        values = dataclasses.asdict(self)
        del values["micro_batches"]
        return values


@dataclass
class LayerState:
    """The state of a layer with default vectors, apart from its parameters and buffers."""

    name: str
    adapter: MoeAdapter
    settings: Settings
    process_group: Any = None
    frozen: bool = False
    recorder: Any = None
    used: weakref.WeakValueDictionary[int, Tensor] = field(default_factory=weakref.WeakValueDictionary)
    """The ê of each pass whose autograd graph still exists, by the sequence number of the first node of the pass."""

    def keep(self, first_node: int, vectors: Tensor, node: Any) -> None:
        """Stores the ê of a pass for a recomputation, as long as ``node``, a node of the pass's graph, exists."""
        if node is not None:
            node.metadata[BUFFER] = self.used[first_node] = vectors

    def used_before(self, number: int) -> Tensor | None:
        """Returns the ê of the last pass that started before the autograd node ``number`` was created; None without one."""
        passes = {first: vectors for first, vectors in self.used.items() if first <= number}
        return passes[max(passes)] if passes else None

    def __deepcopy__(self, memo: Any) -> LayerState:
        # A copy in the same process uses the same process group.
        return dataclasses.replace(self, recorder=None, used=weakref.WeakValueDictionary())

    def __getstate__(self) -> dict[str, Any]:
        # Process groups, recorders and autograd graphs belong to one process.
        return {**self.__dict__, "process_group": None, "recorder": None, "used": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, used=weakref.WeakValueDictionary())


class DefaultMoeLayer:
    """Mixin for an MoE layer. Computes y = Σ_A q_i e_i(x) + Σ_{i∉A} q_i ê_i, and updates the moving averages ê.

    The buffer ``default_vectors`` contains ê [E, D] in float32, or float64 for a float64 model.
    """

    default_vectors: Tensor
    default_moe_state: LayerState

    def forward(self: Any, hidden: Tensor) -> Any:
        """Returns the same types and shapes as the original class of the layer, for hidden states [..., D]."""
        state: LayerState = self.default_moe_state
        adapter = state.adapter
        # Read in each pass, because transformers also follows a change of the router's top_k.
        shape = adapter.describe(self)
        shape.check(state.name)
        first_node = 0 if torch.compiler.is_compiling() else torch._C._autograd._get_sequence_nr()
        if hidden.shape[-1:] != (shape.hidden_size,):
            raise ValueError(
                f"{state.name}: expected hidden states [..., {shape.hidden_size}], got {list(hidden.shape)}; correct the "
                "input, or `hidden_size` of the MoeAdapter"
            )
        x = hidden.reshape(-1, shape.hidden_size)  # [T, D]
        z = adapter.logits(self, x)  # [T, E]
        self._check(x, z)
        wide = wide_dtype(z.dtype)
        with no_autocast(x):
            p, q, index = gates(z.to(wide), shape.top_k, shape.renormalize)
        rows = adapter.experts(self, x.repeat_interleave(shape.top_k, dim=0), index.reshape(-1))
        self._check_rows(rows, len(x) * shape.top_k, shape.hidden_size)
        rows = rows.reshape(-1, shape.top_k, shape.hidden_size)  # [T, K, D]
        with no_autocast(x):
            y = mix(rows, q, index, self._vectors(rows, p, index, first_node), state.settings.pass_forward)
        if state.recorder is not None:
            state.recorder.record(self, x, z, index, y)
        return adapter.output(self, hidden, y.to(hidden.dtype), z)

    def _check(self: Any, x: Tensor, z: Tensor) -> None:
        state, vectors = self.default_moe_state, self.default_vectors
        expected = (x.shape[0], vectors.shape[0])
        if tuple(z.shape) != expected:
            raise ValueError(
                f"{state.name}: expected router logits [tokens, experts] = {list(expected)}, got {list(z.shape)}; correct "
                "the `logits` callable of the MoeAdapter"
            )
        if vectors.dtype not in (torch.float32, torch.float64):
            raise TypeError(
                f"{state.name}: expected default vectors in float32, got {vectors.dtype}, in which small updates of the "
                "moving average are lost; do not cast buffers (for FSDP: MixedPrecision(buffer_dtype=torch.float32))"
            )

    def _check_rows(self: Any, rows: Tensor, count: int, width: int) -> None:
        if tuple(rows.shape) != (count, width):
            raise ValueError(
                f"{self.default_moe_state.name}: expected outputs of experts [tokens * top_k, hidden_size] = "
                f"{[count, width]}, got {list(rows.shape)}; correct the `experts` callable of the MoeAdapter"
            )

    def _vectors(self: Any, rows: Tensor, p: Tensor, index: Tensor, first_node: int) -> Tensor | None:
        """Returns the ê that this pass uses, after its update in training; None if the pass uses no default vectors."""
        state: LayerState = self.default_moe_state
        settings, recording = state.settings, state.recorder is not None
        if not self.training and not recording and not (settings.pass_forward and settings.use_at_evaluation):
            return None
        updating = self.training and torch.is_grad_enabled() and not state.frozen and not recording
        eager = not torch.compiler.is_compiling()
        if eager and in_backward():
            return self._vectors_of_recomputed_pass(updating).to(p.dtype, copy=True)
        if updating:
            vectors = self._updated_vectors(rows.detach(), p.detach(), index).to(p.dtype)
        else:
            vectors = self.default_vectors.to(p.dtype, copy=True)
        if eager and torch.is_grad_enabled():
            state.keep(first_node, vectors, rows.grad_fn or p.grad_fn)
        return vectors

    @torch.no_grad()
    def _updated_vectors(self: Any, rows: Tensor, p: Tensor, index: Tensor) -> Tensor:
        """Updates ê, and returns a copy of it."""
        settings, vectors = self.default_moe_state.settings, self.default_vectors
        by_count = not settings.weighted or settings.weight_norm == "count"
        sums, mass = expert_sums(rows, p, index, settings.weighted, by_count)
        return update_default_vectors(vectors, sums.to(vectors.dtype), mass.to(vectors.dtype), settings.decay, self._group())

    def _vectors_of_recomputed_pass(self: Any, updating: bool) -> Tensor:
        """Returns the ê that was used in the pass that gradient checkpointing now recomputes."""
        state, node = self.default_moe_state, torch._C._current_autograd_node()
        if updating and node.name().endswith("CheckpointFunctionBackward"):
            raise RuntimeError(
                f"{state.name}: expected a forward pass with gradients enabled before its recomputation, got gradient "
                "checkpointing with use_reentrant=True, whose first forward pass runs without gradients; call "
                'model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})'
            )
        # The node belongs to the pass that is recomputed. Autograd numbers nodes in the order in which it creates them, so
        # this is the last pass that started before the node.
        used = state.used_before(node._sequence_nr())
        return self.default_vectors if used is None else used

    def _group(self: Any) -> str:
        """Returns the name of the process group over which sums are added; "" without torch.distributed."""
        distributed = torch.distributed
        if not (distributed.is_available() and distributed.is_initialized()):
            return ""
        group = self.default_moe_state.process_group or distributed.group.WORLD
        return group.group_name

    def _apply(self: Any, fn: Any, recurse: bool = True) -> Any:
        """Moves and casts the layer. ê is not cast to a dtype smaller than float32."""
        vectors = self._buffers.pop(BUFFER)
        try:
            super()._apply(fn, recurse)  # type: ignore[misc]
            moved = fn(vectors)
            keep = moved.is_floating_point() and moved.dtype.itemsize >= 4
            vectors = moved if keep else vectors.to(moved.device)
        finally:
            self._buffers[BUFFER] = vectors
        return self

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        return new_instance, (DefaultMoeLayer, original_class(self, DefaultMoeLayer)), self.__dict__

    def extra_repr(self: Any) -> str:
        """Adds the settings to the layer's line in ``print(model)``."""
        own = super().extra_repr()  # type: ignore[misc]
        return ", ".join(filter(None, [own, str(self.default_moe_state.settings)]))


def layers_of(model: nn.Module) -> dict[str, Any]:
    """Returns the layers of ``model`` with default vectors, by name. Raises ValueError if there are none."""
    modules = model.named_modules() if isinstance(model, nn.Module) else ()
    found = {name: m for name, m in modules if isinstance(m, DefaultMoeLayer)}
    if not found:
        raise ValueError(
            f"expected a model with default vectors, got {type(model).__name__} without any; call "
            "routegrad.torch.default_moe(model) first"
        )
    return found
