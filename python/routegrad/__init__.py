"""Default vectors for Mixture-of-Experts routers in PyTorch, and access to the runs of routegrad.

``routegrad.load_run`` reads the folder of a run and does not need PyTorch. ``routegrad.torch`` contains everything that
needs PyTorch; it is imported on first use.
"""

from __future__ import annotations

import importlib
from typing import Any

from .runs import Run, load_run

__all__ = ["Run", "load_run", "torch"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "torch":
        return importlib.import_module(".torch", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
