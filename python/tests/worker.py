"""One process of test_distributed: trains two steps with DDP or FSDP, and saves gradients and default vectors.

Usage: worker.py RANK RANKS FOLDER
"""

import copy
import sys

import models
import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import routegrad.torch as rt

try:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.fsdp import fully_shard
except ImportError:
    fully_shard = None

NAME, STEPS, BATCH = "olmoe", 2, 4
WAYS = ["ddp", "checkpointed ddp", "own group", *(["fsdp", "checkpointed fsdp"] if fully_shard else [])]


def train(rank, ranks, folder, way):
    group = dist.new_subgroups(group_size=1)[0] if way == "own group" and ranks > 1 else None
    model = rt.default_moe(models.tiny(NAME), beta=0.5, process_group=group)
    if group is not None:
        model = copy.deepcopy(model)  # The copy uses the same group.
    if "checkpointed" in way:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    wrapped, sharded = model, "fsdp" in way and ranks > 1
    if sharded:
        for part in (*model.model.layers, model):
            fully_shard(part)
    elif ranks > 1:
        wrapped = DistributedDataParallel(model, broadcast_buffers=way != "own group")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for step in range(STEPS):
        inputs = models.tokens(BATCH, seed=step).chunk(ranks)[rank]
        optimizer.zero_grad()
        wrapped(input_ids=inputs, labels=inputs).loss.backward()
        optimizer.step()
    if sharded:
        with pytest.raises(NotImplementedError, match="weights sharded over ranks"):
            rt.router_gradient_similarity(model, dict(input_ids=inputs))
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)) if sharded else model.state_dict()
    gradients = {f"grad.{n}": p.grad.full_tensor() if sharded else p.grad for n, p in model.named_parameters()}
    torch.save(gradients | state, f"{folder}/{way}-{rank}-of-{ranks}.pt")


def main():
    rank, ranks, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(1)
    if ranks > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=ranks)
    for way in WAYS:
        train(rank, ranks, folder, way)
    if ranks > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
