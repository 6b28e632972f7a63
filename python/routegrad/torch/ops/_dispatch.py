"""Dispatch: sorts rows by expert, and returns the maps between tokens and rows."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._launch import I32, as_indices, call, check, check_indices, empty, zeros

_NAME = "routegrad::dispatch"


class Dispatch(NamedTuple):
    """The order of R = T·K rows, one per token and chosen expert. Rows are sorted by expert, then by token.

    A slot is the pair of a token t and the index k of one of its choices; its number is t·K + k.

    Attributes:
        choices: [T, K] int32, the expert of each slot.
        offsets: [E + 1] int32; the rows of expert e are offsets[e] … offsets[e + 1] − 1.
        row_token: [R] int32, the token of each row.
        row_slot: [R] int32, the slot of each row.
        slot_row: [T, K] int32, the row of each slot.
    """

    choices: Tensor
    offsets: Tensor
    row_token: Tensor
    row_slot: Tensor
    slot_row: Tensor


def _check(choices: Tensor, num_experts: int) -> tuple[int, int]:
    check(_NAME, "choices", choices, ["T", "K"], [I32], choices)
    tokens, slots = choices.shape
    if not 1 <= num_experts <= 256:
        raise ValueError(f"{_NAME}: expected 1 to 256 experts, got {num_experts}")
    if not 1 <= slots <= num_experts:
        raise ValueError(f"{_NAME}: expected 1 to {num_experts} choices per token, got {slots}")
    return tokens, slots


def _check_different(choices: Tensor) -> None:
    """Raises ValueError if a token chose an expert twice. Not checked on a GPU."""
    if choices.device.type != "cpu":
        return
    ordered = choices.sort(dim=1).values
    tokens = (ordered[:, 1:] == ordered[:, :-1]).any(dim=1).nonzero()
    if len(tokens):
        token = tokens[0].item()
        raise ValueError(
            f"{_NAME}: expected different experts for a token, got {choices[token].tolist()} for token {token}; choose each "
            "expert at most once, as topk does"
        )


@torch.library.custom_op(_NAME, mutates_args=())
def _dispatch(choices: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tokens, slots = _check(choices, num_experts)
    rows = tokens * slots
    check_indices(_NAME, "choices", choices, 0, num_experts)
    _check_different(choices)
    offsets = zeros(choices, num_experts + 1, dtype=I32)
    row_token, row_slot = zeros(choices, rows, dtype=I32), zeros(choices, rows, dtype=I32)
    slot_row = torch.empty_like(choices)
    if rows == 0:
        return offsets, row_token, row_slot, slot_row
    fault, sizes = zeros(choices, 1, dtype=I32), dict(tokens=tokens, experts=num_experts, choices_per_token=slots)
    workspace = empty(choices, call("dispatch_workspace", choices, **sizes), dtype=torch.uint8)
    call(
        "dispatch_choices", choices, offsets=offsets, row_token=row_token, row_slot=row_slot, slot_row=slot_row, fault=fault,
        workspace=workspace, choices=choices, row_capacity=rows, **sizes,
    )  # fmt: skip
    if choices.is_cuda:
        # A device-side assertion, as in PyTorch for indices; the next synchronization reports it.
        torch._assert_async(fault[0] == 0, f"{_NAME}: expected choices in 0 … {num_experts - 1}")
    return offsets, row_token, row_slot, slot_row


@_dispatch.register_fake
def _(choices: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tokens, slots = _check(choices, num_experts)
    rows = tokens * slots
    return (
        empty(choices, num_experts + 1, dtype=I32),
        empty(choices, rows, dtype=I32),
        empty(choices, rows, dtype=I32),
        torch.empty_like(choices),
    )


def dispatch(choices: Tensor, num_experts: int) -> Dispatch:
    """Sorts the rows of tokens by expert, so that the rows of each expert are contiguous, as grouped products require.

    Args:
        choices: [T, K] int32 or int64, in 0 … E − 1; the choices of a token must be different experts.
        num_experts: E, at most 256.

    Returns:
        The choices in int32, and the maps between tokens and rows.

    Raises:
        IndexError: a choice is out of range, for CPU tensors. On a GPU, a device-side assertion fails.
        ValueError: a token chose an expert twice, for CPU tensors.
    """
    choices = as_indices(_NAME, "choices", choices)
    return Dispatch(choices, *_dispatch(choices, num_experts))
