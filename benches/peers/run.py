"""The peers of `routegrad bench`: PyTorch, moe-ops and SonicMoE on the same inputs, as the same records.

    routegrad bench --list --json > cases.jsonl
    python benches/peers/run.py cases.jsonl --out peers.jsonl      needs torch; moe-ops, sonic-moe where they can be had
    routegrad bench --merge peers.jsonl

With --compare FILE, nothing is timed: what `routegrad bench --dump FILE` wrote, and what the peers give on the CPU, is held
against float32 in PyTorch. With TRITON_INTERPRET=1 in the environment those of moe-ops run there too.
"""

import argparse
import contextlib
import datetime
import json
import math
import multiprocessing
import signal
import subprocess
import sys
import time

import torch

import layers
import operations
import products
import steps
from inputs import Inputs
from measure import prepare, timed, told

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
# The reference is what the peer computes, so that ours alone is compared.
OWN_REFERENCE = {"operation", "adamw"}
# Bytes of a CPU's cache that inputs are rotated past, and what all sets may fill.
CPU_CACHE, MOST_BYTES = 32 << 20, 30e9
# Of a layer, what no peer has alone.
OURS_ALONE = {"default_layer_forward", "default_layer_backward", "combine", "expert_mean", "gate_gradient"}
# As src/machine.rs asks for it.
STATE = ["clocks.sm", "clocks.mem", "temperature.gpu", "power.draw", "clocks_event_reasons.active", "utilization.gpu"]


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


def state():
    """What nvidia-smi says of the GPU; None without one."""
    query = ["nvidia-smi", "--query-gpu=" + ",".join(STATE), "--format=csv,noheader,nounits", "--id=0"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, check=True, timeout=10).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return dict(zip(STATE, (value.strip() for value in answer.split("\n")[0].split(","))))


def record(head, group, case, side, sets):
    timing, detail = None, side.reason or side.detail
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
        sizes = group["sizes"]
        if sizes["work"] == "step":
            detail = f"{sizes['sequences'] * sizes['sequence'] / timing['seconds']:.0f} tokens/s"
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
        "detail": detail,
        "system": head["system"],
        "driver": head["driver"],
    }


def sets_of(group, cuda):
    """So many sets of inputs that one is out of the cache when its turn comes again, as far as there is room."""
    if group["sizes"]["work"] == "step":
        return 1
    cache = torch.cuda.get_device_properties(0).L2_cache_size if cuda else CPU_CACHE
    bytes_of = [max(case["bytes"], 1) for case in group["cases"] if case["family"] not in OURS_ALONE] or [1]
    wanted = min(12, max(2, math.ceil(2 * cache / min(bytes_of)) + 1))
    return int(max(1, min(wanted, MOST_BYTES // max(bytes_of))))


def plain(group):
    """Peers have no default vectors."""
    return {"default": False} if group["sizes"]["work"] == "layer" else {}


def check(side, outputs, group, inputs):
    """Holds what a side gave against float32; one that computes something else is not timed."""
    try:
        reference = OUTPUTS[group["sizes"]["work"]](group, inputs, **plain(group))
        errors = {name: difference(output, reference[name]) for name, output in outputs.items()}
    except Exception as e:  # such as no room for float32
        side.detail = f"{side.detail}; not compared: {told(e)}".removeprefix("; ")
        return
    wrong = [f"{name} by {error:.1e}" for name, error in errors.items() if not error <= OTHER_TOLERANCE]
    if wrong:
        side.fail(ValueError("differs from float32: " + ", ".join(wrong)))


def measured(head, group, late, refused, doing):
    """A record for each case and peer of a group: of those that come late, or of the others."""
    cuda, missing = head["device"] == "cuda", ""
    if cuda and not torch.cuda.is_available():
        cuda, missing = False, "torch finds no GPU"
    stream, before = (torch.cuda.Stream(), state()) if cuda else (None, None)
    count = sets_of(group, cuda)
    sets = [Inputs(group["group"], "cuda" if cuda else "cpu") for _ in range(count)]
    sides = [side for side in SIDES[group["sizes"]["work"]](group, sets, cuda) if side.late == late]
    with torch.cuda.stream(stream) if cuda else contextlib.nullcontext():
        for case in group["cases"]:
            of_case = [side for side in sides if side.family == case["family"] and side.only in case["case"]]
            if not of_case:
                continue
            for side in of_case:
                side.reason, doing.value = missing or refused.get(side.implementation, ""), side.implementation.encode()
                outputs = None if side.reason else prepare(side, cuda, stream)
                if outputs and late:  # that of the others was compared on the CPU
                    check(side, outputs, group, sets[0])
            outputs, doing.value = None, b""
            timed(of_case, cuda)
            after = state() if cuda else None
            for side in of_case:
                side.launches = []  # and with them all that they keep
                yield record(head, group, case, side, count) | {"before": before, "after": after}
            before = after


def shapes(sizes):
    """Balanced and other routing have the same: what was compiled for one is good for the other."""
    return {key: len(value) if key == "counts" else value for key, value in sizes.items()}


def in_order(groups):
    """Kinds of work in turn, shape by shape, so that a run that ends early has some of each; then whole steps; then the peers
    that come late, first at the shapes that SonicMoE publishes. Each as (head, group, late)."""
    seen, turns = {}, []
    for head, group in groups:
        known = seen.setdefault(group["sizes"]["work"], [])
        if shapes(group["sizes"]) not in known:
            known.append(shapes(group["sizes"]))
        turns.append((known.index(shapes(group["sizes"])), group["sizes"]["work"], head, group))
    early = sorted(turns, key=lambda turn: (turn[1] == "step", *turn[:2]))
    late = [turn for turn in early if turn[1] in ("layer", "gemm")]
    late.sort(key=lambda turn: not turn[3]["group"].startswith("sonic"))
    return [(*turn[2:], False) for turn in early] + [(*turn[2:], True) for turn in late]


def measure_from(chosen, start, jobs, at, refused, doing):
    """Measures the jobs from number `at` on, and writes what they gave as it comes."""
    took, compiled = {}, None
    with open(chosen.out, "a") as out:
        while at.value < len(jobs):
            head, group, late = jobs[at.value]
            kind, began = (group["sizes"]["work"], late), time.monotonic()
            if began - start + took.get(kind, 0) > chosen.budget:  # as long as the last of its kind
                print(f"left for want of time: {group['cases'][0]['case']}{', peers that come late' if late else ''}")
                at.value += 1
                continue
            if compiled != shapes(group["sizes"]):
                torch.compiler.reset()  # so that it is compiled for these shapes, and not for any
                compiled = shapes(group["sizes"])
            for line in measured(head, group, late, refused, doing):
                out.write(json.dumps(line) + "\n")
                out.flush()
                took_one = f"{1e6 * line['timing']['seconds']:10.1f} µs" if line["timing"] else "   cannot run"
                print(f"{took_one}  {line['case']:48} {line['implementation']}  {line['detail']}", flush=True)
            if head["device"] == "cuda" and torch.cuda.is_available():
                torch.cuda.empty_cache()
            took[kind] = time.monotonic() - began
            at.value += 1


def measure(chosen):
    """All jobs in a process of their own: where a peer takes it down, the others go on in the next, without that peer."""
    start, context = time.monotonic(), multiprocessing.get_context("fork")
    groups = [(head, group) for head, group in read(chosen.cases) if head["device"] != "sim"]
    for _, group in groups:
        group["cases"] = [case for case in group["cases"] if chosen.only in case["case"]]
    jobs = in_order((head, group) for head, group in groups if group["cases"])
    at, doing, refused = context.Value("i", 0), context.Array("c", 200), {}
    with open(chosen.out, "w"):
        pass  # made anew
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended from outside; the records so far are kept"))
    while at.value < len(jobs):
        child = context.Process(target=measure_from, args=(chosen, start, jobs, at, refused, doing))
        child.start()
        try:
            child.join()
        finally:
            child.kill()  # where this one is ended, that one has to be
        if child.exitcode == 0:
            break
        peer, group = doing.value.decode(), jobs[at.value][1]["group"]
        print(f"the process ended with {child.exitcode} in {group}: {peer or 'nobody knows by whom'}", flush=True)
        if peer and peer not in refused:
            refused[peer] = f"took its process down in {group}, exit code {child.exitcode}"
        else:
            at.value += 1
        doing.value = b""


def difference(mine, theirs):
    mine, theirs = (t.detach().double().flatten() for t in (mine, theirs))
    return ((mine - theirs).norm() / theirs.norm()).item()


def peers_of(group, inputs):
    """What each peer gives for a group on the CPU, by its name and that of the output; or why it cannot."""
    for side in SIDES[group["sizes"]["work"]](group, [inputs], False):
        try:
            given = side.outputs(side.make()[0]())
        except Exception as e:
            yield side, side.family, told(e)
            continue
        if not given:
            yield side, side.family, "runs; gives nothing to compare"
        yield from ((side, name, tensor) for name, tensor in given.items())


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
        if work in OWN_REFERENCE:
            print(f"{'':29} torch {'':18} {name}: what ours was held against")
            continue
        if work == "layer":
            reference = layers.outputs(group, Inputs(group["group"]), **plain(group))
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
