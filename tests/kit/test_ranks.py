"""What two ranks do: what FSDP gathers, keeps and reads, and where both go on."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import TINY, tiny_model
from processes import finish, start_ranks
from torch.distributed.tensor import DTensor

import train
from flow import Draw, Task
from kit import distributed, run, wan
from kit.checkpoints import Checkpoint
from kit.distributed import World

# what FSDP calls
GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
HYBRID = dataclasses.replace(TINY, layers=3, dual=(1,))  # blocks 0 and 2 have no motion expert


def batch() -> tuple:
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 48, 2, 8, 8), (2, 5, 235), (2, 16, 64), (16, 64)
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


def sharded(world: World) -> None:
    """Each stage under FSDP, two microbatches in each."""
    sizes, gathered, real = [], [], getattr(dist, GATHER)

    def counted(output, *args, **options):
        gathered.append(output.nbytes)
        return real(output, *args, **options)

    setattr(dist, GATHER, counted)
    model = tiny_model(HYBRID)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    expert = 2 * 2 * sum(p.numel() for p in model.blocks[1].motion.parameters())  # bf16, twice a step
    for stage, task in enumerate((Task.VIDEO_ONLY, Task.MOTION_ONLY, Task.JOINT)):
        train.freeze(model, stage)
        objective = distributed.wrap(model, world, "fsdp", bf16=True)
        drawn = Draw(task, torch.zeros(2, dtype=torch.bool), torch.full((2,), 0.3), torch.arange(2))
        gathered.clear()
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
                loss = objective(*batch(), drawn)
            loss.total.backward()
            # catches whole gradients that wait for the last microbatch, and whole weights
            kept = [p.grad for p in model.parameters() if p.grad is not None]
            share = sum(distributed.local(g).nbytes for g in kept) / sum(g.nbytes for g in kept)
            assert share == pytest.approx(0.5, abs=0.05)
            assert all(isinstance(p, DTensor) for p in model.parameters())
        assert {g.dtype for g in kept} == {torch.float32}  # also of what was frozen in the stage before
        sizes.append(sum(gathered) / 2)
        model.zero_grad()
    # catches the frozen video expert gathered in stage 1, and the motion expert in stage 0
    video, motion, both = sizes
    assert both - video == pytest.approx(expert, rel=0.1)  # of the one dual block
    assert both - motion == pytest.approx(3 * expert, rel=0.1)
    for name, x in model.state_dict().items():
        assert torch.equal(distributed.local(distributed.gathered(x)), before[name]), name


def reads(world: World) -> None:
    """Rank 0 reads a Wan, and all have it: a whole fp32 model for every GPU would fill a node's memory."""
    called = []
    wan.load_transformer = lambda folder: called.append(folder) or tiny_model()
    wan.transformer_config = lambda folder: TINY
    run.batches.statistics = lambda *_: (torch.full((235,), 3.0), torch.ones(235))
    expected = tiny_model().state_dict()
    expected |= {"motion_mean": torch.full((235,), 3.0), "motion_std": torch.ones(235)}
    for kind in ("fsdp", "ddp"):
        called.clear()
        model, _ = run.build(Path("wan"), None, None, {1: 1}, [], 0, None, world)
        assert len(called) == (world.rank == 0)
        assert model.blocks[0].video.modulation.is_meta == (world.rank > 0)
        distributed.wrap(model, world, kind, False)
        for name, x in model.state_dict().items():
            assert torch.equal(distributed.local(distributed.gathered(x)), expected[name]), name


def resumes(world: World) -> None:
    """Rank 1 does not see the last checkpoint yet, as on a network disk. Catches: each resumes its own."""
    seen = [Checkpoint(Path(f"step-{step}"), {"plan": {}, "step": step}) for step in (4, 2)]
    run.checkpoints.newest = lambda out: seen[world.rank]
    assert run.resumed(Path("nowhere"), "must", {}) == seen[0]


def as_a_rank(check: Callable[[World], None]) -> None:
    torch.set_num_threads(1)
    check(distributed.start("cpu"))
    distributed.stop()


@pytest.mark.parametrize("check", (sharded, reads, resumes))
def test_each_of_two_ranks(check, tmp_path):
    finish(start_ranks(as_a_rank, check, ranks=2), tmp_path / "log")
