"""Two processes against one."""

import os
import pathlib
import subprocess
import sys

import torch
import worker

TESTS = pathlib.Path(__file__).parent


def run(ranks, folder):
    environment = {**os.environ, "PYTHONPATH": f"{TESTS.parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    commands = [[sys.executable, str(TESTS / "worker.py"), str(rank), str(ranks), str(folder)] for rank in range(ranks)]
    started = [subprocess.Popen(c, env=environment, stderr=subprocess.PIPE, text=True) for c in commands]
    for process in started:
        _, errors = process.communicate(timeout=170)
        assert process.returncode == 0, errors


def test_two_processes_of_ddp_and_fsdp_compute_what_one_computes(tmp_path):
    run(2, tmp_path)
    for mode in worker.MODES:
        worker.train(0, 1, tmp_path, mode)
        first, second, one = (torch.load(tmp_path / f"{mode}-{name}.pt") for name in ("0-of-2", "1-of-2", "0-of-1"))
        assert any(name.endswith("default_vectors") for name in one)
        for name, expected in one.items():
            assert torch.equal(first[name], second[name]), f"{mode}, {name}: ranks differ"
            error = (first[name] - expected).abs().max().item()
            assert error <= 1e-5 * max(1.0, expected.abs().max().item()), f"{mode}, {name}: {error:.2e}"
            if name.endswith("default_vectors"):
                assert expected.abs().sum() > 0
