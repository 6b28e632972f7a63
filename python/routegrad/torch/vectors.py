"""The arithmetic of Default MoE: choice of experts, gates, moving average. Knows no model.

Letters: T tokens, E experts, K experts per token, D model width. For one token: x input, z router logits,
p = softmax(z), A the K chosen experts, e_i(x) the output of expert i, ê_i the default vector of expert i.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of router arithmetic and default vectors: float64 for float64, otherwise float32."""
    return torch.promote_types(dtype, torch.float32)


def no_autocast(x: Tensor) -> torch.autocast:
    """A context in which operations on the device of ``x`` keep the dtype of their inputs."""
    return torch.autocast(device_type=x.device.type, enabled=False)


def chosen_experts(p: Tensor, top_k: int) -> Tensor:
    """Indices [T, K] of the ``top_k`` largest of each row of ``p`` [T, E]; ties go to the lower index."""
    return p.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]


def gates(z: Tensor, top_k: int, renormalize: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Probabilities p [T, E], weights q [T, E] and chosen experts [T, K] for logits ``z`` [T, E].

    q is p, or with ``renormalize`` q_i = p_i / Σ_A p for all i, also those outside A.
    """
    p = z.softmax(dim=-1)
    index = chosen_experts(p.detach(), top_k)
    q = p / p.gather(1, index).sum(dim=-1, keepdim=True) if renormalize else p
    return p, q, index


def expert_sums(rows: Tensor, p: Tensor, index: Tensor, weighted: bool, by_count: bool) -> tuple[Tensor, Tensor]:
    """Sums [E, D] of the outputs of each expert over the tokens that chose it, and what to divide them by, [E].

    ``rows`` [T, K, D] holds e_i(x) for i = ``index`` [T, K], ``p`` [T, E] the probabilities. Weighted: Σ p e and Σ p,
    or the number of tokens with ``by_count``; not weighted: Σ e and the number of tokens. A matrix product instead of
    ``index_add``: the order of the sum is fixed on every device.
    """
    (tokens, top_k), experts = index.shape, p.shape[1]
    flat = index.reshape(-1, 1)
    zeros = p.new_zeros(tokens * top_k, experts)
    counted = zeros.scatter(1, flat, 1.0)
    weights = zeros.scatter(1, flat, p.gather(1, index).reshape(-1, 1)) if weighted else counted
    sums = weights.t() @ rows.reshape(tokens * top_k, rows.shape[-1]).to(p.dtype)
    return sums, (counted if by_count else weights).sum(dim=0)


def in_backward() -> bool:
    """Whether a backward pass runs in this thread: a forward in it is a recomputation for gradient checkpointing."""
    return torch._C._current_graph_task_id() != -1


@torch.library.custom_op("routegrad::update_default_vectors", mutates_args=("vectors",))
def update_default_vectors(vectors: Tensor, sums: Tensor, mass: Tensor, beta: float, group: str) -> Tensor:
    """ê_i ← β ê_i + (1 − β) sums_i / mass_i in ``vectors`` [E, D]; returns a copy of the new ê.

    ``sums`` [E, D] and ``mass`` [E] are first added over the ranks of ``group``, the name of a process group or "".
    An expert without tokens keeps its ê, as does one whose mean is not finite: one NaN must not stay in ê for ever.
    In a recomputation for gradient checkpointing ê stays as it is. One opaque operation, so that compiled code decides
    that when it runs and not when it is traced.
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
    """y [T, D] = Σ_A q_i e_i + Σ_{i∉A} q_i ê_i in the dtype of ``q``.

    ``rows`` [T, K, D] holds e_i for i = ``index`` [T, K]; ``q`` [T, E]; ``vectors`` ê [E, D], or None to leave the
    second sum out. Without ``in_forward`` the second sum is in the gradient alone. No gradient flows into ê.
    """
    y = (q.gather(1, index).unsqueeze(-1) * rows).sum(dim=1)
    if vectors is None:
        return y
    others = q.scatter(1, index, 0.0) @ vectors.detach()
    return y + others if in_forward else y + (others - others.detach())
