"""Devices and ranks: one network trained by many processes as if by one.

`torchrun` starts the processes and describes them in the environment; without it there is one. Each rank
sees its share of a batch, and gradients are averaged over the ranks, in one of two ways:

    ddp     every rank has the whole network
    fsdp    a rank has a shard of every tensor; a block is whole only while it runs. Over several nodes
            each node has a full set of shards, so that only gradients cross nodes (HSDP).
"""

import contextlib
import functools
import os
import signal
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import flow
from dual_dit import DualDiT
from kit import graphs

# with gradients, two optimizer states and the average, a DDP rank holds 20 bytes a parameter
SHARD_FROM = 1_000_000_000  # parameters


class World(NamedTuple):
    """This process among those of the run."""

    device: torch.device
    rank: int
    ranks: int


def start(device: str) -> World:
    """Join the process group that torchrun describes, if any."""
    if device == "cuda" and "RANK" in os.environ:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    if device.startswith("cuda:"):
        torch.cuda.set_device(device)  # CUDA graphs and NCCL use the current device
    if "RANK" not in os.environ:
        return World(torch.device(device), 0, 1)
    # gloo in addition to NCCL: checkpoints are written from the CPU
    backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
    store, rank, ranks = next(dist.rendezvous("env://"))
    if os.environ.get("LOCAL_WORLD_SIZE") == str(ranks):
        # torchrun's store outlives a restart, and with it the addresses of ranks that died. Several nodes
        # count restarts each for itself: docs/cluster.md has a variable for them
        store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT')}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=ranks)
    return World(torch.device(device), rank, ranks)


def stop() -> None:
    """Leave the process group; from here on SIGTERM ends the process."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if dist.is_initialized():
        dist.destroy_process_group()


def terminated() -> threading.Event:
    """An event that SIGTERM sets, so that a step is finished and saved before the process ends."""
    event = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: event.set())
    return event


# ---------------------------------------------------------------- wrapping


def small(model: nn.Module) -> bool:
    """Whether every rank can hold the whole model."""
    return sum(p.numel() for p in model.parameters()) < SHARD_FROM


class Objective(nn.Module):
    """flow.loss as a module.

    DDP expects gradients through all that a module returns. Of the network itself that would include a clean
    condition's velocity, which the loss does not use.
    """

    def __init__(self, model: DualDiT, replay: bool = False):
        super().__init__()
        self.model = model
        self.network = graphs.Recorded(model) if replay else model

    def forward(self, *inputs) -> flow.Loss:
        return flow.loss(self.network, *inputs)


def wrap(model: DualDiT, world: World, kind: str | None, bf16: bool, replay: bool = False) -> nn.Module:
    """flow.loss of the model, on its device, wrapped for training by all ranks.

    kind is "ddp", "fsdp" or None: by the model's size. Under FSDP its parameters become DTensors. A model on
    the meta device gets memory and rank 0's values; if rank 0's is on meta too, a checkpoint is read later.
    `replay`: one GPU replays a small network as CUDA graphs (kit/graphs.py).
    """
    if kind is None:
        kind = "ddp" if small(model) else "fsdp"
    if world.ranks > 1 and kind == "fsdp":
        if not isinstance(model, FSDPModule):
            _shard(model, world, bf16)
        _gather_what_runs(model)
        return Objective(model)
    model = model.to_empty(device=world.device) if model.motion_mean.is_meta else model.to(world.device)
    if world.ranks == 1:
        return Objective(model, replay and world.device.type == "cuda" and small(model))
    # each task leaves a different part of the network unused; DDP broadcasts rank 0's values
    return DistributedDataParallel(Objective(model), find_unused_parameters=True)


def _shard(model: DualDiT, world: World, bf16: bool) -> None:
    """FSDP2 block by block. Shards are allocated empty; then rank 0 broadcasts each whole tensor in turn."""
    values = {} if model.motion_mean.is_meta else model.state_dict()
    model.to("meta")
    mesh = _mesh(world)
    # Inputs keep their dtype: times and positions are fp32. Blocks gather weights in bf16, instead of casting
    # after the gather; those that are used in fp32 (modulation, norms) are rounded to bf16 by it.
    blocks = MixedPrecisionPolicy(torch.bfloat16 if bf16 else None, torch.float32, cast_forward_inputs=False)
    ends = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=blocks)
    # resharded after each forward pass: validation has no backward pass, and weights change after it
    fully_shard(model, mesh=mesh, mp_policy=ends, reshard_after_forward=True)
    if world.device.type == "cpu":  # gloo sums where FSDP asks for an average
        for module in (model, *model.blocks):
            module.set_force_sum_reduction_for_comms(True)
    model.to_empty(device=world.device)
    has_values = torch.tensor(float(bool(values)), device=world.device)
    dist.broadcast(has_values, src=0)
    for name, mine in model.state_dict().items() if has_values else ():
        value = torch.empty(mine.shape, dtype=mine.dtype, device=world.device)
        value = values[name].to(world.device) if world.rank == 0 else value
        dist.broadcast(value, src=0)
        if isinstance(mine, DTensor):
            value = distribute_tensor(value, mesh, mine.placements, src_data_rank=None).to_local()
        local(mine).copy_(value)
    # FSDP's lazy init looks at the parameters that train: let it see those of later stages, too
    frozen = [p for p in model.parameters() if not p.requires_grad]
    model.requires_grad_(True)
    fully_shard.state(model)._lazy_init()
    for p in frozen:
        p.requires_grad_(False)


def _gather_what_runs(model: DualDiT) -> None:
    """Let FSDP gather a block's trained parameters only.

    Frozen ones belong to a modality that is absent from the stage. torch has no public way to leave them out.
    """
    for block in model.blocks:
        group = fully_shard.state(block)._fsdp_param_group
        group.everything = getattr(group, "everything", group.fsdp_params)
        trained = [x for x in group.everything if x.sharded_param.requires_grad]
        if model.config.shared:  # motion runs through the video expert
            trained = group.everything
        group.fsdp_params = trained or group.everything[:1]  # a video-only block in stage 1: nothing runs


def _mesh(world: World) -> DeviceMesh:
    """One dimension of all ranks; with several nodes of several ranks, two: (nodes, ranks of a node)."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world.ranks))
    if 1 < local < world.ranks and world.ranks % local == 0:
        shape, names = (world.ranks // local, local), ("replicate", "shard")
    else:
        shape, names = (world.ranks,), ("shard",)
    return init_device_mesh(world.device.type, shape, mesh_dim_names=names)


# attention is what costs most to recompute, and its result is as small as the tokens
KEPT = [
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
]


def recompute_blocks(model: DualDiT) -> None:
    """Recompute each block in the backward pass, except fused attention: saves memory, costs time."""
    kept = functools.partial(create_selective_checkpoint_contexts, KEPT)
    for block in model.blocks:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False, context_fn=kept)


def compile_blocks(model: DualDiT) -> None:
    """torch.compile each block's forward; FSDP's hooks before and after it are not compiled."""
    # a graph for each task and clip length: graphs for any length take four times as long to compile
    torch._dynamo.config.automatic_dynamic_shapes = False
    torch._dynamo.config.recompile_limit = 32
    torch._dynamo.config.optimize_ddp = False  # it cannot split graphs that are recomputed
    for block in model.blocks:
        block.forward = functools.partial(_compiled_if_training, block.forward, torch.compile(block.forward))


def _compiled_if_training(plain: Callable, compiled: Callable, *inputs: object) -> dict[str, Tensor]:
    """Validation and pictures run uncompiled: they are rare, and graphs for them would cost more."""
    return (compiled if torch.is_grad_enabled() else plain)(*inputs)


# ---------------------------------------------------------------- a step


def exchange(wrapped: nn.Module, last: bool) -> AbstractContextManager:
    """Context for a microbatch's forward and backward: DDP exchanges gradients in a step's last one only.

    FSDP does so in each: keeping unsharded gradients until the last would cost a rank 4 bytes a parameter.
    """
    if isinstance(wrapped, DistributedDataParallel) and not last:
        return wrapped.no_sync()
    return contextlib.nullcontext()


def clip_gradients(model: nn.Module, limit: float) -> Tensor:
    """Scale all gradients down to this global norm -> what it was, the same on every rank."""
    norm = nn.utils.clip_grad_norm_(model.parameters(), limit)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def gathered(tensor: Tensor | None) -> Tensor | None:
    """A sharded tensor, unsharded on every rank; other tensors, and None, are returned as they are."""
    if not isinstance(tensor, DTensor):
        return tensor
    return tensor.redistribute(placements=[Replicate()] * tensor.device_mesh.ndim)


def gather_gradients(optimizer: torch.optim.Optimizer, *_: object) -> None:
    """Before a step of Muon, which multiplies whole matrices: gather each once, not for every product."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = gathered(p.grad)


def mean_over_ranks(value: Tensor, ranks: int) -> Tensor:
    if ranks > 1:
        dist.all_reduce(value)
    return value / ranks


def of_rank_0(value: object) -> object:
    """Rank 0's value, on every rank."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values)
    return values[0]


def local(tensor: Tensor) -> Tensor:
    """This rank's shard of a sharded tensor; other tensors are returned as they are."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
