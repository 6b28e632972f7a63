"""Compares experts_implementation="routegrad" with "eager" in transformers 5."""

import models
import pytest
import torch
import transformers
from test_transformers import relative_error, vectors

import routegrad.torch as rt

pytest.importorskip("routegrad.torch.ops", exc_type=ImportError)
pytestmark = pytest.mark.skipif(models.VERSION < 5, reason="transformers 4 has no experts implementations")
SIZES = {
    "mixtral": dict(intermediate_size=16), "olmoe": dict(intermediate_size=16), "qwen2_moe": dict(moe_intermediate_size=16),
    "qwen3_moe": dict(moe_intermediate_size=16),
}  # fmt: skip


def results(model, inputs):
    model.zero_grad()
    out = model(input_ids=inputs, labels=inputs)
    out.loss.backward()
    return out, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", models.TYPES)
def test_outputs_and_gradients_are_as_close_to_float32_as_those_of_eager_in_bf16(name, tmp_path):
    models.tiny(name, **SIZES[name]).to(torch.bfloat16).save_pretrained(tmp_path)
    load = transformers.AutoModelForCausalLM.from_pretrained

    def loaded(implementation, dtype):
        return load(tmp_path, dtype=dtype, experts_implementation=implementation, attn_implementation="eager").train()

    inputs = models.tokens()
    exact, exact_grads = results(loaded("eager", torch.float32), inputs)
    eager, eager_grads = results(loaded("eager", torch.bfloat16), inputs)
    model = loaded("routegrad", torch.bfloat16)
    assert model.config._experts_implementation == "routegrad"
    found, grads = results(model, inputs)
    # The two implementations round to bf16 at different places. A wrong layer would cause a relative error of about 1.
    limit = 1.5 * relative_error(eager.logits, exact.logits) + 0.005
    assert relative_error(found.logits, exact.logits) <= limit
    assert grads.keys() == exact_grads.keys()
    for key, want in exact_grads.items():
        limit = 1.5 * relative_error(eager_grads[key], want) + 0.005
        assert relative_error(grads[key], want) <= limit, key


@pytest.mark.parametrize("name", models.TYPES)
def test_a_layers_experts_compute_what_eager_computes(name):
    """The weights are bf16 values in float32. Eager does not round to bf16, so the difference is routegrad's rounding."""
    model = models.tiny(name, **SIZES[name])
    layer = models.moe_layers(model)[-1].experts
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(p.to(torch.bfloat16))
    x = torch.randn(23, 16).to(torch.bfloat16).float()
    index = torch.stack([torch.randperm(layer.num_experts)[:2] for _ in range(23)])
    dy = torch.randn(23, 16)
    grads = []
    for implementation in ("eager", "routegrad"):
        layer.config._experts_implementation = implementation
        layer.zero_grad()
        inputs, weights = x.clone().requires_grad_(), torch.full((23, 2), 0.4, requires_grad=True)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=implementation == "routegrad"):
            y = layer(inputs, index, weights)
        (y.float() * dy).sum().backward()
        grads.append([y, inputs.grad, weights.grad, layer.gate_up_proj.grad, layer.down_proj.grad])
    for want, found in zip(*grads, strict=True):
        assert relative_error(found, want) <= 8e-3


def test_default_vectors_train_with_the_kernels():
    model = models.tiny("olmoe", **SIZES["olmoe"]).to(torch.bfloat16)
    exact = models.tiny("olmoe", **SIZES["olmoe"]).to(torch.bfloat16)
    inputs, gradients = models.tokens(), []
    for made, implementation in ((exact, "eager"), (model, "routegrad")):
        made.set_experts_implementation(implementation)
        rt.default_moe(made.train())
        results(made, inputs)
        gradients.append([*rt.default_vectors(made).values(), *(m.gate.weight.grad for m in models.moe_layers(made))])
    for want, found in zip(*gradients, strict=True):
        assert relative_error(found, want) <= 0.05 and found.norm() > 0


def test_a_saved_model_with_vectors_runs_with_the_kernels(tmp_path):
    rt.default_moe(models.tiny("qwen3_moe", **SIZES["qwen3_moe"]).to(torch.bfloat16), init_std=0.3).save_pretrained(tmp_path)
    found, want = (rt.from_pretrained(tmp_path, experts_implementation=i) for i in ("routegrad", "eager"))
    assert found.config._experts_implementation == "routegrad"
    assert all(torch.equal(a, b) for a, b in zip(vectors(found), vectors(want), strict=True))
    inputs = models.tokens()
    assert relative_error(found(inputs).logits, want(inputs).logits) <= 0.02
    generated = found.generate(inputs, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert generated.shape == (2, inputs.shape[1] + 3)


def test_a_model_compiles_to_one_graph():
    torch._dynamo.reset()
    model = models.tiny("olmoe", experts_implementation="routegrad", **SIZES["olmoe"]).to(torch.bfloat16)
    inputs = models.tokens()
    want = model(inputs, use_cache=False).logits
    found = torch.compile(model, fullgraph=True, backend="aot_eager")(inputs, use_cache=False).logits
    assert relative_error(found, want) <= 0.01


def test_unsupported_experts_raise():
    inputs = models.tokens()
    model = models.tiny("olmoe", experts_implementation="routegrad", **SIZES["olmoe"])
    with pytest.raises(TypeError, match="expected hidden states in bfloat16, got torch.float32"):
        model(inputs)
    model = models.tiny("olmoe", experts_implementation="routegrad", hidden_act="gelu", **SIZES["olmoe"])
    with pytest.raises(NotImplementedError, match="the activation gelu"):
        model.to(torch.bfloat16)(inputs)
    model = models.tiny("olmoe", experts_implementation="routegrad").to(torch.bfloat16)
    with pytest.raises(ValueError, match="F to be a positive multiple of 8, got 12"):
        model(inputs)
