"""The mean output of each expert, and the moving average of the means: the default vectors."""

from __future__ import annotations

import torch
from torch import Tensor

from ._dispatch import Dispatch
from ._grouped_gemm import check_runs
from ._launch import F32, I32, call, check, check_indices, constant, kernels

_SUMS, _UPDATE = "routegrad::expert_sums", "routegrad::expert_mean_update"
_WEIGHTINGS = {"plain": "WEIGHTING_PLAIN", "sum_p": "WEIGHTING_SUM_P", "count": "WEIGHTING_COUNT"}


def _check_sums(column_sums: Tensor, weights: Tensor | None, offsets: Tensor, row_token: Tensor, tokens: int) -> None:
    check(_SUMS, "offsets", offsets, ["E + 1"], [I32], column_sums)
    check(_SUMS, "row_token", row_token, ["R"], [I32], column_sums)
    experts, rows = offsets.shape[0] - 1, row_token.shape[0]
    check(_SUMS, "column_sums", column_sums, [rows // 64 + experts, "D"], [F32], column_sums)
    if weights is not None:
        check(_SUMS, "weights", weights, [tokens, experts], [F32], column_sums)


@torch.library.custom_op(_SUMS, mutates_args=())
def _expert_sums(
    column_sums: Tensor, weights: Tensor | None, offsets: Tensor, row_token: Tensor, tokens: int
) -> tuple[Tensor, Tensor]:
    _check_sums(column_sums, weights, offsets, row_token, tokens)
    experts, rows, hidden = offsets.shape[0] - 1, row_token.shape[0], column_sums.shape[1]
    check_runs(_SUMS, offsets, rows)
    check_indices(_SUMS, "row_token", row_token, 0, tokens)
    sums, masses = column_sums.new_zeros(experts, hidden), column_sums.new_zeros(experts, 2)
    if rows:
        call(
            "expert_sums", column_sums, sums=sums, masses=masses, column_sums=column_sums, gates=weights, offsets=offsets,
            row_token=row_token, rows=rows, tokens=tokens, experts=experts, hidden=hidden,
        )  # fmt: skip
    return sums, masses


@_expert_sums.register_fake
def _(column_sums: Tensor, weights: Tensor | None, offsets: Tensor, row_token: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    _check_sums(column_sums, weights, offsets, row_token, tokens)
    experts = offsets.shape[0] - 1
    return column_sums.new_empty(experts, column_sums.shape[1]), column_sums.new_empty(experts, 2)


def expert_sums(column_sums: Tensor, maps: Dispatch, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Computes ``Σ_r w_r e_r`` over the rows r of each expert, and the divisors for the means. Not differentiable.

    In distributed training, add both results over all ranks before ``expert_mean_update``.

    Args:
        column_sums: [R // 64 + E, D] float32, from ``swiglu_expert_rows``.
        maps: the maps that ``swiglu_expert_rows`` was called with.
        weights: the weights that ``swiglu_expert_rows`` was called with, [T, E] float32 or None.

    Returns:
        The sums [E, D] float32, and the masses [E, 2] float32: Σ w and the number of rows.
    """
    return _expert_sums(constant(column_sums), constant(weights), maps.offsets, maps.row_token, maps.choices.shape[0])


def _check_update(vectors: Tensor, sums: Tensor, masses: Tensor, beta: float, weighting: str) -> None:
    check(_UPDATE, "vectors", vectors, ["E", "D"], [F32], vectors)
    check(_UPDATE, "sums", sums, list(vectors.shape), [F32], vectors)
    check(_UPDATE, "masses", masses, [vectors.shape[0], 2], [F32], vectors)
    if not 0 <= beta <= 1:
        raise ValueError(f"{_UPDATE}: expected 0 <= beta <= 1, got {beta}")
    if weighting not in _WEIGHTINGS:
        raise ValueError(f"{_UPDATE}: expected weighting to be one of {', '.join(_WEIGHTINGS)}, got {weighting!r}")


@torch.library.custom_op(_UPDATE, mutates_args=("vectors",))
def _update(vectors: Tensor, sums: Tensor, masses: Tensor, beta: float, weighting: str) -> None:
    _check_update(vectors, sums, masses, beta, weighting)
    if vectors.data_ptr() % 16:
        raise ValueError(f"{_UPDATE}: expected vectors at a multiple of 16 bytes, got a slice at another address")
    call(
        "expert_mean_update", vectors, average=vectors, sums=sums, masses=masses, beta=vectors.new_full((1,), beta),
        experts=vectors.shape[0], hidden=vectors.shape[1], weighting=getattr(kernels(), _WEIGHTINGS[weighting]),
    )  # fmt: skip


@_update.register_fake
def _(vectors: Tensor, sums: Tensor, masses: Tensor, beta: float, weighting: str) -> None:
    _check_update(vectors, sums, masses, beta, weighting)


def expert_mean_update(vectors: Tensor, sums: Tensor, masses: Tensor, beta: float, weighting: str = "sum_p") -> None:
    """Updates the default vectors in place: ``ê_e ← β ê_e + (1 − β) sums_e / divisor_e``.

    ê_e does not change if its divisor is 0.

    Args:
        vectors: ê [E, D] float32; must not require gradients.
        sums: [E, D] float32, from ``expert_sums``.
        masses: [E, 2] float32, from ``expert_sums``.
        beta: the decay β, 0 <= β <= 1.
        weighting: the divisor: "sum_p", Σ w; "count", the number of rows; "plain", also the number of rows, for sums
            without weights.

    Raises:
        ValueError: ``vectors`` require gradients.
    """
    if isinstance(vectors, Tensor) and vectors.requires_grad:
        raise ValueError(
            f"{_UPDATE}: expected vectors that do not require gradients, got some that do; pass vectors.detach()"
        )
    _update(vectors, constant(sums), constant(masses), beta, weighting)
