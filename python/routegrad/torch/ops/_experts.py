"""SwiGLU experts as two grouped products. Their outputs are combined per token, or returned as rows with column sums."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._combine import check_dispatch, check_indices_of, check_vectors, default_dots, gate_gradient_of, run_combine
from ._dispatch import Dispatch
from ._grouped_gemm import WEIGHTS, check_runs, grouped_gemm_input_gradient, weight_gradient
from ._launch import BF16, F32, I32, bf16, call, check, check_multiples_of_8, constant, empty, zeros


class _Sizes:
    """Checks the arguments, and contains their sizes T, R, E, D and F."""

    def __init__(self, name: str, x: Tensor, gate_up: Tensor, down: Tensor, maps: Dispatch) -> None:
        check(name, "x", x, ["T", "D"], [BF16], x)
        self.tokens, self.hidden = x.shape
        check(name, "gate_up", gate_up, ["E", "2 F", self.hidden], WEIGHTS, x)
        self.experts, self.ffn = gate_up.shape[0], gate_up.shape[1] // 2
        if gate_up.shape[1] % 2:
            raise ValueError(
                f"{name}: expected gate_up of shape [E, 2 F, D], first F gate rows and then F up rows, got "
                f"{list(gate_up.shape)}"
            )
        check(name, "down", down, [self.experts, self.hidden, self.ffn], WEIGHTS, x)
        check_multiples_of_8(name, D=self.hidden, F=self.ffn)
        self.rows = check_dispatch(name, maps, self.tokens, x)
        check(name, "offsets", maps.offsets, [self.experts + 1], [I32], x)
        self._maps, self._name = maps, name

    def check_gates(self, what: str, gates: Tensor, x: Tensor) -> None:
        check(self._name, what, gates, [self.tokens, self.experts], [F32], x)

    def check_values(self) -> None:
        """Raises IndexError or ValueError if an index or an offset is out of range. Does not check tensors on a GPU."""
        check_indices_of(self._name, self._maps, self.experts)
        check_runs(self._name, self._maps.offsets, self.rows)


def _products(
    x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor | None, maps: Dispatch, s: _Sizes, sums: bool
) -> Any:
    """Returns the outputs of the experts [R, D], their column sums [R // 64 + E, D] or None, and h [R, 2F]."""
    h, a = empty(x, s.rows, 2 * s.ffn, dtype=BF16), empty(x, s.rows, s.ffn, dtype=BF16)
    out = zeros(x, s.rows, s.hidden, dtype=BF16)
    column_sums = zeros(x, s.rows // 64 + s.experts, s.hidden, dtype=F32) if sums else None
    if s.rows:
        shared = dict(offsets=maps.offsets, rows=s.rows, experts=s.experts, ffn=s.ffn, hidden=s.hidden)
        sorted_x = x.index_select(0, maps.row_token)
        call("grouped_swiglu_forward", x, h=h, a=a, x=sorted_x, w=bf16(gate_up), x_rows=s.rows, **shared)
        call(
            "grouped_down_forward", x, out=out, column_sums=column_sums, a=a, w=bf16(down), gates=weights,
            row_token=maps.row_token, tokens=s.tokens, **shared,
        )  # fmt: skip
    return out, column_sums, h


def _products_backward(
    dout: Tensor, x: Tensor, gates: Tensor, gate_up: Tensor, down: Tensor, h: Tensor, maps: Dispatch, s: _Sizes,
    of_weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Returns dx, dgate_up, ddown, and dots [R, C], the partial sums of ⟨dout, e(x)⟩ for each row.

    ``dout`` [R, D] is the gradient of each row before it is multiplied by the gate. Without ``of_weights``, dgate_up and
    ddown are empty.
    """
    sizes = dict(rows=s.rows, experts=s.experts, hidden=s.hidden, ffn=s.ffn)
    columns = call("dot_columns", x, **sizes)
    dh, scaled_a = torch.zeros_like(h), zeros(x, s.rows, s.ffn, dtype=BF16)
    dots = zeros(x, s.rows, columns, dtype=F32)
    call(
        "grouped_swiglu_backward", x, dh=dh, scaled_a=scaled_a, dots=dots, dout=dout, w=bf16(down), h=h, gates=gates,
        offsets=maps.offsets, row_token=maps.row_token, dout_rows=s.rows, dot_columns=columns, **sizes,
    )  # fmt: skip
    if of_weights:
        dgate_up = weight_gradient(dh, x.index_select(0, maps.row_token), maps.offsets, gate_up)
        ddown = weight_gradient(dout, scaled_a, maps.offsets, down)
    else:
        dgate_up, ddown = gate_up.new_empty(0), down.new_empty(0)
    dx_rows = grouped_gemm_input_gradient(dh, gate_up, maps.offsets)
    return run_combine(dx_rows, None, maps, None, s.experts), dgate_up, ddown, dots


def _weights(make: Callable[[Tensor], Tensor], gate_up: Tensor, down: Tensor, of_weights: bool) -> tuple[Tensor, Tensor]:
    """Returns tensors made by ``make`` for the gradients of the weights; without ``of_weights``, empty ones."""
    return (make(gate_up), make(down)) if of_weights else (gate_up.new_empty(0), down.new_empty(0))


_EXPERTS = "routegrad::swiglu_experts"


@torch.library.custom_op(_EXPERTS, mutates_args=())
def _experts(
    x: Tensor, gates: Tensor, gate_up: Tensor, down: Tensor, vectors: Tensor | None, choices: Tensor, offsets: Tensor,
    row_token: Tensor, row_slot: Tensor, slot_row: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    maps = Dispatch(choices, offsets, row_token, row_slot, slot_row)
    s = _Sizes(_EXPERTS, x, gate_up, down, maps)
    s.check_gates("gates", gates, x)
    s.check_values()
    check_vectors(_EXPERTS, vectors, s.experts, s.hidden, x)
    rows, _, h = _products(x, gate_up, down, None, maps, s, sums=False)
    return run_combine(rows, gates, maps, vectors, s.experts), h


@_experts.register_fake
def _(
    x: Tensor, gates: Tensor, gate_up: Tensor, down: Tensor, vectors: Tensor | None, choices: Tensor, offsets: Tensor,
    row_token: Tensor, row_slot: Tensor, slot_row: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    s = _Sizes(_EXPERTS, x, gate_up, down, Dispatch(choices, offsets, row_token, row_slot, slot_row))
    s.check_gates("gates", gates, x)
    check_vectors(_EXPERTS, vectors, s.experts, s.hidden, x)
    return torch.empty_like(x), x.new_empty(s.rows, 2 * s.ffn)


_EXPERTS_BACKWARD = "routegrad::swiglu_experts_backward"


@torch.library.custom_op(_EXPERTS_BACKWARD, mutates_args=())
def _experts_backward(
    dy: Tensor, x: Tensor, gates: Tensor, gate_up: Tensor, down: Tensor, h: Tensor, vectors: Tensor | None, choices: Tensor,
    offsets: Tensor, row_token: Tensor, row_slot: Tensor, slot_row: Tensor, of_weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    maps = Dispatch(choices, offsets, row_token, row_slot, slot_row)
    s = _Sizes(_EXPERTS_BACKWARD, x, gate_up, down, maps)
    s.check_gates("gates", gates, x)
    s.check_values()
    check(_EXPERTS_BACKWARD, "dy", dy, [s.tokens, s.hidden], [BF16], x)
    check(_EXPERTS_BACKWARD, "h", h, [s.rows, 2 * s.ffn], [BF16], x)
    check_vectors(_EXPERTS_BACKWARD, vectors, s.experts, s.hidden, x)
    if s.rows == 0:
        return torch.empty_like(x), torch.empty_like(gates), *_weights(torch.zeros_like, gate_up, down, of_weights)
    if vectors is None:
        dout, of_vectors = dy.index_select(0, row_token), None
    else:
        dout = empty(dy, s.rows, s.hidden, dtype=BF16)
        of_vectors = default_dots(dy, maps, vectors, s.experts, dout)
    dx, dgate_up, ddown, dots = _products_backward(dout, x, gates, gate_up, down, h, maps, s, of_weights)
    return dx, gate_gradient_of(dots, maps, of_vectors, s.experts), dgate_up, ddown


@_experts_backward.register_fake
def _(
    dy: Tensor, x: Tensor, gates: Tensor, gate_up: Tensor, down: Tensor, h: Tensor, vectors: Tensor | None, choices: Tensor,
    offsets: Tensor, row_token: Tensor, row_slot: Tensor, slot_row: Tensor, of_weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return torch.empty_like(x), torch.empty_like(gates), *_weights(torch.empty_like, gate_up, down, of_weights)


def _experts_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, gates, gate_up, down, vectors, *maps = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # Otherwise autograd would make a tensor of zeros [R, 2F] as the gradient of h.
    ctx.save_for_backward(x, gates, gate_up, down, output[1], vectors, *maps)


def _experts_gradients(ctx: Any, dy: Tensor | None, _: None) -> tuple[Any, ...]:
    if dy is None:
        return (None,) * 10
    of_weights = any(ctx.needs_input_grad[2:4])
    dx, dgates, *dweights = _experts_backward(dy.contiguous(), *ctx.saved_tensors, of_weights)
    return dx, dgates, *(dweights if of_weights else (None, None)), None, None, None, None, None, None


_experts.register_autograd(_experts_gradients, setup_context=_experts_save)


def swiglu_experts(
    x: Tensor, gates: Tensor, gate_up: Tensor, down: Tensor, maps: Dispatch, vectors: Tensor | None = None
) -> Tensor:
    """Computes the output of an MoE layer with SwiGLU experts: ``y_t = Σ_A gate_ti e_i(x_t) + Σ_{i∉A} gate_ti ê_i``, with
    ``e_i(x) = D_i (silu(gate) ⊙ up)`` and ``(gate, up) = G_i x``.

    For the backward pass, x, the gates and a tensor [R, 2F] are saved, but not the outputs of the experts.

    Args:
        x: [T, D] bfloat16.
        gates: [T, E] float32; without ``vectors``, only the gates of the chosen experts are used.
        gate_up: G [E, 2F, D] bfloat16 or float32; the first F rows are the gate weights, the last F rows the up weights.
            float32 is rounded to bfloat16 for the products.
        down: D [E, D, F] bfloat16 or float32, rounded like ``gate_up``. D and F must be multiples of 8.
        maps: the result of ``dispatch`` for the choices A.
        vectors: ê [E, D] float32, treated as constants; if None, the second sum is omitted.

    Returns:
        [T, D] bfloat16, differentiable with respect to x, gates, gate_up and down.
    """
    return _experts(x, gates, gate_up, down, constant(vectors), *maps)[0]


_ROWS = "routegrad::swiglu_expert_rows"


@torch.library.custom_op(_ROWS, mutates_args=())
def _rows(
    x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor | None, choices: Tensor, offsets: Tensor, row_token: Tensor,
    row_slot: Tensor, slot_row: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    maps = Dispatch(choices, offsets, row_token, row_slot, slot_row)
    s = _Sizes(_ROWS, x, gate_up, down, maps)
    if weights is not None:
        s.check_gates("weights", weights, x)
    s.check_values()
    return _products(x, gate_up, down, weights, maps, s, sums=True)


@_rows.register_fake
def _(
    x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor | None, choices: Tensor, offsets: Tensor, row_token: Tensor,
    row_slot: Tensor, slot_row: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    s = _Sizes(_ROWS, x, gate_up, down, Dispatch(choices, offsets, row_token, row_slot, slot_row))
    if weights is not None:
        s.check_gates("weights", weights, x)
    sums = empty(x, s.rows // 64 + s.experts, s.hidden, dtype=F32)
    return x.new_empty(s.rows, s.hidden), sums, x.new_empty(s.rows, 2 * s.ffn)


_ROWS_BACKWARD = "routegrad::swiglu_expert_rows_backward"


@torch.library.custom_op(_ROWS_BACKWARD, mutates_args=())
def _rows_backward(
    drows: Tensor, x: Tensor, gate_up: Tensor, down: Tensor, h: Tensor, choices: Tensor, offsets: Tensor, row_token: Tensor,
    row_slot: Tensor, slot_row: Tensor, of_weights: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    maps = Dispatch(choices, offsets, row_token, row_slot, slot_row)
    s = _Sizes(_ROWS_BACKWARD, x, gate_up, down, maps)
    s.check_values()
    check(_ROWS_BACKWARD, "drows", drows, [s.rows, s.hidden], [BF16], x)
    check(_ROWS_BACKWARD, "h", h, [s.rows, 2 * s.ffn], [BF16], x)
    if s.rows == 0:
        return torch.empty_like(x), *_weights(torch.zeros_like, gate_up, down, of_weights)
    ones = torch.ones(s.tokens, s.experts, dtype=F32, device=x.device)
    return _products_backward(drows, x, ones, gate_up, down, h, maps, s, of_weights)[:3]


@_rows_backward.register_fake
def _(
    drows: Tensor, x: Tensor, gate_up: Tensor, down: Tensor, h: Tensor, choices: Tensor, offsets: Tensor, row_token: Tensor,
    row_slot: Tensor, slot_row: Tensor, of_weights: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return torch.empty_like(x), *_weights(torch.empty_like, gate_up, down, of_weights)


def _rows_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, gate_up, down, _, *maps = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # As above, for the column sums and h.
    ctx.save_for_backward(x, gate_up, down, output[2], *maps)


def _rows_gradients(ctx: Any, drows: Tensor | None, *_: None) -> tuple[Any, ...]:
    if drows is None:
        return (None,) * 9
    of_weights = any(ctx.needs_input_grad[1:3])
    dx, *dweights = _rows_backward(drows.contiguous(), *ctx.saved_tensors, of_weights)
    return dx, *(dweights if of_weights else (None, None)), None, None, None, None, None, None


_rows.register_autograd(_rows_gradients, setup_context=_rows_save)


def swiglu_expert_rows(
    x: Tensor, gate_up: Tensor, down: Tensor, maps: Dispatch, weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Computes the output ``e_i(x_t)`` of each chosen expert as a row, and the column sums for ``expert_sums``.

    ``combine`` computes the layer's output from the rows.

    Args:
        x, gate_up, down, maps: as in ``swiglu_experts``.
        weights: [T, E] float32, the weight of each row in the sums; 1 if None.

    Returns:
        The rows [R, D] bfloat16, sorted by expert and differentiable with respect to x, gate_up and down; and the column
        sums [R // 64 + E, D] float32, not differentiable.
    """
    rows, column_sums, _ = _rows(x, gate_up, down, constant(weights), *maps)
    return rows, column_sums
