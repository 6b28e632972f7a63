"""Timing as src/measure.rs does it: sides in turn, two passes, medians; a GPU's events and graphs where there are."""

import importlib.metadata
import statistics
import time
from dataclasses import dataclass, field
from typing import Callable

import torch

PASSES = 2


@dataclass
class Side:
    """One implementation of a case."""

    implementation: str
    family: str
    make: Callable  # gives a launch for each set of inputs; raises where it cannot
    gives: list | Callable = ()  # names of what a launch returns, or a function from that to outputs by name
    detail: str = ""
    version: str = torch.__version__
    only: str = ""  # of its family, the cases whose name contains this
    late: bool = False  # compiles or tunes for long, or may fault: runs when all others have
    steps: bool = False  # no graph is tried: the optimizer's step is not one launch
    # What came of it.
    reason: str = ""  # why it cannot run
    launches: list = field(default_factory=list)
    graph: bool = False
    passes: list = field(default_factory=list)
    plan: tuple = (0, 0)
    next: int = 0

    def run(self, times):
        try:
            for _ in range(times):
                self.launches[self.next]()
                self.next = (self.next + 1) % len(self.launches)
        except Exception as e:
            self.fail(e)
            raise

    def fail(self, e):
        self.launches, self.passes, self.reason = [], [], told(e)

    def outputs(self, given):
        """What a launch returned, by name."""
        given = given if isinstance(given, (tuple, list)) else [given]
        return self.gives(*given) if callable(self.gives) else dict(zip(self.gives, given))


def told(e):
    lines = str(e).strip().splitlines()
    return f"{type(e).__name__}: {lines[0][:200]}" if lines else type(e).__name__


def version(package):
    """Of a package, where it is installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


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
    """Makes the launches and warms them up, then captures graphs where that works. Gives what the first launch returned, by
    name; None when the side cannot run, for the reason it then has."""
    try:
        side.launches = side.make()
        outputs = side.outputs(side.launches[0]())
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
                side.detail = f"{side.detail}; eager, no graph: {told(e)}".removeprefix("; ")
        side.run(1)
        if cuda:
            torch.cuda.synchronize()
    except Exception as e:
        side.fail(e)
        if cuda:
            torch.cuda.synchronize()  # an error that stays ends this process, and run.py goes on in another
        return None
    return outputs


def timed(sides, cuda):
    """Times the sides of one case beside each other. One that raises has no time but a reason; the others begin anew."""
    while running := [side for side in sides if not side.reason]:
        try:
            return interleaved(running, cuda)
        except Exception:
            if cuda:
                torch.cuda.synchronize()
            if all(not side.reason for side in running):
                raise


def interleaved(sides, cuda, budget=0.15):
    """Times the sides in turn; each gets its passes."""
    slowest = max(seconds(lambda: side.run(1), cuda) for side in sides)
    launches = int(min(64, max(1, -(-1e-3 // max(slowest, 1e-9)))))
    samples = int(min(25, max(5, budget / (PASSES * (launches + 1) * max(slowest, 1e-9)))))
    for side in sides:
        side.passes, side.plan = [], (samples, launches)
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
