"""routegrad's kernels as PyTorch operators.

Each is a ``torch.library`` operator ``routegrad::NAME`` with a fake implementation and, if it is differentiable, a
gradient. ``torch.compile(fullgraph=True)`` supports all of them. CUDA tensors need a build with nvcc; the kernels run on
PyTorch's current stream. For CPU tensors, a simulator runs the code of the kernels: the arithmetic is that of a GPU, but
it is slow.

    scores, choices, z_loss = ops.router(x, weight, top_k)
    maps = ops.dispatch(choices, num_experts)
    y = ops.swiglu_experts(x, scores, gate_up, down, maps, vectors)

Notation: T tokens, E experts, K experts per token, R = T·K rows, D model width, F expert width.
"""

from ._attention import attention
from ._combine import combine, gate_gradient
from ._cross_entropy import cross_entropy, token_losses
from ._dispatch import Dispatch, dispatch
from ._expert_mean import expert_mean_update, expert_sums
from ._experts import swiglu_expert_rows, swiglu_experts
from ._grouped_gemm import grouped_gemm, grouped_gemm_input_gradient, grouped_gemm_weight_gradient
from ._launch import kernels
from ._router import router

__all__ = [
    "Dispatch",
    "attention",
    "combine",
    "cross_entropy",
    "dispatch",
    "expert_mean_update",
    "expert_sums",
    "gate_gradient",
    "grouped_gemm",
    "grouped_gemm_input_gradient",
    "grouped_gemm_weight_gradient",
    "router",
    "swiglu_expert_rows",
    "swiglu_experts",
    "token_losses",
]

kernels()  # Raises ImportError with build instructions if the extension is missing.
