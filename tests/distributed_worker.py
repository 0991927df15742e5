"""Run by test_distributed.py, in each process of torchrun: distributed_worker.py DIRECTORY CHECK...

One after the other, in the same processes: most of the time is spent to start them.
"""

import sys

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor
from torch.testing import assert_close

import deconv_ext

torch.set_num_threads(1)


def network() -> nn.Sequential:
    torch.manual_seed(1)
    layer = deconv_ext.ConvTranspose2d
    return nn.Sequential(layer(4, 6, 4, 2, 1), nn.Tanh(), layer(6, 2, 3, 2, groups=2)).double()


def joined_batch() -> torch.Tensor:
    torch.manual_seed(2)
    return torch.randn(4, 4, 5, 3, dtype=torch.float64)


def loss_of(y: torch.Tensor) -> torch.Tensor:
    return y.square().mean()


def gradients_of_one_process() -> list[torch.Tensor]:
    model = network()
    loss_of(model(joined_batch())).backward()
    return [p.grad for p in model.parameters()]


def own_samples() -> torch.Tensor:
    return joined_batch().chunk(dist.get_world_size())[dist.get_rank()]


def ddp(directory: str) -> None:
    model = nn.parallel.DistributedDataParallel(network())
    loss_of(model(own_samples())).backward()
    assert_close([p.grad for p in model.parameters()], gradients_of_one_process())


def fsdp(directory: str) -> None:
    model = network()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=mesh)
    loss_of(model(own_samples())).backward()
    assert all(isinstance(p, DTensor) for p in model.parameters())
    gradients = [p.grad.full_tensor() for p in model.parameters()]
    assert_close(gradients, gradients_of_one_process())


def dtensor(directory: str) -> None:
    """Weights replicated; the batch replicated, or in shards with partial gradients."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for placement in (Replicate(), Shard(0)):
        model = distribute_module(network(), mesh)
        y = model(distribute_tensor(joined_batch(), mesh, [placement]))
        assert y.placements == (placement,), y.placements
        assert_close(y.full_tensor(), network()(joined_batch()))
        loss_of(y).backward()
        gradients = [p.grad.full_tensor() for p in model.parameters()]
        assert_close(gradients, gradients_of_one_process())


def checkpoint(directory: str) -> None:
    """Saved from shards, loaded into a plain model."""
    model = network()
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    dcp.save({"model": model.state_dict()}, checkpoint_id=directory)
    other = network()
    for p in other.parameters():
        nn.init.zeros_(p)
    state = {"model": other.state_dict()}
    dcp.load(state, checkpoint_id=directory)
    other.load_state_dict(state["model"])
    x = joined_batch()
    assert torch.equal(other(x), network()(x))


if __name__ == "__main__":
    dist.init_process_group("gloo")
    for check in sys.argv[2:]:
        globals()[check](sys.argv[1])
        print(f"{check} holds\n", end="", flush=True)
    dist.destroy_process_group()
