"""``experts_implementation="routegrad"`` for models of transformers 5: their experts by routegrad's kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

NAME = "routegrad"


def register() -> None:
    """Registers ``routegrad`` among the experts' implementations of transformers, where it has them."""
    try:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    except ImportError:
        return
    ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)


def experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """What an ``Experts`` module of transformers returns, ``Σ_k weight_tk e_{index_tk}(x_t)``, [T, D] bfloat16.

    Args:
        hidden_states: [T, D] bfloat16; under autocast to bfloat16, any floating-point dtype.
        top_k_index: [T, K] int64.
        top_k_weights: [T, K].

    Raises:
        NotImplementedError: the experts are not those of SwiGLU without biases, or spread over ranks.
        TypeError: hidden states that are not bfloat16.
    """
    from . import ops

    _check(self)
    device = hidden_states.device.type
    if torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.bfloat16:
        hidden_states = hidden_states.to(torch.bfloat16)
    if hidden_states.dtype != torch.bfloat16:
        raise TypeError(
            f'experts_implementation="routegrad": expected hidden states in bfloat16, got {hidden_states.dtype}; load the '
            "model with dtype=torch.bfloat16, or run it under torch.autocast to bfloat16"
        )
    gates = hidden_states.new_zeros(len(hidden_states), self.num_experts, dtype=torch.float32)
    gates = gates.scatter(1, top_k_index, top_k_weights.float())
    maps = ops.dispatch(top_k_index.contiguous(), self.num_experts)
    return ops.swiglu_experts(hidden_states.contiguous(), gates, self.gate_up_proj, self.down_proj, maps)


def _check(experts: Any) -> None:
    activation = getattr(experts.config, "hidden_act", "silu")
    wrong = [
        (not experts.has_gate, "experts without a gate"),
        (experts.has_bias, "biases"),
        (getattr(experts, "has_post_expert_norm", False), "a norm behind the experts"),
        (experts.is_transposed, "transposed weights"),
        (not getattr(experts, "is_concatenated", True), "interleaved gate and up weights"),
        (activation not in ("silu", "swish"), f"the activation {activation}"),
        (getattr(experts, "_is_expert_parallel", False), "expert parallelism"),
    ]
    for found, what in wrong:
        if found:
            raise NotImplementedError(
                f'experts_implementation="routegrad": expected SwiGLU experts without biases, whole on each rank, got {what}'
                '; load the model with experts_implementation="grouped_mm"'
            )
