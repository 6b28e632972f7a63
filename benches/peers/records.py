"""The records that the peers give: the lines of src/verify/bench/record.rs. Needs no PyTorch, so as to say where there is none."""

import datetime
import json
import subprocess
from types import SimpleNamespace

# As src/machine.rs asks for it.
STATE = ["clocks.sm", "clocks.mem", "temperature.gpu", "power.draw", "clocks_event_reasons.active", "utilization.gpu"]


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


def without_torch(cases, out, why):
    """A record of each case, for all peers: that there is no PyTorch."""
    absent = SimpleNamespace(implementation="PyTorch", version="", passes=[], reason=f"{type(why).__name__}: {why}")
    with open(out, "w") as file:
        for head, group in read(cases):
            for case in group["cases"] if head["device"] != "sim" else []:
                file.write(json.dumps(record(head, group, case, absent, 0)) + "\n")
    return absent.reason
