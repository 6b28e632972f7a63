"""One process of test_distributed: trains two steps with DDP, and saves gradients and default vectors.

Usage: worker.py RANK RANKS FOLDER
"""

import sys

import models
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import routegrad.torch as rt

NAME, STEPS, BATCH = "olmoe", 2, 4


def train(rank, ranks, folder, checkpointing):
    model = rt.default_moe(models.tiny(NAME), beta=0.5)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    wrapped = DistributedDataParallel(model) if ranks > 1 else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for step in range(STEPS):
        inputs = models.tokens(BATCH, seed=step).chunk(ranks)[rank]
        optimizer.zero_grad()
        wrapped(input_ids=inputs, labels=inputs).loss.backward()
        optimizer.step()
    found = {f"grad.{n}": p.grad for n, p in model.named_parameters()} | model.state_dict()
    torch.save(found, f"{folder}/{checkpointing}-{rank}-of-{ranks}.pt")


def main():
    rank, ranks, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(1)
    if ranks > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=ranks)
    for checkpointing in (False, True):
        train(rank, ranks, folder, checkpointing)
    if ranks > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
