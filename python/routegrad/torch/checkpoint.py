"""Loads a checkpoint of routegrad as a model of transformers."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .convert import default_moe
from .layer import BUFFER
from .pretrained import weight_files

_DEFAULT_SETTINGS = {"beta", "weighted", "weight_norm", "pass_forward", "use_at_evaluation"}
_OTHER_SETTINGS = {"name", "source", "samples", "shrink", "init_std", "renormalize"}


def load_model(checkpoint: Path, dtype: torch.dtype | None, routegrad: str | os.PathLike[str] | None) -> nn.Module:
    """Loads the model of ``checkpoint``, a folder ``step-N``; see ``Run.model``."""
    if not (dtype is None or isinstance(dtype, torch.dtype)):
        raise TypeError(f"dtype: expected a torch.dtype such as torch.bfloat16, or None, got {dtype!r}")
    file = checkpoint / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{checkpoint}: expected a checkpoint with config.json, got none; pass checkpoints/step-N")
    _verify(checkpoint, file)
    try:
        source = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(source, dict):
            raise ValueError(f"a {type(source).__name__}")
    except ValueError as error:
        raise ValueError(f"{file}: expected a JSON object, got an error: {error}; copy the checkpoint again") from error
    if source.get("model_type") != "routegrad":
        raise ValueError(
            f"{file}: expected model_type routegrad, got {source.get('model_type')!r}; load it with "
            "AutoModelForCausalLM.from_pretrained"
        )
    try:
        model_type = architecture(source)
        config = None if model_type is None else transformers_config(source, model_type)
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{file}: expected the keys of a model of routegrad, got {error!r}; copy the checkpoint again"
        ) from error
    if model_type is None:
        return _exported(checkpoint, source, dtype, routegrad)
    return _native(checkpoint, source, config, dtype or torch.float32)


def _verify(checkpoint: Path, file: Path) -> None:
    """Raises ValueError if ``file`` is not the one that the checkpoint was saved with. Without a manifest, accepts it."""
    if (checkpoint / "manifest.json").is_file():
        from .ops import kernels

        kernels().verify_file(os.fspath(checkpoint), file.name)


def architecture(source: dict[str, Any]) -> str | None:
    """Returns the architecture of transformers that computes and trains a model with this config.json; None if none does."""
    router, name = source["router"], source["router"]["name"]
    if source["norm_type"] != "rmsnorm" or name not in ("topk", "densemixer", "default"):
        return None
    if name == "default" and not _known_settings(router):
        return None
    dense, shared = source["mlp_only_layers"], source["shared_expert_intermediate_size"]
    own_width = source["head_dim"] * source["num_attention_heads"] != source["hidden_size"]
    bias, qk_norm = source["attention_bias"], source["qk_norm"]
    if qk_norm == "head":
        return None if bias or shared else "qwen3_moe"
    if qk_norm == "full":
        return None if bias or shared or dense or own_width else "olmoe"
    if not own_width:
        return "qwen2_moe"
    plain = not (bias or shared or dense) and router.get("renormalize", False)
    return "mixtral" if plain else None


def _known_settings(router: dict[str, Any]) -> bool:
    """Returns whether ``default_moe`` supports these settings: plain averages over the tokens that chose the expert."""
    plain = router.get("source", "chosen") == "chosen" and router.get("shrink", 1.0) == 1.0
    return plain and set(router) <= _DEFAULT_SETTINGS | _OTHER_SETTINGS


def transformers_config(source: dict[str, Any], model_type: str) -> Any:
    """Returns the configuration in transformers of the architecture ``model_type`` for a checkpoint's config.json."""
    from transformers import AutoConfig

    same = [
        "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
        "num_experts_per_tok", "hidden_act", "max_position_embeddings", "rope_theta", "tie_word_embeddings",
    ]  # fmt: skip
    keys = {key: source[key] for key in same} | {"rms_norm_eps": source["norm_eps"], "use_sliding_window": False}
    experts, width = source["num_experts"], source["moe_intermediate_size"]
    if model_type == "mixtral":
        return AutoConfig.for_model(
            model_type, **keys, num_local_experts=experts, intermediate_size=width, sliding_window=None
        )
    keys |= {"num_experts": experts, "norm_topk_prob": source["router"].get("renormalize", False)}
    if model_type == "olmoe":
        return AutoConfig.for_model(model_type, **keys, intermediate_size=width)
    keys |= {
        "intermediate_size": source["intermediate_size"],
        "moe_intermediate_size": width,
        "mlp_only_layers": source["mlp_only_layers"],
        "decoder_sparse_step": 1,
    }
    if model_type == "qwen2_moe":
        keys |= {
            "qkv_bias": source["attention_bias"],
            "shared_expert_intermediate_size": source["shared_expert_intermediate_size"],
        }
    return AutoConfig.for_model(model_type, **keys)


def _native(checkpoint: Path, source: dict[str, Any], config: Any, dtype: torch.dtype) -> nn.Module:
    from transformers import AutoModelForCausalLM

    model_type = config.model_type
    if dtype == torch.float64:
        # The default of transformers 5, a grouped matrix product, does not support float64.
        config._experts_implementation = "eager"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Initializing zero-element tensors")
        model = AutoModelForCausalLM.from_config(config).to(dtype)
    settings = {k: v for k, v in source["router"].items() if k in _DEFAULT_SETTINGS}
    if source["router"]["name"] == "default":
        default_moe(model, **settings)
    targets = model.state_dict(keep_vars=True)
    left = set(targets)
    with torch.no_grad():
        for name, value in _tensors(checkpoint, model_type, targets):
            if name not in targets or targets[name].shape != value.shape:
                raise ValueError(
                    f"{checkpoint}: expected tensors of a {model_type}, got {name} {list(value.shape)}; the files do not "
                    "match config.json"
                )
            targets[name].copy_(value)
            left.discard(name)
    # A qwen2_moe always has a shared expert; its width is 0 if the checkpoint has none. A tied head has no separate tensor.
    idle = [r"\.shared_expert"] * (not source["shared_expert_intermediate_size"])
    idle += [r"^lm_head\."] * source["tie_word_embeddings"]
    missing = [name for name in sorted(left) if not any(re.search(pattern, name) for pattern in idle)]
    if missing:
        raise ValueError(f"{checkpoint}: expected tensor {missing[0]}, got none; copy the checkpoint again")
    return model.eval()


def _tensors(checkpoint: Path, model_type: str, targets: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yields the checkpoint's tensors, with the names and shapes that the installed version of transformers uses."""
    from safetensors import SafetensorError, safe_open

    for file in weight_files(str(checkpoint), {}):
        _verify(checkpoint, Path(file))
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118
                    if name.endswith(f".{BUFFER}") and not any(n.endswith(BUFFER) for n in targets):
                        continue
                    yield from _renamed(name, tensors.get_tensor(name), model_type, targets)
        except SafetensorError as error:
            raise ValueError(
                f"{file}: expected a safetensors file, got an error: {error}; copy the checkpoint again"
            ) from error


def _renamed(name: str, value: Tensor, model_type: str, targets: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    if name not in targets and model_type == "mixtral":
        name = name.replace(".mlp.", ".block_sparse_moe.")
    fused = re.fullmatch(r"(.*\.experts)\.(gate_up_proj|down_proj)", name)
    if name in targets or not fused:
        yield name, value
        return
    # transformers 4 has a module for each expert.
    gate, up, down = ("w1", "w3", "w2") if model_type == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    for expert, matrix in enumerate(value):
        pieces = [(down, matrix)] if fused[2] == "down_proj" else list(zip((gate, up), matrix.chunk(2), strict=True))
        for part, piece in pieces:
            yield f"{fused[1]}.{expert}.{part}.weight", piece


def _exported(
    checkpoint: Path, source: dict[str, Any], dtype: torch.dtype | None, routegrad: str | os.PathLike[str] | None
) -> nn.Module:
    """Converts the checkpoint with ``routegrad export``, and loads the result with the model code that it contains."""
    from transformers import AutoModelForCausalLM

    program = os.fspath(routegrad) if routegrad is not None else shutil.which("routegrad")
    if program is None:
        raise FileNotFoundError(
            f"{checkpoint}: expected RMSNorm and the router topk, densemixer or default, or the program `routegrad` in PATH "
            f"to export other models, got router {source['router']['name']} with {source['norm_type']}; pass "
            "routegrad=PATH, or export it: routegrad export --model DIR --to hf --out NEW"
        )
    with tempfile.TemporaryDirectory() as folder:
        command = [program, "export", "--model", str(checkpoint), "--to", "hf", "--out", f"{folder}/model"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"`{' '.join(command)}` failed: {done.stderr.strip()}")
        # The model code comes from the installed routegrad, not from the checkpoint.
        model = AutoModelForCausalLM.from_pretrained(f"{folder}/model", trust_remote_code=True, dtype=dtype or torch.float32)
    return model.eval()
