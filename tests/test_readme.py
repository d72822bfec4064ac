"""README.md and docs/: every command is understood, the short ones run, links lead somewhere."""

import contextlib
import importlib
import io
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from conftest import ROOT

from kit.data.clips import read_metadata

README = (ROOT / "README.md").read_text()
PAGES = {path.relative_to(ROOT): path.read_text() for path in (ROOT / "README.md", *ROOT.glob("docs/*.md"))}
SOURCES = {
    path.relative_to(ROOT): path.read_text()
    for pattern in ("*.py", "kit/**/*.py", "study/*.py", "bench/*.py")
    for path in ROOT.glob(pattern)
}
COMMANDS = [
    line.strip()
    for text in PAGES.values()
    for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
]
# every command that runs Python of ours, `python VERB.py`, `torchrun ... train.py` or `python -m VERB`
VERB = re.compile(r"(?:python|torchrun) (?:.*? )?(?:-m ((?:kit|study)\.\w+|bench)|(\w+)\.py)(.*)")
CALLS = [  # module, arguments
    (call[1] or call[2], shlex.split(call[3], comments=True)) for call in map(VERB.match, COMMANDS) if call
]


def module_of(verb: str) -> ModuleType:
    """What `python -m VERB` or `python VERB.py` runs."""
    return importlib.import_module(f"{verb}.__main__" if (ROOT / verb.replace(".", "/")).is_dir() else verb)


def section(title: str) -> str:
    return re.search(rf"## {title}\n(.*?)\n## ", README, re.DOTALL)[1]


def test_readme_is_short_links_every_page_and_shows_every_verb():
    assert len(README.splitlines()) <= 200
    assert {str(page) for page in PAGES} - {"README.md"} <= set(re.findall(r"\]\((docs/[^)]+)\)", README))
    assert {module for module, _ in CALLS} >= {"train", "sample", "kit.data", "bench"}


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_and_paths_lead_somewhere(page: Path):
    text = re.sub(r"```.*?```", "", PAGES[page], flags=re.DOTALL)
    links = [link for link in re.findall(r"\]\(([^)#]+)", text) if "://" not in link]
    for link in links:
        assert (ROOT / page.parent / link).exists(), link
    for path in re.findall(r"`((?:kit|study|bench|tests|assets|docs)/[\w./]*)`", text):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize(("module", "arguments"), CALLS, ids=lambda value: str(value)[:60])
def test_every_command_is_understood(module, arguments, monkeypatch):
    # catches options that were renamed or dropped; argparse leaves with SystemExit
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    module_of(module).options()


def test_every_make_target_exists():
    makefile = (ROOT / "Makefile").read_text()
    for target in {word[1] for command in COMMANDS if (word := re.match(r"make (\w+)", command))}:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_every_option_in_the_text_exists():
    source = "".join(SOURCES.values())
    # torchrun's, and of the tools in docs/data.md
    others = {"--nproc-per-node", "--nnodes", "--max-restarts", "--shutdown-timeout", "--calib", "--save_pkl"}
    for option in set(re.findall(r"`(--[a-z_-]+)", "".join(PAGES.values()))) - others:
        assert f'"{option}"' in source, option


def test_every_choice_that_the_paper_leaves_open_has_its_row():
    rows = re.findall(r"^\| `([\w/.]+)` \|", section("Where the paper is silent"), re.MULTILINE)
    method = {str(path): source for path, source in SOURCES.items() if path.parts[0] != "study"}
    marks = [path for path, source in method.items() for _ in re.findall("# paper is silent:", source)]
    assert sorted(rows) == sorted(marks)


# ---------------------------------------------------------------- run


def test_sample_commands_run(verb, tmp_path, monkeypatch):
    # in the README's order: the second and third read what the first has written
    monkeypatch.chdir(tmp_path)
    block = re.search(r"```sh\n(.*?)```", section("Sample"), re.DOTALL)[1]
    commands = [shlex.split(line)[2:] for line in block.splitlines()]
    assert len(commands) == 3
    for arguments in commands:
        ended = verb(importlib.import_module("sample"), *arguments, "--steps", 1)
        assert ended.code == 0, ended.err
        name, out = arguments[arguments.index("--task") + 1], arguments[arguments.index("--out") + 1]
        made = {path.suffix for path in (tmp_path / out).glob(f"{name}.*")}
        assert made == {".mp4", ".gif", ".png", ".npz", ".bvh"}


def test_folder_of_videos_becomes_a_table(tmp_path):
    # catches a tool that is run in one folder and given the videos of another
    (tmp_path / "GVHMR/tools/demo").mkdir(parents=True)
    (tmp_path / "GVHMR/tools/demo/demo.py").write_text(
        "import pathlib, sys\n"
        "video, root = (pathlib.Path(option.split('=')[1]) for option in sys.argv[1:3])\n"
        "made = root / video.stem / 'hmr4d_results.pt'\n"
        "made.parent.mkdir(parents=True), made.write_bytes(video.read_bytes())\n"
    )
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips/a.mp4").write_bytes(b"a video")
    (tmp_path / "clips/a.txt").write_text('she says "hi", and waves\n')
    lines = [command for command in COMMANDS if command.startswith("(")]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    subprocess.run(["bash", "-ec", "\n".join(lines)], cwd=tmp_path, env={"PATH": path}, check=True)
    (clip,), problems = read_metadata(tmp_path / "clips")
    assert not problems and clip[:2] == ("a.mp4", 'she says "hi", and waves')
    assert (tmp_path / "clips" / clip.motion).read_bytes() == b"a video"


def test_memory_in_docs_wan_is_what_plan_counts(monkeypatch):
    text = PAGES[Path("docs/wan.md")]
    columns = []
    for module, arguments in CALLS:
        if module == "bench" and "plan" in arguments and f"bench {shlex.join(arguments)}\n" in text:
            monkeypatch.setattr(sys, "argv", ["bench", *arguments])
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                module_of("bench").main()
            columns.append(re.search(r"^sum +(\S+) +(\S+)", printed.getvalue(), re.MULTILINE).groups())
    stored, checkpointed = zip(*columns, strict=True)
    assert f"| sum | {' | '.join(checkpointed)} |" in text
    assert f"| sum without `--checkpointing` | {' | '.join(stored)} |" in text
