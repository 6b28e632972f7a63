"""Causal attention on the fused projection of queries, keys and values, with grouped queries and packed documents."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._launch import BF16, F32, I32, call, check, empty

_NAME, _BACKWARD = "routegrad::attention", "routegrad::attention_backward"


def _sizes(
    name: str, qkv: Tensor, sequence: int, heads: int, key_value_heads: int, first_key: Tensor | None
) -> dict[str, int]:
    check(name, "qkv", qkv, ["T", "(H + 2 KV) d"], [BF16], qkv)
    tokens, width = qkv.shape
    if heads < 1 or key_value_heads < 1 or heads % key_value_heads:
        raise ValueError(f"{name}: expected heads to be a multiple of key_value_heads, got {heads} and {key_value_heads}")
    parts = heads + 2 * key_value_heads
    if width % parts or width // parts not in (64, 128):
        raise ValueError(f"{name}: expected qkv of width {parts} d, d = 64 or 128, got {width}")
    if sequence < 1 or tokens % sequence:
        raise ValueError(f"{name}: expected whole sequences of {sequence} tokens, got {tokens} tokens")
    if first_key is not None:
        check(name, "first_key", first_key, [tokens], [I32], qkv)
    return dict(tokens=tokens, sequence=sequence, heads=heads, key_value_heads=key_value_heads, head_width=width // parts)


def _check_first_key(name: str, first_key: Tensor | None, sequence: int) -> None:
    """Raises ValueError unless 0 <= first_key <= row, and it does not decrease in a sequence. Not checked on a GPU."""
    if first_key is None or first_key.device.type != "cpu":
        return
    keys = first_key.view(-1, sequence)
    lowest = torch.nn.functional.pad(keys[:, :-1], (1, 0))
    wrong = ((keys < lowest) | (keys > torch.arange(sequence, device="cpu"))).nonzero()
    if len(wrong):
        place, row = wrong[0].tolist()
        raise ValueError(
            f"{name}: expected first_key from 0 to the row in the sequence, not less than in the row before, got "
            f"{keys[place, row]} at row {row} of sequence {place}; pass the position where its document begins"
        )


def _outputs(qkv: Tensor, s: dict[str, int]) -> tuple[Tensor, Tensor]:
    out = empty(qkv, s["tokens"], s["heads"] * s["head_width"], dtype=BF16)
    return out, empty(qkv, s["tokens"] // s["sequence"], s["heads"], s["sequence"], dtype=F32)


@torch.library.custom_op(_NAME, mutates_args=())
def _attention(
    qkv: Tensor, sequence: int, heads: int, key_value_heads: int, first_key: Tensor | None
) -> tuple[Tensor, Tensor]:
    s = _sizes(_NAME, qkv, sequence, heads, key_value_heads, first_key)
    _check_first_key(_NAME, first_key, sequence)
    out, log_sum_exp = _outputs(qkv, s)
    if s["tokens"]:
        call("attention_forward", qkv, out=out, log_sum_exp=log_sum_exp, qkv=qkv, first_key=first_key, **s)
    return out, log_sum_exp


@_attention.register_fake
def _(qkv: Tensor, sequence: int, heads: int, key_value_heads: int, first_key: Tensor | None) -> tuple[Tensor, Tensor]:
    return _outputs(qkv, _sizes(_NAME, qkv, sequence, heads, key_value_heads, first_key))


def _check_backward(dout: Tensor, out: Tensor, log_sum_exp: Tensor, qkv: Tensor, s: dict[str, int]) -> None:
    like_out = (s["tokens"], s["heads"] * s["head_width"])
    like_sum = (s["tokens"] // s["sequence"], s["heads"], s["sequence"])
    check(_BACKWARD, "dout", dout, like_out, [BF16], qkv)
    check(_BACKWARD, "out", out, like_out, [BF16], qkv)
    check(_BACKWARD, "log_sum_exp", log_sum_exp, like_sum, [F32], qkv)


@torch.library.custom_op(_BACKWARD, mutates_args=())
def _attention_backward(
    dout: Tensor, out: Tensor, log_sum_exp: Tensor, qkv: Tensor, sequence: int, heads: int, key_value_heads: int,
    first_key: Tensor | None,
) -> Tensor:  # fmt: skip
    s = _sizes(_BACKWARD, qkv, sequence, heads, key_value_heads, first_key)
    _check_backward(dout, out, log_sum_exp, qkv, s)
    _check_first_key(_BACKWARD, first_key, sequence)
    dqkv = torch.empty_like(qkv)
    if s["tokens"]:
        floats = call("attention_backward_workspace", qkv, tokens=s["tokens"], sequence=sequence, heads=heads)
        call(
            "attention_backward", qkv, dqkv=dqkv, workspace=empty(qkv, floats, dtype=F32), dout=dout, qkv=qkv, out=out,
            log_sum_exp=log_sum_exp, first_key=first_key, **s,
        )  # fmt: skip
    return dqkv


@_attention_backward.register_fake
def _(
    dout: Tensor, out: Tensor, log_sum_exp: Tensor, qkv: Tensor, sequence: int, heads: int, key_value_heads: int,
    first_key: Tensor | None,
) -> Tensor:  # fmt: skip
    s = _sizes(_BACKWARD, qkv, sequence, heads, key_value_heads, first_key)
    _check_backward(dout, out, log_sum_exp, qkv, s)
    return torch.empty_like(qkv)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, *ctx.sizes, first_key = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # Otherwise autograd would make a tensor of zeros as the gradient of log_sum_exp.
    ctx.save_for_backward(*output, qkv, first_key)


def _gradient(ctx: Any, dout: Tensor | None, _: None) -> tuple[Any, ...]:
    if dout is None:
        return (None,) * 5
    out, log_sum_exp, qkv, first_key = ctx.saved_tensors
    dqkv = _attention_backward(dout.contiguous(), out, log_sum_exp, qkv, *ctx.sizes, first_key)
    return dqkv, None, None, None, None


_attention.register_autograd(_gradient, setup_context=_save)


def attention(
    qkv: Tensor, sequence: int, heads: int, key_value_heads: int | None = None, first_key: Tensor | None = None
) -> Tensor:
    """Computes causal attention: ``softmax(Q Kᵀ / √d) V``, where row r of a sequence attends to the keys first_key[r] … r.

    Args:
        qkv: [T, (H + 2 KV) d] bfloat16: for each token the query heads, the key heads and the value heads; d is 64 or 128,
            and T = B·S for B sequences.
        sequence: S, the number of tokens per sequence.
        heads: H, the number of query heads.
        key_value_heads: KV, the number of key heads and of value heads; H must be a multiple of it. H if None.
        first_key: [T] int32: the position in the sequence at which the token's document begins; must not decrease within a
            sequence. 0 for every token if None.

    Returns:
        [T, H d] bfloat16, differentiable with respect to qkv.

    Raises:
        ValueError: a value of first_key is wrong, for CPU tensors.
    """
    return _attention(qkv, sequence, heads, heads if key_value_heads is None else key_value_heads, first_key)[0]
