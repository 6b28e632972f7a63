"""Compares one MoE layer with plain loops in float64, with finite differences, and with cases computed by hand."""

import copy
import pickle

import models
import numpy as np
import pytest
import reference
import torch
from torch import nn

import routegrad.torch as rt
from routegrad.torch.vectors import chosen_experts, expert_sums

TOLERANCE = 1e-9


def arrays(layer):
    """Returns the router, gate, up and down weights of a layer of transformers as NumPy arrays."""
    get = lambda t: t.detach().numpy()  # noqa: E731
    if isinstance(layer.experts, nn.ModuleList):
        names = ("w1", "w3", "w2") if hasattr(layer.experts[0], "w1") else ("gate_proj", "up_proj", "down_proj")
        matrices = [np.stack([get(getattr(e, n).weight) for e in layer.experts]) for n in names]
    else:
        gate, up = np.split(get(layer.experts.gate_up_proj), 2, axis=1)
        matrices = [gate, up, get(layer.experts.down_proj)]
    return get(layer.gate.weight), *matrices


def gradients(layer):
    """Returns the gradients of the same weights."""
    clone = copy.deepcopy(layer)
    with torch.no_grad():
        for p, q in zip(clone.parameters(), layer.parameters(), strict=True):
            p.copy_(torch.zeros_like(p) if q.grad is None else q.grad)
    return arrays(clone)


def layer_and_reference(name, **settings):
    model, adapters = models.tiny_float64(name)
    rt.default_moe(model, adapters=adapters, init_std=0.5, **settings)
    layer = models.moe_layers(model)[-1].train()
    shape = layer.default_moe_state.adapter.describe(layer)
    assert shape.renormalize == (name in ("mixtral", "qwen3_moe"))
    plain = reference.Layer(*arrays(layer), layer.default_vectors.numpy(), shape.top_k, shape.renormalize)
    return layer, plain


def close(found, expected, tolerance=TOLERANCE):
    found = found.detach().numpy() if isinstance(found, torch.Tensor) else found
    error = np.abs(found - expected).max() / max(np.abs(expected).max(), 1e-30)
    assert error <= tolerance, f"relative error {error:.2e}"


def routed(layer, x):
    """Returns the layer's output without its shared expert."""
    y = layer(x)
    y = y[0] if isinstance(y, tuple) else y
    if hasattr(layer, "shared_expert"):
        y = y - layer.shared_expert_gate(x).sigmoid() * layer.shared_expert(x)
    return y


@pytest.mark.parametrize("pass_forward", [True, False])
@pytest.mark.parametrize("average", ["sum_p", "count", "plain"])
@pytest.mark.parametrize("name", models.TYPES)
def test_outputs_gradients_and_vectors_equal_plain_loops(name, average, pass_forward):
    weighted, norm = average != "plain", "count" if average == "count" else "sum_p"
    layer, plain = layer_and_reference(name, beta=0.7, weighted=weighted, weight_norm=norm, pass_forward=pass_forward)
    x = torch.randn(2, 5, models.HIDDEN, dtype=torch.float64, requires_grad=True)
    g = torch.randn_like(x)
    y = routed(layer, x)
    y.backward(g)
    rows, incoming = x.detach().numpy().reshape(-1, models.HIDDEN), g.numpy().reshape(-1, models.HIDDEN)
    plain.update(rows, 0.7, weighted, norm)
    close(layer.default_vectors, plain.vectors)
    close(y.reshape(-1, models.HIDDEN), plain.forward(rows, use_vectors=pass_forward))
    dx, *others = plain.backward(rows, incoming, use_vectors=True)
    close(x.grad.reshape(-1, models.HIDDEN), dx)
    for found, expected in zip(gradients(layer), others, strict=True):
        close(found, expected)


@pytest.mark.parametrize(("pass_forward", "use"), [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("name", ["mixtral", "olmoe"])
def test_evaluation_uses_vectors_only_if_both_settings_are_true(name, pass_forward, use):
    layer, plain = layer_and_reference(name, pass_forward=pass_forward, use_at_evaluation=use)
    layer.eval()
    before = layer.default_vectors.clone()
    x = torch.randn(7, 1, models.HIDDEN, dtype=torch.float64, requires_grad=True)
    g = torch.randn_like(x)
    y = routed(layer, x)
    y.backward(g)
    rows = x.detach().numpy().reshape(-1, models.HIDDEN)
    close(y.reshape(-1, models.HIDDEN), plain.forward(rows, use_vectors=pass_forward and use))
    dx, drouter, *_ = plain.backward(rows, g.numpy().reshape(rows.shape), use_vectors=pass_forward and use)
    close(x.grad.reshape(rows.shape), dx)
    close(gradients(layer)[0], drouter)
    assert torch.equal(layer.default_vectors, before)


def margin(layer, x):
    """Returns the smallest difference between the lowest chosen and the highest other probability of a token."""
    p = (x.reshape(-1, models.HIDDEN) @ layer.gate.weight.t()).softmax(-1).sort(descending=True).values
    k = layer.default_moe_state.adapter.describe(layer).top_k
    return (p[:, k - 1] - p[:, k]).min().item()


@pytest.mark.parametrize("name", models.TYPES)
def test_router_gradient_equals_central_differences_with_choice_and_vectors_fixed(name):
    layer, _ = layer_and_reference(name)
    x, g = torch.randn(2, 6, 1, models.HIDDEN, dtype=torch.float64).unbind()
    assert margin(layer, x) > 1e-4
    with rt.frozen(layer):
        (routed(layer, x) * g).sum().backward()
        weight, step = layer.gate.weight, 1e-6
        for _ in range(6):
            direction, values = torch.randn_like(weight), []
            for sign in (1, -1):
                with torch.no_grad():
                    weight += sign * step * direction
                    values.append((routed(layer, x) * g).sum())
                    weight -= sign * step * direction
            difference = (values[0] - values[1]) / (2 * step)
            close((weight.grad * direction).sum().reshape(1), difference.reshape(1).numpy(), 1e-7)


@pytest.mark.parametrize("name", models.TYPES)
def test_gradcheck_of_input_and_router_with_frozen_vectors(name):
    layer, _ = layer_and_reference(name)
    x = torch.randn(3, 1, models.HIDDEN, dtype=torch.float64, requires_grad=True)
    weight = layer.gate.weight.detach().clone().requires_grad_()
    assert margin(layer, x) > 1e-4

    def run(x, weight):
        return torch.func.functional_call(layer, {"gate.weight": weight}, (x,))

    with rt.frozen(layer):
        assert torch.autograd.gradcheck(run, (x, weight), fast_mode=True)


@pytest.mark.parametrize("name", models.TYPES)
def test_a_batch_without_tokens_does_not_change_the_vectors(name):
    layer = models.moe_layers(rt.default_moe(models.tiny(name), init_std=1.0))[-1].train()
    before = layer.default_vectors.clone()
    x = torch.zeros(0, 3, models.HIDDEN, requires_grad=True)
    y = layer(x)
    y = y[0] if isinstance(y, tuple) else y
    y.sum().backward()
    assert y.shape == x.shape and torch.equal(layer.default_vectors, before)


@pytest.mark.parametrize("name", ["mixtral", "olmoe"])
def test_vectors_have_no_effect_if_every_expert_is_chosen(name):
    experts = models.OWN[name].get("num_experts", 4)
    plain = models.moe_layers(models.tiny(name, num_experts_per_tok=experts))[0]
    layer = models.moe_layers(rt.default_moe(models.tiny(name, num_experts_per_tok=experts), init_std=1.0))[0].train()
    x = torch.randn(2, 5, models.HIDDEN)
    found, expected = (y[0] if isinstance(y, tuple) else y for y in (layer(x), plain(x)))
    close(found, expected.detach().numpy(), 1e-5)


def test_of_equal_probabilities_the_lower_expert_is_chosen():
    p = torch.tensor([[0.2, 0.3, 0.3, 0.2], [0.25, 0.25, 0.25, 0.25], [0.1, 0.2, 0.3, 0.4]])
    assert chosen_experts(p, 2).tolist() == [[1, 2], [0, 1], [3, 2]]


def test_an_expert_without_tokens_keeps_its_vector():
    layer, plain = layer_and_reference("olmoe")
    with torch.no_grad():
        layer.gate.weight.zero_()  # All probabilities are equal, so experts 0 to 2 get every token.
    before = layer.default_vectors.clone()
    layer(torch.randn(1, 4, models.HIDDEN, dtype=torch.float64))
    changed = (layer.default_vectors != before).any(dim=1)
    assert changed.tolist() == [True, True, True, False, False]


def test_vectors_stay_finite_after_tokens_that_are_not_finite():
    layer, _ = layer_and_reference("mixtral")
    layer(torch.full((1, 3, models.HIDDEN), torch.nan, dtype=torch.float64))
    assert layer.default_vectors.isfinite().all()


def test_expert_sums_equal_sums_computed_by_hand():
    rows = torch.tensor([[[4.0, 0.0]], [[0.0, 8.0]], [[0.0, 8.0]]])
    p = torch.tensor([[0.5, 0.25, 0.25], [0.125, 0.375, 0.5], [0.75, 0.125, 0.125]])
    index = torch.tensor([[0], [2], [0]])
    sums, mass = expert_sums(rows, p, index, weighted=True, by_count=False)
    assert sums.tolist() == [[2.0, 6.0], [0.0, 0.0], [0.0, 4.0]]
    assert mass.tolist() == [1.25, 0.0, 0.5]
    sums, mass = expert_sums(rows, p, index, weighted=False, by_count=True)
    assert (sums.tolist(), mass.tolist()) == ([[4.0, 8.0], [0.0, 0.0], [0.0, 8.0]], [2.0, 0.0, 1.0])


class OwnLayer(nn.Module):
    """An MoE layer that is not from transformers: linear experts, one per token."""

    def __init__(self, experts=3, width=4):
        super().__init__()
        self.router = nn.Linear(width, experts, bias=False)
        self.weights = nn.Parameter(torch.randn(experts, width, width))

    def forward(self, x):
        p = self.router(x).softmax(-1)
        best = p.argmax(-1, keepdim=True)
        return p.gather(-1, best) * torch.einsum("...de,...e->...d", self.weights[best.squeeze(-1)], x)


def own_logits(layer, x):
    return layer.router(x)


def own_experts(layer, x, expert):
    return torch.einsum("rde,re->rd", layer.weights[expert], x)


OWN = {OwnLayer: rt.MoeAdapter(own_logits, own_experts, num_experts=3, hidden_size=4, top_k=1)}


def test_a_custom_layer_works_with_an_adapter():
    own = nn.Sequential(OwnLayer(), OwnLayer()).double()
    x = torch.randn(6, 4, dtype=torch.float64)
    expected = own(x)
    rt.default_moe(own, pass_forward=False, adapters=OWN)
    torch.testing.assert_close(own(x), expected, rtol=1e-12, atol=1e-12)
    assert all(v.shape == (3, 4) and v.abs().sum() > 0 for v in rt.default_vectors(own).values())
    assert {n: int(load.sum()) for n, load in rt.expert_load(own, x).items()} == {"0": 6, "1": 6}


def test_copies_and_pickles_compute_the_same():
    own = rt.default_moe(nn.Sequential(OwnLayer()), adapters=OWN)
    own(torch.randn(5, 4))
    model = rt.default_moe(models.tiny("qwen2_moe"), beta=0.5)
    inputs = models.tokens()
    model(inputs)
    for original, data in [(own.eval(), torch.randn(3, 4)), (model.eval(), inputs)]:
        for other in (copy.deepcopy(original), pickle.loads(pickle.dumps(original))):
            found, expected = other(data), original(data)
            found, expected = getattr(found, "logits", found), getattr(expected, "logits", expected)
            assert torch.equal(found, expected)
            assert all(torch.equal(a, b) for a, b in zip(other.buffers(), original.buffers(), strict=True))


def test_casting_the_model_never_casts_vectors_below_float32():
    model = rt.default_moe(models.tiny("olmoe"), init_std=1.0)
    before = [v.clone() for v in rt.default_vectors(model).values()]
    model.to(torch.bfloat16)
    assert next(model.parameters()).dtype == torch.bfloat16
    for found, expected in zip(rt.default_vectors(model).values(), before, strict=True):
        assert found.dtype == torch.float32 and torch.equal(found, expected)
    model.double()
    assert all(v.dtype == torch.float64 for v in rt.default_vectors(model).values())
