"""Timing as src/measure.rs does it: sides in turn, two passes, medians; a GPU's events and graphs where there are."""

import statistics
import time
from dataclasses import dataclass, field

import torch

PASSES = 2


@dataclass
class Side:
    """One implementation of a case: a launch for each set of inputs, or the reason why there is none."""

    implementation: str
    version: str
    family: str
    launches: list = field(default_factory=list)
    reason: str = ""
    detail: str = ""
    graph: bool = False
    gives: list = field(default_factory=list)  # names of what a launch returns
    steps: bool = False  # no graph is tried: the optimizer's step is not one launch
    only: str = ""  # of its family, the cases whose name contains this
    passes: list = field(default_factory=list)
    plan: tuple = (0, 0)
    next: int = 0

    def run(self, times):
        for _ in range(times):
            self.launches[self.next]()
            self.next = (self.next + 1) % len(self.launches)


def seconds(work, cuda):
    if not cuda:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    work()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) * 1e-3


def captured(launch, stream):
    """The launch as a replay of a CUDA graph."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        launch()
    return graph.replay


def prepare(side, cuda, stream):
    """Warms up, then captures graphs where that works; False when the side cannot run, for the reason it then has."""
    try:
        for launch in side.launches:
            for _ in range(2):
                launch()
        if cuda and not side.steps:
            torch.cuda.synchronize()
            try:
                side.launches = [captured(launch, stream) for launch in side.launches]
                side.graph = True
            except Exception as e:
                torch.cuda.synchronize()
                side.detail = (side.detail + f" eager, no graph: {first_line(e)}").strip()
        side.run(1)
    except Exception as e:
        side.launches, side.reason = [], f"{type(e).__name__}: {first_line(e)}"
        return False
    return True


def first_line(e):
    lines = str(e).strip().splitlines()
    return lines[0][:200] if lines else type(e).__name__


def interleaved(sides, cuda, budget=0.15):
    """Times the sides of one case in turn; each gets its passes."""
    slowest = max(seconds(lambda: side.run(1), cuda) for side in sides)
    launches = int(min(64, max(1, -(-1e-3 // max(slowest, 1e-9)))))
    samples = int(min(25, max(5, budget / (PASSES * (launches + 1) * max(slowest, 1e-9)))))
    for _ in range(PASSES):
        times = [[] for _ in sides]
        for _ in range(samples):
            for side, times_of in zip(sides, times):
                side.run(1)
                times_of.append(seconds(lambda: side.run(launches), cuda) / launches)
        for side, times_of in zip(sides, times):
            quarters = statistics.quantiles(times_of, n=4)
            median = statistics.median(times_of)
            side.passes.append((median, (quarters[2] - quarters[0]) / median))
            side.plan = (samples, launches)
