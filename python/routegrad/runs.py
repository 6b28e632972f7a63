"""Reads the folder of a run: configuration, metrics, newest checkpoint. Needs only the standard library."""

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
        path: its folder.
        config: ``config.toml``, the resolved configuration.
    """

    path: Path
    config: dict[str, Any]

    @property
    def name(self) -> str:
        """The name of the folder."""
        return self.path.name

    def records(self) -> list[dict[str, Any]]:
        """The lines of ``metrics.jsonl``, one per optimizer step; [] before the first.

        A last line that a crash cut off is left out.
        """
        file = self.path / "metrics.jsonl"
        if not file.is_file():
            return []
        lines = file.read_text(encoding="utf-8").splitlines()
        records: list[dict[str, Any]] = []
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                if number == len(lines):
                    break
                raise ValueError(
                    f"{file}, line {number}: expected a JSON object, got {line[:40]!r}; restore the file, or delete the line"
                ) from error
            records.append(record)
        return records

    @property
    def metrics(self) -> Any:
        """The records as a pandas DataFrame indexed by step where pandas is installed, otherwise as a list of dicts."""
        records = self.records()
        try:
            import pandas
        except ImportError:
            return records
        frame = pandas.DataFrame.from_records(records)
        return frame.set_index("step") if "step" in frame else frame

    def checkpoints(self) -> list[Path]:
        """The whole checkpoints, oldest first: those whose files have the sizes that their manifest names."""
        steps = []
        for folder in (self.path / "checkpoints").glob("step-*"):
            number = re.fullmatch(r"step-(\d+)", folder.name)
            if number and _is_whole(folder):
                steps.append((int(number[1]), folder))
        return [folder for _, folder in sorted(steps)]

    @property
    def checkpoint(self) -> Path:
        """The newest whole checkpoint. Raises FileNotFoundError if there is none."""
        found = self.checkpoints()
        if not found:
            raise FileNotFoundError(
                f"{self.path}: expected a whole checkpoint in checkpoints/step-N, got none; let the run go on with "
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
        """The model of a checkpoint for transformers, by default the newest; needs ``routegrad[torch]``.

        A model with RMSNorm and the router topk, densemixer or default becomes a mixtral, olmoe, qwen2_moe or qwen3_moe
        and trains as such; with the router default it has default vectors (see ``routegrad.torch.default_moe``). Any
        other is converted by ``routegrad export`` and computes as at evaluation.

        Args:
            checkpoint: a folder ``checkpoints/step-N``.
            dtype: of the weights; float32 if None.
            routegrad: the program for ``routegrad export``; the one in PATH if None.
        """
        from .torch.checkpoint import load_model

        return load_model(Path(checkpoint) if checkpoint is not None else self.checkpoint, dtype, routegrad)


def load_run(path: str | os.PathLike[str]) -> Run:
    """Opens the folder of a run, as in ``load_run("runs/tiny-default")``.

    Raises FileNotFoundError where it is not one.
    """
    folder = Path(path)
    file = folder / "config.toml"
    if not file.is_file():
        raise FileNotFoundError(
            f"{folder}: expected the folder of a run with config.toml, got {'another one' if folder.is_dir() else 'none'}; "
            "give the folder that `routegrad train` wrote, such as runs/tiny-default"
        )
    with file.open("rb") as opened:
        try:
            config = tomllib.load(opened)
        except tomllib.TOMLDecodeError as error:
            raise ValueError(f"{file}: expected TOML, got an error: {error}; restore the file") from error
    return Run(folder, config)


def _is_whole(checkpoint: Path) -> bool:
    try:
        files = json.loads((checkpoint / "manifest.json").read_text(encoding="utf-8"))["files"]
        return bool(files) and all((checkpoint / n).stat().st_size == entry["bytes"] for n, entry in files.items())
    except (OSError, ValueError, KeyError, TypeError):
        return False
