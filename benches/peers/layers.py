"""The MoE layer: on torch._grouped_mm under torch.compile, and SonicMoE's. Both get our routing."""

import functools

import torch
import torch._functorch.config as functorch
from torch.nn import functional as F

from measure import Side, version

functorch.donated_buffer = False  # a backward that is run again keeps its buffers


class Layer:
    """The tensors of a layer, as src/verify/bench/layer.rs has them."""

    def __init__(self, sizes, inputs):
        t, d, f, e = sizes["tokens"], sizes["hidden"], sizes["ffn"], len(sizes["counts"])
        bf16 = torch.bfloat16
        self.x = inputs.normal("x", [t, d], 1.0, bf16)
        self.router = inputs.normal("router", [e, d], d**-0.5)
        self.gate_up = inputs.normal("gate_up", [e, 2 * f, d], d**-0.5, bf16)
        self.down = inputs.normal("down", [e, d, f], f**-0.5, bf16)
        self.dy = inputs.normal("dy", [t, d], 1.0, bf16)
        self.average = inputs.normal("average", [e, d])
        self.choices = inputs.choices(sizes["counts"], t)

    def leaves(self):
        leaves = [self.x, self.router, self.gate_up, self.down]
        for leaf in leaves:
            leaf.requires_grad_(True)
        return leaves


def expert_by_expert(x, gates, gate_up, down, choices):
    """As a straightforward model does it; on a CPU ten times as fast as torch._grouped_mm in f32."""
    y = torch.zeros_like(x)
    for expert in range(len(gate_up)):
        rows, slot = (choices == expert).nonzero(as_tuple=True)
        if len(rows) == 0:
            continue
        gate, up = (x[rows] @ gate_up[expert].T).chunk(2, dim=-1)
        out = (F.silu(gate) * up) @ down[expert].T
        y = y.index_add(0, rows, out * gates[rows, slot, None].to(out.dtype))
    return y


def experts(x, gates, gate_up, down, choices):
    """Rows sorted by expert, two grouped products around SwiGLU, sums of each token's rows by its gates."""
    tokens, top_k = choices.shape
    expert_of = choices.flatten()
    order = torch.argsort(expert_of, stable=True)
    counts = torch.zeros(len(gate_up), dtype=torch.int64, device=x.device).scatter_add_(
        0, expert_of, torch.ones_like(expert_of)
    )
    ends = torch.cumsum(counts, 0).to(torch.int32)
    gate, up = torch._grouped_mm(x[order // top_k], gate_up.transpose(1, 2), offs=ends).chunk(2, dim=-1)
    rows = torch._grouped_mm(F.silu(gate) * up, down.transpose(1, 2), offs=ends)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=x.device)
    return (rows[place].view(tokens, top_k, -1) * gates[..., None].to(rows.dtype)).sum(1)


def torch_layer(x, router, gate_up, down, choices):
    scores = F.softmax(x.float() @ router.T, dim=-1)
    return experts(x, scores.gather(1, choices), gate_up, down, choices)


def sonic_layer(x, router, gate_up, down, choices):
    """What their layer for K experts a token launches, with our choices where it has those of its top-k; the router in bf16
    and gate above up, as theirs can be."""
    from sonicmoe import functional as sonic
    from sonicmoe.enums import ActivationType

    (tokens, top_k), count = choices.shape, len(router)
    gates = F.softmax(F.linear(x, router.to(x.dtype)), dim=-1, dtype=torch.float32).gather(1, choices)
    ints = lambda n: torch.empty(n, dtype=torch.int32, device=x.device)
    rows = tokens * top_k
    frequency, offsets, token_of, scatter, reverse = map(ints, (count, count + 1, rows, rows, rows))
    sonic.TC_topk_router_metadata_triton(
        choices.to(torch.int32), count, frequency, offsets, token_of, scatter, reverse
    )
    a, h = sonic._UpProjection.apply(
        x, gate_up.permute(1, 2, 0), None, offsets, rows, top_k, token_of, scatter, reverse, None, False,
        ActivationType.SWIGLU, False, True,
    )
    return sonic._DownProjection.apply(
        a, h, down.permute(1, 2, 0), None, gates, offsets, tokens, top_k, token_of, scatter, reverse, None, False,
        ActivationType.SWIGLU,
    )


def forward(run, layer):
    leaves = layer.leaves()
    return lambda: run(*leaves, layer.choices)


def backward(run, layer):
    """Alone, on a kept forward."""
    leaves = layer.leaves()
    out = run(*leaves, layer.choices)
    return lambda: torch.autograd.grad(out, leaves, layer.dy, retain_graph=True)


def router(run, layer):
    x, w, top_k = layer.x.detach(), layer.router.detach(), layer.choices.shape[1]
    return lambda: run(x, w, top_k)


def scored(x, w, top_k):
    """As torch would do it: scores, the K best, and what a balance loss needs."""
    scores = F.softmax(x.float() @ w.T, dim=-1)
    return scores, *scores.topk(top_k, dim=-1), scores.mean(0)


def sides(group, sets, cuda):
    made = functools.cache(lambda: [Layer(group["sizes"], inputs) for inputs in sets])
    launches = lambda kind, run: lambda: [kind(run, layer) for layer in made()]
    layer, gradients = torch.compile(torch_layer), ["dx", "drouter", "dgate_up", "ddown"]
    torch_name, sonic = "torch layer, compiled", {"version": version("sonic-moe"), "detail": "router in bf16", "late": True}
    return [
        Side(torch_name, "layer_forward", launches(forward, layer), ["y"]),
        Side(torch_name, "layer_backward", launches(backward, layer), gradients),
        Side("SonicMoE", "layer_forward", launches(forward, sonic_layer), ["y"], **sonic),
        Side("SonicMoE", "layer_backward", launches(backward, sonic_layer), gradients, **sonic),
        Side("torch, compiled", "router_forward", launches(router, torch.compile(scored)), detail="top-k included"),
    ]


def outputs(group, inputs, default=True, beta=0.9):
    """A layer in float32, by the names of our dump. Of Default MoE: the averages first, then y, then its gradients."""
    layer = Layer(group["sizes"], inputs)
    x, router_weight, gate_up, down = (leaf.detach().float().requires_grad_(True) for leaf in layer.leaves())
    scores = F.softmax(x @ router_weight.T, dim=-1)
    y, average, chosen = 0, layer.average.clone(), torch.zeros_like(scores)
    chosen.scatter_(1, layer.choices, 1.0)
    for expert in range(len(gate_up)):
        (rows,) = chosen[:, expert].nonzero(as_tuple=True)
        if len(rows) == 0:
            continue
        gate, up = (x[rows] @ gate_up[expert].T).chunk(2, dim=-1)
        weighted = (F.silu(gate) * up @ down[expert].T) * scores[rows, expert, None]
        y = y + torch.zeros_like(x).index_add(0, rows, weighted)
        mean = weighted.detach().sum(0) / scores[rows, expert].detach().sum()
        average[expert] = beta * average[expert] + (1 - beta) * mean
    if default:
        y = y + (scores * (1 - chosen)) @ average
    gradients = torch.autograd.grad(y, [x, router_weight, gate_up, down], layer.dy.float())
    names = ["dx", "drouter", "dgate_up", "ddown"]
    return {"y": y.detach(), "average": average, **dict(zip(names, gradients))}
