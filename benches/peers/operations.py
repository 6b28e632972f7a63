"""Norms, cross-entropy, AdamW and attention on a GPU's kernels; and the CPU's operations, forward and backward together."""

import torch
from torch.nn import functional as F

from layers import expert_by_expert
from measure import Side

EPS = 1e-5
BF16 = torch.bfloat16


def side(name, family, build, sets, gives=(), detail=""):
    """A side whose launches `build` makes of each set."""
    return Side(name, family, lambda: [build(inputs) for inputs in sets], gives, detail)


def gradient_of(out, leaves, dout):
    return lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True)


# LayerNorm behind a residual add.


def norm_inputs(sizes, inputs):
    rows, hidden = sizes["rows"], sizes["hidden"]
    matrix = lambda name: inputs.normal(name, [rows, hidden], 1.0, BF16)
    vector = lambda name: inputs.normal(name, [hidden], 1.0, BF16)
    return matrix("x"), matrix("residual"), vector("weight"), vector("bias"), matrix("dy")


def norm(x, residual, weight, bias):
    total = x + residual
    return F.layer_norm(total, weight.shape, weight, bias, EPS), total


def norm_sides(group, sets, cuda):
    sizes, compiled = group["sizes"], torch.compile(norm)

    def forward(inputs):
        x, residual, weight, bias, _ = norm_inputs(sizes, inputs)
        return lambda: compiled(x, residual, weight, bias)

    def backward(inputs):
        x, residual, weight, bias, dy = norm_inputs(sizes, inputs)
        leaves = [t.requires_grad_(True) for t in ((x + residual).detach(), weight, bias)]
        one = torch.compile(lambda t, w, b: F.layer_norm(t, w.shape, w, b, EPS))
        return gradient_of(one(*leaves), leaves, dy)

    return [
        side("torch, compiled", "norm_forward", forward, sets, ["y", "sum"]),
        side("torch, compiled", "norm_backward", backward, sets, ["dx", "dweight", "dbias"]),
    ]


def norm_outputs(group, inputs):
    x, residual, weight, bias, dy = norm_inputs(group["sizes"], inputs)
    total = x + residual
    leaves = [t.float().requires_grad_(True) for t in (total, weight, bias)]
    y = F.layer_norm(leaves[0], weight.shape, leaves[1], leaves[2], EPS)
    dx, dweight, dbias = torch.autograd.grad(y, leaves, dy.float())
    return {"y": y.detach(), "sum": total, "dx": dx, "dweight": dweight, "dbias": dbias}


# From logits to losses and the logits' gradient.


def loss_inputs(sizes, inputs):
    tokens, vocabulary = sizes["tokens"], sizes["vocabulary"]
    return inputs.normal("logits", [tokens, vocabulary], 2.0), inputs.ids("targets", tokens, vocabulary)


def loss_sides(group, sets, cuda):
    def build(loss):
        def built(inputs):
            logits, targets = loss_inputs(group["sizes"], inputs)
            logits.requires_grad_(True)
            return lambda: torch.autograd.grad(loss(logits, targets), logits)

        return built

    return [
        side(name, "cross_entropy_rows", build(loss), sets, ["dlogits"], "gradient in f32")
        for name, loss in [("torch", F.cross_entropy), ("torch, compiled", torch.compile(F.cross_entropy))]
    ]


def loss_outputs(group, inputs):
    logits, targets = loss_inputs(group["sizes"], inputs)
    logits.requires_grad_(True)
    losses = F.cross_entropy(logits, targets, reduction="none")
    (dlogits,) = torch.autograd.grad(losses.mean(), logits)
    return {"losses": losses.detach(), "dlogits": dlogits}


# A third step of AdamW.


def adamw(sizes, inputs):
    count = [sizes["numbers"]]
    w = torch.nn.Parameter(inputs.normal("w", count))
    w.grad = inputs.normal("gradient", count)
    cuda = inputs.device == "cuda"
    optimizer = torch.optim.AdamW(
        [w], lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, fused=True, capturable=cuda
    )
    state = {"exp_avg": inputs.normal("m", count), "exp_avg_sq": inputs.normal("v", count) ** 2}
    step = torch.tensor(2.0, device=inputs.device)
    optimizer.state[w] = {"step": step, **state}
    return w, optimizer


def adamw_sides(group, sets, cuda):
    build = lambda inputs: adamw(group["sizes"], inputs)[1].step
    return [side("torch", "adamw_update", build, sets, detail="fused")]


def adamw_outputs(group, inputs):
    w, optimizer = adamw(group["sizes"], inputs)
    optimizer.step()
    state = optimizer.state[w]
    return {"w": w.detach(), "m": state["exp_avg"], "v": state["exp_avg_sq"]}


# Causal attention on the fused projection.


def attention_inputs(sizes, inputs):
    b, s, h, d = (sizes[key] for key in ("sequences", "sequence", "heads", "width"))
    qkv = inputs.normal("qkv", [b, s, 3, h, d], 1.0, BF16)
    dout = inputs.normal("dout", [b, s, h, d], 1.0, BF16)
    return qkv, dout


def attention(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def attention_sides(group, sets, cuda):
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def build(backend, back):
        def built(inputs):
            qkv, dout = attention_inputs(group["sizes"], inputs)
            # Heads of a token beside each other, as a projection leaves them, and the same of outputs and gradients: no
            # backend has to copy one into another's order.
            leaves = [part.contiguous().requires_grad_(back) for part in qkv.unbind(2)]

            def forward():
                with sdpa_kernel(backend):
                    return attention(*(leaf.transpose(1, 2) for leaf in leaves)).transpose(1, 2)

            return gradient_of(forward(), leaves, dout) if back else forward

        return built

    joined = lambda *gradients: {"dqkv": torch.stack(gradients, 2)}
    found = []
    for name, backend in [
        ("torch, cuDNN attention", SDPBackend.CUDNN_ATTENTION),
        ("torch, flash attention", SDPBackend.FLASH_ATTENTION),
    ]:
        found.append(side(name, "attention_forward", build(backend, False), sets, ["out"]))
        found.append(side(name, "attention_backward", build(backend, True), sets, joined))
    return found


def attention_outputs(group, inputs):
    qkv, dout = attention_inputs(group["sizes"], inputs)
    qkv = qkv.float().requires_grad_(True)
    out = attention(*(part.transpose(1, 2) for part in qkv.unbind(2))).transpose(1, 2)
    (dqkv,) = torch.autograd.grad(out, qkv, dout.float())
    return {"out": out.detach(), "dqkv": dqkv}


# The CPU's operations in f32: src/verify/bench/operations.rs.


def rotary(sizes, device):
    half = sizes["width"] // 2
    frequency = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    angle = torch.arange(sizes["sequence"], dtype=torch.float64)[:, None] * frequency
    return angle.cos().float().to(device), angle.sin().float().to(device)


def rotated(x, cos, sin):
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def operation(sizes, inputs):
    """The leaves by name, and the function of them."""
    name, tokens, hidden = sizes["operation"], sizes["tokens"], sizes["hidden"]
    heads, width, s = sizes["heads"], sizes["width"], sizes["sequence"]
    row, vocabulary, ffn = 3 * heads * width, sizes["vocabulary"], sizes["ffn"]
    count, deviation = len(sizes["counts"]), hidden**-0.5
    made = lambda leaf, shape, scale=1.0: (leaf, inputs.normal(f"{name}/{leaf}", shape, scale))
    ids = lambda: inputs.ids("ids", tokens, vocabulary)
    shaped = lambda x: x.view(tokens // s, s, 3, heads, width)
    match name:
        case "linear":
            return [made("x", [tokens, hidden]), made("weight", [row, hidden], deviation)], F.linear
        case "experts":
            choices = inputs.choices(sizes["counts"], tokens)
            leaves = [
                made("x", [tokens, hidden]),
                made("gates", [tokens, count]),
                made("gate_up", [count, 2 * ffn, hidden], deviation),
                made("down", [count, hidden, ffn], ffn**-0.5),
            ]
            return leaves, lambda x, gates, up, down: expert_by_expert(x, gates.gather(1, choices), up, down, choices)
        case "attention":

            def run(x):
                q, k, v = (part.transpose(1, 2) for part in shaped(x).unbind(2))
                return attention(q, k, v).transpose(1, 2).reshape(tokens, heads * width)

            return [made("x", [tokens, row])], run
        case "cross_entropy":
            targets = ids()
            leaves = [made("x", [tokens, hidden]), made("weight", [vocabulary, hidden], deviation)]
            return leaves, lambda x, w: F.cross_entropy(x @ w.T, targets)
        case "add":
            return [made("x", [tokens, hidden]), made("residual", [tokens, hidden])], torch.add
        case "rmsnorm":
            leaves = [made("x", [tokens, hidden]), made("weight", [hidden])]
            return leaves, lambda x, w: F.rms_norm(x, w.shape, w, EPS)
        case "layernorm":
            leaves = [made("x", [tokens, hidden]), made("weight", [hidden]), made("bias", [hidden])]
            return leaves, lambda x, w, b: F.layer_norm(x, w.shape, w, b, EPS)
        case "rope":
            cos, sin = (t[:, None] for t in rotary(sizes, inputs.device))

            def run(x):
                q, k, v = shaped(x).unbind(2)
                return torch.stack([rotated(q, cos, sin), rotated(k, cos, sin), v], 2).view(tokens, row)

            return [made("x", [tokens, row])], run
        case "qk_norm":

            def run(x, query, key):
                q, k, v = shaped(x).unbind(2)
                norm = lambda t, w: F.rms_norm(t, w.shape, w, EPS)
                return torch.stack([norm(q, query), norm(k, key), v], 2).view(tokens, row)

            leaves = [made("x", [tokens, row]), made("query_weight", [width]), made("key_weight", [width])]
            return leaves, run
        case "swiglu":

            def run(x):
                gate, up = x.chunk(2, dim=-1)
                return F.silu(gate) * up

            return [made("x", [tokens, 2 * ffn])], run
        case "embedding":
            rows = ids()
            return [made("weight", [vocabulary, hidden], deviation)], lambda w: F.embedding(rows, w)
    raise NotImplementedError(name)


def operation_passes(sizes, inputs):
    named, run = operation(sizes, inputs)
    leaves = [leaf.requires_grad_(True) for _, leaf in named]
    out = run(*leaves)
    dout = inputs.normal(f"{sizes['operation']}/dout", list(out.shape) or [1]).view(out.shape)

    def both():
        out = run(*leaves)
        return out, torch.autograd.grad(out, leaves, dout)

    return named, both


def operation_sides(group, sets, cuda):
    family = group["cases"][0]["family"]
    return [side("torch", family, lambda inputs: operation_passes(group["sizes"], inputs)[1], sets, detail="eager")]


def operation_outputs(group, inputs):
    named, both = operation_passes(group["sizes"], inputs)
    out, gradients = both()
    return {"out": out.detach(), **{f"d{name}": g for (name, _), g in zip(named, gradients)}}
