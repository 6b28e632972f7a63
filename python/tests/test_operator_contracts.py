"""The requirements on PyTorch operators: opcheck, compilation, and errors for wrong arguments."""

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

ops = pytest.importorskip("routegrad.torch.ops", exc_type=ImportError)
from moe_case import BF16, Moe, normal  # noqa: E402

REGISTERED = torch.ops.routegrad


def samples():
    """Returns arguments for every operator by the operator's name; some of the tensors require gradients."""
    moe = Moe(tokens=9)
    rows, maps = len(moe.rows), moe.maps
    router_weight = normal(5, 24, dtype=torch.float32, grad=True)
    scores, choices, z_loss, lse = REGISTERED.router(moe.x.detach(), router_weight.detach(), 2, None)
    h = normal(rows, 32)
    qkv = normal(12, 4 * 64, grad=True)
    out, qkv_lse = REGISTERED.attention(qkv.detach(), 6, 2, 1, None)
    x, w, targets = normal(9, 24, grad=True), normal(40, 24, grad=True), torch.arange(9, dtype=torch.int32)
    run, other = normal(rows, 24, grad=True), normal(rows, 32, grad=True)
    weights = (moe.gate_up, moe.down)
    fixed = tuple(t.detach() for t in weights)
    sums = REGISTERED.swiglu_expert_rows(moe.x.detach(), *fixed, None, *maps)[1]
    return {
        "router": [(moe.x, router_weight, 2, None), (moe.x, router_weight, 1, torch.zeros(5))],
        "router_backward": [(torch.randn_like(scores), z_loss, scores, lse, moe.x.detach(), router_weight.detach())],
        "dispatch": [(choices, 5)],
        "grouped_gemm": [(run, moe.gate_up, maps.offsets)],
        "grouped_gemm_input_gradient": [(other, moe.gate_up, maps.offsets)],
        "grouped_gemm_weight_gradient": [(other, run, maps.offsets)],
        "swiglu_experts": [(moe.x, moe.gates, *weights, vectors, *maps) for vectors in (None, moe.vectors)],
        "swiglu_experts_backward": [
            (moe.dy, moe.x.detach(), moe.gates.detach(), *fixed, h, moe.vectors, *maps, of_weights)
            for of_weights in (False, True)
        ],
        "swiglu_expert_rows": [(moe.x, *weights, moe.gates.detach(), *maps)],
        "swiglu_expert_rows_backward": [
            (normal(rows, 24), moe.x.detach(), *fixed, h, *maps, of_weights) for of_weights in (False, True)
        ],
        "combine": [(run, moe.gates, moe.vectors, *maps)],
        "gate_gradient": [(torch.randn(rows, 2, requires_grad=True), x, moe.vectors, 5, *maps)],
        "expert_sums": [(sums, moe.gates.detach(), maps.offsets, maps.row_token, 9)],
        "expert_mean_update": [(moe.vectors, torch.randn(5, 24), torch.rand(5, 2), 0.9, "count")],
        "update_default_vectors": [(moe.vectors, torch.randn(5, 24), torch.rand(5), 0.9, "")],
        "attention": [(qkv, 6, 2, 1, None), (qkv, 6, 2, 1, torch.zeros(12, dtype=torch.int32))],
        "attention_backward": [(normal(12, 2 * 64), out, qkv_lse, qkv.detach(), 6, 2, 1, None)],
        "cross_entropy": [(x, w, targets)],
        "cross_entropy_backward": [
            (torch.rand(9), x.detach(), w.detach(), targets, of_weight) for of_weight in (False, True)
        ],
    }


def test_every_operator_has_samples():
    import routegrad.torch.ops as module

    registered = {op.split("::")[1] for op in torch._C._dispatch_get_all_op_names() if op.startswith("routegrad::")}
    assert registered == set(samples()), module


@pytest.mark.parametrize("name", list(samples()))
def test_opcheck(name):
    for arguments in samples()[name]:
        torch.library.opcheck(getattr(REGISTERED, name).default, arguments)


def moe_layer(x, weight, gate_up, down, vectors):
    """Computes a Default MoE layer with the operators. Returns its output and the mean of logsumexp²."""
    scores, choices, z_loss = ops.router(x, weight, 2)
    maps = ops.dispatch(choices, weight.shape[0])
    rows, column_sums = ops.swiglu_expert_rows(x, gate_up, down, maps, scores)
    sums, masses = ops.expert_sums(column_sums, maps, scores)
    ops.expert_mean_update(vectors, sums, masses, 0.9)
    return ops.combine(rows, scores, maps, vectors) + ops.swiglu_experts(x, scores, gate_up, down, maps), z_loss


def layer_results(function, tokens):
    torch.manual_seed(3)
    moe = Moe(tokens=tokens)
    weight, vectors = normal(5, 24, dtype=torch.float32, grad=True), moe.vectors.clone()
    y, z_loss = function(moe.x, weight, moe.gate_up, moe.down, vectors)
    (y.float() * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().add(z_loss).backward()
    return [y, z_loss, vectors, *(t.grad for t in (moe.x, weight, moe.gate_up, moe.down))]


@pytest.mark.parametrize(("backend", "dynamic"), [("aot_eager", False), ("aot_eager", True), ("inductor", True)])
def test_a_compiled_layer_is_one_graph_and_computes_the_same(backend, dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(moe_layer, fullgraph=True, dynamic=dynamic, backend=backend)
    for tokens in (11, 14):
        for found, want in zip(layer_results(compiled, tokens), layer_results(moe_layer, tokens), strict=True):
            # inductor adds gradients in a different order.
            tolerance = 0.01 if backend == "inductor" else 0.0
            assert (found - want).float().norm() <= tolerance * want.float().norm()


def test_attention_and_loss_compile():
    torch._dynamo.reset()
    weight, targets = normal(40, 128), torch.arange(12)

    def run(qkv):
        return ops.cross_entropy(ops.attention(qkv, 6, 2), weight, targets)

    results = []
    for function in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(1)
        qkv = normal(12, 6 * 64, grad=True)
        loss = function(qkv)
        loss.backward()
        results.append((loss, qkv.grad))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


class ZerosMade(TorchDispatchMode):
    """Collects the shapes of the tensors of zeros that PyTorch makes, without those made inside operators."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if "zeros" in func.name():
            self.shapes.append(tuple(result.shape))
        return result


class NoGradient(torch.autograd.Function):
    """The identity, without a gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return None


SAVING = {
    "swiglu_experts": lambda m: ops.swiglu_experts(m.x, m.gates, m.gate_up, m.down, m.maps),
    "swiglu_expert_rows": lambda m: ops.swiglu_expert_rows(m.x, m.gate_up, m.down, m.maps)[0],
    "attention": lambda m: ops.attention(m.x.repeat(1, 32), 9, 8, 2),
}
"""The first output of each operator that also returns tensors only for its own backward pass."""


@pytest.mark.parametrize("name", list(SAVING))
def test_autograd_makes_no_zeros_for_outputs_without_gradients(name):
    moe = Moe(tokens=9)
    output = SAVING[name](moe)
    with ZerosMade() as made:
        output.backward(torch.randn_like(output))
    assert made.shapes == [] and moe.x.grad.any()


@pytest.mark.parametrize("name", list(SAVING))
def test_an_output_without_a_gradient_gives_the_input_none(name):
    moe = Moe(tokens=9)
    NoGradient.apply(SAVING[name](moe)).sum().backward()
    assert moe.x.grad is None


WITH_WEIGHTS = {
    "swiglu_experts": SAVING["swiglu_experts"],
    "swiglu_expert_rows": SAVING["swiglu_expert_rows"],
    "token_losses": lambda m: ops.token_losses(m.x, m.gate_up[0], torch.arange(9)),
}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", list(WITH_WEIGHTS))
def test_no_product_is_computed_for_the_gradients_of_frozen_weights(name, compiled, monkeypatch):
    torch._dynamo.reset()
    launched, launch = [], ops._launch.call

    def call(function, like, **arguments):
        launched.append(function)
        return launch(function, like, **arguments)

    for module in (ops._grouped_gemm, ops._cross_entropy):
        monkeypatch.setattr(module, "call", call)
    results = []
    for frozen in (False, True):
        torch.manual_seed(5)
        moe = Moe(tokens=9)
        for weight in (moe.gate_up, moe.down):
            weight.requires_grad_(not frozen)
        run = torch.compile(WITH_WEIGHTS[name], backend="aot_eager") if compiled else WITH_WEIGHTS[name]
        output = run(moe)
        launched.clear()
        output.backward(torch.ones_like(output))
        results.append(moe.x.grad)
        assert ("grouped_gemm_weight_gradient" in launched) == (not frozen) == (moe.gate_up.grad is not None)
    assert torch.equal(*results)


def misaligned(tensor):
    """Returns a tensor with the same values at an address that is not a multiple of 16."""
    return torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(tensor.shape)


def test_unaligned_slices_give_the_same_results():
    moe = Moe(tokens=9)
    weight, qkv = normal(5, 24, dtype=torch.float32, grad=True), normal(9, 4 * 64, grad=True)

    def outputs(place):
        x, rows, maps = place(moe.x), place(moe.x).repeat_interleave(2, 0), moe.maps
        scores, _, _ = ops.router(x, place(weight), 2)
        yield scores
        yield ops.grouped_gemm(place(rows), place(moe.gate_up), maps.offsets)
        yield ops.swiglu_experts(x, place(scores), place(moe.gate_up), place(moe.down), maps, place(moe.vectors))
        yield ops.combine(place(rows), place(scores), maps)
        yield ops.attention(place(qkv), 9, 2, 1)
        yield ops.token_losses(x, place(moe.gate_up[0]), place(torch.arange(9, dtype=torch.int32)))

    leaves, results = (moe.x, weight, qkv, moe.gate_up, moe.down), []
    for place in (lambda t: t, misaligned):
        torch.manual_seed(4)
        # autograd passes to each output a slice of the gradient of `whole`.
        whole = torch.cat([torch.zeros(1, dtype=BF16), *(y.flatten().to(BF16) for y in outputs(place))])
        results.append([whole, *torch.autograd.grad(whole, leaves, torch.randn(whole.shape).to(BF16))])
    for found, want in zip(*results, strict=True):
        assert torch.equal(found, want)


W, X, OFFSETS = normal(2, 8, 16), normal(6, 16), torch.tensor([0, 2, 6], dtype=torch.int32)
REPEATED = torch.tensor([[0, 1, 2], [2, 0, 2]])


def attention_from(first_key):
    return ops.attention(normal(8, 3 * 64), 4, 1, first_key=torch.tensor(first_key, dtype=torch.int32))


def update(vectors):
    ops.expert_mean_update(vectors, torch.zeros(3, 8), torch.ones(3, 2), 0.5)


WRONG = [
    (TypeError, "expected x in torch.bfloat16, got torch.float32", lambda: ops.grouped_gemm(X.float(), W, OFFSETS)),
    (TypeError, "expected offsets in torch.int32, got torch.int64", lambda: ops.grouped_gemm(X, W, OFFSETS.long())),
    (ValueError, r"x of shape \[R, 16\], got \[6, 8\]", lambda: ops.grouped_gemm(X[:, :8].contiguous(), W, OFFSETS)),
    (ValueError, "x to be contiguous, got strides", lambda: ops.grouped_gemm(normal(16, 6).t(), W, OFFSETS)),
    (ValueError, "on cpu or cuda, got meta", lambda: ops.attention(torch.empty(8, 192, dtype=BF16, device="meta"), 8, 1)),
    (ValueError, "N to be a positive multiple of 8, got 7", lambda: ops.grouped_gemm(X, normal(2, 7, 16), OFFSETS)),
    (ValueError, r"decrease and are at most 6, got \[0, 2, 7\]", lambda: ops.grouped_gemm(X, W, OFFSETS + OFFSETS // 6)),
    (IndexError, "choices in 0 … 3, got 0 … 4", lambda: ops.dispatch(torch.tensor([[0], [4]]), 4)),
    (IndexError, "choices in 0 … 3, got 0 … 2147483647", lambda: ops.dispatch(torch.tensor([[0], [2**32]]), 4)),
    (TypeError, "expected choices to be a tensor, got list", lambda: ops.dispatch([[0], [1]], 4)),
    (TypeError, "targets in torch.int32 or torch.int64, got", lambda: ops.cross_entropy(X, W[0], torch.zeros(6))),
    ((TypeError, RuntimeError), "routegrad::combine", lambda: ops.combine(X, torch.zeros(3, 2), (X,) * 5, vectors="x")),
    (ValueError, "1 to 4 choices per token, got 5", lambda: ops.dispatch(torch.zeros(2, 5, dtype=torch.int32), 4)),
    (ValueError, "top_k from 1 to 4, got 5", lambda: ops.router(X, torch.zeros(4, 16), 5)),
    (TypeError, "weight in torch.float32", lambda: ops.router(X, normal(4, 16), 1)),
    (ValueError, "d = 64 or 128", lambda: ops.attention(normal(8, 3 * 32), 8, 1)),
    (ValueError, "whole sequences of 5 tokens", lambda: ops.attention(normal(8, 3 * 64), 5, 1)),
    (IndexError, "targets in 0 … 7, got 1 … 8", lambda: ops.token_losses(X[:2], W[0], torch.tensor([1, 8]))),
    (ValueError, "plain, sum_p, count", lambda: ops.expert_mean_update(*torch.zeros(2, 3, 8), torch.ones(3, 2), 0.5, "p")),
    (ValueError, r"different experts for a token, got \[2, 0, 2\] for token 1", lambda: ops.dispatch(REPEATED, 4)),
    (ValueError, "got 4 at row 3 of sequence 1", lambda: attention_from([0, 0, 2, 2, 0, 1, 1, 4])),
    (ValueError, "got -1 at row 0 of sequence 0", lambda: attention_from([-1, 0, 0, 0, 0, 0, 0, 0])),
    (ValueError, "got -2147483648 at row 2 of sequence 0", lambda: attention_from([0, 1, -(2**31), 0, 0, 0, 0, 0])),
    (ValueError, "got 0 at row 2 of sequence 1", lambda: attention_from([0, 0, 0, 0, 0, 1, 0, 0])),
    (ValueError, "got 4 at row 0 of sequence 1", lambda: attention_from([0, 0, 0, 0, 4, 4, 4, 4])),
    (TypeError, "ignore_index to be an integer, got None", lambda: ops.cross_entropy(X[:2], W[0], OFFSETS[:2], None)),
    (ValueError, "vectors that do not require gradients", lambda: update(torch.zeros(3, 8, requires_grad=True))),
    (
        ValueError,
        "vectors that do not require gradients",
        lambda: torch.no_grad()(update)(torch.nn.Parameter(torch.zeros(3, 8))),
    ),
    (
        ValueError,
        "vectors at a multiple of 16 bytes",
        lambda: ops.expert_mean_update(misaligned(torch.zeros(3, 8)), torch.zeros(3, 8), torch.ones(3, 2), 0.5),
    ),
]


def wrong_values(value):
    """Returns wrong values for an operator's argument."""
    if not isinstance(value, torch.Tensor):
        return [None, "x", -1, 10**6, 0]
    wrong = [None, 1, value.to(torch.complex64), value.to(torch.int8), torch.empty_like(value, device="meta")]
    wrong += [value.unsqueeze(0), value.flatten()[:0], value.new_zeros(3, 5), value.to_sparse(), value.new_zeros(())]
    if value.dim():
        wrong += [value[:-1], torch.cat([value, value]), value.repeat_interleave(2, -1)[..., ::2]]
    if value.dtype == torch.int32:
        wrong += [value - 100, value + 100, value * 2**24]
    if value.dim() > 1:
        wrong += [value.transpose(0, 1), value[..., :-1].contiguous()]
    return wrong


EXCEPTIONS = (TypeError, ValueError, IndexError, RuntimeError)


@pytest.mark.skipif(torch.get_default_device().type != "cpu", reason="only the values of CPU tensors are checked")
@pytest.mark.parametrize("name", sorted(set(samples()) - {"update_default_vectors"}))
def test_no_argument_crashes_the_interpreter(name):
    """Replaces one argument at a time by a wrong value. The operator must raise an exception or return a result."""
    operator, raised = getattr(REGISTERED, name), 0
    for arguments in samples()[name]:
        for place, value in enumerate(arguments):
            for wrong in wrong_values(value.detach() if isinstance(value, torch.Tensor) else value):
                try:
                    operator(*arguments[:place], wrong, *arguments[place + 1 :])
                except EXCEPTIONS as error:
                    # PyTorch 2.5 itself rejects sparse tensors.
                    assert any(word in str(error) for word in ("expected", "routegrad", "SparseTensorImpl"))
                    raised += 1
        assert raised > 5 * len(arguments)


# The values of GPU tensors are not checked, to avoid a synchronization.
READS_VALUES = torch.get_default_device().type == "cpu"
OF_VALUES = ("decrease and are at most", "choices in", "targets in", "different experts", "of sequence")


@pytest.mark.parametrize(("kind", "text", "run"), WRONG, ids=[text for _, text, _ in WRONG])
def test_wrong_arguments_raise(kind, text, run):
    if not READS_VALUES and any(part in text for part in OF_VALUES):
        pytest.skip("only the values of CPU tensors are checked")
    with pytest.raises(kind, match=text):
        run()


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("name", ["router", "grouped_gemm", "swiglu_experts", "combine", "attention", "cross_entropy"])
def test_a_tangent_raises(name, gradient):
    """PyTorch itself raises if an input requires gradients."""
    first, *others = (t.detach() if isinstance(t, torch.Tensor) else t for t in samples()[name][0])
    with forward_ad.dual_level(), pytest.raises(NotImplementedError):
        getattr(REGISTERED, name)(forward_ad.make_dual(first.requires_grad_(gradient), torch.ones_like(first)), *others)


def test_maps_for_another_number_of_tokens_raise():
    moe, other = Moe(tokens=9), Moe(tokens=8)
    with pytest.raises(ValueError, match=r"choices of shape \[9, K\], got \[8, 2\]"):
        ops.swiglu_experts(moe.x, moe.gates, moe.gate_up, moe.down, other.maps)
    if not READS_VALUES:
        return
    broken = moe.maps._replace(row_token=moe.maps.row_token + 9)
    with pytest.raises(IndexError, match="row_token in 0 … 8, got 9"):
        ops.combine(normal(18, 24), moe.gates, broken)


def test_the_extension_checks_lengths_itself():
    """With wrong lengths, the extension raises, so no kernel reads beyond the end of a tensor."""
    kernels = ops.kernels()
    x = torch.zeros(4, 8, dtype=BF16)
    memory = (x.data_ptr(), x.nbytes)
    sizes = dict(tokens=4, rows=9, experts=2, hidden=8, slots=2)
    with pytest.raises(ValueError, match="`rows_in` of 72 elements or more, got 32"):
        kernels.combine(None, y=memory, rows_in=memory, gates=None, slot_row=memory, choices=None, vectors=None, **sizes)
    with pytest.raises(TypeError, match="combine: expected an argument `rows_in`, got none"):
        kernels.combine(None, y=memory)
    with pytest.raises(TypeError, match="combine: expected no argument `other`, got one"):
        kernels.combine(None, other=memory)
    with pytest.raises(TypeError, match=r"combine: expected 1 positional argument\(s\), got 0"):
        kernels.combine()


def test_a_gpu_needs_a_build_with_kernels_for_it():
    kernels = ops.kernels()
    if kernels.HAS_GPU_KERNELS:
        with pytest.raises(RuntimeError, match=r"Tesla T4 has compute capability 7\.5; the kernels need 8\.0"):
            kernels.require_gpu("Tesla T4", 7, 5)
        return
    with pytest.raises(RuntimeError, match="expected a build with kernels for GPUs, got one without"):
        kernels.require_gpu("NVIDIA H200", 9, 0)
    with pytest.raises(RuntimeError, match="expected a build with kernels for GPUs"):
        kernels.dispatch_workspace(1, tokens=4, experts=4, choices_per_token=2)


def test_an_old_driver_raises(monkeypatch):
    kernels = ops.kernels()
    if not kernels.HAS_GPU_KERNELS:
        with pytest.raises(RuntimeError, match="expected a build with kernels for GPUs"):
            kernels.require_driver(13000)
        return
    monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: 11080, raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with pytest.raises(RuntimeError, match=r"driver is too old: it supports CUDA 11\.8, the kernels need \d+\.0"):
        ops._launch._require_gpu.__wrapped__(0)
    kernels.require_driver(999 * 1000)


def test_each_thread_makes_the_context_of_a_gpu_current_before_its_first_kernel(monkeypatch):
    used = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: used.append((threading.get_ident(), device)))

    def run():
        for device in [0, 1, 0]:
            ops._launch._use_gpu(device)
        return threading.get_ident()

    threads = [run()]
    with ThreadPoolExecutor(1) as other:
        threads.append(other.submit(run).result())
    assert used == [(thread, device) for thread in threads for device in [0, 1]]


def test_without_the_extension_default_moe_works_and_operators_raise_with_build_instructions():
    code = """
import sys
sys.modules["routegrad._kernels"] = None
import torch, routegrad.torch as rt
class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = torch.nn.Linear(8, 4, bias=False)
    def forward(self, x):
        return x
adapter = rt.MoeAdapter(lambda m, x: m.gate(x), lambda m, x, e: x, num_experts=4, hidden_size=8, top_k=1)
layer = rt.default_moe(torch.nn.Sequential(Layer()), adapters={Layer: adapter})
layer(torch.ones(3, 8)).sum().backward()
try:
    import routegrad.torch.ops
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "build it with `pip install ./python`" in done.stdout
