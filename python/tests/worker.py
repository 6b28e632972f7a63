"""One process of test_distributed: trains two steps, and saves gradients and default vectors.

Usage: worker.py RANK RANKS FOLDER
"""

import sys

import models
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import routegrad.torch as rt

NAME, STEPS, BATCH = "olmoe", 2, 4
MODES = ["ddp", "checkpointing", "fsdp"]


def train(rank, ranks, folder, mode):
    """``mode``: "ddp", "checkpointing" (with DDP) or "fsdp"; without ranks all of them train the model as it is."""
    model = rt.default_moe(models.tiny(NAME), beta=0.5)
    if mode == "checkpointing":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    wrapped = model
    if ranks > 1 and mode == "fsdp":
        mesh = init_device_mesh("cpu", (ranks,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    elif ranks > 1:
        wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for step in range(STEPS):
        inputs = models.tokens(BATCH, seed=step).chunk(ranks)[rank]
        optimizer.zero_grad()
        wrapped(input_ids=inputs, labels=inputs).loss.backward()
        optimizer.step()
    found = {f"grad.{n}": p.grad for n, p in model.named_parameters()} | model.state_dict()
    whole = {n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in found.items()}
    torch.save(whole, f"{folder}/{mode}-{rank}-of-{ranks}.pt")


def main():
    rank, ranks, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(1)
    if ranks > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=ranks)
    for mode in MODES:
        train(rank, ranks, folder, mode)
    if ranks > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
