"""Watching a run: a line of measures each step, in metrics.jsonl and on the terminal; its speed."""

import contextlib
import json
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm import tqdm

from dual_dit import DualDiTConfig
from flow import Role
from kit import devices
from kit.data.batch import Batch
from kit.files import whole_file
from kit.flops import Tokens, step_flops
from rope import TOKENS_PER_FRAME

# dense bf16 FLOP/s as the makers state them; the first name that fits counts
PEAKS = {
    "B200": 2250e12, "H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12,
    "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12,
}  # fmt: skip


# ---------------------------------------------------------------- the log


class Log:
    """metrics.jsonl, TensorBoard where it is installed, and the progress bar."""

    def __init__(self, run: Path, first_step: int, steps: int):
        """A run that goes on at `first_step` drops the lines of what it will repeat."""
        path = run / "metrics.jsonl"
        with whole_file(path) as temporary:
            temporary.write_text("".join(_lines_before(path, first_step)))
        self.file = open(path, "a")  # noqa: SIM115, close() closes it
        self.board = None
        with contextlib.suppress(ImportError):
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(run / "tensorboard", purge_step=first_step)
        self.bar = tqdm(initial=first_step, total=steps)
        self.smooth: dict[str, float] = {}

    def step(self, record: dict) -> None:
        """One training step; what is not finite is left out, as JSON has no word for it."""
        task = record["task"]
        finite = {k: v for k, v in record.items() if not isinstance(v, float) or math.isfinite(v)}
        if "loss" in finite:
            before = self.smooth.get(task, record["loss"])
            self.smooth[task] = 0.95 * before + 0.05 * record["loss"]
        self.bar.set_postfix({k: f"{v:.3f}" for k, v in sorted(self.smooth.items())}, refresh=False)
        self.bar.update()
        self._write(finite, {f"{task}/{k}": v for k, v in finite.items() if isinstance(v, float)})

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


def _lines_before(path: Path, step: int) -> Iterator[str]:
    """The lines of a log that are of earlier steps; a crash may have cut off the last."""
    for line in path.read_text().splitlines(keepends=True) if path.exists() else ():
        with contextlib.suppress(ValueError):
            if json.loads(line)["step"] < step:
                yield line


# ---------------------------------------------------------------- speed


def peak_flops(device: torch.device, bf16: bool) -> float | None:
    """What this device can do in a second: measured on a CPU, as published for a GPU, None if unknown."""
    if device.type == "cpu":
        return devices.matmul_rate(device, torch.bfloat16 if bf16 else torch.float32)
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAKS.items() if bf16 and key in name), None)


def speed(config: DualDiTConfig, batch: Batch, clips: int, seconds: float, peak: float | None) -> dict:
    """A step of `clips` like those of `batch`: clips and tokens a second; MFU, of all ranks' peak FLOP/s."""
    video = 0 if batch.task.video is Role.ABSENT else math.prod(batch.video.shape[2:])
    motion = 0 if batch.task.motion is Role.ABSENT else batch.motion.shape[1] * TOKENS_PER_FRAME
    tokens = Tokens(video // math.prod(config.patch), motion, batch.text.shape[1])
    rates = {
        "clips_per_second": clips / seconds,
        "tokens_per_second": clips * (tokens.video + tokens.motion) / seconds,
    }
    if peak:  # recomputed blocks are no useful work
        rates["mfu"] = clips * step_flops(config, tokens, checkpointing=False) / seconds / peak
    return rates
