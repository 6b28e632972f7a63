"""That one peer cannot spoil another's figures: `python benches/peers/test_jobs.py`, on the CPU in seconds."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
import types

import jobs
import measure
from measure import Side


def fail(e):
    raise e


def end():
    os.kill(os.getpid(), signal.SIGKILL)


def work():
    time.sleep(1e-3)


def fake_sides(group, sets, cuda):
    """Two good ones, and one for each way to fail."""
    count = len(sets)
    good = lambda: [work] * count
    timed = Side("raises when timed", "fake", lambda: [lambda: fail(StopIteration()) if timed.passes else None] * count)
    return [
        Side("good", "fake", good),
        Side("cannot be made", "fake", lambda: fail(MemoryError("no room\nfor it"))),
        Side("raises", "fake", lambda: [lambda: fail(ValueError())] * count),
        timed,
        Side("ends the process", "fake", lambda: [end] * count),
        Side("also good", "fake", good),
    ]


def measured(sides, groups, folder, **options):
    """The records of groups of one case each."""
    jobs.SIDES["fake"] = sides
    head = {"head": True, "machine": "m", "device": "cpu", "run": "r", "system": "", "driver": ""}
    case = lambda name: {"case": f"fake {name}", "family": "fake", "flops": 1.0, "bytes": 1 << 30}
    lines = [head] + [{"group": name, "sizes": {"work": "fake", "name": name}, "cases": [case(name)]} for name in groups]
    cases, out = folder / "cases.jsonl", folder / "peers.jsonl"
    cases.write_text("\n".join(map(json.dumps, lines)))
    jobs.measure(types.SimpleNamespace(**{"cases": cases, "out": out, "only": "", "budget": 60} | options), time.monotonic())
    return [json.loads(line) for line in out.read_text().splitlines()]


def each_peer_gets_its_figures_or_the_reason_why_not(folder):
    records = measured(fake_sides, ["one", "two"], folder)
    for case in ["fake one", "fake two"]:
        of_case = {record["implementation"]: record for record in records if record["case"] == case}
        assert all(of_case[name]["timing"]["seconds"] >= 1e-3 for name in ["good", "also good"]), of_case
        for name, reason in [
            ("cannot be made", "MemoryError: no room"),
            ("raises", "ValueError"),
            ("raises when timed", "StopIteration"),  # in its second pass
            ("ends the process", "took its process down in one, exit code -9"),
        ]:
            assert of_case[name]["timing"] is None and of_case[name]["detail"] == reason, of_case[name]
    assert len(records) == 12, [record["implementation"] for record in records]


def without_time_nothing_is_measured(folder):
    assert measured(fake_sides, ["one"], folder, budget=-1) == []


def what_is_ended_from_outside_keeps_its_records_and_leaves_no_process(folder):
    """The second case never ends."""
    code = """
import pathlib, sys, time, test_jobs
from measure import Side
hang = lambda group, sets, cuda: [
    Side("good" if group["group"] == "one" else "hangs", "fake", lambda: [
        test_jobs.work if group["group"] == "one" else lambda: (print("hangs", flush=True), time.sleep(600))])]
test_jobs.measured(hang, ["one", "two"], pathlib.Path(sys.argv[1]))
"""
    here = pathlib.Path(__file__).parent
    program = subprocess.Popen([sys.executable, "-c", code, str(folder)], cwd=here, stdout=subprocess.PIPE, text=True)
    while program.stdout.readline().strip() != "hangs":
        assert program.poll() is None
    program.terminate()
    # The pipe ends when nobody holds it: neither the program nor the process that it had started.
    program.communicate(timeout=30)
    assert program.returncode != 0
    assert [json.loads(line)["implementation"] for line in (folder / "peers.jsonl").open()] == ["good"]


def late_peers_come_last_and_whole_steps_before_them(folder):
    groups = [("gemm", "a"), ("gemm", "b"), ("layer", "x"), ("layer", "sonic y"), ("step", "s"), ("norm", "n")]
    entries = [({}, {"group": name, "sizes": {"work": work, "name": name}}) for work, name in groups]
    order = [(group["group"], late) for _, group, late in jobs.in_order(entries)]
    assert [name for name, late in order if not late] == ["a", "x", "n", "b", "sonic y", "s"], order
    assert [name for name, late in order if late] == ["sonic y", "a", "x", "b"] and order[-1][1], order


def medians_are_of_interleaved_samples_without_the_untimed_launch(folder):
    clock = [0.0]

    def side(first, usual):
        """A launch after another side's is slow, as with a cold cache: the untimed one."""

        def launch():
            clock[0] += usual if last[0] is launch else first
            last[0] = launch

        return Side("", "", None, launches=[launch])

    last, kept = [None], measure.time
    measure.time = types.SimpleNamespace(perf_counter=lambda: clock[0])
    sides = [side(9.0, 1.0), side(9.0, 3.0)]
    try:
        measure.interleaved(sides, False)
    finally:
        measure.time = kept
    assert [side.passes for side in sides] == [[(1.0, 0.0)] * 2, [(3.0, 0.0)] * 2], [side.passes for side in sides]


if __name__ == "__main__":
    for test in [
        medians_are_of_interleaved_samples_without_the_untimed_launch,
        late_peers_come_last_and_whole_steps_before_them,
        each_peer_gets_its_figures_or_the_reason_why_not,
        without_time_nothing_is_measured,
        what_is_ended_from_outside_keeps_its_records_and_leaves_no_process,
    ]:
        with tempfile.TemporaryDirectory() as folder:
            test(pathlib.Path(folder))
        print(f"holds: {test.__name__.replace('_', ' ')}", flush=True)
