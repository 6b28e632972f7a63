"""Reads the folder of a run: configuration, metrics and checkpoints. Uses only the standard library from Python 3.11 on."""

from __future__ import annotations

import json
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Run:
    """A run of routegrad.

    Attributes:
        path: the folder of the run.
        config: the content of ``config.toml``, the resolved configuration.
    """

    path: Path
    config: dict[str, Any]

    @property
    def name(self) -> str:
        """The name of the folder."""
        return self.path.name

    def records(self) -> list[dict[str, Any]]:
        """Returns the lines of ``metrics.jsonl``, one dict per optimizer step; [] if there is no such file.

        Skips the last line if it is incomplete, as after a crash.

        Raises:
            ValueError: another line is not a JSON object.
        """
        file = self.path / "metrics.jsonl"
        if not file.is_file():
            return []
        lines = file.read_bytes().splitlines()
        records: list[dict[str, Any]] = []
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line.decode())
                if not isinstance(record, dict):
                    raise ValueError(f"not an object: {record}")
            except ValueError as error:
                if number == len(lines):
                    break
                raise ValueError(
                    f"{file}, line {number}: expected a JSON object, got {line[:40]!r}; restore the file, or delete the line"
                ) from error
            records.append(record)
        return records

    @property
    def metrics(self) -> Any:
        """The records as a pandas DataFrame with the step as index if pandas is installed, otherwise as a list of dicts."""
        records = self.records()
        try:
            import pandas
        except ImportError:
            return records
        frame = pandas.DataFrame.from_records(records)
        return frame.set_index("step") if "step" in frame else frame

    def checkpoints(self) -> list[Path]:
        """Returns the folders of the complete checkpoints, oldest first.

        A checkpoint is complete if all its files exist and have the sizes in its manifest.
        """
        steps = []
        for folder in (self.path / "checkpoints").glob("step-*"):
            number = re.fullmatch(r"step-(\d+)", folder.name)
            if number and _is_complete(folder):
                steps.append((int(number[1]), folder))
        return [folder for _, folder in sorted(steps)]

    @property
    def checkpoint(self) -> Path:
        """The folder of the newest complete checkpoint. Raises FileNotFoundError if there is none."""
        found = self.checkpoints()
        if not found:
            raise FileNotFoundError(
                f"{self.path}: expected a complete checkpoint in checkpoints/step-N, got none; continue the run with "
                f"`routegrad train --resume --out {self.path}`"
            )
        return found[-1]

    def model(
        self,
        checkpoint: str | os.PathLike[str] | None = None,
        *,
        dtype: torch.dtype | None = None,
        routegrad: str | os.PathLike[str] | None = None,
    ) -> torch.nn.Module:
        """Loads a checkpoint as a model of transformers. Needs ``routegrad[torch]``.

        A model with RMSNorm and the router topk, densemixer or default becomes a mixtral, olmoe, qwen2_moe or qwen3_moe,
        which can be trained; with the router default it has default vectors (see ``routegrad.torch.default_moe``). With
        the router densemixer it is trained with the gradient of topk. Any other model is converted by ``routegrad export``;
        it computes what routegrad computes in evaluation. The files are compared with the digests in the manifest, if the
        folder has one.

        Args:
            checkpoint: the folder of a checkpoint, ``checkpoints/step-N``; the newest complete one if None.
            dtype: the dtype of the weights; float32 if None.
            routegrad: the path of the program for ``routegrad export``; if None, it is searched for in PATH.

        Raises:
            FileNotFoundError: there is no checkpoint, or no program although the model needs it.
            ImportError: the compiled extension, which computes the digests, is missing.
            TypeError: ``dtype`` is not a torch.dtype.
            ValueError: the files are not those of a checkpoint of routegrad, or are damaged.
            RuntimeError: ``routegrad export`` failed.
        """
        from .torch.checkpoint import load_model

        return load_model(Path(checkpoint) if checkpoint is not None else self.checkpoint, dtype, routegrad)


def load_run(path: str | os.PathLike[str]) -> Run:
    """Opens the folder of a run, for example ``load_run("runs/tiny-default")``.

    Raises:
        FileNotFoundError: the folder does not exist or has no ``config.toml``.
        ValueError: ``config.toml`` is not valid TOML in UTF-8.
    """
    folder = Path(path)
    file = folder / "config.toml"
    if not file.is_file():
        raise FileNotFoundError(
            f"{folder}: expected the folder of a run with config.toml, got "
            f"{'a folder without it' if folder.is_dir() else 'no folder'}; pass the folder that `routegrad train` wrote, "
            "such as runs/tiny-default"
        )
    with file.open("rb") as opened:
        try:
            config = tomllib.load(opened)
        except ValueError as error:
            raise ValueError(f"{file}: expected TOML, got an error: {error}; restore the file") from error
    return Run(folder, config)


def _is_complete(checkpoint: Path) -> bool:
    try:
        files = json.loads((checkpoint / "manifest.json").read_text(encoding="utf-8"))["files"]
        return bool(files) and all((checkpoint / n).stat().st_size == entry["bytes"] for n, entry in files.items())
    except (OSError, ValueError, KeyError, TypeError):
        return False
