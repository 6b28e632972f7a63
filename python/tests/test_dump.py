"""Compares with `routegrad dump --train`: logits, loss, every gradient and the updated default vectors, for equal weights.

Needs the program, from ROUTEGRAD_BIN or target/release. Does not build it.
"""

import json
import os
import pathlib
import subprocess

import models
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

import routegrad.torch as rt

TOLERANCE = 1e-6
BUILT = pathlib.Path(__file__).parents[2] / "target/release/routegrad"
PROGRAM = pathlib.Path(os.environ.get("ROUTEGRAD_BIN", BUILT))

pytestmark = [
    pytest.mark.skipif(not PROGRAM.is_file(), reason=f"no routegrad program: set ROUTEGRAD_BIN, or build {BUILT}"),
    pytest.mark.skipif(models.VERSION < 5, reason="transformers 4 stores each expert in its own tensors"),
]
SETTINGS = dict(beta=0.7, weighted=True, weight_norm="sum_p", pass_forward=True, use_at_evaluation=True)


def config_json(model, settings, renormalize):
    """Returns the config.json that routegrad writes for the model."""
    c, mixtral, olmoe = model.config, model.config.model_type == "mixtral", model.config.model_type == "olmoe"
    qk_norm = {"olmoe": "full", "qwen3_moe": "head"}.get(c.model_type, "none")
    router = {"name": "default", "init_std": 0.0, **settings}
    if renormalize:
        router["renormalize"] = True
    return {
        "model_type": "routegrad", "vocab_size": c.vocab_size, "hidden_size": c.hidden_size,
        "num_hidden_layers": c.num_hidden_layers, "num_attention_heads": c.num_attention_heads,
        "num_key_value_heads": c.num_key_value_heads,
        "head_dim": getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads,
        "num_experts": c.num_local_experts if mixtral else c.num_experts, "num_experts_per_tok": c.num_experts_per_tok,
        "moe_intermediate_size": c.intermediate_size if mixtral or olmoe else c.moe_intermediate_size,
        "intermediate_size": c.intermediate_size, "mlp_only_layers": list(getattr(c, "mlp_only_layers", None) or []),
        "norm_type": "rmsnorm", "norm_eps": c.rms_norm_eps, "rope_theta": 10000.0, "tie_word_embeddings": False,
        "attention_bias": c.model_type == "qwen2_moe", "qk_norm": qk_norm,
        "shared_expert_intermediate_size": getattr(c, "shared_expert_intermediate_size", 0),
        "max_position_embeddings": c.max_position_embeddings, "hidden_act": "silu", "router": router,
    }  # fmt: skip


def dump(model, tokens, folder, settings, renormalize):
    """Runs the program with the model's weights and default vectors, and returns its tensors; None without `renormalize`."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config_json(model, settings, renormalize)))
    save_file({n: t.contiguous() for n, t in model.state_dict().items()}, folder / "model.safetensors")
    save_file({"tokens": tokens}, folder / "tokens.safetensors")
    command = [PROGRAM, "dump", "--model", folder, "--tokens", folder / "tokens.safetensors", "--out", folder / "out"]
    done = subprocess.run([*command, "--train", "--threads", "2"], capture_output=True, text=True, check=False)
    if done.returncode != 0 and renormalize and "renormalize" in done.stderr:
        return None
    assert done.returncode == 0, done.stderr
    return load_file(folder / "out")


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("olmoe", {}),
        ("olmoe", dict(weighted=False)),
        ("qwen2_moe", dict(weight_norm="count")),
        ("qwen2_moe", dict(pass_forward=False)),
        ("qwen3_moe", {}),
        ("mixtral", {}),
    ],
)
def test_the_model_computes_what_the_program_computes(name, changes, tmp_path):
    norm = {} if name in ("mixtral", "olmoe") else dict(norm_topk_prob=name == "qwen3_moe")
    renormalize = name in ("mixtral", "qwen3_moe")
    for attempt in (renormalize, False):
        own = {**norm, "norm_topk_prob": attempt} if name != "mixtral" else {}
        model, adapters = models.tiny_float64(name, tie_word_embeddings=False, **own)
        settings = {**SETTINGS, **changes}
        rt.default_moe(model, adapters=adapters, init_std=0.5, **settings)
        tokens = models.tokens(2, 10)
        expected = dump(model, tokens, tmp_path / f"{name}-{attempt}", settings, attempt)
        if expected is not None:
            break
        if name == "mixtral":
            pytest.skip(f"{PROGRAM} does not renormalize with default vectors, which mixtral always does")
    compare(model, tokens, expected)


def compare(model: nn.Module, tokens, expected):
    logits = model.train()(tokens[:, :-1]).logits
    assert logits.dtype == torch.float64
    loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    found = {"logits": logits, "loss": loss, **{f"grad.{n}": p.grad for n, p in model.named_parameters()}}
    found |= {f"{n}.default_vectors": v for n, v in rt.default_vectors(model).items()}
    assert set(found) == set(expected)
    for key, value in expected.items():
        error = (found[key] - value).abs().max().item() / max(value.abs().max().item(), 1e-30)
        assert error <= TOLERANCE, f"{key}: relative error {error:.2e}"
