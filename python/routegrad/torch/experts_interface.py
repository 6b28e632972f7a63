"""``experts_implementation="routegrad"`` for models of transformers 5: runs their experts with routegrad's kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

NAME = "routegrad"


def register() -> None:
    """Registers ``routegrad`` as an experts implementation. Does nothing if transformers does not support this."""
    try:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    except ImportError:
        return
    ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)


def experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Computes the output of an ``Experts`` module of transformers: ``Σ_k weight_tk e_{index_tk}(x_t)``.

    Args:
        self: the ``Experts`` module.
        hidden_states: [T, D] bfloat16; under autocast to bfloat16, any floating-point dtype.
        top_k_index: [T, K] int64, the chosen experts.
        top_k_weights: [T, K], their weights.

    Returns:
        [T, D] bfloat16.

    Raises:
        NotImplementedError: the experts are not SwiGLU experts without biases, or are distributed over ranks.
        TypeError: the hidden states are not bfloat16.
        ValueError: the kernels do not support the number of experts or a width.
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
        (getattr(experts, "has_post_expert_norm", False), "a norm after the experts"),
        (experts.is_transposed, "transposed weights"),
        (not getattr(experts, "is_concatenated", True), "interleaved gate and up weights"),
        (activation not in ("silu", "swish"), f"the activation {activation}"),
        (getattr(experts, "_is_expert_parallel", False), "expert parallelism"),
    ]
    for found, what in wrong:
        if found:
            raise NotImplementedError(
                'experts_implementation="routegrad": expected SwiGLU experts without biases, all of them on each rank, got '
                f'{what}; load the model with experts_implementation="grouped_mm"'
            )
