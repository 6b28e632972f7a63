"""Fine-tunes a small Mixture-of-Experts model on text with and without default vectors, and plots both loss curves.

    pip install './python[torch,plot]'
    python python/examples/finetune_default_moe.py
    python python/examples/finetune_default_moe.py --text book.txt --steps 500 --out curves.png

The model is a randomly initialized olmoe (8 experts, 1 expert per token); its tokens are bytes. It is first trained
without default vectors. Then two copies are trained on the same batches, one without and one with default vectors. This
takes some minutes on two cores. The script prints the loss on held-out text, how evenly the experts are used, and how
close the router's gradient is to the dense gradient.
"""

from __future__ import annotations

import argparse
import copy
import pathlib
import time

import torch
import transformers
from torch import Tensor

import routegrad.torch as rt

SPEECHES = pathlib.Path(__file__).parents[2] / "data/embedded/sotu.txt.zst"


def read_bytes(path: pathlib.Path) -> Tensor:
    """Returns the bytes of a text file, or of a text file compressed with zstd, as tokens."""
    data = path.read_bytes()
    if path.suffix == ".zst":
        import zstandard

        data = zstandard.ZstdDecompressor().stream_reader(data).read()
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).long()


def random_model(length: int) -> torch.nn.Module:
    """Returns a model with about 1 M parameters.

    olmoe does not renormalize the weights, so its router gets a gradient from the loss even with one expert per token.
    """
    config = transformers.OlmoeConfig(
        vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_experts=8, num_experts_per_tok=1, norm_topk_prob=False, max_position_embeddings=length,
        router_aux_loss_coef=0.01, pad_token_id=None, eos_token_id=None, use_cache=False,
    )  # fmt: skip
    return transformers.OlmoeForCausalLM(config)


def batch(text: Tensor, sequences: int, length: int, generator: torch.Generator) -> Tensor:
    """Returns sequences [B, S] from random positions in the text."""
    starts = torch.randint(0, len(text) - length, (sequences, 1), generator=generator)
    return text[starts + torch.arange(length)]


@torch.no_grad()
def evaluate(model: torch.nn.Module, batches: list[Tensor]) -> float:
    """Returns the mean cross-entropy in nats per byte."""
    model.eval()
    losses = [model(input_ids=b, labels=b).loss.item() for b in batches]
    return sum(losses) / len(losses)


def train(
    model: torch.nn.Module, text: Tensor, held_out: list[Tensor], steps: int, rate: float, seed: int, every: int
) -> list[tuple[int, float]]:
    """Trains with AdamW and the auxiliary loss; returns (step, loss on held-out text)."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.1)
    curve = [(0, evaluate(model, held_out))]
    for step in range(1, steps + 1):
        inputs = batch(text, 8, held_out[0].shape[1], generator)
        model.train()
        model(input_ids=inputs, labels=inputs, output_router_logits=True).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % every == 0 or step == steps:
            curve.append((step, evaluate(model, held_out)))
    return curve


def draw(curves: dict[str, list[tuple[int, float]]], out: pathlib.Path) -> None:
    """Plots the loss over the steps, with one line per model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for (name, curve), style in zip(curves.items(), ("o-", "s--"), strict=True):
        axes.plot(*zip(*curve, strict=True), style, label=name, markersize=4)
    axes.set(xlabel="fine-tuning steps", ylabel="held-out loss (nats per byte)")
    axes.set_title("Fine-tuning with and without default vectors")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(out, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=pathlib.Path, default=SPEECHES, help="text file, also .zst (default: %(default)s)")
    parser.add_argument("--pretrain", type=int, default=300, help="steps before the model is copied (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=300, help="steps of fine-tuning (default: %(default)s)")
    parser.add_argument("--beta", type=float, default=0.9, help="decay of the default vectors (default: %(default)s)")
    parser.add_argument("--length", type=int, default=128, help="bytes per sequence (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("finetune_default_moe.png"))
    options = parser.parse_args()

    text = read_bytes(options.text)
    cut = int(0.95 * len(text))
    generator = torch.Generator().manual_seed(1)
    held_out = [batch(text[cut:], 16, options.length, generator) for _ in range(4)]
    torch.manual_seed(options.seed)
    pretrained, started = random_model(options.length), time.perf_counter()
    train(pretrained, text[:cut], held_out, options.pretrain, 3e-3, options.seed, options.pretrain)
    print(f"pretrained: {evaluate(pretrained, held_out):.4f} nats per byte, {time.perf_counter() - started:.0f} s")

    models = {
        "top-1": pretrained,
        "top-1 with default vectors": rt.default_moe(copy.deepcopy(pretrained), beta=options.beta),
    }
    curves = {}
    for name, model in models.items():
        started = time.perf_counter()
        curves[name] = train(model, text[:cut], held_out, options.steps, 1e-3, options.seed + 1, max(1, options.steps // 12))
        load = torch.stack(list(rt.expert_load(model, {"input_ids": torch.cat(held_out)}).values())).double()
        variation = (load.std(dim=1, correction=0) / load.mean(dim=1)).mean().item()
        seconds = time.perf_counter() - started
        print(f"{name}: {curves[name][-1][1]:.4f} nats per byte, load variation {variation:.2f}, {seconds:.0f} s")
    print("cosine similarity of the router gradient to the dense gradient:")
    for found in rt.router_gradient_similarity(models["top-1 with default vectors"], {"input_ids": held_out[0]}):
        print(f"  {found.layer}: with default vectors {found.cosine:.3f}, without {found.topk_cosine:.3f}")
    draw(curves, options.out)
    print(f"curves: {options.out}")


if __name__ == "__main__":
    main()
