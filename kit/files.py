"""Atomic file writes, the record of how a result was made, and one-line errors of the command line."""

import argparse
import json
import math
import os
import platform
import secrets
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
from safetensors import SafetensorError

UMASK = os.umask(0)  # it can only be read by setting it
os.umask(UMASK)


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` and rename it on success, so that nothing half-written is left.

    FileNotFoundError when the folder of `path` does not exist, OSError when safetensors cannot write there.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"cannot write {path}: folder {path.parent} does not exist; create it first")
    # the suffix stays last: some writers choose the format by it
    temporary = path.with_name(f".{path.stem}.{secrets.token_hex(4)}{path.suffix}")
    try:
        yield temporary
        temporary.chmod(0o666 & ~UMASK)  # some writers make files that only their owner may read
        os.replace(temporary, path)
    except SafetensorError as error:  # raised on a full disk, too
        raise OSError(f"cannot write {path}: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def recorded(options: dict[str, object]) -> dict[str, object]:
    """Options as they stand in a record."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in options.items()}


def write_record(path: Path, options: dict[str, object], **more: object) -> None:
    """Write how a result was made, as JSON: command, options, versions and `more`.

    Creates the folder of `path`.
    """
    record = {
        "command": sys.argv,
        "options": recorded(options),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(record | more, indent=2) + "\n")


# ---------------------------------------------------------------- the command line


class Parser(argparse.ArgumentParser):
    """Wrong options are a ValueError, which run() prints in one line."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def run(main: Callable[[], None]) -> None:
    """Call main(); a ValueError, OSError or ImportError becomes one line on stderr, and exit code 2."""
    try:
        main()
    except (ValueError, OSError, ImportError) as error:
        line = " ".join(str(error).split())
        program = Path(sys.argv[0])
        name = program.parent.name if program.name == "__main__.py" else program.name  # a package is called
        print(f"{name}: error: {line}", file=sys.stderr)
        sys.exit(2)


def size(text: str) -> tuple[int, int]:
    """An option such as 480x832 -> (height, width) in pixels."""
    height, _, width = text.partition("x")
    if not (height.isdigit() and width.isdigit()):
        raise argparse.ArgumentTypeError(f"expected HEIGHTxWIDTH such as 480x832, got {text!r}")
    return int(height), int(width)


def count(text: str) -> int:
    """An option that is a number of at least 1."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, got {text!r}")
    return int(text)


def count_or_0(text: str) -> int:
    """An option that is a number of things, or 0 for never."""
    return 0 if text == "0" else count(text)


def positive(text: str) -> float:
    """An option that is a number above 0."""
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return number


def finite(text: str) -> float:
    """An option that is a finite number."""
    number = float(text)
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"expected a finite number, got {text!r}")
    return number


def new_file(text: str) -> Path:
    """An option that names a file to write: its folder must exist, before hours of work."""
    if not Path(text).absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"expected a file in a folder that exists, got {text!r}")
    return Path(text)


def device(text: str) -> str:
    """An option that names a device of this machine: cpu, cuda or cuda:N."""
    gpus = [f"cuda:{gpu}" for gpu in range(torch.cuda.device_count())]
    there = ["cpu", *(["cuda", *gpus] if gpus else [])]
    if text not in there:
        raise argparse.ArgumentTypeError(f"this machine has {', '.join(there)}, got {text!r}")
    return text


def frames(text: str) -> int:
    """An option that is a number of frames, 4n+1: a codec's latents hold the first frame, then four each."""
    number = count(text)
    if number % 4 != 1:
        nearest = max(1, 4 * round((number - 1) / 4) + 1)
        raise argparse.ArgumentTypeError(f"expected 4n+1, got {number}; the nearest is {nearest}")
    return number
