"""Error messages state what was expected, what was got, and what to do."""

import functools

import models
import numpy as np
import pytest
import torch
from torch import nn

import routegrad.torch as rt


@pytest.mark.parametrize(
    ("settings", "kind", "words"),
    [
        (dict(beta=1.0), ValueError, "beta: expected 0 <= beta < 1, got 1.0"),
        (dict(beta=float("nan")), ValueError, "beta"),
        (dict(beta="0.9"), ValueError, "beta"),
        (dict(weight_norm="sum"), ValueError, 'weight_norm: expected "sum_p" or "count"'),
        (dict(weighted=1), TypeError, "weighted: expected True or False"),
        (dict(init_std=-1.0), ValueError, "init_std"),
        (dict(init_std="1"), ValueError, "init_std: expected a number of at least 0, got '1'"),
        (dict(init_std=float("inf")), ValueError, "init_std"),
        (dict(generator=1), TypeError, "expected a torch.Generator or None, got int"),
        (dict(process_group="all"), TypeError, "expected a torch.distributed.ProcessGroup or None, got str"),
        (dict(adapters=[rt.MoeAdapter]), TypeError, "adapters: expected a dict of layer classes and their MoeAdapter"),
        (dict(adapters={nn.Linear: 1}), TypeError, "adapters: expected a dict"),
        (dict(betas=0.9), TypeError, "betas"),
        (dict(micro_batches=0), ValueError, "micro_batches"),
    ],
)
def test_wrong_settings_raise_errors_with_their_name(settings, kind, words):
    model = models.tiny("mixtral")
    with pytest.raises(kind, match=words):
        rt.default_moe(model, **settings)
    assert not any(isinstance(m, rt.DefaultMoeLayer) for m in model.modules())


def test_a_model_without_moe_layers_raises():
    with pytest.raises(TypeError, match="mixtral, olmoe, qwen2_moe or qwen3_moe, got Linear.*adapters="):
        rt.default_moe(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="MoE layers of .* got str without any"):
        rt.default_moe("model")
    with pytest.raises(TypeError, match="MoE layers"):
        rt.expert_load(nn.Linear(2, 2), torch.zeros(1, 2))


def test_a_second_conversion_raises():
    with pytest.raises(ValueError, match="call default_moe only once"):
        rt.default_moe(rt.default_moe(models.tiny("olmoe")))


def test_functions_that_need_vectors_raise_without_them():
    similarity = lambda m: rt.router_gradient_similarity(m, {})  # noqa: E731
    for run in (rt.default_vectors, lambda m: rt.set_micro_batches(m, 2), similarity, rt.remove_default_moe):
        with pytest.raises(ValueError, match=r"default_moe\(model\) first"):
            run(models.tiny("mixtral"))


def test_vectors_in_bf16_raise():
    model = rt.default_moe(models.tiny("mixtral"))
    for layer in models.moe_layers(model):
        layer.default_vectors = layer.default_vectors.bfloat16()
    with pytest.raises(TypeError, match="expected default vectors in float32, got torch.bfloat16"):
        model(models.tokens())


def test_quantized_weights_raise():
    model = models.tiny("mixtral")
    layer = models.moe_layers(model)[0]
    layer.gate.weight = nn.Parameter(torch.zeros(4, 16, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TypeError, match="got torch.int8"):
        rt.default_moe(model)


def test_router_jitter_raises():
    with pytest.raises(ValueError, match="router_jitter_noise 0, got 0.1"):
        rt.default_moe(models.tiny("mixtral", router_jitter_noise=0.1))


def test_a_forward_set_on_the_layer_raises():
    model = models.tiny("mixtral")
    layer = models.moe_layers(model)[0]
    layer.forward = functools.partial(layer.forward)
    with pytest.raises(ValueError, match="call default_moe before"):
        rt.default_moe(model)


def test_an_adapter_with_wrong_sizes_or_logits_raises():
    class Layer(nn.Module):
        def forward(self, x):
            return x

    adapter = dict(logits=lambda layer, x: x[:, :2], experts=lambda layer, x, e: x, hidden_size=4)
    with pytest.raises(ValueError, match="top_k 5, num_experts 3"):
        rt.default_moe(nn.Sequential(Layer()), adapters={Layer: rt.MoeAdapter(**adapter, num_experts=3, top_k=5)})
    model = rt.default_moe(nn.Sequential(Layer()), adapters={Layer: rt.MoeAdapter(**adapter, num_experts=3, top_k=1)})
    with pytest.raises(ValueError, match=r"router logits \[tokens, experts\] = \[7, 3\], got \[7, 2\]"):
        model(torch.zeros(7, 4))
    for width in (2, 5, 8):
        with pytest.raises(ValueError, match=rf"hidden states \[..., 4\], got \[7, {width}\]"):
            model(torch.zeros(7, width))


@pytest.mark.parametrize("shape", [(8, 5), (4, 10), (10, 2, 2), (20, 2)])
def test_experts_of_a_wrong_shape_raise(shape):
    class Layer(nn.Module):
        def forward(self, x):
            return x

    experts = lambda layer, x, e: torch.ones(shape)  # noqa: E731
    adapter = rt.MoeAdapter(lambda layer, x: x[:, :3], experts, num_experts=3, hidden_size=4, top_k=2)
    layer = rt.default_moe(nn.Sequential(Layer()), adapters={Layer: adapter})
    with pytest.raises(ValueError, match=r"outputs of experts \[tokens \* top_k, hidden_size\] = \[10, 4\], got \["):
        layer(torch.zeros(5, 4))


@pytest.mark.parametrize("number", [np.float32, np.float64])
def test_numbers_of_numpy_are_accepted_and_stored_as_json(number, tmp_path):
    model = rt.default_moe(models.tiny("mixtral"), beta=number(0.75), init_std=number(0.5), micro_batches=np.int64(2))
    model.save_pretrained(tmp_path)
    settings = models.moe_layers(rt.from_pretrained(tmp_path))[0].default_moe_state.settings
    assert settings.beta == 0.75 and type(settings.beta) is float


def test_a_wrong_batch_or_reference_of_router_gradient_similarity_raises():
    model = rt.default_moe(models.tiny("mixtral"))
    with pytest.raises(TypeError, match="input_ids"):
        rt.router_gradient_similarity(model, models.tokens())
    with pytest.raises(ValueError, match="reference"):
        rt.router_gradient_similarity(model, dict(input_ids=models.tokens()), reference="dense")
