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
"""The options of ``from_pretrained`` that select the source of the files."""
_OF_WEIGHTS = (*_PLACE, "dtype", "torch_dtype", "quantization_config")
"""The options that do not change the configuration."""
_UNSUPPORTED = {
    "device_map": "load the model and move it with .to(device)",
    "output_loading_info": "call from_pretrained of the model's class",
    "variant": "save the model without it",
}


def from_pretrained(path: str | os.PathLike[str], **options: Any) -> nn.Module:
    """Loads a causal language model that ``save_pretrained`` wrote, with its default vectors and settings.

    ``AutoModelForCausalLM.from_pretrained`` loads the same files as a model without default vectors.

    Args:
        path: a folder, or the name of a model on the Hugging Face hub.
        options: the options of ``AutoModelForCausalLM.from_pretrained`` except ``device_map``, ``output_loading_info`` and
            ``variant``. ``dtype`` does not cast default vectors to a dtype smaller than float32.

    Raises:
        ValueError: the saved model has no default vectors, or those of an MoE layer are missing or have another shape, or
            an option is given that is not supported.
    """
    import transformers

    for name, instead in _UNSUPPORTED.items():
        value = options.get(name)
        if value is not None and value is not False:
            raise ValueError(f"{name}: expected none, got {value!r}; {instead}")
    path = os.fspath(path)
    place = {key: options[key] for key in _PLACE if key in options}
    config = options.pop("config", None)
    if config is None:
        # As in AutoModelForCausalLM: the configuration takes the options that are its attributes.
        weights = {key: options[key] for key in _OF_WEIGHTS if key in options}
        others = {key: value for key, value in options.items() if key not in weights}
        config, unused = transformers.AutoConfig.from_pretrained(path, return_unused_kwargs=True, **place, **others)
        options = weights | {key: value for key, value in others.items() if key in unused}
    settings = getattr(config, "default_moe", None)
    if not isinstance(settings, dict):
        raise ValueError(
            f"{path}: expected a config.json with `default_moe`, got none: the model has no default vectors; load it with "
            "AutoModelForCausalLM.from_pretrained and call default_moe(model)"
        )
    base = transformers.AutoModelForCausalLM._model_mapping[type(config)]
    ignored = [*(getattr(base, "_keys_to_ignore_on_load_unexpected", None) or []), rf"\.{BUFFER}$"]
    # This subclass with the same name is used only for loading. It ignores the tensors of ê; `_fill` reads them below.
    loading = type(base.__name__, (base,), {"__module__": base.__module__, "_keys_to_ignore_on_load_unexpected": ignored})
    model = loading.from_pretrained(path, config=config, **options)
    model.__class__ = base
    default_moe(model, **settings)
    _fill(model, path, place)
    return model


def _canonical(name: str) -> str:
    """Returns the layer's name in transformers 5, where `block_sparse_moe` of mixtral is `mlp`."""
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
    """Returns, for each tensor of default vectors in a model's safetensors files, a function that reads it."""
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
    """Returns the paths of a model's safetensors files. ``place`` contains the options that select their source."""
    from transformers.utils import cached_file

    def find(name: str) -> str | None:
        return cached_file(path, name, **place, _raise_exceptions_for_missing_entries=False)

    index = find("model.safetensors.index.json")
    if index is not None:
        try:
            with open(index, encoding="utf-8") as file:
                names = sorted(set(json.load(file)["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{index}: expected JSON with weight_map, got {error!r}; copy the model again") from error
    else:
        names = ["model.safetensors"]
    files = [find(name) for name in names]
    if None in files:
        raise ValueError(f"{path}: expected the files {names}, got not all of them; copy the model again")
    return [file for file in files if file is not None]
