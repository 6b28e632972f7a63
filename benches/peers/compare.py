"""Holds what we compute, and what the peers give on the CPU, against float32 in PyTorch."""

from safetensors.torch import load_file

import records
from inputs import Inputs
from kinds import OUTPUTS, SIDES, TOLERANCE, difference, plain, reference
from measure import told

# Of ours where they round less often: f32, or bf16 once.
OURS = {"operation": 1e-5, "adamw": 1e-5, "cross_entropy": 5e-3, "gemm": 5e-3, "norm": 5e-3}
# The reference is what the peer computes, so that ours alone is compared.
OWN_REFERENCE = {"operation", "adamw"}


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
    """Every array of the dump, and what the peers give on the CPU, against float32; 1 where one is too far off."""
    ours, failed = load_file(chosen.compare), 0

    def judge(who, error, tolerance, what):
        nonlocal failed
        good = error <= tolerance
        failed += not good
        print(f"{'agrees' if good else 'DIFFERS':8} {error:9.2e} of {tolerance:.0e}  {who:24} {what}", flush=True)

    for _, group in records.read(chosen.cases):
        work, name = group["sizes"]["work"], group["group"]
        name = group["sizes"]["operation"] if work == "operation" else name
        if work not in OUTPUTS or not any(key.startswith(f"{work} {name}/") for key in ours):
            continue
        tolerance, right = OURS.get(work, TOLERANCE), reference(group, Inputs(group["group"]))
        for output, theirs in right.items():
            judge("routegrad", difference(ours.pop(f"{work} {name}/{output}"), theirs), tolerance, f"{name}/{output}")
        if work in OWN_REFERENCE:
            print(f"{'':29} torch {'':18} {name}: what ours was held against")
            continue
        if work == "layer":
            right = reference(group, Inputs(group["group"]), **plain(group))
        for side, output, given in peers_of(group, Inputs(group["group"])):
            if isinstance(given, str):
                print(f"                              {side.implementation:24} {name}, {output}: {given}")
            else:
                judge(side.implementation, difference(given, right[output]), TOLERANCE, f"{name}/{output}")
    print(f"{failed} differ; not compared: {', '.join(ours) or 'none'}")
    return 1 if failed or ours else 0
