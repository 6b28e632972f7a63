"""The peers of `routegrad bench`: PyTorch, moe-ops and SonicMoE on the same inputs, as the same records.

    routegrad bench --list --json > cases.jsonl
    python benches/peers/run.py cases.jsonl --out peers.jsonl      needs torch; moe-ops, sonic-moe where they can be had
    routegrad bench --merge peers.jsonl

With --compare FILE, nothing is timed: what `routegrad bench --dump FILE` wrote, and what the peers give on the CPU, is held
against float32 in PyTorch. With TRITON_INTERPRET=1 in the environment the kernels of moe-ops run there too.
`compare_steps.py` does so for whole training steps; `inputs.py` and `test_jobs.py`, run alone, test themselves.
"""

import argparse
import sys
import time

import records


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


def main():
    start, chosen = time.monotonic(), arguments()
    if chosen.compare:
        from compare import compare

        return compare(chosen)
    try:
        from jobs import measure
    except (ImportError, OSError) as e:
        return records.without_torch(chosen.cases, chosen.out, e)
    return measure(chosen, start)


if __name__ == "__main__":
    sys.exit(main())
