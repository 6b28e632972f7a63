"""Times the peers of every case, most valuable first, so that none of them spoils the others' figures."""

import contextlib
import json
import math
import multiprocessing
import signal
import sys
import time

import torch

import records
from inputs import Inputs
from kinds import SIDES, TOLERANCE, difference, plain, reference
from measure import prepare, timed, told

# Bytes of a CPU's cache that inputs are rotated past, and what all sets may fill.
CPU_CACHE, MOST_BYTES = 32 << 20, 30e9
# Of a layer, what no peer has alone.
OURS_ALONE = {"default_layer_forward", "default_layer_backward", "combine", "expert_mean", "gate_gradient"}


def sets_of(group, cuda):
    """So many sets of inputs that one is out of the cache when its turn comes again, as far as there is room."""
    if group["sizes"]["work"] == "step":
        return 1
    cache = torch.cuda.get_device_properties(0).L2_cache_size if cuda else CPU_CACHE
    bytes_of = [max(case["bytes"], 1) for case in group["cases"] if case["family"] not in OURS_ALONE] or [1]
    wanted = min(12, max(2, math.ceil(2 * cache / min(bytes_of)) + 1))
    return int(max(1, min(wanted, MOST_BYTES // max(bytes_of))))


def check(side, outputs, group, inputs):
    """Holds what a side gave against float32; one that computes something else is not timed."""
    try:
        theirs = reference(group, inputs, **plain(group))
        errors = {name: difference(output, theirs[name]) for name, output in outputs.items()}
    except Exception as e:  # such as no room for float32
        side.detail = f"{side.detail}; not compared: {told(e)}".removeprefix("; ")
        return
    wrong = [f"{name} by {error:.1e}" for name, error in errors.items() if not error <= TOLERANCE]
    if wrong:
        side.fail(ValueError("differs from float32: " + ", ".join(wrong)))


def measured(head, group, late, refused, doing):
    """A record for each case and peer of a group: of those that come late, or of the others."""
    cuda, missing = head["device"] == "cuda", ""
    if cuda and not torch.cuda.is_available():
        cuda, missing = False, "torch finds no GPU"
    stream, before = (torch.cuda.Stream(), records.state()) if cuda else (None, None)
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
            after = records.state() if cuda else None
            for side in of_case:
                side.launches = []  # and with them all that they keep
                yield records.record(head, group, case, side, count) | {"before": before, "after": after}
            before = after


def shapes(sizes):
    """Balanced and other routing have the same: what was compiled for one is good for the other."""
    return {key: len(value) if key == "counts" else value for key, value in sizes.items()}


def in_order(groups):
    """Kinds of work in turn, shape by shape, so that a run that ends early has some of each; then whole steps; then the
    peers that come late, first at the shapes that SonicMoE publishes. Each as (head, group, late)."""
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


def measure(chosen, start):
    """All jobs in a process of their own: where a peer takes it down, the others go on in the next, without that peer. The
    budget counts from `start`."""
    context = multiprocessing.get_context("fork")
    groups = [(head, group) for head, group in records.read(chosen.cases) if head["device"] != "sim"]
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
