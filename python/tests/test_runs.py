"""Folders of runs: configuration, metrics, checkpoints, models."""

import json
import os
import pathlib
import subprocess
import sys

import models
import pytest
import test_dump
import torch
from safetensors.torch import load_file, save_file

import routegrad
import routegrad.torch as rt
from routegrad.torch.checkpoint import architecture

PROGRAM = test_dump.PROGRAM
needs_program = pytest.mark.skipif(not PROGRAM.is_file(), reason="no routegrad program: set ROUTEGRAD_BIN")


def a_run(folder, steps=(2, 10)):
    folder.mkdir()
    (folder / "config.toml").write_text('[model]\nhidden = 16\n\n[router]\nname = "default"\n')
    lines = [json.dumps({"step": s, "loss": 3.0 - s, "load": [[1, 2]]}) for s in (1, 2)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    for step in steps:
        a_checkpoint(folder, step)
    return folder


def a_checkpoint(run, step):
    folder = run / "checkpoints" / f"step-{step}"
    folder.mkdir(parents=True)
    (folder / "trainer.json").write_text("{}")
    manifest = {"step": step, "files": {"trainer.json": {"bytes": 2, "blake3": ""}}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def test_a_run_is_read(tmp_path):
    run = routegrad.load_run(a_run(tmp_path / "wide"))
    assert (run.name, run.config["router"]["name"]) == ("wide", "default")
    assert [r["loss"] for r in run.records()] == [2.0, 1.0]
    assert run.checkpoint.name == "step-10"  # 10 is newer than 2.


def test_metrics_are_a_frame_with_pandas_and_a_list_without(tmp_path, monkeypatch):
    run = routegrad.load_run(a_run(tmp_path / "r"))
    pandas = pytest.importorskip("pandas")
    assert isinstance(run.metrics, pandas.DataFrame)
    assert run.metrics.loc[2, "loss"] == 1.0
    monkeypatch.setitem(sys.modules, "pandas", None)
    assert run.metrics == run.records()


def test_an_incomplete_last_line_is_skipped_and_any_other_raises(tmp_path):
    run = routegrad.load_run(a_run(tmp_path / "r"))
    file = tmp_path / "r/metrics.jsonl"
    file.write_text(file.read_text() + '{"step": 3, "lo')
    assert len(run.records()) == 2
    file.write_bytes(file.read_bytes() + b"\xff\xfe")
    assert len(run.records()) == 2
    for first in (b'{"step"', b"\xff", b"12"):
        file.write_bytes(first + b"\n" + file.read_bytes())
        with pytest.raises(ValueError, match="line 1: expected a JSON object"):
            run.records()


def test_the_newest_complete_checkpoint_is_used(tmp_path):
    run = routegrad.load_run(a_run(tmp_path / "r", steps=(3, 20)))
    (tmp_path / "r/checkpoints/step-20/trainer.json").write_text("{")
    (tmp_path / "r/checkpoints/step-30").mkdir()
    assert run.checkpoint.name == "step-3"
    (tmp_path / "r/checkpoints/step-3/manifest.json").unlink()
    with pytest.raises(FileNotFoundError, match="expected a complete checkpoint"):
        _ = run.checkpoint


def test_a_folder_that_is_not_a_run_raises(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.toml, got a folder without it"):
        routegrad.load_run(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"config\.toml, got no folder"):
        routegrad.load_run(tmp_path / "none")
    for content in (b"[", b"# \xff"):
        (tmp_path / "config.toml").write_bytes(content)
        with pytest.raises(ValueError, match=r"config\.toml: expected TOML"):
            routegrad.load_run(tmp_path)


def test_the_import_takes_a_fraction_of_a_second_and_does_not_import_torch():
    code = (
        "import time; t = time.process_time(); import routegrad, sys; print(time.process_time() - t, 'torch' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": str(pathlib.Path(routegrad.__file__).parents[1])}
    command = [sys.executable, "-c", code]
    seconds, torch_there = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=True
    ).stdout.split()
    assert torch_there == "False"
    assert float(seconds) <= 0.3


@pytest.mark.parametrize("name", models.TYPES)
def test_checkpoints_load_as_models_of_their_architecture(name, tmp_path):
    model = rt.default_moe(models.tiny(name, tie_word_embeddings=False), beta=0.7, init_std=0.5).eval()
    renormalize = name in ("mixtral", "qwen3_moe")
    settings = {**test_dump.SETTINGS}
    source = test_dump.config_json(model, settings, renormalize)
    assert architecture(source) == name
    folder = tmp_path / "step-1"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(source))
    save_file(fused(model), folder / "model.safetensors")
    run = routegrad.Run(tmp_path, {})
    loaded = run.model(folder)
    assert loaded.config.model_type == name
    inputs = models.tokens()
    torch.testing.assert_close(loaded(inputs).logits, model(inputs).logits, rtol=1e-5, atol=1e-5)
    assert run.model(folder, dtype=torch.float64).dtype == torch.float64
    with pytest.raises(TypeError, match="dtype: expected a torch.dtype such as torch.bfloat16, or None, got 'bfloat16'"):
        run.model(folder, dtype="bfloat16")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.gate.weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"expected tensor model\.layers\.1\..*gate\.weight, got none"):
        run.model(folder)


def test_damaged_files_raise_with_their_name(tmp_path):
    model = rt.default_moe(models.tiny("olmoe"))
    source = test_dump.config_json(model, test_dump.SETTINGS, False)
    save_file(fused(model), tmp_path / "model.safetensors")
    run, config, weights = routegrad.Run(tmp_path, {}), tmp_path / "config.json", tmp_path / "model.safetensors"
    short = {key: value for key, value in source.items() if key != "qk_norm"}
    for content in (
        b"[]",
        b'{"model_type": "rou',
        b"\xff",
        json.dumps(short).encode(),
        json.dumps({**source, "router": 1}).encode(),
    ):
        config.write_bytes(content)
        with pytest.raises(ValueError, match=r"config\.json: expected"):
            run.model(tmp_path)
    config.write_text(json.dumps(source))
    whole = weights.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"\xff" * 64):
        weights.write_bytes(content)
        with pytest.raises(ValueError, match=r"model\.safetensors: expected a safetensors file"):
            run.model(tmp_path)
    for content in ("{", "[]", '{"weight_map": 1}'):
        (tmp_path / "model.safetensors.index.json").write_text(content)
        with pytest.raises(ValueError, match=r"index\.json: expected JSON with weight_map"):
            run.model(tmp_path)


EMPTY = "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"
"""The BLAKE3 digest of an empty file."""


def test_a_file_of_a_checkpoint_is_compared_with_its_digest(tmp_path):
    kernels = pytest.importorskip("routegrad.torch.ops", exc_type=ImportError).kernels()
    (tmp_path / "config.json").write_text("")
    manifest = {"step": 1, "files": {"config.json": {"bytes": 0, "blake3": EMPTY}}}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    kernels.verify_file(str(tmp_path), "config.json")
    with pytest.raises(ValueError, match=r"other\.json"):
        (tmp_path / "other.json").write_text("")
        kernels.verify_file(str(tmp_path), "other.json")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: expected the file that was saved, got 1 bytes"):
        kernels.verify_file(str(tmp_path), "config.json")
    with pytest.raises(ValueError, match=r"config\.json: expected the file that was saved, got 1 bytes"):
        routegrad.Run(tmp_path, {}).model(tmp_path)


def test_unsupported_settings_are_not_ignored():
    source = test_dump.config_json(models.tiny("olmoe"), test_dump.SETTINGS, False)
    for setting, expected in [
        ({"source": "chosen", "samples": 16, "shrink": 1.0}, "olmoe"),
        ({"source": "sampled"}, None),
        ({"shrink": 0.5}, None),
        ({"other": 1}, None),
    ]:
        assert architecture({**source, "router": {**source["router"], **setting}}) == expected
    assert architecture({**source, "router": {"name": "remoe"}}) is None
    assert architecture({**source, "norm_type": "layernorm"}) is None


def fused(model):
    """Returns the model's tensors with the names of a checkpoint, in which one tensor contains all experts of a layer."""
    tensors = {}
    state = {n.replace(".block_sparse_moe.", ".mlp."): t for n, t in model.state_dict().items()}
    for name, value in state.items():
        prefix, _, rest = name.partition(".experts.")
        expert, _, matrix = rest.partition(".")
        if not expert.isdigit():
            tensors[name] = value.clone()
        elif expert == "0" and not matrix.startswith(("w3", "up_proj")):
            stack = lambda part: torch.stack([t for n, t in state.items() if n.startswith(prefix) and n.endswith(part)])  # noqa: B023,E731
            up = {"w1.weight": "w3.weight", "gate_proj.weight": "up_proj.weight"}.get(matrix)
            experts = f"{prefix}.experts."
            prefix = experts
            if up is None:
                tensors[experts + "down_proj"] = stack(matrix)
            else:
                tensors[experts + "gate_up_proj"] = torch.cat((stack(matrix), stack(up)), dim=1)
    return tensors


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")

    def train(name, *options):
        command = [
            PROGRAM, "train", "--quiet", "--steps", "2", "--out", folder / name, "--set", "train.sequences_per_step=2",
            "--set", "train.micro_batch=2", "--set", "model.sequence_length=16", "--set", "train.eval_sequences=2",
            "--set", "model.hidden=64", "--set", "model.layers=2", *options,
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return routegrad.load_run(folder / name)

    return train


@needs_program
@pytest.mark.parametrize("router", ["topk", "default"])
def test_the_model_of_a_run_computes_what_the_program_computes(router, trained, tmp_path):
    run = trained(f"run-{router}", "--router", router)
    assert [r["step"] for r in run.records()] == [1, 2]
    model = run.model(dtype=torch.float64)
    tokens = torch.randint(0, 256, (2, 9), generator=torch.Generator().manual_seed(0))
    save_file({"tokens": tokens}, tmp_path / "tokens")
    command = [PROGRAM, "dump", "--model", run.path, "--tokens", tmp_path / "tokens", "--out", tmp_path / "out"]
    subprocess.run(command, check=True, capture_output=True)
    expected = load_file(tmp_path / "out")["logits"]
    # transformers computes norms and RoPE in float32.
    torch.testing.assert_close(model(tokens[:, :-1]).logits, expected, rtol=1e-5, atol=1e-5)
    has_vectors = any(isinstance(m, rt.DefaultMoeLayer) for m in model.modules())
    assert has_vectors == (router == "default")


@needs_program
def test_damaged_weights_of_a_run_are_not_loaded(trained):
    run = trained("damaged", "--router", "default")
    assert run.model()
    file = run.checkpoint / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.safetensors: expected the file that was saved, got another digest"):
        run.model()


@needs_program
def test_other_models_are_loaded_through_export(trained, monkeypatch):
    run = trained("layernorm", "--router", "topk", "--set", 'model.norm="layernorm"')
    assert type(run.model(routegrad=PROGRAM)).__name__ == "RoutegradForCausalLM"
    monkeypatch.setenv("PATH", "")
    with pytest.raises(FileNotFoundError, match="routegrad export --model DIR --to hf --out NEW"):
        run.model()
