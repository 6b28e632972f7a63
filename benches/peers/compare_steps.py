"""Holds a training step of the PyTorch model in steps.py against ours: equal weights, moments, tokens; on the CPU in f32.

    python benches/peers/compare_steps.py target/release/routegrad

Trains two steps of a small model of each router and norm on one known text, takes the first step's checkpoint into PyTorch
and does the second there: losses, gradient norm, updated weights and averages have to agree. So have they on
torch._grouped_mm and compiled; in bf16 too, as a GPU runs it, the losses.
"""

import json
import pathlib
import random
import string
import subprocess
import sys
import tempfile
import tomllib

import torch
from safetensors.torch import load_file

import steps

SEQUENCE, SEQUENCES = 64, 2
SHAPE = ["hidden=64", "heads=2", "layers=3", "expert_ffn_width=96", "dense_ffn_width=96", f"sequence_length={SEQUENCE}"]
TRAIN = ["checkpoint_interval=1", f"sequences_per_step={SEQUENCES}", f"micro_batch={SEQUENCES}"]
# What a checkpoint keeps apart and we as well as the model here have as one.
PARTS = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
# Relative; of an update, whose entries are quotients of small numbers, and of bf16.
TOLERANCE, UPDATE, BF16 = 1e-5, 1e-3, 1e-2


def trained(program, folder, router, norm):
    """A run of two steps on a text of one window; and the window, as often as a step has sequences."""
    letters = random.Random(0).choices(string.ascii_letters, k=2 * SEQUENCE + 2)
    text = ["".join(letters[: SEQUENCE + 1]), "".join(letters[SEQUENCE + 1 :])]  # the second is for validation
    data, run = folder / "data", folder / "run"
    data.mkdir()
    for name, part in zip("ab", text):
        (data / f"{name}.txt").write_text(part)
    keys = [f"model.{key}" for key in [*SHAPE, f'norm="{norm}"']] + [f"train.{key}" for key in TRAIN]
    command = [program, "train", "--quiet", "--preset", "tiny", "--experts", "8c1", "--router", router, "--steps", "2"]
    command += ["--data", data, "--out", run] + [part for key in keys for part in ("--set", key)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return run, torch.tensor([list(text[0].encode())] * SEQUENCES)


def sizes_of(config):
    model, train = config["model"], config["train"]
    return {
        "sequences": train["sequences_per_step"], "micro_batch": train["micro_batch"], "sequence": model["sequence_length"],
        "vocabulary": model["vocab_size"], "hidden": model["hidden"], "layers": model["layers"], "heads": model["heads"],
        "norm": model["norm"], "dense_ffn": model["dense_ffn_width"], "ffn": model["expert_ffn_width"],
        "experts": model["num_experts"], "top_k": model["top_k"],
    }


def named(model):
    """Every tensor of the model under its name in a checkpoint."""

    def norm(name, norm):
        yield f"{name}.weight", norm.weight
        if getattr(norm, "bias", None) is not None:
            yield f"{name}.bias", norm.bias

    yield "model.embed_tokens.weight", model.embedding.weight
    yield "lm_head.weight", model.head.weight
    yield from norm("model.norm", model.norms[-1])
    for layer, (attention, ffn) in enumerate(zip(model.attention, model.ffn)):
        at = f"model.layers.{layer}"
        yield from norm(f"{at}.input_layernorm", model.norms[2 * layer])
        yield from norm(f"{at}.post_attention_layernorm", model.norms[2 * layer + 1])
        yield f"{at}.self_attn.qkv_proj.weight", attention.qkv.weight
        yield f"{at}.self_attn.o_proj.weight", attention.out.weight
        if layer == 0:
            yield f"{at}.mlp.gate_up_proj.weight", ffn.gate_up.weight
            yield f"{at}.mlp.down_proj.weight", ffn.down.weight
            continue
        yield f"{at}.mlp.gate.weight", ffn.router.weight
        yield f"{at}.mlp.experts.gate_up_proj", ffn.gate_up
        yield f"{at}.mlp.experts.down_proj", ffn.down
        if ffn.default:
            yield f"{at}.mlp.default_vectors", ffn.average


def taken(file, name):
    """Out of a checkpoint's file, so that what nobody takes is left."""
    if name in file:
        return file.pop(name)
    fused = next(fused for fused in PARTS if fused in name)
    return torch.cat([file.pop(name.replace(fused, part)) for part in PARTS[fused]])


def begun(training, checkpoint, rate):
    """Weights, averages and moments after the first step; gives the weights."""
    weights, moments = (load_file(checkpoint / f"{name}.safetensors") for name in ("model", "trainer"))
    before = {}
    for name, tensor in named(training.model):
        before[name] = taken(weights, name)
        with torch.no_grad():
            tensor.copy_(before[name])
        if isinstance(tensor, torch.nn.Parameter):
            first, second = (moments.pop(f"{name}.{moment}_moment") for moment in ("first", "second"))
            training.optimizer.state[tensor] = {"step": torch.tensor(1.0), "exp_avg": first, "exp_avg_sq": second}
    assert not weights and not moments, f"the model here has no {[*weights, *moments]}"
    assert len(training.optimizer.state) == len(training.parameters)
    for group in training.optimizer.param_groups:
        group["lr"] = rate
    return before


def apart(mine, theirs):
    mine, theirs = (torch.as_tensor(t).double() for t in (mine, theirs))
    return ((mine - theirs).norm() / theirs.norm()).item()


def compare(run, tokens, router, compiled, grouped, bf16):
    """Each figure with how far it is from ours, and how far it may be."""
    sizes = sizes_of(tomllib.loads((run / "config.toml").read_text()))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    ours = next(line for line in lines if line.get("step") == 2 and "auxiliary_loss" in line)
    training = steps.Training(sizes, router, "cpu", compiled, grouped, bf16)
    before = begun(training, run / "checkpoints" / "step-1", ours["learning_rate"])
    loss, auxiliary, norm = training.step([tokens])
    scale = BF16 / TOLERANCE if bf16 else 1
    yield "loss", apart(loss, ours["loss"]), TOLERANCE * scale
    yield "auxiliary loss", apart(auxiliary, ours["auxiliary_loss"]), TOLERANCE * scale
    if bf16:
        return  # a choice of expert that turns in bf16 changes its gradients
    yield "gradient norm", apart(norm, ours["gradient_norm"]), TOLERANCE
    after = load_file(run / "checkpoints" / "step-2" / "model.safetensors")
    errors = {}
    for name, tensor in named(training.model):
        kind, old = "update" if isinstance(tensor, torch.nn.Parameter) else "average", before[name]
        error = apart(tensor.detach() - old, taken(after, name) - old)
        errors[kind] = max(errors.get(kind, (0.0, "")), (error, name))
    for kind, (error, name) in errors.items():
        yield f"{kind}, most in {name}", error, UPDATE


EAGER = {"compiled": False, "grouped": False, "bf16": False}
GROUPED = {"compiled": True, "grouped": True, "bf16": False}
KINDS = {"eager": EAGER, "grouped, compiled": GROUPED, "grouped, compiled, bf16": GROUPED | {"bf16": True}}
# Router, norm, and whether it is compiled as well: that takes minutes.
MODELS = [
    ("topk", "rmsnorm", True),
    ("topk", "layernorm", False),
    ("default", "rmsnorm", False),
    ("default", "layernorm", True),
]


def main(program):
    failed = 0
    for router, norm, compiled in MODELS:
        kinds = {name: kind for name, kind in KINDS.items() if compiled or not kind["compiled"]}
        with tempfile.TemporaryDirectory() as folder:
            run, tokens = trained(program, pathlib.Path(folder), router, norm)
            for name, kind in kinds.items():
                torch.compiler.reset()
                for what, error, tolerance in compare(run, tokens, router, **kind):
                    good = error <= tolerance
                    failed += not good
                    word = "agrees" if good else "DIFFERS"
                    print(f"{word:8} {error:9.2e} of {tolerance:.0e}  {router} {norm}, {name}: {what}", flush=True)
    print(f"{failed} differ")
    return 1 if failed else 0


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    sys.exit(main(sys.argv[1]))
