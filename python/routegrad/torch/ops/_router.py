"""The router: softmax of the logits, the chosen experts, and the mean of logsumexp²."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._launch import BF16, F32, I32, call, check, check_multiples_of_8, empty

_NAME = "routegrad::router"


def _check(x: Tensor, weight: Tensor, top_k: int, selection_bias: Tensor | None) -> tuple[int, int, int]:
    check(_NAME, "x", x, ["T", "D"], [BF16], x)
    tokens, hidden = x.shape
    check(_NAME, "weight", weight, ["E", hidden], [F32], x)
    experts = weight.shape[0]
    check_multiples_of_8(_NAME, D=hidden)
    if not 1 <= experts <= 256:
        raise ValueError(f"{_NAME}: expected 1 to 256 experts, got {experts}")
    if not 1 <= top_k <= min(experts, 16):
        raise ValueError(f"{_NAME}: expected top_k from 1 to {min(experts, 16)}, got {top_k}")
    if selection_bias is not None:
        check(_NAME, "selection_bias", selection_bias, [experts], [F32], x)
    return tokens, experts, hidden


@torch.library.custom_op(_NAME, mutates_args=())
def _router(x: Tensor, weight: Tensor, top_k: int, selection_bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tokens, experts, hidden = _check(x, weight, top_k, selection_bias)
    scores, choices, z_loss, log_sum_exp = _router_outputs(x, weight, top_k)
    if tokens == 0:
        return scores, choices, z_loss.zero_(), log_sum_exp
    partials = empty(x, call("router_partials", x, tokens=tokens, experts=experts), dtype=F32)
    call(
        "router_forward", x, scores=scores, log_sum_exp=log_sum_exp, choices=choices, partials=partials,
        first_non_finite=empty(x, 1, dtype=I32), x=x, w=weight, selection_bias=selection_bias, tokens=tokens,
        experts=experts, hidden=hidden, choices_per_token=top_k,
    )  # fmt: skip
    statistics = empty(x, 2 * experts + 2, dtype=F32)
    call("router_statistics", x, statistics=statistics, partials=partials, tokens=tokens, experts=experts)
    return scores, choices, z_loss.copy_(statistics[2 * experts]), log_sum_exp


def _router_outputs(x: Tensor, weight: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tokens, experts = x.shape[0], weight.shape[0]
    return (
        empty(x, tokens, experts, dtype=F32),
        empty(x, tokens, top_k, dtype=I32),
        empty(x, dtype=F32),
        empty(x, tokens, dtype=F32),
    )


@_router.register_fake
def _(x: Tensor, weight: Tensor, top_k: int, selection_bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check(x, weight, top_k, selection_bias)
    return _router_outputs(x, weight, top_k)


@torch.library.custom_op("routegrad::router_backward", mutates_args=())
def _router_backward(
    dscores: Tensor, dz_loss: Tensor, scores: Tensor, log_sum_exp: Tensor, x: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    name = "routegrad::router_backward"
    check(name, "x", x, ["T", "D"], [BF16], x)
    tokens, hidden = x.shape
    check(name, "weight", weight, ["E", hidden], [F32], x)
    experts = weight.shape[0]
    for what, tensor, shape in [
        ("dscores", dscores, [tokens, experts]),
        ("dz_loss", dz_loss, []),
        ("scores", scores, [tokens, experts]),
        ("log_sum_exp", log_sum_exp, [tokens]),
    ]:
        check(name, what, tensor, shape, [F32], x)
    dx, dweight = torch.empty_like(x), torch.empty_like(weight)
    if tokens == 0:
        return dx, dweight.zero_()
    sizes = dict(tokens=tokens, experts=experts, hidden=hidden)
    partials = empty(x, call("router_backward_workspace", x, **sizes), dtype=F32)
    call(
        "router_backward", x, dx=dx, dz=torch.empty_like(scores), dw_partials=partials, scores=scores,
        log_sum_exp=log_sum_exp, dscores=dscores, dlse2=dz_loss, x=x, w=weight, **sizes,
    )  # fmt: skip
    call("router_weight_gradient", x, dw=dweight, dw_partials=partials, **sizes)
    return dx, dweight


@_router_backward.register_fake
def _(
    dscores: Tensor, dz_loss: Tensor, scores: Tensor, log_sum_exp: Tensor, x: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    scores, _, _, log_sum_exp = output
    ctx.mark_non_differentiable(log_sum_exp)
    ctx.save_for_backward(scores, log_sum_exp, inputs[0], inputs[1])


def _backward(ctx: Any, dscores: Tensor, _: Any, dz_loss: Tensor, __: Any) -> tuple[Any, ...]:
    dx, dweight = _router_backward(dscores.contiguous(), dz_loss.contiguous(), *ctx.saved_tensors)
    return dx, dweight, None, None


_router.register_autograd(_backward, setup_context=_save)


def router(x: Tensor, weight: Tensor, top_k: int, selection_bias: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Computes the probabilities ``p = softmax(x Wᵀ)``, and chooses the K experts with the largest p + bias for each token.

    Of equal values, the expert with the lower index is chosen. Logits and p have the accuracy of a float32 product.

    Args:
        x: [T, D] bfloat16; D must be a multiple of 8.
        weight: W [E, D] float32; E is at most 256.
        top_k: K, at most 16.
        selection_bias: [E] float32, added to p only for the choice of experts.

    Returns:
        p [T, E] float32; the chosen experts [T, K] int32, in ascending order; and the mean of logsumexp(z)² over the tokens,
        z = x Wᵀ, a float32 scalar. p and the mean are differentiable with respect to x and weight.
    """
    scores, choices, z_loss, _ = _router(x, weight, top_k, selection_bias)
    return scores, choices, z_loss
