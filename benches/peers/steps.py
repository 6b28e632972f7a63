"""Whole training steps of a model in PyTorch: the same shapes, losses and optimizer; on a GPU experts on torch._grouped_mm.

`compare_steps.py` holds a step against ours. One thing differs: where a step has several micro-batches, each of them moves
the averages of the experts' outputs here, the whole step with us.
"""

import torch
from torch import nn
from torch.nn import functional as F

from layers import expert_by_expert, experts
from measure import Side

AUXILIARY, BETA, EPS = 0.01, 0.9, 1e-5


def linear(inputs, outputs):
    return nn.Linear(inputs, outputs, bias=False)


def norm(sizes):
    kind = nn.LayerNorm if sizes["norm"] == "layernorm" else nn.RMSNorm
    return kind(sizes["hidden"], eps=EPS)


def rotate(x, cos, sin):
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class Attention(nn.Module):
    def __init__(self, sizes):
        super().__init__()
        hidden, self.heads = sizes["hidden"], sizes["heads"]
        self.qkv, self.out = linear(hidden, 3 * hidden), linear(hidden, hidden)

    def forward(self, x, cos, sin):
        b, s, d = x.shape
        q, k, v = self.qkv(x).view(b, s, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k = rotate(q, cos, sin).to(v.dtype), rotate(k, cos, sin).to(v.dtype)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).reshape(b, s, d))


class SwiGLU(nn.Module):
    def __init__(self, hidden, width):
        super().__init__()
        self.gate_up, self.down = linear(hidden, 2 * width), linear(width, hidden)

    def forward(self, x):
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class MixtureOfExperts(nn.Module):
    """The K best experts of each token; with `default`, moving averages of the experts' outputs stand in for the others."""

    def __init__(self, sizes, default, grouped):
        super().__init__()
        self.run = experts if grouped else expert_by_expert
        count, hidden, ffn = sizes["experts"], sizes["hidden"], sizes["ffn"]
        self.router, self.default, self.top_k = linear(hidden, count), default, sizes["top_k"]
        self.gate_up = nn.Parameter(torch.randn(count, 2 * ffn, hidden) * hidden**-0.5)
        self.down = nn.Parameter(torch.randn(count, hidden, ffn) * ffn**-0.5)
        self.register_buffer("average", torch.zeros(count, hidden))

    def forward(self, x):
        rows = x.reshape(-1, x.shape[-1])
        with torch.autocast(x.device.type, enabled=False):
            p = F.softmax(rows.float() @ self.router.weight.T, dim=-1)
        gates, chosen = p.topk(self.top_k, dim=-1)
        chosen, order = chosen.sort(dim=-1)
        gates = gates.gather(1, order)
        share = torch.zeros_like(p).scatter(1, chosen, 1.0)
        auxiliary = p.shape[1] * (share.mean(0) / self.top_k * p.mean(0)).sum()
        kind = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        y = self.run(rows.to(kind), gates, self.gate_up.to(kind), self.down.to(kind), chosen)
        if not self.default:
            return y.view_as(x), auxiliary
        if self.top_k > 1:
            raise NotImplementedError("the averages of more than one expert a token")
        with torch.no_grad():
            # A token's output is its one expert's, weighted: sums by expert are a product with who chose whom.
            weighted = y.float()
            mass = (share * p).sum(0)
            mean = share.T @ weighted / mass.clamp(min=1e-30)[:, None]
            moved = torch.where((mass > 0)[:, None], BETA * self.average + (1 - BETA) * mean, self.average)
            self.average.copy_(moved)
        return (y + ((p * (1 - share)) @ moved).to(y.dtype)).view_as(x), auxiliary


class Model(nn.Module):
    def __init__(self, sizes, router, grouped):
        super().__init__()
        hidden, count = sizes["hidden"], sizes["layers"]
        self.embedding, self.head = nn.Embedding(sizes["vocabulary"], hidden), linear(hidden, sizes["vocabulary"])
        self.norms = nn.ModuleList(norm(sizes) for _ in range(2 * count + 1))
        self.attention = nn.ModuleList(Attention(sizes) for _ in range(count))
        moe = [MixtureOfExperts(sizes, router == "default", grouped) for _ in range(count - 1)]
        self.ffn = nn.ModuleList([SwiGLU(hidden, sizes["dense_ffn"]), *moe])
        head = hidden // sizes["heads"]
        frequency = 10000.0 ** (-torch.arange(head // 2) / (head // 2))
        angle = torch.arange(sizes["sequence"])[:, None] * frequency[None, :]
        self.register_buffer("cos", angle.cos())
        self.register_buffer("sin", angle.sin())

    def forward(self, tokens):
        """Cross-entropy, and the auxiliary loss as it is added: the mean over its layers."""
        x, auxiliary = self.embedding(tokens[:, :-1]), 0
        for layer, (attention, ffn) in enumerate(zip(self.attention, self.ffn)):
            x = x + attention(self.norms[2 * layer](x), self.cos, self.sin)
            y = ffn(self.norms[2 * layer + 1](x))
            if layer > 0:
                y, loss = y
                auxiliary = auxiliary + loss
            x = x + y
        logits = self.head(self.norms[-1](x)).flatten(0, 1)
        loss = F.cross_entropy(logits.float(), tokens[:, 1:].flatten())
        return loss, AUXILIARY * auxiliary / (len(self.ffn) - 1)


class Training:
    """A model with its optimizer; `step` does the next one, in micro-batches."""

    def __init__(self, sizes, router, device, compiled, grouped, bf16):
        torch.manual_seed(0)
        self.sizes, self.device, self.bf16 = sizes, device, bf16
        self.model = Model(sizes, router, grouped).to(device)
        self.parameters = list(self.model.parameters())
        self.losses = torch.compile(self.model) if compiled else self.model
        # Norms and the embedding do not decay.
        kept = {id(p) for p in self.parameters if p.dim() == 1} | {id(self.model.embedding.weight)}
        groups = [
            {"params": [p for p in self.parameters if (id(p) in kept) == keep], "weight_decay": 0.0 if keep else 0.1}
            for keep in (False, True)
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), fused=True)

    def step(self, batches=None):
        """Of these tokens, or of random bytes; gives the last micro-batch's losses and the norm of the gradient."""
        parts = self.sizes["sequences"] // self.sizes["micro_batch"]
        shape = (self.sizes["micro_batch"], self.sizes["sequence"] + 1)
        self.optimizer.zero_grad()
        for part in range(parts):
            # Bytes, whatever the vocabulary, as our corpus has them.
            tokens = batches[part] if batches else torch.randint(0, 256, shape, device=self.device)
            with torch.autocast(self.device, torch.bfloat16, enabled=self.bf16):
                loss, auxiliary = self.losses(tokens)
            ((loss + auxiliary) / parts).backward()
        norm = nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        return loss.detach(), auxiliary.detach(), norm


def sides(group, sets, cuda):
    found, device = [], "cuda" if cuda else "cpu"
    for router in group["sizes"]["routers"]:
        for compiled in [True] if cuda else [False, True]:

            def make(router=router, compiled=compiled):
                return [Training(group["sizes"], router, device, compiled, grouped=cuda, bf16=cuda).step]

            name = "torch model, compiled" if compiled else "torch model, eager"
            found.append(Side(name, "step", make, only=f" {router}", steps=True))
    return found
