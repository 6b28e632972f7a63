"""Launches kernels on tensors: checks of arguments, the stream, the extension ``routegrad._kernels``."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

BF16, F32, I32 = torch.bfloat16, torch.float32, torch.int32


@functools.cache
def kernels() -> Any:
    """The compiled extension. Raises ImportError that says how to build it."""
    try:
        from routegrad import _kernels
    except ImportError as error:
        raise ImportError(
            f"routegrad's operators: expected the compiled extension routegrad._kernels, got none ({error}); build it with "
            "`pip install ./python` in a clone of the repository, which needs Rust and a C++ compiler"
        ) from error
    return _kernels


@functools.cache
def _require_gpu(device: int) -> None:
    kernels().require_gpu(torch.cuda.get_device_name(device), *torch.cuda.get_device_capability(device))


def _aligned(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) and value.data_ptr() % 16 else value


def _memory(value: Any) -> Any:
    return (value.data_ptr(), value.nbytes) if isinstance(value, Tensor) else value


def call(function: str, like: Tensor, **arguments: Any) -> Any:
    """Calls a function of the extension: on PyTorch's current stream of the GPU of ``like``, or on the simulator.

    Arguments go by name, a tensor as its memory. Kernels read 16 bytes at a time: a slice that lies at another address, as
    autograd makes them, is copied; what a kernel writes must not be one.
    """
    run = getattr(kernels(), function)
    arguments = {name: _aligned(value) for name, value in arguments.items()}
    values = {name: _memory(value) for name, value in arguments.items()}
    if like.device.type != "cuda":
        return run(None, **values)
    with torch.cuda.device(like.device):
        _require_gpu(like.device.index)
        return run(torch.cuda.current_stream().cuda_stream, **values)


def empty(like: Tensor, *shape: int, dtype: torch.dtype) -> Tensor:
    """A tensor on the device of ``like``, whose content is not specified."""
    return torch.empty(shape, dtype=dtype, device=like.device)


def zeros(like: Tensor, *shape: int, dtype: torch.dtype) -> Tensor:
    """Zeros on the device of ``like``."""
    return torch.zeros(shape, dtype=dtype, device=like.device)


def check(
    operator: str, name: str, tensor: Tensor, shape: Sequence[int | str], dtypes: Sequence[torch.dtype], like: Tensor
) -> None:
    """Raises unless ``tensor`` is a contiguous tensor of that shape, one of the dtypes, on the device of ``like``.

    A letter in ``shape`` stands for any size. That ``like`` is a tensor is for its own check to say.

    Raises:
        TypeError: no tensor, or of another dtype.
        ValueError: another shape, strides or device.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{operator}: expected a tensor {name}, got {type(tensor).__name__}")
    if tensor.dtype not in dtypes:
        names = " or ".join(str(dtype) for dtype in dtypes)
        raise TypeError(f"{operator}: expected {name} in {names}, got {tensor.dtype}; pass {name}.to({dtypes[0]})")
    fits = tensor.dim() == len(shape) and all(
        isinstance(want, str) or got == want for got, want in zip(tensor.shape, shape, strict=True)
    )
    if not fits:
        wanted = ", ".join(str(size) for size in shape)
        raise ValueError(f"{operator}: expected {name} of shape [{wanted}], got {list(tensor.shape)}")
    if tensor.device.type not in ("cpu", "cuda"):
        raise ValueError(f"{operator}: expected {name} on cpu or cuda, got {tensor.device}; there are no kernels for others")
    if isinstance(like, Tensor) and tensor.device != like.device:
        raise ValueError(f"{operator}: expected {name} on {like.device} as the first argument, got {tensor.device}")
    if not tensor.is_contiguous():
        raise ValueError(
            f"{operator}: expected {name} contiguous, got strides {list(tensor.stride())} of shape {list(tensor.shape)}; "
            f"pass {name}.contiguous()"
        )


def as_indices(operator: str, name: str, indices: Any) -> Tensor:
    """``indices`` as int32; what that cannot hold becomes its largest or smallest number. Raises TypeError for others."""
    if not isinstance(indices, Tensor):
        raise TypeError(f"{operator}: expected a tensor {name}, got {type(indices).__name__}")
    if indices.dtype not in (I32, torch.int64):
        raise TypeError(f"{operator}: expected {name} in torch.int32 or torch.int64, got {indices.dtype}")
    limits = torch.iinfo(I32)
    return indices if indices.dtype == I32 else indices.clamp(limits.min, limits.max).to(I32)


def constant(value: Any) -> Any:
    """A tensor without its gradient; anything else as it is, for the operator to refuse."""
    return value.detach() if isinstance(value, Tensor) else value


def check_multiples_of_8(operator: str, **sizes: int) -> None:
    """Raises ValueError unless every size is a multiple of 8: rows of bf16 are read 16 bytes at a time."""
    for name, size in sizes.items():
        if size % 8 or size == 0:
            raise ValueError(f"{operator}: expected {name} to be a positive multiple of 8, got {size}; pad the weights")


def check_indices(operator: str, name: str, indices: Tensor, low: int, high: int) -> None:
    """Raises IndexError unless all indices lie in low … high − 1. On a GPU nothing is read back, and nothing checked."""
    if indices.device.type != "cpu" or indices.numel() == 0:
        return
    least, most = indices.min().item(), indices.max().item()
    if least < low or most >= high:
        raise IndexError(f"{operator}: expected {name} in {low} … {high - 1}, got {least} … {most}")


def bf16(weight: Tensor) -> Tensor:
    """``weight`` as the products take it; float32 is rounded."""
    return weight.to(BF16)
