"""The kinds of work: who does it beside us, and what it gives in float32."""

import layers
import operations
import products
import steps

SIDES = {
    "gemm": products.sides,
    "layer": layers.sides,
    "norm": operations.norm_sides,
    "cross_entropy": operations.loss_sides,
    "adamw": operations.adamw_sides,
    "attention": operations.attention_sides,
    "operation": operations.operation_sides,
    "step": steps.sides,
}
OUTPUTS = {
    "gemm": products.outputs,
    "layer": layers.outputs,
    "norm": operations.norm_outputs,
    "cross_entropy": operations.loss_outputs,
    "adamw": operations.adamw_outputs,
    "attention": operations.attention_outputs,
    "operation": operations.operation_outputs,
}
# Relative L2 error of bf16 results, and of bf16 between the kernels of a layer.
TOLERANCE = 1e-2


def plain(group):
    """Peers have no default vectors."""
    return {"default": False} if group["sizes"]["work"] == "layer" else {}


def reference(group, inputs, **options):
    """Outputs by the names of our dump."""
    return OUTPUTS[group["sizes"]["work"]](group, inputs, **options)


def difference(mine, theirs):
    mine, theirs = (t.detach().double().flatten() for t in (mine, theirs))
    return ((mine - theirs).norm() / theirs.norm()).item()
