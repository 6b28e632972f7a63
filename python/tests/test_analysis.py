"""Router gradients and expert load."""

import copy
import functools

import models
import pytest
import torch

import routegrad.torch as rt
from routegrad.torch.analysis import _Recorder, router_weight_gradients


def converted(name, **settings):
    model, adapters = models.tiny_float64(name)
    return rt.default_moe(model, adapters=adapters, init_std=0.3, **settings), dict(input_ids=models.tokens())


def recorded(model, batch):
    recorder = _Recorder()
    for layer in models.moe_layers(model):
        layer.default_moe_state.recorder = recorder
    model(**batch, labels=batch["input_ids"]).loss.backward()
    return {layer: found for layer, (found,) in recorder.passes.items()}


@pytest.mark.parametrize("name", models.TYPES)
def test_closed_forms_equal_autograd(name):
    model, batch = converted(name)
    for layer, found in recorded(model, batch).items():
        closed = router_weight_gradients(layer, found["x"], found["z"], found["g"], "densemixer")
        torch.testing.assert_close(closed["default"], layer.gate.weight.grad, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("name", models.TYPES)
def test_the_dense_reference_is_the_gradient_with_every_expert_run(name):
    """Compares with autograd through Σ q_i e_i over all experts, for the weights q_i of the estimator and the recorded g."""
    model, batch = converted(name)
    for layer, found in recorded(model, batch).items():
        state, x = layer.default_moe_state, found["x"]
        shape = state.adapter.describe(layer)
        experts = range(shape.num_experts)
        every = [state.adapter.experts(layer, x, torch.full((len(x),), i)).detach() for i in experts]
        for reference in ("densemixer", "default"):
            weight = layer.gate.weight.detach().clone().requires_grad_()
            p = (x @ weight.t()).softmax(-1)
            on = torch.zeros_like(p).scatter(1, found["index"], 1.0)
            q = p
            if shape.renormalize:
                # For the experts that did not run, DenseMixer treats the divisor as a constant.
                total = (p * on).sum(1, keepdim=True)
                q = p * on / total + p * (1 - on) / (total.detach() if reference == "densemixer" else total)
            y = sum(q[:, i, None] * every[i] for i in experts)
            y.backward(found["g"])
            closed = router_weight_gradients(layer, x, found["z"], found["g"], reference)
            torch.testing.assert_close(closed["dense"], weight.grad, rtol=1e-9, atol=1e-14)


def test_similarity_does_not_change_gradients_modes_or_vectors():
    model, batch = converted("olmoe")
    model.train()
    before = copy.deepcopy(model.state_dict())
    found = rt.router_gradient_similarity(model, batch)
    assert [f.layer for f in found] == list(rt.default_vectors(model))
    assert all(p.grad is None for p in model.parameters()) and model.training
    assert all(torch.equal(a, before[n]) for n, a in model.state_dict().items())
    for f in found:
        assert -1 <= f.cosine <= 1 and f.relative_error >= 0 and -1 <= f.topk_cosine <= 1


def test_exact_default_vectors_give_the_dense_gradient():
    """The experts ignore their input, so ê is equal to the outputs of the experts that did not run."""
    model, batch = converted("olmoe", beta=0.0)
    for layer in models.moe_layers(model):
        table = torch.randn(5, models.HIDDEN, dtype=torch.float64)

        def constant(own, x, expert, table=table):
            return table[expert]

        state = layer.default_moe_state
        state.adapter = rt.MoeAdapter(
            state.adapter.logits, constant, state.adapter.output, num_experts=5, hidden_size=models.HIDDEN, top_k=3
        )
        with torch.no_grad():
            layer.default_vectors.copy_(constant(layer, None, torch.arange(5)))
    for f in rt.router_gradient_similarity(model, batch):
        assert abs(f.cosine - 1) <= 1e-9 and f.relative_error <= 1e-9 and abs(f.optimal_scale - 1) <= 1e-9
        assert f.topk_relative_error > 0.01


def test_optimal_scale_minimizes_the_error():
    model, batch = converted("olmoe")
    first = rt.router_gradient_similarity(model, batch)[-1]
    layer = models.moe_layers(model)[-1]
    found = recorded(model, batch)[layer]
    gradients = router_weight_gradients(layer, found["x"], found["z"], found["g"], "densemixer")
    error = lambda c: (gradients["topk"] + c * (gradients["default"] - gradients["topk"]) - gradients["dense"]).norm()  # noqa: E731
    best = error(first.optimal_scale)
    assert all(best <= error(first.optimal_scale + d) for d in (-0.05, 0.05))


def values(results):
    return torch.tensor([list(vars(r).values())[1:] for r in results], dtype=torch.float64)


@pytest.mark.parametrize("name", models.TYPES)
def test_several_passes_of_a_loss_are_added(name):
    model, batch = converted(name)
    first, second = batch["input_ids"].chunk(2)
    mean = lambda tokens: model(input_ids=tokens, labels=tokens).loss  # noqa: E731
    again = lambda tokens: torch.utils.checkpoint.checkpoint(mean, tokens, use_reentrant=False)  # noqa: E731
    want, found, recomputed = (
        values(rt.router_gradient_similarity(model, None, loss=lambda *_, run=run: run()))
        for run in (
            lambda: 2 * mean(batch["input_ids"]),
            lambda: mean(first) + mean(second),
            lambda: again(first) + again(second),
        )
    )
    torch.testing.assert_close(found, want, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(recomputed, found, rtol=1e-9, atol=1e-9)


@pytest.mark.skipif(not hasattr(torch.compiler, "set_stance"), reason="before PyTorch 2.6 a compiled model raises")
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("vectors", [False, True])
def test_a_compiled_model_is_measured_after_it_has_run(vectors, in_place):
    torch._dynamo.reset()
    changes = dict(experts_implementation="batched_mm") if models.VERSION >= 5 else {}
    model, batch = models.tiny("qwen3_moe", **changes).eval(), dict(input_ids=models.tokens())
    if vectors:
        rt.default_moe(model, init_std=0.3)
    measures = [rt.expert_load, rt.router_gradient_similarity][: 1 + vectors]
    want = [measure(model, batch) for measure in measures]
    if in_place:
        model.compile(backend="aot_eager")
        compiled = model
    else:
        compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        compiled(**batch)
    found = [measure(compiled, batch) for measure in measures]
    assert [v.tolist() for v in found[0].values()] == [v.tolist() for v in want[0].values()]
    if vectors:
        torch.testing.assert_close(values(found[1]), values(want[1]), rtol=1e-4, atol=1e-5)


def test_a_layer_that_does_not_run_raises():
    model = models.tiny("olmoe")
    model.model.layers[1].forward = lambda hidden, *_, **__: hidden if models.VERSION >= 5 else (hidden,)
    with pytest.raises(RuntimeError, match=r"layers\.1\.mlp: expected a pass that runs this layer"):
        rt.expert_load(model, dict(input_ids=models.tokens()))
    with pytest.raises(RuntimeError, match=r"layers\.1\.mlp: expected a loss that depends on the layer"):
        rt.router_gradient_similarity(rt.default_moe(model), dict(input_ids=models.tokens()))


@pytest.mark.parametrize("name", models.TYPES)
def test_expert_load_counts_the_choices_among_equal_logits(name):
    """In bf16 many logits are equal. The rows that the experts get are counted."""
    many = {"num_local_experts" if name == "mixtral" else "num_experts": 64}
    model = models.tiny(name, num_experts_per_tok=4, hidden_size=64, **many).bfloat16().eval()
    batch, counts = dict(input_ids=models.tokens(8, 50)), []
    for layer in models.moe_layers(model):
        count = torch.zeros(64, dtype=torch.int64)
        counts.append(count)

        def of_all(experts, arguments, count=count):
            count.add_(arguments[1].flatten().bincount(minlength=64))

        def of_one(expert, arguments, count=count, number=0):
            count[number] += len(arguments[0])

        if models.VERSION >= 5:
            layer.experts.register_forward_pre_hook(of_all)
            continue
        for number, expert in enumerate(layer.experts):
            expert.register_forward_pre_hook(functools.partial(of_one, number=number))
    with torch.no_grad():
        model(**batch)
    want = [count.tolist() for count in counts]
    assert [load.tolist() for load in rt.expert_load(model, batch).values()] == want


@pytest.mark.parametrize("vectors", [False, True])
@pytest.mark.parametrize("name", models.TYPES)
def test_expert_load_counts_the_choices_of_the_router_of_transformers(name, vectors):
    plain, batch = models.tiny(name), dict(input_ids=models.tokens())
    model = rt.default_moe(copy.deepcopy(plain), pass_forward=False) if vectors else plain
    load = rt.expert_load(model, batch)
    with torch.no_grad():
        logits = plain.eval()(**batch, output_router_logits=True).router_logits
    top_k = plain.config.num_experts_per_tok
    for counts, z in zip(load.values(), logits, strict=True):
        chosen = z.softmax(-1).topk(top_k).indices
        assert counts.tolist() == torch.bincount(chosen.flatten(), minlength=z.shape[1]).tolist()
        assert int(counts.sum()) == batch["input_ids"].numel() * top_k
