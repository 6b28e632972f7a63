"""Tiny random models of the four architectures, and a version of transformers' code for them that computes in float64."""

import importlib
import inspect
import sys
import types

import torch
import transformers

from routegrad.torch import adapters

VERSION = int(transformers.__version__.split(".")[0])
TYPES = ["mixtral", "olmoe", "qwen2_moe", "qwen3_moe"]
HIDDEN, WIDTH, VOCABULARY = 16, 12, 40
BASE = dict(
    vocab_size=VOCABULARY, hidden_size=HIDDEN, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=64, rope_theta=10000.0, initializer_range=0.3, num_experts_per_tok=2,
    attn_implementation="eager",
)  # fmt: skip
OWN = {
    "mixtral": dict(intermediate_size=WIDTH, num_local_experts=4, head_dim=6, sliding_window=None),
    "olmoe": dict(intermediate_size=WIDTH, num_experts=5, num_experts_per_tok=3, norm_topk_prob=False, pad_token_id=None),
    "qwen2_moe": dict(
        intermediate_size=20, moe_intermediate_size=WIDTH, shared_expert_intermediate_size=10, num_experts=4,
        norm_topk_prob=False, use_sliding_window=False,
    ),
    "qwen3_moe": dict(
        intermediate_size=20, moe_intermediate_size=WIDTH, num_experts=4, norm_topk_prob=True, mlp_only_layers=[0],
        head_dim=6,
    ),
}  # fmt: skip


def config(name, **changes):
    keys = {**BASE, **OWN[name], **changes}
    if VERSION >= 5:
        keys.setdefault("experts_implementation", "eager")
    return transformers.AutoConfig.for_model(name, **keys)


def tiny(name, seed=0, **changes):
    """Returns a float32 model with random parameters, including those of norms and routers."""
    torch.manual_seed(seed)
    return fill(transformers.AutoModelForCausalLM.from_config(config(name, **changes)))


def fill(model):
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter) + (1.0 if "norm" in key else 0.0))
    return model


def tokens(batch=2, length=9, seed=1):
    made = torch.Generator("cpu").manual_seed(seed)
    return torch.randint(0, VOCABULARY, (batch, length), generator=made, device="cpu").to(torch.get_default_device())


def moe_layers(model):
    return [m for m in model.modules() if type(m).__name__.endswith("SparseMoeBlock")]


def float64_module(name):
    """Returns a copy of the architecture's module in which float32 is replaced by float64."""
    module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    source = inspect.getsource(module)
    for old, new in [
        ("torch.float32", "torch.float64"),
        ("dtype=torch.float)", "dtype=torch.float64)"),
        ("dtype=torch.float,", "dtype=torch.float64,"),
        (".float()", ".double()"),
    ]:
        source = source.replace(old, new)
    patched = types.ModuleType(module.__name__ + "_float64")
    patched.__dict__.update(__package__=module.__package__, __file__=module.__file__)
    sys.modules[patched.__name__] = patched
    exec(compile(source, module.__file__, "exec"), patched.__dict__)
    return patched


def tiny_float64(name, seed=0, **changes):
    """Returns a float64 model that computes only in float64, and the adapters for its MoE layers."""
    module, made = float64_module(name), config(name, **changes)
    architecture = type(transformers.AutoModelForCausalLM.from_config(made)).__name__
    torch.manual_seed(seed)
    model = fill(getattr(module, architecture)(made).double())
    for rotary in (m for m in model.modules() if hasattr(m, "inv_freq")):
        head = getattr(made, "head_dim", None) or HIDDEN // 4
        rotary.inv_freq = 10000.0 ** -(torch.arange(0, head, 2, dtype=torch.float64) / head)
    block = next(type(m) for m in model.modules() if type(m).__name__.endswith("SparseMoeBlock"))
    return model, {block: adapters.TRANSFORMERS}
