"""Whole models of transformers: outputs, training, files, checkpointing, autocast, compilation."""

import copy
import functools

import models
import pytest
import torch
import transformers
from torch.nn import functional as F

import routegrad.torch as rt
from routegrad.torch.adapters import Float32Gate


def loss_of(model, inputs):
    return model(input_ids=inputs, labels=inputs).loss


def vectors(model):
    return [v.clone() for v in rt.default_vectors(model).values()]


def relative_error(found, want):
    """Returns the norm of the difference divided by the norm of ``want``."""
    return ((found.double() - want.double()).norm() / want.double().norm()).item()


def same(found, expected, tolerance=0.0):
    for a, b in zip(found, expected, strict=True):
        error = (a - b).abs().max().item()
        assert error <= tolerance * max(1.0, b.abs().max().item()), f"difference {error:.2e}"


@pytest.mark.parametrize("name", models.TYPES)
def test_without_pass_forward_the_model_computes_what_transformers_computes(name):
    plain = models.tiny(name)
    model = rt.default_moe(copy.deepcopy(plain), beta=0.99, pass_forward=False)
    inputs = models.tokens()
    for mode in ("eval", "train"):
        getattr(plain, mode)(), getattr(model, mode)()
        expected, found = plain(inputs, output_router_logits=True), model(inputs, output_router_logits=True)
        same([found.logits, *found.router_logits], [expected.logits, *expected.router_logits], 2e-6)


def logits_and_gradients(model, inputs):
    found = model(input_ids=inputs, labels=inputs)
    found.loss.backward()
    # In transformers 4, the gradient of an expert without tokens is None.
    gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
    return {"logits": found.logits.detach(), **gradients}


@pytest.mark.parametrize("name", models.TYPES)
def test_without_vectors_every_gradient_equals_that_of_transformers(name):
    """float32 gradients are compared relative to the largest element; bf16 gradients must be close to those of float32."""
    results, inputs = {}, models.tokens()
    for dtype in (torch.float32, torch.bfloat16):
        plain = models.tiny(name).to(dtype).eval()
        model = rt.default_moe(copy.deepcopy(plain), use_at_evaluation=False, init_std=1.0)
        results[dtype] = logits_and_gradients(plain, inputs), logits_and_gradients(model, inputs)
    (exact, found), (plain_half, half) = results.values()
    for key, want in exact.items():
        error = (found[key] - want).abs().max() / want.abs().max().clamp(min=1e-30)
        assert error <= 1e-5, f"{key}: relative error {error:.2e}"
        if want.any():
            assert relative_error(half[key], want) <= 1.5 * relative_error(plain_half[key], want) + 0.005, key


@pytest.mark.parametrize("name", models.TYPES)
def test_the_router_gets_gradients_for_experts_that_did_not_run(name):
    model = rt.default_moe(models.tiny(name), init_std=0.5)
    inputs = models.tokens(1, 1)
    loss_of_logits = model(inputs).logits.square().sum()
    loss_of_logits.backward()
    for layer in models.moe_layers(model):
        assert (layer.gate.weight.grad.abs().amax(dim=1) > 0).all()


@pytest.mark.parametrize("name", models.TYPES)
def test_save_and_load_keep_vectors_and_settings(name, tmp_path):
    model = rt.default_moe(models.tiny(name), beta=0.75, weight_norm="count")
    inputs = models.tokens()
    loss_of(model, inputs).backward()
    model.eval().save_pretrained(tmp_path)
    other = rt.from_pretrained(tmp_path, dtype=torch.float32)
    assert type(other) is type(model)
    same(vectors(other), vectors(model))
    same([other.eval()(inputs).logits], [model(inputs).logits], 1e-6)
    settings = models.moe_layers(other)[0].default_moe_state.settings
    assert (settings.beta, settings.weight_norm) == (0.75, "count")
    half = rt.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert next(half.parameters()).dtype == torch.bfloat16
    same(vectors(half), vectors(model))
    # Saved in several files, and loaded from a subfolder.
    model.save_pretrained(tmp_path / "files", max_shard_size="20KB")
    assert len(list((tmp_path / "files").glob("*.safetensors"))) > 1
    same(vectors(rt.from_pretrained(tmp_path, subfolder="files")), vectors(model))
    # Loaded through state_dict.
    third = rt.default_moe(models.tiny(name, seed=5))
    third.load_state_dict(model.state_dict())
    same(vectors(third), vectors(model))


def test_plain_from_pretrained_reads_the_same_files_without_vectors(tmp_path):
    model = rt.default_moe(models.tiny("qwen3_moe"))
    model.save_pretrained(tmp_path)
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert not any(isinstance(m, rt.DefaultMoeLayer) for m in plain.modules())
    parameters = dict(model.named_parameters())
    same([p for _, p in plain.named_parameters()], [parameters[n] for n, _ in plain.named_parameters()])


@pytest.mark.parametrize("name", models.TYPES)
def test_removing_vectors_restores_the_model(name):
    plain = models.tiny(name)
    model = rt.default_moe(copy.deepcopy(plain), init_std=1.0)
    classes = [type(m) for m in plain.modules()]
    assert rt.remove_default_moe(model) is model
    assert [type(m) for m in model.modules()] == classes and model.state_dict().keys() == plain.state_dict().keys()
    assert not hasattr(model.config, "default_moe")
    same([model(models.tokens()).logits], [plain(models.tokens()).logits])
    assert rt.default_vectors(rt.default_moe(model))


@pytest.mark.parametrize("name", models.TYPES)
def test_a_pass_that_returns_router_logits_does_not_change_what_conversion_and_removal_do(name):
    """In transformers 4.57, such a pass leaves the forward method in the layers."""
    plain, inputs = models.tiny(name).eval(), models.tokens()
    expected = plain(inputs, output_router_logits=True).logits
    model = rt.default_moe(plain, pass_forward=False)
    found = model(inputs, output_router_logits=True)
    same([found.logits], [expected], 2e-6)
    same([rt.remove_default_moe(model)(inputs).logits], [expected])
    half = rt.default_moe(model).bfloat16()
    half(inputs, output_router_logits=True)
    rt.default_moe(rt.remove_default_moe(half))
    assert all(z.dtype == torch.float32 for z in half(inputs, output_router_logits=True).router_logits)


@pytest.mark.parametrize("name", models.TYPES)
def test_a_change_of_top_k_after_the_conversion_has_the_effect_that_it_has_in_transformers(name):
    plain, inputs = models.tiny(name).eval(), models.tokens()
    model = rt.default_moe(copy.deepcopy(plain), pass_forward=False).eval()
    for layer in (*models.moe_layers(plain), *models.moe_layers(model)):
        (layer.gate if models.VERSION >= 5 else layer).top_k = 1
    same([model(inputs).logits], [plain(inputs).logits], 2e-6)
    loads = [rt.expert_load(m, dict(input_ids=inputs)) for m in (plain, model)]
    assert [v.tolist() for v in loads[0].values()] == [v.tolist() for v in loads[1].values()]
    assert all(int(v.sum()) == inputs.numel() for v in loads[1].values())
    rt.router_gradient_similarity(model, dict(input_ids=inputs))
    (layer.gate if models.VERSION >= 5 else layer).top_k = 9
    with pytest.raises(ValueError, match="top_k 9, num_experts"):
        model(inputs)


class Wrapped(torch.nn.Module):
    """Contains a router and adds to its logits, as PEFT does. Has the attributes of the router."""

    def __init__(self, router):
        super().__init__()
        self.base_layer = router
        self.delta = torch.nn.Linear(models.HIDDEN, router.weight.shape[0], bias=False)

    @property
    def weight(self):
        return self.base_layer.weight

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_layer"), name)

    def forward(self, x):
        z = self.base_layer(x)
        if not isinstance(z, tuple):
            return z + self.delta(x)
        index = (z[0] + self.delta(x)).topk(self.top_k).indices
        return z[0] + self.delta(x), z[0].softmax(-1).gather(1, index), index


@pytest.mark.parametrize("converted_first", [True, False])
@pytest.mark.parametrize("name", ["mixtral", "olmoe"])
def test_a_wrapped_router_is_used_and_its_float32_logits_are_removed_again(name, converted_first):
    model, inputs = models.tiny(name).bfloat16().eval(), models.tokens()
    if converted_first:
        rt.default_moe(model)
    for layer in models.moe_layers(model):
        layer.gate = Wrapped(layer.gate).bfloat16()
    classes = [type(m) for layer in models.moe_layers(model) for m in layer.gate.modules()]
    if not converted_first:
        rt.default_moe(model)
    inner = []
    models.moe_layers(model)[0].gate.base_layer.register_forward_hook(
        lambda m, i, o: inner.append((o[0] if isinstance(o, tuple) else o).dtype)
    )
    wrapped = model(inputs).logits
    assert inner == [torch.float32] and rt.expert_load(model, dict(input_ids=inputs))
    for layer in models.moe_layers(model):
        torch.nn.init.zeros_(layer.gate.delta.weight)
    assert not torch.equal(model(inputs).logits, wrapped)
    rt.remove_default_moe(model)
    assert not any(isinstance(m, Float32Gate) for m in model.modules())
    if not converted_first:
        assert [type(m) for layer in models.moe_layers(model) for m in layer.gate.modules()] == classes
    model(inputs)


def test_vectors_of_a_part_are_removed_from_the_whole():
    model = models.tiny("olmoe")
    rt.default_moe(model.model.layers[0])
    rt.remove_default_moe(model)
    assert not any(isinstance(m, rt.DefaultMoeLayer) for m in model.modules())


def test_from_pretrained_accepts_the_options_of_the_configuration(tmp_path):
    rt.default_moe(models.tiny("olmoe"), beta=0.75).save_pretrained(tmp_path)
    options = dict(use_cache=False, output_router_logits=True, router_aux_loss_coef=0.5, num_experts_per_tok=1)
    for key, value in options.items():
        model = rt.from_pretrained(tmp_path, **{key: value}, trust_remote_code=False)
        assert getattr(model.config, key) == value and model.config.default_moe["beta"] == 0.75
    assert rt.expert_load(model, dict(input_ids=models.tokens()))["model.layers.0.mlp"].sum() == models.tokens().numel()
    assert model(models.tokens()).router_logits is None
    assert rt.from_pretrained(tmp_path, dtype=torch.bfloat16, use_cache=False).dtype == torch.bfloat16
    assert rt.from_pretrained(tmp_path, dtype="auto").dtype == torch.float32
    assert rt.from_pretrained(tmp_path, attn_implementation="eager").config._attn_implementation == "eager"
    for option in (dict(device_map="cpu"), dict(output_loading_info=True), dict(variant="x")):
        with pytest.raises(ValueError, match=f"{next(iter(option))}: expected none, got"):
            rt.from_pretrained(tmp_path, **option)


def test_from_pretrained_raises_for_a_model_without_vectors(tmp_path):
    models.tiny("olmoe").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="default_moe"):
        rt.from_pretrained(tmp_path)


def test_the_error_names_missing_vectors(tmp_path):
    from safetensors.torch import load_file, save_file

    rt.default_moe(models.tiny("qwen2_moe")).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.default_vectors"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.default_vectors"):
        rt.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe"])
def test_gradient_checkpointing_gives_the_same_gradients_and_updates_vectors_once(name):
    plain = rt.default_moe(models.tiny(name), beta=0.5)
    checkpointed = copy.deepcopy(plain)
    checkpointed.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for model in (plain.train(), checkpointed.train()):
        for step in range(2):
            loss_of(model, models.tokens(seed=step)).backward()
    same(vectors(checkpointed), vectors(plain))
    same([p.grad for p in checkpointed.parameters()], [p.grad for p in plain.parameters()], 1e-6)
    assert all(v.abs().sum() > 0 for v in vectors(plain))


def test_a_recomputation_uses_the_vectors_of_its_own_pass():
    plain = rt.default_moe(models.tiny("olmoe"), beta=0.5).train()
    checkpointed = copy.deepcopy(plain)
    checkpointed.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    batches = [models.tokens(seed=s) for s in range(3)]
    for model in (plain, checkpointed):
        first = loss_of(model, batches[0])
        with rt.frozen(model):
            second = loss_of(model, batches[1])
        third = loss_of(model, batches[2])
        first.backward(retain_graph=True)
        (third + 2 * second + first).backward()
    same([p.grad for p in checkpointed.parameters()], [p.grad for p in plain.parameters()], 1e-5)
    same(vectors(checkpointed), vectors(plain))
    del first, second, third
    assert not any(layer.default_moe_state.used for layer in models.moe_layers(checkpointed))


def test_nested_checkpoints_do_not_change_the_results():
    layers = models.moe_layers(rt.default_moe(models.tiny("qwen2_moe"), beta=0.5).train())
    checkpoint = functools.partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)
    output = lambda y: y[0] if isinstance(y, tuple) else y  # noqa: E731
    inner = lambda x: x + output(layers[0](x))  # noqa: E731
    outer = lambda x: output(layers[1](checkpoint(inner, x)))  # noqa: E731
    start, results = copy.deepcopy(layers[0].state_dict()), []
    for run in (lambda x: output(layers[1](inner(x))), lambda x: checkpoint(outer, x)):
        layers[0].load_state_dict(start)
        for layer in layers:
            layer.zero_grad(), layer.default_vectors.zero_()
        torch.manual_seed(3)
        x = torch.randn(2, 4, models.HIDDEN, requires_grad=True)
        (run(x) + run(2 * x)).square().sum().backward()
        results.append([x.grad, *(p.grad.clone() for layer in layers for p in layer.parameters() if p.grad is not None)])
        results[-1] += [layer.default_vectors.clone() for layer in layers]
    same(results[1], results[0], 1e-5)


def test_reentrant_checkpointing_raises():
    model = rt.default_moe(models.tiny("mixtral")).train()
    loss_of(model, models.tokens()).backward()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    embedded = model.get_input_embeddings()(models.tokens()).detach().requires_grad_()
    with pytest.raises(RuntimeError, match="use_reentrant"):
        model(inputs_embeds=embedded, labels=models.tokens()).loss.backward()


def test_evaluation_no_grad_and_frozen_do_not_change_vectors():
    model = rt.default_moe(models.tiny("olmoe"), init_std=0.1)
    before, inputs = vectors(model), models.tokens()
    loss_of(model.eval(), inputs).backward()
    same(vectors(model), before)
    with torch.no_grad():
        model.train()(inputs)
    same(vectors(model), before)
    with torch.inference_mode():
        model.train()(inputs)
    same(vectors(model), before)
    with rt.frozen(model):
        loss_of(model, inputs).backward()
    same(vectors(model), before)
    loss_of(model, inputs)
    assert all((a != b).any() for a, b in zip(vectors(model), before, strict=True))


def test_generating_uses_vectors_and_does_not_change_them():
    model = rt.default_moe(models.tiny("qwen3_moe"), init_std=0.3).eval()
    before, prompt = vectors(model), models.tokens()
    generate = lambda **options: model.generate(prompt, max_new_tokens=6, do_sample=False, pad_token_id=0, **options)  # noqa: E731
    assert torch.equal(generate(use_cache=True), generate(use_cache=False))
    model.train()
    generate()
    same(vectors(model), before)


def test_two_forward_passes_before_backward_use_different_vectors():
    model = rt.default_moe(models.tiny("mixtral"), beta=0.5).train()
    batches = [models.tokens(seed=s) for s in (1, 2)]
    together = copy.deepcopy(model)
    sum(loss_of(together, b) for b in batches).backward()
    for b in batches:
        loss_of(model, b).backward()
    same([p.grad for p in together.parameters()], [p.grad for p in model.parameters()], 1e-6)


def test_micro_batches_decay_by_the_root_of_beta():
    model = rt.default_moe(models.tiny("mixtral"), beta=0.81, init_std=0.3).train()
    whole = copy.deepcopy(model)
    rt.set_micro_batches(model, 2)
    inputs = models.tokens()
    start = vectors(model)[0]
    loss_of(whole, inputs), loss_of(model, inputs)
    one, half = vectors(whole)[0], vectors(model)[0]
    # The same mean m has the factor 1 - 0.81 in the first model, and 1 - 0.9 in the second.
    mean = (one - 0.81 * start) / 0.19
    same([half], [0.9 * start + 0.1 * mean], 1e-5)
    # n passes of the same batch with the same weights have the effect of one step, because (β^(1/n))^n = β.
    loss_of(model, inputs)
    same([vectors(model)[0]], [one], 1e-5)


def test_bf16_autocast_trains_with_router_and_vectors_in_float32():
    model = rt.default_moe(models.tiny("qwen3_moe", initializer_range=0.1)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    inputs, losses, seen = models.tokens(4, 16), [], []
    gate = models.moe_layers(model)[0].gate
    gate.register_forward_hook(lambda m, i, o: seen.append((o[0] if isinstance(o, tuple) else o).dtype))
    for _ in range(30):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of(model, inputs)
        loss.backward()
        optimizer.step(), optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0], losses
    assert set(seen) == {torch.float32}
    assert all(v.dtype == torch.float32 and v.isfinite().all() for v in vectors(model))


def test_a_model_in_bf16_routes_in_float32():
    model = rt.default_moe(models.tiny("mixtral").bfloat16(), init_std=0.1).train()
    found = model(models.tokens(), output_router_logits=True)
    assert found.logits.dtype == torch.bfloat16
    assert all(z.dtype == torch.float32 for z in found.router_logits)
    found.logits.sum().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "gate.weight" in n)


@pytest.mark.skipif(models.VERSION < 5, reason="transformers 4 loops over experts with tokens: graph breaks")
@pytest.mark.parametrize(("experts", "backend"), [("grouped_mm", "inductor"), ("batched_mm", "aot_eager")])
def test_compiles_to_one_graph_and_updates_vectors_when_it_runs(experts, backend):
    torch._dynamo.reset()
    plain = rt.default_moe(models.tiny("mixtral", experts_implementation=experts, num_hidden_layers=1), beta=0.5).train()
    compiled = copy.deepcopy(plain)
    inner = torch.compile(compiled, backend=backend, fullgraph=True)
    for step in range(2):
        inputs = models.tokens(seed=step)
        for model in (plain, inner):
            F.cross_entropy(model(inputs, use_cache=False).logits.flatten(0, 1), inputs.flatten()).backward()
    same(vectors(compiled), vectors(plain), 1e-6)
    same([p.grad for p in compiled.parameters()], [p.grad for p in plain.parameters()], 1e-5)
    before = vectors(compiled)
    inner.eval()
    with torch.no_grad():
        inner(inputs, use_cache=False)
    same(vectors(compiled), before)


def test_compiles_with_graph_breaks_if_the_experts_run_in_a_loop():
    plain = rt.default_moe(models.tiny("olmoe", num_hidden_layers=1), beta=0.5).train()
    compiled = copy.deepcopy(plain)
    inner = torch.compile(compiled, backend="aot_eager")
    inputs = models.tokens()
    for model in (plain, inner):
        F.cross_entropy(model(inputs, use_cache=False).logits.flatten(0, 1), inputs.flatten()).backward()
    same(vectors(compiled), vectors(plain), 1e-6)
    same([p.grad for p in compiled.parameters()], [p.grad for p in plain.parameters()], 1e-5)


def test_checkpointing_a_compiled_layer_updates_vectors_once():
    layer = models.moe_layers(rt.default_moe(models.tiny("qwen3_moe"), beta=0.5))[0].train()
    once = copy.deepcopy(layer)
    compiled = torch.compile(layer, backend="aot_eager")
    x = torch.randn(2, 4, models.HIDDEN, requires_grad=True)
    once(x)
    output = torch.utils.checkpoint.checkpoint(compiled, x, use_reentrant=False)
    (output[0] if isinstance(output, tuple) else output).sum().backward()
    same([layer.default_vectors], [once.default_vectors], 1e-6)


def test_auxiliary_loss_of_transformers_reaches_the_routers():
    model = rt.default_moe(models.tiny("olmoe"))
    inputs = models.tokens()
    found = model(inputs, labels=inputs, output_router_logits=True)
    assert found.aux_loss is not None and found.aux_loss.item() > 0
    found.aux_loss.backward()
    assert all(layer.gate.weight.grad.abs().sum() > 0 for layer in models.moe_layers(model))
