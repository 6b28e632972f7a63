"""Checks the arguments of operators, and launches kernels with the extension ``routegrad._kernels``."""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

BF16, F32, I32 = torch.bfloat16, torch.float32, torch.int32


@functools.cache
def kernels() -> Any:
    """Returns the compiled extension. Raises ImportError with build instructions if it is missing."""
    try:
        from routegrad import _kernels
    except ImportError as error:
        raise ImportError(
            f"routegrad: expected the compiled extension routegrad._kernels, got none ({error}); build it with "
            "`pip install ./python` in a clone of the repository, which needs Rust and a C++ compiler"
        ) from error
    return _kernels


@functools.cache
def _require_gpu(device: int) -> None:
    # Present in builds of PyTorch for CUDA. PyTorch itself may be for an earlier version of CUDA than the kernels.
    driver_version = getattr(torch._C, "_cuda_getDriverVersion", None)
    if driver_version is not None:
        kernels().require_driver(driver_version())
    kernels().require_gpu(torch.cuda.get_device_name(device), *torch.cuda.get_device_capability(device))


class _Thread(threading.local):
    """The GPUs that a thread has used."""

    def __init__(self) -> None:
        self.gpus: set[int] = set()


_thread = _Thread()


def _use_gpu(device: int) -> None:
    """Makes the context of a GPU current in this thread. ``torch.cuda.device`` alone does not in a new thread, and TMA descriptors,
    which some kernels make before they launch anything, need it."""
    if device not in _thread.gpus:
        torch.cuda.mem_get_info(device)  # A call of the CUDA runtime that uses the device.
        _thread.gpus.add(device)


def _aligned(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) and value.data_ptr() % 16 else value


def _memory(value: Any) -> Any:
    return (value.data_ptr(), value.nbytes) if isinstance(value, Tensor) else value


def call(function: str, like: Tensor, **arguments: Any) -> Any:
    """Calls a function of the extension, on PyTorch's current stream of the GPU of ``like`` or on the simulator.

    Arguments are passed by name, and a tensor as its address and size. Kernels read 16 bytes at a time, so a tensor whose
    address is not a multiple of 16, such as a slice from autograd, is copied. Outputs must be at a multiple of 16, because
    the kernel would write to the copy.
    """
    run = getattr(kernels(), function)
    arguments = {name: _aligned(value) for name, value in arguments.items()}
    values = {name: _memory(value) for name, value in arguments.items()}
    if like.device.type != "cuda":
        return run(None, **values)
    with torch.cuda.device(like.device):
        _require_gpu(like.device.index)
        _use_gpu(like.device.index)
        return run(torch.cuda.current_stream().cuda_stream, **values)


def empty(like: Tensor, *shape: int, dtype: torch.dtype) -> Tensor:
    """Returns an uninitialized tensor on the device of ``like``."""
    return torch.empty(shape, dtype=dtype, device=like.device)


def zeros(like: Tensor, *shape: int, dtype: torch.dtype) -> Tensor:
    """Returns a tensor of zeros on the device of ``like``."""
    return torch.zeros(shape, dtype=dtype, device=like.device)


def check(
    operator: str, name: str, tensor: Tensor, shape: Sequence[int | str], dtypes: Sequence[torch.dtype], like: Tensor
) -> None:
    """Checks that ``tensor`` is contiguous, has the given shape and one of the dtypes, and is on the device of ``like``.
    It must have no tangent.

    A string in ``shape`` allows any size. If ``like`` is not a tensor, the device is not compared; the caller must check
    ``like`` in another call.

    Raises:
        TypeError: ``tensor`` is not a tensor, or has the wrong dtype.
        ValueError: the shape, the strides or the device are wrong.
        NotImplementedError: ``tensor`` has a tangent.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{operator}: expected {name} to be a tensor, got {type(tensor).__name__}")
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
        raise ValueError(
            f"{operator}: expected {name} on cpu or cuda, got {tensor.device}; there are no kernels for other devices"
        )
    if isinstance(like, Tensor) and tensor.device != like.device:
        raise ValueError(f"{operator}: expected {name} on {like.device} like the first argument, got {tensor.device}")
    if not tensor.is_contiguous():
        raise ValueError(
            f"{operator}: expected {name} to be contiguous, got strides {list(tensor.stride())} for shape "
            f"{list(tensor.shape)}; pass {name}.contiguous()"
        )
    if forward_ad.unpack_dual(tensor).tangent is not None:
        raise NotImplementedError(
            f"{operator}: expected {name} without a tangent, got one; operators have gradients only in reverse mode"
        )


def as_indices(operator: str, name: str, indices: Any) -> Tensor:
    """Returns ``indices`` in int32. Values outside the range of int32 are clamped to it.

    Raises:
        TypeError: ``indices`` is not a tensor, or its dtype is not int32 or int64.
    """
    if not isinstance(indices, Tensor):
        raise TypeError(f"{operator}: expected {name} to be a tensor, got {type(indices).__name__}")
    if indices.dtype not in (I32, torch.int64):
        raise TypeError(f"{operator}: expected {name} in torch.int32 or torch.int64, got {indices.dtype}")
    limits = torch.iinfo(I32)
    return indices if indices.dtype == I32 else indices.clamp(limits.min, limits.max).to(I32)


def constant(value: Any) -> Any:
    """Returns a tensor detached from its graph. Returns any other value unchanged; the operator then rejects it."""
    return value.detach() if isinstance(value, Tensor) else value


def check_multiples_of_8(operator: str, **sizes: int) -> None:
    """Raises ValueError unless every size is a positive multiple of 8. Kernels read rows of bf16 16 bytes at a time."""
    for name, size in sizes.items():
        if size % 8 or size == 0:
            raise ValueError(f"{operator}: expected {name} to be a positive multiple of 8, got {size}; pad the weights")


def check_indices(operator: str, name: str, indices: Tensor, low: int, high: int) -> None:
    """Raises IndexError unless all indices are in low … high − 1. Not checked on a GPU, to avoid a synchronization."""
    if indices.device.type != "cpu" or indices.numel() == 0:
        return
    least, most = indices.min().item(), indices.max().item()
    if least < low or most >= high:
        raise IndexError(f"{operator}: expected {name} in {low} … {high - 1}, got {least} … {most}")


def bf16(weight: Tensor) -> Tensor:
    """Returns ``weight`` in bfloat16 for the products; float32 is rounded."""
    return weight.to(BF16)
