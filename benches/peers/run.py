"""The peers of `routegrad bench`: PyTorch, moe-ops and SonicMoE on the same inputs, as the same records.

    routegrad bench --list --json > cases.jsonl
    python benches/peers/run.py cases.jsonl --out peers.jsonl      needs torch; moe-ops, sonic-moe where they can be had
    routegrad bench --merge peers.jsonl

With --compare FILE, nothing is timed: what `routegrad bench --dump FILE` wrote, and what the peers give on the CPU, is held
against float32 in PyTorch.
"""

import argparse
import contextlib
import datetime
import json
import sys
import time

import torch

import layers
import operations
import products
import steps
from inputs import Inputs
from measure import Side, first_line, interleaved, prepare

SIDES = {
    "gemm": products.sides,
    "layer": layers.sides,
    "norm": operations.norm_sides,
    "cross_entropy": operations.loss_sides,
    "adamw": operations.adamw_sides,
    "attention": operations.attention_sides,
    "operation": operations.operation_sides,
    "step": steps.sides,
}
OUTPUTS = {
    "gemm": products.outputs,
    "layer": layers.outputs,
    "norm": operations.norm_outputs,
    "cross_entropy": operations.loss_outputs,
    "adamw": operations.adamw_outputs,
    "attention": operations.attention_outputs,
    "operation": operations.operation_outputs,
}
# Relative L2 errors: of bf16 results and of bf16 between the kernels of a layer; of f32 operations.
TOLERANCE = {"operation": 1e-5, "adamw": 1e-5, "cross_entropy": 5e-3, "gemm": 5e-3, "norm": 5e-3}
OTHER_TOLERANCE = 1e-2
# Bytes of the caches that inputs are rotated past, and what all sets may fill.
CACHE, MOST_BYTES = {"cuda": 60 << 20, "cpu": 32 << 20}, 30e9


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("cases", help="what routegrad bench --list --json printed")
    parser.add_argument("--out", help="file of the records, made anew")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--budget", type=float, default=420, help="seconds to end within")
    parser.add_argument("--compare", metavar="FILE", help="a dump of routegrad to hold against PyTorch")
    chosen = parser.parse_args()
    if bool(chosen.out) == bool(chosen.compare):
        parser.error("give --out FILE to measure, or --compare FILE to compare")
    return chosen


def read(path):
    """Each group with what its records share."""
    head = {}
    for line in open(path):
        entry = json.loads(line)
        if entry.get("head"):
            head = entry
        else:
            yield head, entry


def now():
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def record(head, case, side, sets):
    timing = None
    if side.passes:
        timing = {
            "seconds": min(p[0] for p in side.passes),
            "passes": [p[0] for p in side.passes],
            "spread": [p[1] for p in side.passes],
            "samples": side.plan[0],
            "launches": side.plan[1],
            "sets": sets,
            "graph": side.graph,
        }
    return {
        "machine": head["machine"],
        "device": head["device"],
        "case": case["case"],
        "family": case["family"],
        "implementation": side.implementation,
        "version": side.version,
        "run": head["run"],
        "date": now(),
        "flops": case["flops"],
        "bytes": case["bytes"],
        "timing": timing,
        "detail": side.reason or side.detail,
        "system": head["system"],
        "driver": head["driver"],
    }


def sets_of(group, device):
    """So many sets of inputs that one is out of the cache when its turn comes again, as far as there is room."""
    if group["sizes"]["work"] == "step":
        return 1
    bytes_of = [max(case["bytes"], 1) for case in group["cases"]]
    wanted = min(12, max(2, 2 * CACHE[device] // bytes_of[0] + 1))
    return int(max(1, min(wanted, MOST_BYTES // max(bytes_of))))


def measured(head, group, only):
    """A record for each case and peer of a group."""
    device = "cuda" if head["device"] == "cuda" else "cpu"
    cuda, count = device == "cuda", sets_of(group, device)
    stream = torch.cuda.Stream() if cuda else None
    cases = [case for case in group["cases"] if only in case["case"]]
    with torch.cuda.stream(stream) if cuda else contextlib.nullcontext():
        try:
            sets = [Inputs(group["group"], device) for _ in range(count)]
            sides = SIDES[group["sizes"]["work"]](group, sets, cuda)
        except Exception as e:  # such as no room: the others go on
            reason = f"{type(e).__name__}: {first_line(e)}"
            sides = [Side("torch", torch.__version__, case["family"], reason=reason) for case in cases]
        for case in cases:
            of_case = [s for s in sides if s.family == case["family"] and s.only in case["case"]]
            running = [s for s in of_case if not s.reason and prepare(s, cuda, stream)]
            if running:
                interleaved(running, cuda)
            yield from (record(head, case, side, count) for side in of_case)


def measure(chosen):
    start = time.monotonic()
    with open(chosen.out, "w") as out:
        for head, group in read(chosen.cases):
            if head["device"] == "sim" or not any(chosen.only in case["case"] for case in group["cases"]):
                continue
            if time.monotonic() - start > chosen.budget:
                print(f"left for want of time: {group['group']}")
                continue
            for line in measured(head, group, chosen.only):
                out.write(json.dumps(line) + "\n")
                out.flush()
                took = f"{1e6 * line['timing']['seconds']:10.1f} µs" if line["timing"] else " cannot run "
                print(f"{took}  {line['case']:48} {line['implementation']}  {line['detail']}", flush=True)
            torch.compiler.reset()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


def difference(mine, theirs):
    mine, theirs = (t.detach().double().flatten() for t in (mine, theirs))
    return ((mine - theirs).norm() / theirs.norm()).item()


def peers_of(group, inputs):
    """What each peer gives for a group on the CPU, by its name and that of the output; or why it cannot."""
    work = group["sizes"]["work"]
    for side in SIDES[work](group, [inputs], False):
        try:
            given = side.launches[0]() if side.launches else None
        except Exception as e:
            given, side.reason = None, f"{type(e).__name__}: {first_line(e)}"
        if given is None:
            yield side, side.family, side.reason or "runs; gives nothing to compare"
            continue
        given = given if isinstance(given, (tuple, list)) else [given]
        yield from ((side, name, tensor) for name, tensor in zip(side.gives, given))


def compare(chosen):
    """Every array of the dump, and what the peers give on the CPU, against float32; fails where one is too far off."""
    from safetensors.torch import load_file

    ours, failed = load_file(chosen.compare), 0

    def judge(who, error, tolerance, what):
        nonlocal failed
        good = error <= tolerance
        failed += not good
        print(f"{'agrees' if good else 'DIFFERS':8} {error:9.2e} of {tolerance:.0e}  {who:24} {what}", flush=True)

    for _, group in read(chosen.cases):
        work, name = group["sizes"]["work"], group["group"]
        name = group["sizes"]["operation"] if work == "operation" else name
        if work not in OUTPUTS or not any(key.startswith(f"{work} {name}/") for key in ours):
            continue
        tolerance = TOLERANCE.get(work, OTHER_TOLERANCE)
        reference = OUTPUTS[work](group, Inputs(group["group"]))
        for output, theirs in reference.items():
            judge("routegrad", difference(ours.pop(f"{work} {name}/{output}"), theirs), tolerance, f"{name}/{output}")
        if work == "operation":
            continue  # the reference is the peer
        if work == "layer":
            reference = layers.outputs(group, Inputs(group["group"]), default=False)
        for side, output, given in peers_of(group, Inputs(group["group"])):
            if isinstance(given, str):
                print(f"                              {side.implementation:24} {name}, {output}: {given}")
            else:
                judge(side.implementation, difference(given, reference[output]), OTHER_TOLERANCE, f"{name}/{output}")
    print(f"{failed} differ; not compared: {', '.join(ours) or 'none'}")
    return 1 if failed or ours else 0


if __name__ == "__main__":
    chosen = arguments()
    sys.exit(compare(chosen) if chosen.compare else measure(chosen))
