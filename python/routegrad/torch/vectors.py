"""The arithmetic of Default MoE: choice of experts, gates and moving average. Does not depend on a model.

Notation: T tokens, E experts, K experts per token, D model width. For one token: x input, z router logits,
p = softmax(z), A the K chosen experts, e_i(x) the output of expert i, ê_i the default vector of expert i.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype of router arithmetic and default vectors: float64 for float64, otherwise float32."""
    return torch.promote_types(dtype, torch.float32)


def no_autocast(x: Tensor) -> torch.autocast:
    """Returns a context manager that disables autocast on the device of ``x``."""
    return torch.autocast(device_type=x.device.type, enabled=False)


def chosen_experts(p: Tensor, top_k: int) -> Tensor:
    """Returns the indices [T, K] of the ``top_k`` largest values in each row of ``p`` [T, E].

    Of equal values, the one with the lower index is chosen.
    """
    return p.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]


def gates(z: Tensor, top_k: int, renormalize: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the probabilities p [T, E], the weights q [T, E] and the chosen experts [T, K] for logits ``z`` [T, E].

    Without ``renormalize``, q = p. With it, q_i = p_i / Σ_A p for all i, also for those outside A.
    """
    p = z.softmax(dim=-1)
    index = chosen_experts(p.detach(), top_k)
    q = p / p.gather(1, index).sum(dim=-1, keepdim=True) if renormalize else p
    return p, q, index


def expert_sums(rows: Tensor, p: Tensor, index: Tensor, weighted: bool, by_count: bool) -> tuple[Tensor, Tensor]:
    """Returns the sums [E, D] of each expert's outputs over the tokens that chose it, and the divisors [E] of the means.

    ``rows`` [T, K, D] contains e_i(x) for i = ``index`` [T, K], and ``p`` [T, E] the probabilities. If ``weighted``, the sum
    is Σ p e, and the divisor is Σ p, or with ``by_count`` the number of tokens. Otherwise they are Σ e and the number of
    tokens. The sums are computed by a matrix product and not by ``index_add``, so that the order of summation is fixed on
    every device.
    """
    (tokens, top_k), experts = index.shape, p.shape[1]
    flat = index.reshape(-1, 1)
    zeros = p.new_zeros(tokens * top_k, experts)
    counted = zeros.scatter(1, flat, 1.0)
    weights = zeros.scatter(1, flat, p.gather(1, index).reshape(-1, 1)) if weighted else counted
    sums = weights.t() @ rows.reshape(tokens * top_k, rows.shape[-1]).to(p.dtype)
    return sums, (counted if by_count else weights).sum(dim=0)


def in_backward() -> bool:
    """Returns whether a backward pass is running in this thread.

    A forward pass during a backward pass is a recomputation for gradient checkpointing.
    """
    return torch._C._current_graph_task_id() != -1


@torch.library.custom_op("routegrad::update_default_vectors", mutates_args=("vectors",))
def update_default_vectors(vectors: Tensor, sums: Tensor, mass: Tensor, beta: float, group: str) -> Tensor:
    """Updates ``vectors`` [E, D] in place: ê_i ← β ê_i + (1 − β) sums_i / mass_i. Returns a copy of the new ê.

    ``sums`` [E, D] and ``mass`` [E] are first added over the ranks of ``group``, the name of a process group, or "" for a
    single process. ê_i does not change if no token chose expert i, or if the mean is not finite, because a NaN would
    remain in ê. In a recomputation for gradient checkpointing, ê does not change. This is a custom operator so that
    compiled code checks for a recomputation when it runs, not when it is traced.
    """
    if not in_backward():
        totals = torch.cat((sums, mass.unsqueeze(1)), dim=1)
        if group:
            dist.all_reduce(totals, group=dist.distributed_c10d._resolve_process_group(group))
        mean = totals[:, :-1] / totals[:, -1:]
        known = (totals[:, -1:] > 0) & mean.isfinite().all(dim=1, keepdim=True)
        vectors.copy_(torch.where(known, beta * vectors + (1 - beta) * mean, vectors))
    return vectors.clone()


@update_default_vectors.register_fake
def _(vectors: Tensor, sums: Tensor, mass: Tensor, beta: float, group: str) -> Tensor:
    return torch.empty_like(vectors)


def mix(rows: Tensor, q: Tensor, index: Tensor, vectors: Tensor | None, in_forward: bool) -> Tensor:
    """Returns y [T, D] = Σ_A q_i e_i + Σ_{i∉A} q_i ê_i in the dtype of ``q`` [T, E].

    ``rows`` [T, K, D] contains e_i for i = ``index`` [T, K]. ``vectors`` is ê [E, D], or None to omit the second sum.
    Without ``in_forward``, the second sum changes only the gradient and not y. No gradient flows to ê.
    """
    y = (q.gather(1, index).unsqueeze(-1) * rows).sum(dim=1)
    if vectors is None:
        return y
    others = q.scatter(1, index, 0.0) @ vectors.detach()
    return y + others if in_forward else y + (others - others.detach())
