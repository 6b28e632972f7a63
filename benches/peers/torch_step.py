"""Training steps of `tiny` or `small` in PyTorch on the CPU: the peer of `cargo bench --bench step`.

The same shapes, losses and optimizer; experts run one after another over the tokens that chose them,
as a straightforward PyTorch model does. Prints the median tokens/s.

    pip install torch
    python benches/peers/torch_step.py --preset small --router default --threads 2
"""

import argparse
import statistics
import time

import torch
from torch import nn
from torch.nn import functional as F

VOCAB, HEAD, EXPERTS, LENGTH, SEQUENCES = 256, 64, 8, 256, 16
# Hidden size, layers, heads and width of an expert.
PRESETS = {"tiny": (128, 4, 2, 352), "small": (256, 6, 4, 704)}
HIDDEN, LAYERS, HEADS, WIDTH = PRESETS["tiny"]
AUXILIARY, BETA = 0.01, 0.9


def linear(inputs, outputs):
    return nn.Linear(inputs, outputs, bias=False)


def rotary_tables():
    """cos and sin [S, head / 2] of position times frequency."""
    frequency = 10000.0 ** (-torch.arange(HEAD // 2) / (HEAD // 2))
    angle = torch.arange(LENGTH)[:, None] * frequency[None, :]
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = linear(HIDDEN, 3 * HIDDEN), linear(HIDDEN, HIDDEN)

    def forward(self, x, tables):
        q, k, v = self.qkv(x).view(SEQUENCES, LENGTH, 3, HEADS, HEAD).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(rotate(q, *tables), rotate(k, *tables), v, is_causal=True)
        return self.out(mixed.transpose(1, 2).reshape(SEQUENCES, LENGTH, HIDDEN))


class SwiGLU(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_up, self.down = linear(HIDDEN, 2 * WIDTH), linear(WIDTH, HIDDEN)

    def forward(self, x):
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class MixtureOfExperts(nn.Module):
    """One expert a token; with `default`, moving averages of their outputs stand in for the others."""

    def __init__(self, default):
        super().__init__()
        self.router, self.default = linear(HIDDEN, EXPERTS), default
        self.experts = nn.ModuleList(SwiGLU() for _ in range(EXPERTS))
        self.register_buffer("average", torch.zeros(EXPERTS, HIDDEN))

    def forward(self, x):
        rows = x.reshape(-1, HIDDEN)
        p = self.router(rows).softmax(-1)
        weight, chosen = p.max(-1)
        share = F.one_hot(chosen, EXPERTS).float()
        self.auxiliary = EXPERTS * (share.mean(0) * p.mean(0)).sum()
        y = torch.zeros_like(rows)
        average = self.average.clone()
        for e, expert in enumerate(self.experts):
            (tokens,) = (chosen == e).nonzero(as_tuple=True)
            if len(tokens) == 0:
                continue
            scaled = expert(rows[tokens]) * weight[tokens, None]
            y = y.index_add(0, tokens, scaled)
            if self.default:
                mean = scaled.detach().sum(0) / weight[tokens].detach().sum()
                average[e] = BETA * average[e] + (1 - BETA) * mean
        if self.default:
            self.average.copy_(average)
            y = y + (p * (1 - share)) @ average
        return y.view_as(x)


class Model(nn.Module):
    def __init__(self, default):
        super().__init__()
        self.embedding, self.head = nn.Embedding(VOCAB, HIDDEN), linear(HIDDEN, VOCAB)
        self.norms = nn.ModuleList(nn.RMSNorm(HIDDEN, eps=1e-5) for _ in range(2 * LAYERS + 1))
        self.attention = nn.ModuleList(Attention() for _ in range(LAYERS))
        self.ffn = nn.ModuleList([SwiGLU()] + [MixtureOfExperts(default) for _ in range(LAYERS - 1)])
        self.tables = rotary_tables()

    def loss(self, tokens):
        x = self.embedding(tokens[:, :-1])
        for layer in range(LAYERS):
            x = x + self.attention[layer](self.norms[2 * layer](x), self.tables)
            x = x + self.ffn[layer](self.norms[2 * layer + 1](x))
        logits = self.head(self.norms[-1](x))
        auxiliary = sum(layer.auxiliary for layer in self.ffn[1:]) / (LAYERS - 1)
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()) + AUXILIARY * auxiliary


def main():
    global HIDDEN, LAYERS, HEADS, WIDTH
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    arguments.add_argument("--preset", choices=PRESETS, default="tiny")
    arguments.add_argument("--compiled", action="store_true", help="under torch.compile")
    arguments.add_argument("--router", choices=["topk", "default"], default="default")
    arguments.add_argument("--threads", type=int, default=2)
    arguments.add_argument("--steps", type=int, default=20)
    chosen = arguments.parse_args()
    torch.set_num_threads(chosen.threads)
    torch.manual_seed(0)
    HIDDEN, LAYERS, HEADS, WIDTH = PRESETS[chosen.preset]
    model = Model(chosen.router == "default")
    loss = torch.compile(model.loss) if chosen.compiled else model.loss
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    times = []
    for _ in range(chosen.steps + 3):
        tokens = torch.randint(0, VOCAB, (SEQUENCES, LENGTH + 1))
        start = time.perf_counter()
        optimizer.zero_grad()
        loss(tokens).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        times.append(time.perf_counter() - start)
    rate = SEQUENCES * LENGTH / statistics.median(times[3:])
    name = f"torch {torch.__version__} {'compiled' if chosen.compiled else 'eager'} {chosen.preset} {chosen.router:8}"
    print(f"{name} {rate:6.0f} tokens/s (median of {chosen.steps} steps)")


if __name__ == "__main__":
    main()
