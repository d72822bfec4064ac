"""What two ranks do inside a step: compiled DDP, and what FSDP gathers, keeps and reads."""

import dataclasses
import functools
import json
import os
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import TINY, tiny_model
from processes import _context
from torch.distributed.tensor import DTensor

from dual_dit import DualDiT
from flow import Draw, Task
from kit import distributed, run, wan
from kit.distributed import World

GATHER = (
    "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
)  # what FSDP calls
HYBRID = dataclasses.replace(TINY, layers=3, dual=(1,))  # blocks 0 and 2 have no motion expert


def batch() -> tuple:
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 48, 2, 8, 8), (2, 5, 235), (2, 16, 64), (16, 64)
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


def loss_of(objective: torch.nn.Module, task: Task, bf16: bool = False) -> torch.Tensor:
    drawn = Draw(
        task, torch.zeros(2, dtype=torch.bool), torch.full((2,), 0.3), torch.full((2,), 0.6), torch.arange(2)
    )
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16, cache_enabled=False):
        return objective(*batch(), drawn).total


def whole(x: torch.Tensor) -> torch.Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def norm(model: DualDiT) -> float:
    return distributed.clip(model, 1e9).item()


def compiled_ddp(world: World) -> list[float]:
    """Loss and gradient norm of a joint step, plain and compiled with checkpointing."""
    real, found = torch.compile, []
    torch.compile = functools.partial(real, backend="aot_eager")
    for compiled in (False, True):
        model = tiny_model()
        if compiled:
            distributed.recompute_blocks(model)
            distributed.compile_blocks(model)
        objective = distributed.wrap(model, world, "ddp", False)
        loss = loss_of(objective, Task.JOINT)
        loss.backward()
        found += [loss.item(), norm(model)]
    torch.compile = real
    return found


def sharded(world: World) -> dict:
    """All stages under FSDP: bytes gathered in a step of each, and what is kept after a microbatch."""
    found, gathered, real = {}, [0], getattr(dist, GATHER)

    def counted(output, *args, **options):
        gathered[0] += output.nbytes
        return real(output, *args, **options)

    setattr(dist, GATHER, counted)
    torch.manual_seed(0)
    model = DualDiT(HYBRID)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.03 * torch.randn_like(p))
    before = {name: x.clone() for name, x in model.state_dict().items()}
    for stage, task in ((0, Task.VIDEO_ONLY), (1, Task.MOTION_ONLY), (2, Task.JOINT)):
        video = set(model.video_parameters())
        for p in model.parameters():
            p.requires_grad_({0: p in video, 1: p not in video, 2: True}[stage])
        objective = distributed.wrap(model, world, "fsdp", bf16=True)
        gathered[0] = 0
        parts = []
        for last in (False, True):
            with distributed.exchange(objective, last):
                loss_of(objective, task, bf16=True).backward()
            kept = [p.grad for p in model.parameters() if p.grad is not None]
            parts.append(sum(distributed.local(g).nbytes for g in kept) / sum(g.nbytes for g in kept))
            parts.append(sum(not isinstance(p, DTensor) for p in model.parameters()))
        dtypes = {str(p.grad.dtype) for p in model.parameters() if p.grad is not None}
        found[str(stage)] = {"gathered": gathered[0] / 2, "kept": parts, "dtypes": sorted(dtypes)}
        found[str(stage)]["norm"] = norm(model)
        for p in model.parameters():
            p.grad = None
    for name, x in model.state_dict().items():
        assert torch.equal(whole(x), before[name]), name
    setattr(dist, GATHER, real)
    return found


def reads(world: World) -> dict:
    """Where a rank has the Wan that rank 0 has read, before and after it is on its device."""
    called = []
    wan.load_transformer = lambda folder: called.append(folder) or tiny_model()
    wan.transformer_config = lambda folder: TINY
    run.batches.statistics = lambda sources, seed: (torch.full((235,), 3.0), torch.ones(235))
    found = {}
    for kind in ("fsdp", "ddp"):
        called.clear()
        model, _ = run.build(Path("wan"), None, None, {1: 1}, [], 0, None, world)
        found[kind] = {"called": len(called), "meta": model.blocks[0].video.modulation.is_meta}
        distributed.wrap(model, world, kind, False)
        state, expected = model.state_dict(), tiny_model().state_dict()
        expected["motion_mean"] = torch.full((235,), 3.0)
        values = {name: whole(x) for name, x in state.items()}
        found[kind]["equal"] = all(torch.equal(values[name], expected[name]) for name in expected)
    return found


def work(rank: int, port: str, folder: str) -> None:
    os.environ |= {
        "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "localhost", "MASTER_PORT": port,
    }  # fmt: skip
    torch.set_num_threads(1)
    world = distributed.start("cpu")
    for check in (reads, sharded, compiled_ddp):
        (Path(folder) / f"{check.__name__}-{rank}.json").write_text(json.dumps(check(world)))
    distributed.stop()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    processes = [_context().Process(target=work, args=(rank, port, str(folder))) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
        process.kill()
    return lambda name: [json.loads((folder / f"{name}-{rank}.json").read_text()) for rank in range(2)]


def test_compiled_blocks_under_ddp_are_recomputed(found):
    # catches Dynamo's DDPOptimizer, which ends in a TypeError
    for loss, gradients, compiled_loss, compiled_gradients in found("compiled_ddp"):
        assert (compiled_loss, compiled_gradients) == pytest.approx((loss, gradients), rel=1e-5)


def test_fsdp_keeps_no_whole_gradients_between_microbatches(found):
    for each in found("sharded"):
        for stage in "012":
            first, whole_after_first, second, whole_after_second = each[stage]["kept"]
            assert first == pytest.approx(0.5, abs=0.05) and second == pytest.approx(0.5, abs=0.05)
            assert whole_after_first == whole_after_second == 0
            assert each[stage]["dtypes"] == ["torch.float32"]  # also of what was frozen in the stage before


def test_fsdp_gathers_only_the_experts_that_run(found):
    # catches the frozen video expert gathered in stage 1, and the motion expert in stage 0
    expert = (
        2 * 2 * sum(p.numel() for p in DualDiT(HYBRID).blocks[1].motion.parameters())
    )  # bf16, twice a step
    for each in found("sharded"):
        video, motion, both = (each[stage]["gathered"] for stage in "012")
        assert both - video == pytest.approx(expert, rel=0.1)  # of the one dual block
        assert both - motion == pytest.approx(3 * expert, rel=0.1)


def test_one_rank_reads_a_wan_and_all_have_it(found):
    # catches a whole fp32 model in host memory for every GPU of a node
    for rank, each in enumerate(found("reads")):
        for kind in ("fsdp", "ddp"):
            assert each[kind] == {"called": int(rank == 0), "meta": rank > 0, "equal": True}
