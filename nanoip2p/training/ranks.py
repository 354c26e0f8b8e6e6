"""One training run on several devices, started by torchrun: who keeps which weights, gradients, averages.

Three ways, from the fastest to the smallest: every rank has everything (DistributedDataParallel); every rank
has the weights and a share of the optimizer (ZeRO, Rajbhandari et al. 1910.02054, stage 1); every rank has a
share of everything (torch's fully_shard, stage 3). Without torchrun there is one rank, and nothing is shared.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nanoip2p.common.device import pick_device

PATIENCE = timedelta(days=1)  # until the others have stored their latents or shown their samples


@dataclass(frozen=True)
class Ranks:
    """This process among all of them."""

    rank: int
    count: int
    device: torch.device
    talk: object = None  # a gloo group for small messages, so that no GPU has to wait for them

    def agree(self, number: int) -> int:
        """The largest of what all ranks say; every rank has to ask."""
        if self.count == 1:
            return number
        said = torch.tensor(number)
        dist.all_reduce(said, dist.ReduceOp.MAX, group=self.talk)
        return int(said)

    def mean(self, number: float) -> float:
        """The mean of what all ranks say; every rank has to ask."""
        if self.count == 1:
            return number
        said = torch.tensor(number, dtype=torch.float64)
        dist.all_reduce(said, group=self.talk)
        return said.item() / self.count


@contextmanager
def started(device: str | None) -> Iterator[Ranks]:
    """Join the other processes of torchrun, if it started this one, and leave them at the end.

    device: as --device has it; with CUDA, each process of a machine takes a card of its own. ValueError when
    there are fewer cards than processes.
    """
    count = int(os.environ.get("WORLD_SIZE", 1))
    chosen = pick_device(device)
    if count == 1:
        yield Ranks(0, 1, chosen)
        return
    if chosen.type == "cuda":
        local, cards = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= cards:
            raise ValueError(f"{local + 1} processes for {cards} GPUs; torchrun --nproc-per-node {cards}")
        chosen = torch.device("cuda", local)
        torch.cuda.set_device(chosen)
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    try:
        yield Ranks(dist.get_rank(), count, chosen, dist.new_group(backend="gloo", timeout=PATIENCE))
    finally:
        dist.destroy_process_group()


def shard(unet: nn.Module) -> None:
    """Leave each rank a share of every weight; layers are put together when they are needed."""
    from torch.distributed.fsdp import fully_shard
    for level in (*unet.down_blocks, unet.mid_block, *unet.up_blocks):
        for layer in (*level.resnets, *level.attentions):
            fully_shard(layer)
    fully_shard(unet)


def spread(unet: nn.Module, ranks: Ranks) -> nn.Module:
    """What to call in place of `unet`, so that gradients become the mean over all ranks."""
    if ranks.count == 1 or is_sharded(unet):
        return unet
    return nn.parallel.DistributedDataParallel(unet, gradient_as_bucket_view=True)


def is_sharded(unet: nn.Module) -> bool:
    """Whether `shard` was here."""
    return hasattr(unet, "set_requires_gradient_sync")


def reshard(unet: nn.Module) -> None:
    """Let go of the shares of others, which the last layers keep after a forward pass for the way back."""
    if is_sharded(unet):
        unet.reshard()


@contextmanager
def gradients_shared(forward: nn.Module, now: bool) -> Iterator[None]:
    """Inside, backward passes exchange gradients or, before the last of a step, only add up their own."""
    if is_sharded(forward):
        forward.set_requires_gradient_sync(now)
    waits = isinstance(forward, nn.parallel.DistributedDataParallel) and not now
    with forward.no_sync() if waits else nullcontext():
        yield


def make_optimizer(unet: nn.Module, lr: float, shared: bool) -> torch.optim.Optimizer:
    """AdamW as the paper's code sets it. shared: each rank keeps the state of some weights only (ZeRO)."""
    settings = {"lr": lr, "betas": (0.9, 0.999), "weight_decay": 0.01}
    if not shared:
        return torch.optim.AdamW(unet.parameters(), **settings, fused=not is_sharded(unet))
    from torch.distributed.optim import ZeroRedundancyOptimizer
    return ZeroRedundancyOptimizer(unet.parameters(), torch.optim.AdamW, **settings)


def local(tensor: Tensor) -> Tensor:
    """The share of a tensor that lies here; all of it, unless it is sharded."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor: where it is, or put together on the CPU; every rank has to ask."""
    return tensor.full_tensor().detach().cpu() if hasattr(tensor, "full_tensor") else tensor.detach()


def like(full: Tensor, parameter: Tensor) -> Tensor:
    """The opposite of `whole`: on the parameter's device, and sharded as it is."""
    full = full.to(parameter.device, parameter.dtype)
    if not hasattr(parameter, "full_tensor"):
        return torch.empty_like(parameter).copy_(full)  # in the parameter's memory format
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(full, parameter.device_mesh, parameter.placements)


def weights_of(unet: nn.Module, keep: bool = True) -> dict[str, Tensor]:
    """Whole weights by name; every rank has to ask, and one that does not `keep` them gets none."""
    pairs = ((name, whole(parameter)) for name, parameter in unet.named_parameters())
    return {name: full for name, full in pairs if keep}


@torch.no_grad()
def set_weights(unet: nn.Module, weights: dict[str, Tensor]) -> None:
    """The opposite of `weights_of`. KeyError when one is missing."""
    for name, parameter in unet.named_parameters():
        parameter.copy_(like(weights[name], parameter))


def moments_of(optimizer: torch.optim.Optimizer, unet: nn.Module, moment: str) -> dict[str, Tensor]:
    """Adam's `exp_avg` or `exp_avg_sq` by the names of the weights, for rank 0; every rank has to ask."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    if hasattr(optimizer, "consolidate_state_dict"):
        optimizer.consolidate_state_dict(to=0)
        if rank != 0:
            return {}
    state = optimizer.state_dict()["state"]
    moments = ((name, whole(state[i][moment] if i in state else torch.zeros_like(parameter)))
               for i, (name, parameter) in enumerate(unet.named_parameters()))
    return {name: full for name, full in moments if rank == 0}


def set_moments(optimizer: torch.optim.Optimizer, unet: nn.Module, step: int, exp_avg: dict[str, Tensor],
                exp_avg_sq: dict[str, Tensor]) -> None:
    """The opposite of `moments_of`, for an optimizer that has taken `step` steps."""
    state = {i: {"step": torch.tensor(float(step)), "exp_avg": like(exp_avg[name], parameter),
                 "exp_avg_sq": like(exp_avg_sq[name], parameter)}
             for i, (name, parameter) in enumerate(unet.named_parameters())}
    groups = [group | {"params": list(state)} for group in optimizer.param_groups]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
