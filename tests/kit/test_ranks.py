"""What two ranks do inside a step: what FSDP gathers, keeps and reads."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import TINY, tiny_model
from processes import finish, start_ranks
from torch.distributed.tensor import DTensor

from dual_dit import DualDiT
from flow import Draw, Task
from kit import distributed, run, wan
from kit.distributed import World

# what FSDP calls
GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
HYBRID = dataclasses.replace(TINY, layers=3, dual=(1,))  # blocks 0 and 2 have no motion expert


def batch() -> tuple:
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 48, 2, 8, 8), (2, 5, 235), (2, 16, 64), (16, 64)
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


def loss_of(objective: torch.nn.Module, task: Task, bf16: bool = False) -> torch.Tensor:
    drawn = Draw(task, torch.zeros(2, dtype=torch.bool), torch.full((2,), 0.3), torch.arange(2))
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16, cache_enabled=False):
        return objective(*batch(), drawn).total


def sharded(world: World) -> list[dict]:
    """Each stage under FSDP: bytes gathered in a step, and what is kept after each of two microbatches."""
    found, gathered, real = [], [], getattr(dist, GATHER)

    def counted(output, *args, **options):
        gathered.append(output.nbytes)
        return real(output, *args, **options)

    setattr(dist, GATHER, counted)
    model = tiny_model(HYBRID)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    for stage, task in enumerate((Task.VIDEO_ONLY, Task.MOTION_ONLY, Task.JOINT)):
        video = set(model.video_parameters())
        for p in model.parameters():
            p.requires_grad_({0: p in video, 1: p not in video, 2: True}[stage])
        objective = distributed.wrap(model, world, "fsdp", bf16=True)
        gathered.clear()
        shares, unsharded = [], 0
        for last in (False, True):
            with distributed.exchange(objective, last):
                loss_of(objective, task, bf16=True).backward()
            kept = [p.grad for p in model.parameters() if p.grad is not None]
            shares.append(sum(distributed.local(g).nbytes for g in kept) / sum(g.nbytes for g in kept))
            unsharded += sum(not isinstance(p, DTensor) for p in model.parameters())
        dtypes = sorted({str(g.dtype) for g in kept})
        found.append({"gathered": sum(gathered) / 2, "kept": shares, "whole": unsharded, "dtypes": dtypes})
        model.zero_grad()
    for name, x in model.state_dict().items():
        assert torch.equal(distributed.local(distributed.gathered(x)), before[name]), name
    setattr(dist, GATHER, real)
    return found


def reads(world: World) -> list[dict]:
    """Under FSDP and DDP: where a rank has the Wan that rank 0 reads, and what it then has."""
    called, found = [], []
    wan.load_transformer = lambda folder: called.append(folder) or tiny_model()
    wan.transformer_config = lambda folder: TINY
    run.batches.statistics = lambda sources, seed: (torch.full((235,), 3.0), torch.ones(235))
    expected = tiny_model().state_dict() | {"motion_mean": torch.full((235,), 3.0)}
    for kind in ("fsdp", "ddp"):
        called.clear()
        model, _ = run.build(Path("wan"), None, None, {1: 1}, [], 0, None, world)
        meta = model.blocks[0].video.modulation.is_meta
        distributed.wrap(model, world, kind, False)
        values = {name: distributed.local(distributed.gathered(x)) for name, x in model.state_dict().items()}
        equal = all(torch.equal(values[name], expected[name]) for name in expected)
        found.append({"called": len(called), "meta": meta, "equal": equal})
    return found


def work(folder: Path) -> None:
    torch.set_num_threads(1)
    world = distributed.start("cpu")
    found = {check.__name__: check(world) for check in (reads, sharded)}
    (folder / f"{world.rank}.json").write_text(json.dumps(found))
    distributed.stop()


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict]:
    """What each of two ranks has found, by the name of the function above."""
    folder = tmp_path_factory.mktemp("ranks")
    finish(start_ranks(work, folder, ranks=2), folder / "log")
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def test_fsdp_keeps_no_whole_gradients_between_microbatches(found):
    for each in found:
        for stage in each["sharded"]:
            assert stage["kept"] == pytest.approx([0.5, 0.5], abs=0.05) and stage["whole"] == 0
            assert stage["dtypes"] == ["torch.float32"]  # also of what was frozen in the stage before


def test_fsdp_gathers_only_the_experts_that_run(found):
    # catches the frozen video expert gathered in stage 1, and the motion expert in stage 0
    parameters = sum(p.numel() for p in DualDiT(HYBRID).blocks[1].motion.parameters())
    expert = 2 * 2 * parameters  # bf16, twice a step
    for each in found:
        video, motion, both = (stage["gathered"] for stage in each["sharded"])
        assert both - video == pytest.approx(expert, rel=0.1)  # of the one dual block
        assert both - motion == pytest.approx(3 * expert, rel=0.1)


def test_one_rank_reads_a_wan_and_all_have_it(found):
    # catches a whole fp32 model in host memory for every GPU of a node
    for rank, each in enumerate(found):
        for kind in each["reads"]:
            assert kind == {"called": int(rank == 0), "meta": rank > 0, "equal": True}
