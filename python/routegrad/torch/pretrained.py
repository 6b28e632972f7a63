"""Loads a model that was saved with default vectors."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from .convert import default_moe
from .layer import BUFFER, layers_of

_PLACE = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
"""Options that say where files come from."""


def from_pretrained(path: str | os.PathLike[str], **options: Any) -> nn.Module:
    """The causal language model that ``save_pretrained`` wrote to ``path``, with its default vectors and settings.

    ``path`` is a folder or a name on the Hugging Face hub. Plain ``AutoModelForCausalLM.from_pretrained`` reads the same
    files without the default vectors: as a model that was never converted.

    Args:
        options: those of ``AutoModelForCausalLM.from_pretrained``; ``device_map`` is not among them. ``dtype`` does not
            round default vectors below float32.

    Raises:
        ValueError: the model has no default vectors, or not those of every MoE layer.
    """
    import transformers

    if options.get("device_map") is not None:
        raise ValueError("device_map: expected none, got one; load the model and move it with .to(device)")
    path = os.fspath(path)
    place = {key: options[key] for key in _PLACE if key in options}
    config = options.pop("config", None) or transformers.AutoConfig.from_pretrained(path, **place)
    settings = getattr(config, "default_moe", None)
    if not isinstance(settings, dict):
        raise ValueError(
            f"{path}: expected a config.json with `default_moe`, got none: the model has no default vectors; load it with "
            "AutoModelForCausalLM.from_pretrained and call default_moe(model)"
        )
    base = transformers.AutoModelForCausalLM._model_mapping[type(config)]
    ignored = [*(getattr(base, "_keys_to_ignore_on_load_unexpected", None) or []), rf"\.{BUFFER}$"]
    # The class of the same name only to load: ê is read below, and is no unexpected tensor.
    loading = type(base.__name__, (base,), {"__module__": base.__module__, "_keys_to_ignore_on_load_unexpected": ignored})
    model = loading.from_pretrained(path, config=config, **options)
    model.__class__ = base
    default_moe(model, **settings)
    _fill(model, path, place)
    return model


def _canonical(name: str) -> str:
    """A layer's name alike in both versions: mixtral's `block_sparse_moe` is `mlp` in transformers 5."""
    return name.replace(".block_sparse_moe", ".mlp").removesuffix(f".{BUFFER}")


def _fill(model: nn.Module, path: str, place: dict[str, Any]) -> None:
    stored = {_canonical(name): read for name, read in stored_vectors(path, place).items()}
    for name, layer in layers_of(model).items():
        read = stored.get(_canonical(name))
        found = None if read is None else read()
        if found is None or found.shape != layer.default_vectors.shape:
            raise ValueError(
                f"{path}: expected {name}.{BUFFER} {list(layer.default_vectors.shape)}, got "
                f"{'none' if found is None else list(found.shape)}; save the model again"
            )
        layer.default_vectors.copy_(found)


def stored_vectors(path: str, place: dict[str, Any]) -> dict[str, Callable[[], Tensor]]:
    """A function for each tensor of default vectors in the safetensors files of a model, which reads it."""
    from safetensors import safe_open

    def reader(file: str, name: str) -> Callable[[], Tensor]:
        def read() -> Tensor:
            with safe_open(file, framework="pt") as tensors:
                return tensors.get_tensor(name)

        return read

    names: dict[str, Callable[[], Tensor]] = {}
    for file in weight_files(path, place):
        with safe_open(file, framework="pt") as tensors:
            names.update({n: reader(file, n) for n in tensors.keys() if re.search(rf"\.{BUFFER}$", n)})  # noqa: SIM118
    return names


def weight_files(path: str, place: dict[str, Any]) -> list[str]:
    """The safetensors files of a model; ``place`` are options of transformers that say where they come from."""
    from transformers.utils import cached_file

    def find(name: str) -> str | None:
        return cached_file(path, name, **place, _raise_exceptions_for_missing_entries=False)

    index = find("model.safetensors.index.json")
    if index is not None:
        with open(index, encoding="utf-8") as file:
            names = sorted(set(json.load(file)["weight_map"].values()))
    else:
        names = ["model.safetensors"]
    files = [find(name) for name in names]
    if None in files:
        raise ValueError(f"{path}: expected the files {names}, got some of them; copy the model again")
    return [file for file in files if file is not None]
