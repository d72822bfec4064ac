"""Watching a run: a line of metrics each step in metrics.jsonl, a progress bar, and the run's speed."""

import contextlib
import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from dual_dit import DualDiTConfig
from flow import Role, Task
from kit.distributed import World
from kit.files import whole_file
from kit.flops import step_flops, tokens_of
from kit.geometry import Geometry

# dense bf16 FLOP/s as published; the first name that matches is used
PEAKS = {
    "B200": 2250e12, "H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12,
    "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12,
}  # fmt: skip


# ---------------------------------------------------------------- the log


class Log:
    """metrics.jsonl, TensorBoard where it is installed, and the progress bar."""

    def __init__(
        self,
        run: Path,
        first_step: int,
        steps: int,
        config: DualDiTConfig,
        geometry: Geometry,
        words: int,
        world: World,
        bf16: bool,
    ):
        """Drops logged lines from `first_step` on, which a resumed run repeats; a finished run keeps all.

        `words`: tokens of a text.
        """
        self.config, self.geometry, self.words = config, geometry, words
        peak = peak_flops(world.device, bf16)
        self.peak = peak and peak * world.ranks
        path = run / "metrics.jsonl"
        with whole_file(path) as temporary:
            kept = [line for line in read_log(path) if line["step"] < first_step or first_step == steps]
            temporary.write_text("".join(f"{json.dumps(line)}\n" for line in kept))
        self.file = open(path, "a")  # noqa: SIM115, close() closes it
        self.board = None
        with contextlib.suppress(ImportError):
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(run / "tensorboard", purge_step=first_step)
        self.bar = tqdm(initial=first_step, total=steps)
        self.smooth: dict[str, float] = {}
        self.skipped = 0  # steps, since this start

    def step(
        self, step: int, stage: int, frames: int, task: Task, losses: Sequence[float], norm: float,
        clips: int, seconds: float,
    ) -> None:  # fmt: skip
        """Log one training step; values that are not finite are left out: JSON has no such numbers."""
        roles, name = {"video": task.video, "motion": task.motion}, task.name.lower()
        made = [modality for modality, role in roles.items() if role is Role.NOISY]
        record = {"step": step, "stage": stage, "frames": frames, "task": name}
        record |= dict(zip(("loss", *made), losses, strict=True))
        self.skipped += not all(map(math.isfinite, (*losses, norm)))
        record |= {"grad_norm": norm, "skipped": self.skipped, "seconds": seconds}
        record |= self.speed(frames, roles, clips, seconds)
        finite = {k: v for k, v in record.items() if not isinstance(v, float) or math.isfinite(v)}
        if "loss" in finite:
            before = self.smooth.get(name, record["loss"])
            self.smooth[name] = 0.95 * before + 0.05 * record["loss"]
        self.bar.set_postfix({k: f"{v:.3f}" for k, v in sorted(self.smooth.items())}, refresh=False)
        self.bar.update()
        self._write(finite, {f"{name}/{k}": v for k, v in finite.items() if isinstance(v, float)})

    def speed(self, frames: int, roles: dict[str, Role], clips: int, seconds: float) -> dict[str, float]:
        """Tokens a second; MFU, relative to the peak FLOP/s of all ranks."""
        tokens = tokens_of(self.config, self.geometry._replace(frames=frames).grid, self.words)
        absent = {modality: 0 for modality, role in roles.items() if role is Role.ABSENT}
        tokens = tokens._replace(**absent)
        rates = {"tokens_per_second": clips * (tokens.video + tokens.motion) / seconds}
        if self.peak:
            rates["mfu"] = clips * step_flops(self.config, tokens) / seconds / self.peak
        return rates

    def validation(self, step: int, losses: dict[str, float]) -> None:
        self._write({"step": step, "validation": losses}, {f"validation/{k}": v for k, v in losses.items()})

    def _write(self, line: dict, scalars: dict[str, float]) -> None:
        print(json.dumps(line), file=self.file, flush=True)
        for name, value in scalars.items() if self.board else ():
            self.board.add_scalar(name, value, line["step"])

    def close(self) -> None:
        self.file.close()
        self.bar.close()
        if self.board:
            self.board.close()


def read_log(path: Path) -> list[dict]:
    """The lines of a metrics.jsonl, none if there is no such file; a crash may have cut off the last."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return found


# ---------------------------------------------------------------- speed


def peak_flops(device: torch.device, bf16: bool) -> float | None:
    """A GPU's published FLOP/s in bf16; None if unknown, in fp32, or for a CPU."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peak for key, peak in PEAKS.items() if bf16 and key in name), None)
