"""Combines the outputs of the experts with default vectors, and computes the gradient of the gates."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._dispatch import Dispatch
from ._launch import BF16, F32, I32, call, check, check_indices, check_multiples_of_8, constant, zeros

_COMBINE, _GATES = "routegrad::combine", "routegrad::gate_gradient"


def check_dispatch(name: str, maps: Dispatch, tokens: int, like: Tensor) -> int:
    """Checks that the maps have the shapes for this number of tokens, and returns the number of rows R."""
    check(name, "choices", maps.choices, [tokens, "K"], [I32], like)
    check(name, "slot_row", maps.slot_row, [tokens, maps.choices.shape[1]], [I32], like)
    rows = tokens * maps.choices.shape[1]
    check(name, "row_token", maps.row_token, [rows], [I32], like)
    check(name, "row_slot", maps.row_slot, [rows], [I32], like)
    return rows


def check_indices_of(name: str, maps: Dispatch, experts: int) -> None:
    """Raises IndexError if an index in the maps is out of range. Does not check maps on a GPU."""
    tokens, rows = maps.choices.shape[0], maps.row_token.shape[0]
    check_indices(name, "choices", maps.choices, 0, experts)
    check_indices(name, "row_token", maps.row_token, 0, tokens)
    check_indices(name, "row_slot", maps.row_slot, 0, rows)
    check_indices(name, "slot_row", maps.slot_row, -1, rows)


def check_vectors(name: str, vectors: Tensor | None, experts: int, hidden: int, like: Tensor) -> None:
    if vectors is not None:
        check(name, "vectors", vectors, [experts, hidden], [F32], like)


def run_combine(rows: Tensor, gates: Tensor | None, maps: Dispatch, vectors: Tensor | None, experts: int) -> Tensor:
    """Returns the sum of the rows of each token, [T, D], with gates and default vectors if given.

    The caller must check the arguments.
    """
    (tokens, slots), hidden = maps.choices.shape, rows.shape[1]
    y = zeros(rows, tokens, hidden, dtype=BF16)
    if tokens:
        call(
            "combine", rows, y=y, rows_in=rows, gates=gates, slot_row=maps.slot_row, choices=maps.choices, vectors=vectors,
            tokens=tokens, rows=rows.shape[0], experts=experts, hidden=hidden, slots=slots,
        )  # fmt: skip
    return y


def default_dots(dy: Tensor, maps: Dispatch, vectors: Tensor, experts: int, dy_rows: Tensor | None = None) -> Tensor:
    """Returns ⟨dy_t, ê_i⟩ [T, E], and writes dy sorted by expert to ``dy_rows`` [R, D], if given.

    The caller must check the arguments.
    """
    (tokens, slots), hidden = maps.choices.shape, dy.shape[1]
    dots = zeros(dy, tokens, experts, dtype=F32)
    if tokens:
        call(
            "default_dots", dy, dgates=dots, g_rows=dy_rows, g=dy, vectors=vectors,
            slot_row=None if dy_rows is None else maps.slot_row, tokens=tokens, rows=tokens * slots, experts=experts,
            hidden=hidden, slots=slots,
        )  # fmt: skip
    return dots


def gate_gradient_of(dots: Tensor, maps: Dispatch, of_vectors: Tensor | None, experts: int) -> Tensor:
    """Returns the gradient of the gates [T, E], in place in ``of_vectors``, the result of ``default_dots``, if given.

    The caller must check the arguments.
    """
    tokens, slots = maps.choices.shape
    dgates = zeros(dots, tokens, experts, dtype=F32) if of_vectors is None else of_vectors
    if tokens:
        call(
            "gate_gradient", dots, dgates=dgates, dots=dots, slot_row=maps.slot_row, choices=maps.choices, tokens=tokens,
            rows=dots.shape[0], experts=experts, slots=slots, dot_columns=dots.shape[1], keep=of_vectors is not None,
        )  # fmt: skip
    return dgates


def _check_combine(name: str, rows: Tensor, gates: Tensor, vectors: Tensor | None, maps: Dispatch) -> None:
    check(name, "rows", rows, ["R", "D"], [BF16], rows)
    check(name, "gates", gates, ["T", "E"], [F32], rows)
    tokens, experts = gates.shape
    check_multiples_of_8(name, D=rows.shape[1])
    check(name, "rows", rows, [check_dispatch(name, maps, tokens, rows), "D"], [BF16], rows)
    check_vectors(name, vectors, experts, rows.shape[1], rows)


@torch.library.custom_op(_COMBINE, mutates_args=())
def _combine(
    rows: Tensor, gates: Tensor, vectors: Tensor | None, choices: Tensor, offsets: Tensor, row_token: Tensor,
    row_slot: Tensor, slot_row: Tensor,
) -> Tensor:  # fmt: skip
    maps = Dispatch(choices, offsets, row_token, row_slot, slot_row)
    _check_combine(_COMBINE, rows, gates, vectors, maps)
    check_indices_of(_COMBINE, maps, gates.shape[1])
    return run_combine(rows, gates, maps, vectors, gates.shape[1])


@_combine.register_fake
def _(
    rows: Tensor, gates: Tensor, vectors: Tensor | None, choices: Tensor, offsets: Tensor, row_token: Tensor,
    row_slot: Tensor, slot_row: Tensor,
) -> Tensor:  # fmt: skip
    _check_combine(_COMBINE, rows, gates, vectors, Dispatch(choices, offsets, row_token, row_slot, slot_row))
    return rows.new_empty(gates.shape[0], rows.shape[1])


def _row_gates(gates: Tensor, maps: Dispatch) -> Tensor:
    """Returns the gate of each row, [R]."""
    return gates.gather(1, maps.choices.long()).flatten().index_select(0, maps.row_slot)


def _combine_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _combine_backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    rows, gates, vectors, *maps = ctx.saved_tensors
    maps, dy = Dispatch(*maps), dy.contiguous()
    dy_rows = dy.index_select(0, maps.row_token).float()  # [R, D]
    drows = (_row_gates(gates, maps).unsqueeze(1) * dy_rows).to(BF16) if ctx.needs_input_grad[0] else None
    dgates = None
    if ctx.needs_input_grad[1]:
        dots = (dy_rows * rows.float()).sum(1, keepdim=True)
        dgates = _gate_gradient(dots, dy, vectors, gates.shape[1], *maps)
    return drows, dgates, None, None, None, None, None, None


_combine.register_autograd(_combine_backward, setup_context=_combine_save)


def combine(rows: Tensor, gates: Tensor, maps: Dispatch, vectors: Tensor | None = None) -> Tensor:
    """Computes ``y_t = Σ_A gate_ti e_i(x_t) + Σ_{i∉A} gate_ti ê_i``, where the rows contain e_i(x_t).

    Args:
        rows: [R, D] bfloat16, sorted by expert; D must be a multiple of 8.
        gates: [T, E] float32.
        maps: the result of ``dispatch`` for the choices A.
        vectors: ê [E, D] float32, treated as constants; if None, the second sum is omitted.

    Returns:
        [T, D] bfloat16, differentiable with respect to rows and gates.
    """
    return _combine(rows, gates, constant(vectors), *maps)


def _check_gates(dots: Tensor, dy: Tensor, vectors: Tensor | None, num_experts: int, maps: Dispatch) -> None:
    check(_GATES, "dots", dots, ["R", "C"], [F32], dots)
    check(_GATES, "dy", dy, ["T", "D"], [BF16], dots)
    if not 1 <= num_experts <= 256:
        raise ValueError(f"{_GATES}: expected 1 to 256 experts, got {num_experts}")
    check_multiples_of_8(_GATES, D=dy.shape[1])
    check(_GATES, "dots", dots, [check_dispatch(_GATES, maps, dy.shape[0], dots), "C"], [F32], dots)
    check_vectors(_GATES, vectors, num_experts, dy.shape[1], dots)


@torch.library.custom_op(_GATES, mutates_args=())
def _gate_gradient(
    dots: Tensor, dy: Tensor, vectors: Tensor | None, num_experts: int, choices: Tensor, offsets: Tensor, row_token: Tensor,
    row_slot: Tensor, slot_row: Tensor,
) -> Tensor:  # fmt: skip
    maps = Dispatch(choices, offsets, row_token, row_slot, slot_row)
    _check_gates(dots, dy, vectors, num_experts, maps)
    check_indices_of(_GATES, maps, num_experts)
    of_vectors = None if vectors is None else default_dots(dy, maps, vectors, num_experts)
    return gate_gradient_of(dots, maps, of_vectors, num_experts)


@_gate_gradient.register_fake
def _(
    dots: Tensor, dy: Tensor, vectors: Tensor | None, num_experts: int, choices: Tensor, offsets: Tensor, row_token: Tensor,
    row_slot: Tensor, slot_row: Tensor,
) -> Tensor:  # fmt: skip
    _check_gates(dots, dy, vectors, num_experts, Dispatch(choices, offsets, row_token, row_slot, slot_row))
    return dots.new_empty(dy.shape[0], num_experts)


def _gate_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, _, vectors, _, *maps = inputs
    ctx.columns = inputs[0].shape[1]
    ctx.save_for_backward(vectors, *maps)


def _gate_backward(ctx: Any, ddgates: Tensor) -> tuple[Any, ...]:
    vectors, *maps = ctx.saved_tensors
    maps = Dispatch(*maps)
    ddots = _row_gates(ddgates, maps).unsqueeze(1).repeat(1, ctx.columns)
    ddy = None
    if vectors is not None:
        ddy = (ddgates.scatter(1, maps.choices.long(), 0.0) @ vectors).to(BF16)
    return ddots, ddy, None, None, None, None, None, None, None


_gate_gradient.register_autograd(_gate_backward, setup_context=_gate_save)


def gate_gradient(dots: Tensor, dy: Tensor, maps: Dispatch, num_experts: int, vectors: Tensor | None = None) -> Tensor:
    """Computes the gradient of every gate: ``Σ_c dots[r, c]`` if the token has a row r of the expert, else ``⟨dy_t, ê_i⟩``.

    Args:
        dots: [R, C] float32: C partial sums of ⟨dy, e_i(x)⟩ for each row.
        dy: [T, D] bfloat16; D must be a multiple of 8.
        maps: the result of ``dispatch`` for the choices.
        num_experts: E, at most 256.
        vectors: ê [E, D] float32, treated as constants; if None, the gradient is 0 for experts that were not chosen.

    Returns:
        [T, E] float32, differentiable with respect to dots and dy.
    """
    return _gate_gradient(dots, dy, constant(vectors), num_experts, *maps)
