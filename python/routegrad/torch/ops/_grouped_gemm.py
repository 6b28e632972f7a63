"""Grouped products: a linear layer whose rows are sorted by expert, its input gradient and its weight gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._launch import BF16, F32, I32, bf16, call, check, check_multiples_of_8, zeros

WEIGHTS = [BF16, F32]
"""The supported dtypes of weights. float32 is rounded to bfloat16 for a product, but its gradient is not rounded."""


def check_runs(name: str, offsets: Tensor, rows: int) -> None:
    """Raises ValueError unless ``offsets`` start at 0, do not decrease and are at most ``rows``. Not checked on a GPU."""
    if offsets.device.type != "cpu":
        return
    found = offsets.tolist()
    if found[0] != 0 or found[-1] > rows or any(a > b for a, b in zip(found, found[1:], strict=False)):
        raise ValueError(f"{name}: expected offsets that start at 0, do not decrease and are at most {rows}, got {found}")


def _sizes(name: str, what: str, rows: Tensor, axis: int, weight: Tensor, offsets: Tensor) -> tuple[int, int, int, int]:
    """Checks the arguments of a product, and returns (R, E, N, K) for weight [E, N, K].

    ``rows`` [R, weight.shape[axis]] is called ``what`` in error messages.
    """
    check(name, "weight", weight, ["E", "N", "K"], WEIGHTS, rows)
    experts, n, k = weight.shape
    check(name, what, rows, ["R", weight.shape[axis]], [BF16], rows)
    check_multiples_of_8(name, N=n, K=k)
    check(name, "offsets", offsets, [experts + 1], [I32], rows)
    return rows.shape[0], experts, n, k


@torch.library.custom_op("routegrad::grouped_gemm", mutates_args=())
def grouped_gemm(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """Computes ``out_r = W_e x_r`` for the rows r of each expert e, offsets[e] … offsets[e + 1] − 1.

    Args:
        x: [R, K] bfloat16, sorted by expert.
        weight: W [E, N, K] bfloat16 or float32; float32 is rounded to bfloat16. N and K must be multiples of 8.
        offsets: [E + 1] int32, from ``dispatch``.

    Returns:
        [R, N] bfloat16, with zeros from row offsets[E] on. Differentiable with respect to x and weight.
    """
    rows, experts, n, k = _sizes("routegrad::grouped_gemm", "x", x, 2, weight, offsets)
    check_runs("routegrad::grouped_gemm", offsets, rows)
    out = zeros(x, rows, n, dtype=BF16)
    if rows:
        call(
            "grouped_gemm_forward", x, out=out, x=x, w=bf16(weight), offsets=offsets, rows=rows, x_rows=rows,
            experts=experts, n=n, k=k,
        )  # fmt: skip
    return out


@grouped_gemm.register_fake
def _(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    rows, _, n, _ = _sizes("routegrad::grouped_gemm", "x", x, 2, weight, offsets)
    return x.new_empty(rows, n)


@torch.library.custom_op("routegrad::grouped_gemm_input_gradient", mutates_args=())
def grouped_gemm_input_gradient(dout: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """Computes the input gradient of ``grouped_gemm``: ``dx_r = W_eᵀ dout_r`` for the rows r of each expert e.

    Args:
        dout: [R, N] bfloat16, sorted by expert.
        weight, offsets: as in ``grouped_gemm``.

    Returns:
        [R, K] bfloat16, with zeros from row offsets[E] on. Differentiable with respect to dout and weight.
    """
    rows, experts, n, k = _sizes("routegrad::grouped_gemm_input_gradient", "dout", dout, 1, weight, offsets)
    check_runs("routegrad::grouped_gemm_input_gradient", offsets, rows)
    dx = zeros(dout, rows, k, dtype=BF16)
    if rows:
        call(
            "grouped_gemm_input_gradient", dout, dx=dx, dout=dout, w=bf16(weight), offsets=offsets, rows=rows,
            dout_rows=rows, experts=experts, n=n, k=k,
        )  # fmt: skip
    return dx


@grouped_gemm_input_gradient.register_fake
def _(dout: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    rows, _, _, k = _sizes("routegrad::grouped_gemm_input_gradient", "dout", dout, 1, weight, offsets)
    return dout.new_empty(rows, k)


@torch.library.custom_op("routegrad::grouped_gemm_weight_gradient", mutates_args=())
def grouped_gemm_weight_gradient(dout: Tensor, x: Tensor, offsets: Tensor) -> Tensor:
    """Computes the weight gradient of ``grouped_gemm``: ``dW_e = Σ_r dout_r x_rᵀ``, in ascending order of the rows r.

    Args:
        dout: [R, N] bfloat16, sorted by expert.
        x: [R, K] bfloat16, sorted by expert.
        offsets: as in ``grouped_gemm``.

    Returns:
        [E, N, K] float32, differentiable with respect to dout and x. The backward pass of this operator rounds its incoming
        gradient to bfloat16.
    """
    experts, n, k = _weight_shape(dout, x, offsets)
    rows = dout.shape[0]
    check_runs("routegrad::grouped_gemm_weight_gradient", offsets, rows)
    dw = zeros(dout, experts, n, k, dtype=F32)
    if rows:
        call(
            "grouped_gemm_weight_gradient", dout, dw=dw, dout=dout, x=x, offsets=offsets, rows=rows, dout_rows=rows,
            x_rows=rows, experts=experts, n=n, k=k, accumulate=False,
        )  # fmt: skip
    return dw


def _weight_shape(dout: Tensor, x: Tensor, offsets: Tensor) -> tuple[int, int, int]:
    name = "routegrad::grouped_gemm_weight_gradient"
    check(name, "dout", dout, ["R", "N"], [BF16], dout)
    check(name, "x", x, [dout.shape[0], "K"], [BF16], dout)
    check(name, "offsets", offsets, ["E + 1"], [I32], dout)
    if len(offsets) < 2:
        raise ValueError(f"{name}: expected offsets of shape [E + 1] with at least one expert, got {list(offsets.shape)}")
    shape = (offsets.shape[0] - 1, dout.shape[1], x.shape[1])
    check_multiples_of_8(name, N=shape[1], K=shape[2])
    return shape


@grouped_gemm_weight_gradient.register_fake
def _(dout: Tensor, x: Tensor, offsets: Tensor) -> Tensor:
    return dout.new_empty(_weight_shape(dout, x, offsets), dtype=F32)


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def weight_gradient(dout: Tensor, x: Tensor, offsets: Tensor, weight: Tensor) -> Tensor:
    """Returns the weight gradient in the dtype of ``weight``."""
    return grouped_gemm_weight_gradient(dout, x, offsets).to(weight.dtype)


def _backward(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
    (x, weight, offsets), dout = ctx.saved_tensors, dout.contiguous()
    dx = grouped_gemm_input_gradient(dout, weight, offsets) if ctx.needs_input_grad[0] else None
    dweight = weight_gradient(dout, x, offsets, weight) if ctx.needs_input_grad[1] else None
    return dx, dweight, None


def _input_gradient_backward(ctx: Any, ddx: Tensor) -> tuple[Any, ...]:
    (dout, weight, offsets), ddx = ctx.saved_tensors, ddx.contiguous()
    ddout = grouped_gemm(ddx, weight, offsets) if ctx.needs_input_grad[0] else None
    dweight = weight_gradient(dout, ddx, offsets, weight) if ctx.needs_input_grad[1] else None
    return ddout, dweight, None


def _weight_gradient_backward(ctx: Any, ddw: Tensor) -> tuple[Any, ...]:
    (dout, x, offsets), ddw = ctx.saved_tensors, ddw.contiguous()
    ddout = grouped_gemm(x, ddw, offsets) if ctx.needs_input_grad[0] else None
    dx = grouped_gemm_input_gradient(dout, ddw, offsets) if ctx.needs_input_grad[1] else None
    return ddout, dx, None


grouped_gemm.register_autograd(_backward, setup_context=_save)
grouped_gemm_input_gradient.register_autograd(_input_gradient_backward, setup_context=_save)
grouped_gemm_weight_gradient.register_autograd(_weight_gradient_backward, setup_context=_save)
