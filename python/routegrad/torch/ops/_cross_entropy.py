"""The output head and its cross-entropy in one operator. Tokens are processed in chunks, so [T, V] logits are not stored."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._grouped_gemm import WEIGHTS
from ._launch import BF16, F32, I32, as_indices, bf16, call, check, check_indices, check_multiples_of_8, empty

_NAME, _BACKWARD = "routegrad::cross_entropy", "routegrad::cross_entropy_backward"
_TOKENS = 2048
"""The number of tokens per chunk."""


def _check(name: str, x: Tensor, weight: Tensor, targets: Tensor) -> None:
    check(name, "x", x, ["T", "D"], [BF16], x)
    check(name, "weight", weight, ["V", x.shape[1]], WEIGHTS, x)
    check(name, "targets", targets, [x.shape[0]], [I32], x)
    check_multiples_of_8(name, V=weight.shape[0], D=x.shape[1])


class _Chunks:
    """Computes one chunk of tokens at a time: float32 logits, and their statistics, one pair per 128 logits of a row."""

    def __init__(self, x: Tensor, weight: Tensor, targets: Tensor) -> None:
        self.x, self.weight, self.targets = x, bf16(weight), targets
        self.vocabulary = weight.shape[0]
        tokens = min(len(x), _TOKENS)
        self.logits = empty(x, tokens, self.vocabulary, dtype=F32)
        self.statistics = empty(x, tokens, -(-self.vocabulary // 128), 2, dtype=F32)

    def run(self, losses: Tensor, first: int, dlogits: Tensor | None) -> int:
        """Computes the losses [rows] of the chunk that starts at token ``first``, and returns its number of rows.

        Writes softmax − onehot to ``dlogits`` [rows, V], if given.
        """
        x = self.x[first : first + _TOKENS]
        rows, hidden = x.shape
        common = dict(logits=self.logits, statistics=self.statistics, tokens=rows, vocabulary=self.vocabulary)
        call("head_logits", x, x=x, w=self.weight, hidden=hidden, **common)
        targets = self.targets[first : first + rows]
        call("cross_entropy_rows", x, losses=losses, dlogits=dlogits, targets=targets, factor=1.0, **common)
        return rows


@torch.library.custom_op(_NAME, mutates_args=())
def _cross_entropy(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    _check(_NAME, x, weight, targets)
    check_indices(_NAME, "targets", targets, 0, weight.shape[0])
    losses, chunks = empty(x, len(x), dtype=F32), _Chunks(x, weight, targets)
    for first in range(0, len(x), _TOKENS):
        chunks.run(losses[first:], first, None)
    return losses


@_cross_entropy.register_fake
def _(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    _check(_NAME, x, weight, targets)
    return x.new_empty(x.shape[0], dtype=F32)


@torch.library.custom_op(_BACKWARD, mutates_args=())
def _cross_entropy_backward(
    dlosses: Tensor, x: Tensor, weight: Tensor, targets: Tensor, of_weight: bool
) -> tuple[Tensor, Tensor]:
    _check(_BACKWARD, x, weight, targets)
    check(_BACKWARD, "dlosses", dlosses, [x.shape[0]], [F32], x)
    check_indices(_BACKWARD, "targets", targets, 0, weight.shape[0])
    (tokens, hidden), vocabulary = x.shape, weight.shape[0]
    dx = torch.empty_like(x)
    dweight = torch.zeros_like(weight, dtype=F32) if of_weight else empty(x, 0, dtype=F32)
    chunks, losses = _Chunks(x, weight, targets), empty(x, min(tokens, _TOKENS), dtype=F32)
    whole = torch.empty_like(chunks.logits, dtype=BF16)
    for first in range(0, tokens, _TOKENS):
        rows = chunks.run(losses, first, whole)
        here = slice(first, first + rows)
        dlogits = whole[:rows].mul_(dlosses[here, None])
        sizes = dict(offsets=None, rows=rows, dout_rows=rows, experts=1, n=vocabulary, k=hidden)
        call("grouped_gemm_input_gradient", x, dx=dx[here], dout=dlogits, w=chunks.weight, **sizes)
        if of_weight:
            call(
                "grouped_gemm_weight_gradient", x, dw=dweight, dout=dlogits, x=x[here], x_rows=rows, accumulate=first > 0,
                **sizes,
            )  # fmt: skip
    return dx, dweight.to(weight.dtype)


@_cross_entropy_backward.register_fake
def _(dlosses: Tensor, x: Tensor, weight: Tensor, targets: Tensor, of_weight: bool) -> tuple[Tensor, Tensor]:
    _check(_BACKWARD, x, weight, targets)
    check(_BACKWARD, "dlosses", dlosses, [x.shape[0]], [F32], x)
    return torch.empty_like(x), torch.empty_like(weight) if of_weight else weight.new_empty(0)


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, dlosses: Tensor) -> tuple[Any, ...]:
    of_weight = ctx.needs_input_grad[1]
    dx, dweight = _cross_entropy_backward(dlosses.contiguous(), *ctx.saved_tensors, of_weight)
    return dx, dweight if of_weight else None, None


_cross_entropy.register_autograd(_gradients, setup_context=_save)


def token_losses(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Computes the cross-entropy of each token in nats: ``logsumexp(z_t) − z_t[target_t]`` with ``z = x Wᵀ`` in float32.

    Args:
        x: [T, D] bfloat16, the final hidden states.
        weight: W [V, D], the output head, bfloat16 or float32; float32 is rounded to bfloat16. V and D must be multiples
            of 8.
        targets: [T] int32 or int64, in 0 … V − 1.

    Returns:
        [T] float32, differentiable with respect to x and weight. The backward pass computes the logits again.

    Raises:
        IndexError: a target is outside the vocabulary, for CPU tensors. On a GPU, the loss of this token is NaN.
    """
    return _cross_entropy(x, weight, as_indices(_NAME, "targets", targets))


def cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int = -100) -> Tensor:
    """Computes the mean of ``token_losses`` over the tokens whose target is not ``ignore_index``.

    Returns:
        A float32 scalar, differentiable with respect to x and weight; NaN if every target is ``ignore_index``.

    Raises:
        TypeError: ``ignore_index`` is not an integer.
    """
    if not isinstance(ignore_index, int):
        raise TypeError(
            f"{_NAME}: expected ignore_index to be an integer, got {ignore_index!r}; to count every token, use "
            "token_losses(...).mean()"
        )
    targets = as_indices(_NAME, "targets", targets)
    counted = targets != ignore_index
    losses = token_losses(x, weight, targets.where(counted, 0))
    return losses.where(counted, 0.0).sum() / counted.sum()
