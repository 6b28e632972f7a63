"""Compares training in two processes with training in one process."""

import os
import pathlib
import subprocess
import sys

import pytest
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


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """For each way of training, the tensors that were saved by rank 0, by rank 1 and by a single process."""
    folder = tmp_path_factory.mktemp("ranks")
    run(2, folder)
    for way in worker.WAYS:
        worker.train(0, 1, folder, way)
    names = ("0-of-2", "1-of-2", "0-of-1")
    return {way: [torch.load(folder / f"{way}-{name}.pt", weights_only=True) for name in names] for way in worker.WAYS}


@pytest.mark.parametrize("way", ["ddp", "checkpointed ddp", "fsdp", "checkpointed fsdp"])
def test_two_processes_compute_what_one_computes(results, way):
    if way not in results:
        pytest.skip("this PyTorch has no torch.distributed.fsdp.fully_shard")
    first, second, one = results[way]
    assert first.keys() == one.keys() and sum(name.endswith("default_vectors") for name in one) == 2
    for name, expected in one.items():
        # FSDP gives the full state only to rank 0.
        assert name not in second or torch.equal(first[name], second[name]), f"{name}: ranks differ"
        error = (first[name] - expected).abs().max().item()
        assert error <= 1e-5 * max(1.0, expected.abs().max().item()), f"{name}: {error:.2e}"
        if name.endswith("default_vectors"):
            assert expected.abs().sum() > 0


def test_averages_are_taken_over_the_process_group(results):
    first, second, _ = results["own group"]
    for name, value in first.items():
        assert torch.equal(value, second[name]) != name.endswith("default_vectors"), name
