"""Grouped and dense products: torch.mm, torch._grouped_mm, and the Triton kernels of moe-ops."""

import functools
import os

import torch

from measure import Side, version

# On the CPU, Triton's interpreter runs the kernels of moe-ops; it knows no products of bf16, so operands are f32 there.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
RESULT = {"grouped_gemm_forward": "out", "grouped_gemm_input_gradient": "dx", "grouped_gemm_weight_gradient": "dw"}


def operands(sizes, inputs):
    """a and b as src/verify/bench/kernels.rs has them, and the groups' ends."""
    n, k, experts, rows = sizes["n"], sizes["k"], len(sizes["counts"]), sum(sizes["counts"])
    bf16 = torch.bfloat16
    x = lambda: inputs.normal("x", [rows, k], 1.0, bf16)
    dout = lambda: inputs.normal("dout", [rows, n], 1.0, bf16)
    w = lambda depth: inputs.normal("w", [experts, n, k], depth**-0.5, bf16)
    ends = torch.cumsum(torch.tensor(sizes["counts"], device=inputs.device), 0).to(torch.int32)
    match sizes["product"]:
        case "grouped_gemm_forward":
            return x(), w(k), ends
        case "grouped_gemm_input_gradient":
            return dout(), w(n), ends
    return dout(), x(), ends


def torch_product(product, a, b, ends):
    """Dense products by torch.mm, grouped ones by torch._grouped_mm; a weight gradient comes in bf16."""
    if len(ends) == 1:
        match product:
            case "grouped_gemm_forward":
                return lambda: a @ b[0].T
            case "grouped_gemm_input_gradient":
                return lambda: a @ b[0]
        return lambda: a.T @ b
    match product:
        case "grouped_gemm_forward":
            return lambda: torch._grouped_mm(a, b.transpose(1, 2), offs=ends)
        case "grouped_gemm_input_gradient":
            return lambda: torch._grouped_mm(a, b, offs=ends)
    return lambda: torch._grouped_mm(a.T, b, offs=ends)


def interpreted():
    """moe-ops with its kernels for Hopper on the CPU, in one configuration each."""
    import moe_ops
    from moe_ops import grouped_gemm_ops, grouped_gemm_ops_sm90

    for kernel in (grouped_gemm_ops.gmm_gradB_kernel, grouped_gemm_ops_sm90.grouped_matmul_tma_kernel):
        del kernel.configs[1:]
    grouped_gemm_ops_sm90.supports_tma = lambda dtype=None: True
    grouped_gemm_ops_sm90.num_sms = lambda: 4
    return moe_ops


def triton_product(product, a, b, ends):
    if INTERPRETED:
        moe_ops, a, b = interpreted(), a.float(), b.float()
    else:
        import moe_ops

    offsets = torch.cat([ends.new_zeros(1), ends])
    if product == "grouped_gemm_forward":
        return lambda: moe_ops.grouped_gemm(a, b, offsets)
    if product == "grouped_gemm_input_gradient":
        x = a.new_zeros(len(a), b.shape[2], requires_grad=True)
        out = moe_ops.grouped_gemm(x, b, offsets)
        return lambda: torch.autograd.grad(out, x, a, retain_graph=True)[0]
    w = a.new_zeros(len(ends), a.shape[1], b.shape[1], requires_grad=True)
    out = moe_ops.grouped_gemm(b, w, offsets)
    return lambda: torch.autograd.grad(out, w, a, retain_graph=True)[0]


def sides(group, sets, cuda):
    sizes, family = group["sizes"], group["cases"][0]["family"]
    dense, gives = len(sizes["counts"]) == 1, [RESULT[sizes["product"]]]
    made = functools.cache(lambda: [operands(sizes, inputs) for inputs in sets])
    launches = lambda product: lambda: [product(sizes["product"], *each) for each in made()]
    detail = "weight gradients in bf16" if family.endswith("weight_gradient") else ""
    found = [Side("torch" if dense else "torch._grouped_mm", family, launches(torch_product), gives, detail)]
    if not dense:
        # As it comes: its products with weights are tuned at the first shape of each number of experts.
        triton = Side("moe-ops (Triton)", family, launches(triton_product), gives, detail, version("moe-ops"), late=True)
        found.append(triton)
    return found


def outputs(group, inputs):
    """What the case computes, by the names of our dump, from the bf16 operands in float32."""
    sizes = group["sizes"]
    product = sizes["product"]
    a, b, ends = operands(sizes, inputs)
    a, b, out, first = a.float(), b.float(), [], 0
    for expert, end in enumerate(ends.tolist()):
        rows = slice(first, end)
        match product:
            case "grouped_gemm_forward":
                out.append(a[rows] @ b[expert].T)
            case "grouped_gemm_input_gradient":
                out.append(a[rows] @ b[expert])
            case _:
                out.append((a[rows].T @ b[rows])[None])
        first = end
    return {RESULT[product]: torch.cat(out)}
