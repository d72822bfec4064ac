"""The tables of README.md and docs/results.md, written from assets/results.json between their markers.

A block begins with the line <!-- NAME --> and ends with <!-- /NAME -->; NAME is one of BLOCKS.
"""

import math
import re
from collections.abc import Callable, Sequence

from study.evaluate import ROWS

MISSING = "not yet measured"
NAMES = {  # in the order of rows
    "real": "real video, through the codec",
    "backbone": "backbone (stage 0)",
    "video-tuning-quarter": "video tuning, a quarter of the clips",
    "video-tuning": "video tuning, as many clips",
    "echomotion-short": "EchoMotion, video tuning's arithmetic",
    "echomotion-short-redrawn": "the same, video redrawn",
    "video-tuning-flops": "video tuning, EchoMotion's arithmetic",
    "mean-motion": "mean motion",
    "stage-1": "text → motion alone (stage 1)",
    "echomotion": "EchoMotion",
    "echomotion-redrawn": "EchoMotion, video redrawn",
    "mvs-rope": "MVS-RoPE",
    "unsynced": "unsynced",
    "collision": "collision",
    "one-stage": "stage 2 alone",
    "single-stream": "one set of weights",
}
# names of networks that are called differently in one part
OTHER_NAMES = {
    ("a82", "mvs-rope"): "stages 1 and 2",
    ("a83", "one-stage"): "two experts",
    ("table6", "real"): "other real motions",
}
LOSS = {"first_loss": "at the start", "loss": "at the end ↓", "behind": "behind the first row by ↓"}
TITLES = {measure: title for measure, (title, *_) in ROWS.items()} | LOSS
TABLE_1 = (
    "limbs_whole", "limbs_missing", "length_variation", "odd_bends", "flicker", "dynamic_degree", "sharpness",
    "prompt_following", "plausible_postures",
)  # fmt: skip
COLUMNS = {
    "table1": TABLE_1,
    "table1-18": TABLE_1,
    **dict.fromkeys(("a81", "a82", "a83"), tuple(LOSS)),
    "table5": ("pa_mpjpe_mm", "mpjpe_mm"),
    "table6": ("frechet_cm2", "usual_poses", "right_action", "jerk"),
}
# of table 1, for README.md
SHORT = ("limbs_whole", "flicker", "sharpness", "prompt_following")
SHORT_ROWS = ("real", "backbone", "video-tuning", "video-tuning-flops", "echomotion", "echomotion-redrawn")


def name_of(part: str, network: str) -> str:
    return OTHER_NAMES.get((part, network), NAMES[network])


def networks(results: dict, part: str) -> dict[str, dict]:
    """What has been measured of a part, in the order of NAMES."""
    return {name: results[part][name] for name in NAMES if name in results[part]}


def cell(found: dict[str, float]) -> str:
    """Mean ± standard error, over clips and over seeds, to the error's two digits: 0.597 ± 0.012."""
    error = math.hypot(found["error"], found.get("error_seeds", 0.0))
    if not error:
        return f"{found['mean']:.3g}"
    digits = max(0, 1 - int(f"{error:e}".partition("e")[2]))
    return f"{found['mean']:.{digits}f} ± {error:.{digits}f}"


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]
    return "\n".join(lines)


def short(results: dict, part: str) -> str:
    """The networks in SHORT_ROWS, and their measures in SHORT."""
    found = {name: of["measures"] for name, of in networks(results, part).items() if name in SHORT_ROWS}
    rows = [[name_of(part, name), *(cell(of[column]) for column in SHORT)] for name, of in found.items()]
    return markdown(["", *(TITLES[column] for column in SHORT)], rows)


def table(results: dict, part: str) -> str:
    """A row a network: its measures, its seeds, and the clips that its last stage was trained on."""
    rows = []
    for network, found in networks(results, part).items():
        trained = f"{found['trained_clips']:,}" if found["steps"] else ""
        cells = [cell(found["measures"][column]) for column in COLUMNS[part]]
        rows.append([name_of(part, network), *cells, str(found["seeds"]), trained])
    clips = next(iter(results[part].values()))["clips"]
    titles = [TITLES[column] for column in COLUMNS[part]]
    lines = markdown(["", *titles, "seeds", "clips in its last stage"], rows)
    errors = [x["error"] for found in networks(results, part).values() for x in found["measures"].values()]
    over = "" if any(errors) else " over seeds"
    return f"{lines}\n\nOn {clips} held-out clips{f', ± the standard error{over}' * ('±' in lines)}."


def shares(results: dict, part: str) -> str:
    """For both directions: the share in the layer where MVS-RoPE's is largest, and the mean over layers."""
    rows = []
    for network, found in networks(results, part).items():
        row = [name_of(part, network)]
        for side in ("motion_to_video", "video_to_motion"):
            layers = [key for key in found["measures"] if key.startswith(side)]
            row.append(cell(found["measures"][f"{side}_{best_layer(results[part], side)}"]))
            row.append(f"{sum(found['measures'][key]['mean'] for key in layers) / len(layers):.3f}")
        rows.append([*row, f"{found['chance']:.3f}", str(found["seeds"])])
    ways = [
        f"{way}, {what}"
        for way in ("motion→video", "video→motion")
        for what in ("MVS-RoPE's best layer", "mean")
    ]
    return markdown(["", *ways, "chance", "seeds"], rows)


def best_layer(found: dict[str, dict], side: str) -> int:
    """Where MVS-RoPE's share is largest; `found` is figure 8's networks."""
    measures = found["mvs-rope"]["measures"]
    means = {key: value["mean"] for key, value in measures.items() if key.startswith(side)}
    return int(max(means, key=means.get).rpartition("_")[2])


BLOCKS: dict[str, Callable[[dict, str], str]] = {
    **dict.fromkeys(COLUMNS, table),
    "figure8": shares,
    "table1-18-short": short,
}


def filled(text: str, results: dict) -> str:
    """The text with every block rewritten from the results."""

    def block(found: re.Match) -> str:
        name, part = found[1], found[1].removesuffix("-short")
        inside = BLOCKS[name](results, part) if results.get(part) else MISSING
        return f"<!-- {name} -->\n{inside}\n<!-- /{name} -->"

    return re.sub(rf"<!-- ({'|'.join(BLOCKS)}) -->\n.*?<!-- /\1 -->", block, text, flags=re.DOTALL)
