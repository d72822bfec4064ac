"""How the verbs speak to a person: errors of use are one line and exit code 2, as argparse's own."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path


def run(main: Callable[[], None]) -> None:
    """Call main(); a ValueError or OSError becomes one line on stderr."""
    try:
        main()
    except (ValueError, OSError) as error:
        line = " ".join(str(error).split())
        print(f"{Path(sys.argv[0]).name}: error: {line}", file=sys.stderr)
        sys.exit(2)


def size(text: str) -> tuple[int, int]:
    """An option such as 480x832 -> (height, width) in pixels."""
    height, _, width = text.partition("x")
    if not (height.isdigit() and width.isdigit()):
        raise argparse.ArgumentTypeError(f"expected HEIGHTxWIDTH such as 480x832, got {text!r}")
    return int(height), int(width)
