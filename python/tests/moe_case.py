"""A random MoE layer for the tests of operators, and its experts in float64."""

import torch
from bounds import Bounded

from routegrad.torch import ops

BF16 = torch.bfloat16


def normal(*shape, scale=1.0, dtype=BF16, grad=False):
    return (scale * torch.randn(shape)).to(dtype).requires_grad_(grad)


class Moe:
    """A random MoE layer with T tokens, and its rows computed in loops. No token chooses expert 1."""

    def __init__(self, tokens=37, experts=5, top_k=2, hidden=24, ffn=16, weights=BF16):
        self.tokens, self.experts, self.top_k, self.hidden, self.ffn = tokens, experts, top_k, hidden, ffn
        self.x = normal(tokens, hidden, grad=True)
        self.gate_up = normal(experts, 2 * ffn, hidden, scale=0.3, dtype=weights, grad=True)
        self.down = normal(experts, hidden, ffn, scale=0.3, dtype=weights, grad=True)
        self.gates = torch.rand(tokens, experts).requires_grad_()
        self.vectors = normal(experts, hidden, dtype=torch.float32)
        others = [e for e in range(experts) if e != 1]
        picks = [[others[i] for i in torch.randperm(len(others))[:top_k]] for _ in range(tokens)]
        self.choices = torch.tensor(picks)
        self.maps = ops.dispatch(self.choices, experts)
        # Rows in order (expert, slot).
        slots = [(e, t, k) for t in range(tokens) for k, e in enumerate(picks[t])]
        self.rows = sorted(slots)
        self.dy = normal(tokens, hidden)

    def weight(self, name, e):
        return Bounded(getattr(self, name)[e].to(BF16))

    def expert(self, x, e):
        """Returns h and a before they are rounded, and the output computed from a in bf16, for x [n, D]."""
        h = Bounded(x) @ self.weight("gate_up", e).t()
        gate, up = h[:, : self.ffn], h[:, self.ffn :]
        a = gate.silu()[0] * up
        return h, a, a.rounded() @ self.weight("down", e).t()

    def expert_backward(self, x, e, dout, gate):
        """Returns the gradients of gate_up, down and x, and ⟨dout, e⟩, for the rows x of an expert and an exact dout."""
        h = self.expert(x, e)[0].rounded()
        z, up = h[:, : self.ffn], h[:, self.ffn :]
        silu, slope = z.silu()
        a, da = silu * up, Bounded(dout) @ self.weight("down", e)
        gate = Bounded(gate[:, None])
        dh = [(gate * da * up * slope).rounded(), (gate * da * silu).rounded()]
        dh = Bounded(torch.cat([d.value for d in dh], 1), torch.cat([d.error for d in dh], 1))
        dgate_up, ddown = dh.t() @ Bounded(x), Bounded(dout).t() @ (gate * a).rounded()
        return dgate_up, ddown, (dh @ self.weight("gate_up", e)).rounded(), (da * a).sum(1)

    def rows_of(self, e):
        """Returns the row numbers and the tokens of an expert."""
        found = [(r, t) for r, (expert, t, _) in enumerate(self.rows) if expert == e]
        return [r for r, _ in found], [t for _, t in found]


def empty(*shape):
    return Bounded(torch.zeros(shape, dtype=torch.float64))
