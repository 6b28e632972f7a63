"""The MoE layer: on torch._grouped_mm under torch.compile, and SonicMoE's. Both get our routing."""

import torch
import torch._functorch.config as functorch
from torch.nn import functional as F

from measure import Side, first_line

VERSION = torch.__version__


class Layer:
    """The tensors of a layer, as src/bench/layer.rs has them."""

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
    """Their layer for any routing; gate above up, as ours."""
    from sonicmoe.enums import ActivationType
    from sonicmoe.functional import moe_general_routing_inputs

    tokens, top_k = choices.shape
    scores = F.softmax(x.float() @ router.T, dim=-1).gather(1, choices)
    token_of = torch.arange(tokens, device=x.device, dtype=torch.int32).repeat_interleave(top_k)
    stream = torch.cuda.current_stream().cuda_stream
    return moe_general_routing_inputs(
        x, scores.flatten(), token_of, choices.flatten().to(torch.int32), gate_up.permute(1, 2, 0), None,
        down.permute(1, 2, 0), None, len(router), stream, ActivationType.SWIGLU, concat_layout=True,
    )[0]


def both_passes(run, layer):
    """Forward, and backward alone on a kept forward."""
    leaves = layer.leaves()
    out = run(*leaves, layer.choices)
    forward = lambda: run(*leaves, layer.choices)
    backward = lambda: torch.autograd.grad(out, leaves, layer.dy, retain_graph=True)
    return forward, backward


def router(layer):
    """As torch would do it: scores, the K best, and what a balance loss needs."""
    top_k = layer.choices.shape[1]

    def run(x, w):
        scores = F.softmax(x.float() @ w.T, dim=-1)
        return scores, *scores.topk(top_k, dim=-1), scores.mean(0)

    compiled = torch.compile(run)
    return lambda: compiled(layer.x, layer.router)


def sides(group, sets, cuda):
    functorch.donated_buffer = False  # a backward that is run again keeps its buffers
    families = [case["family"] for case in group["cases"]]
    layers = [Layer(group["sizes"], inputs) for inputs in sets]
    found = []
    for name, run, version in [
        ("torch layer, compiled", torch.compile(torch_layer), lambda: VERSION),
        ("SonicMoE", sonic_layer, lambda: __import__("importlib.metadata").metadata.version("sonic-moe")),
    ]:
        passes = [
            Side(name, "", "layer_forward", gives=["y"]),
            Side(name, "", "layer_backward", gives=["dx", "drouter", "dgate_up", "ddown"]),
        ]
        try:
            if name == "SonicMoE" and not cuda:
                raise RuntimeError("its kernels need a GPU")
            both = [both_passes(run, layer) for layer in layers]
            for side, launches in zip(passes, zip(*both)):
                side.version, side.launches = version(), list(launches)
        except Exception as e:
            for side in passes:
                side.reason = f"{type(e).__name__}: {first_line(e)}"
        found += passes
    scores = Side("torch, compiled", VERSION, "router_forward", detail="top-k included")
    scores.launches = [router(layer) for layer in layers]
    return [side for side in found + [scores] if side.family in families]


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
