"""README.md: the verbs take its commands, the short ones run; its list of files has all, in order."""

import ast
import contextlib
import importlib
import io
import json
import re
import shlex
import sys
from pathlib import Path
from types import ModuleType

import pytest
from conftest import ROOT

from study import ablate

FOLDERS = ("kit", "study", "bench")
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
COMMANDS = [
    line.strip()
    for block in BLOCKS
    for line in block.replace("\\\n", " ").splitlines()
    if line.strip() and not line.startswith("#")
]
# `on` is a function of the README's own, for train.py
CALLS = re.compile(
    r"(?:python|torchrun) (?:.*? )?(?:-m ((?:kit|study)\.\w+|bench)|(\w+)\.py)(.*)|()(?:on)( --.*)"
)


def sources() -> list[Path]:
    """All of our Python but the tests; an __init__.py only says where things are."""
    found = [*ROOT.glob("*.py"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))]
    return [path for path in found if path.name != "__init__.py"]


def section(title: str) -> str:
    return re.search(rf"## {title}\n(.*?)\n## ", README, re.DOTALL)[1]


def calls() -> list[tuple[str, list[str]]]:
    """Every command that runs Python of ours: module, arguments."""
    found = []
    for command in COMMANDS:
        if call := CALLS.search(command):
            module = call[1] or call[2] or "train"
            found.append((module, shlex.split(call[3] or call[5] or "", comments=True)))
    return found


def module_of(verb: str) -> ModuleType:
    """What `python -m VERB` or `python VERB.py` runs."""
    return importlib.import_module(f"{verb}.__main__" if (ROOT / verb.replace(".", "/")).is_dir() else verb)


def test_readme_runs_every_verb():
    verbs = {"train", "sample", "study.evaluate", "study.figures", "bench", "kit.data"}
    assert {module for module, _ in calls()} >= verbs
    assert len(calls()) > 30


@pytest.mark.parametrize(("module", "arguments"), calls(), ids=lambda value: str(value)[:60])
def test_every_command_is_understood(module, arguments, monkeypatch):
    # catches options that were renamed or dropped; argparse leaves with SystemExit
    arguments = [argument for argument in arguments if argument not in ("$@", "$@;", "}")]
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    module_of(module).options()


def test_every_make_target_exists():
    makefile = (ROOT / "Makefile").read_text()
    targets = {word[1] for command in COMMANDS if (word := re.match(r"make (\w+)", command))}
    assert targets >= {"demo", "test"}
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)


def test_every_option_in_the_text_exists():
    source = "".join(path.read_text() for path in sources())
    others = {"--nproc-per-node", "--max-restarts", "--shutdown-timeout"}  # torchrun's
    for option in set(re.findall(r"`(--[a-z-]+)", README)) - others:
        assert f'"{option}"' in source, option


def test_every_file_in_the_text_exists():
    paths = re.findall(r"\]\((assets/[^)]+)\)|`((?:kit|study|bench|tests|assets)/[\w./]+)`", README)
    assert len(paths) > 20
    for path in {a or b for a, b in paths}:
        assert (ROOT / path).exists(), path


# ---------------------------------------------------------------- read in this order


def reading_list() -> dict[str, int]:
    """The files of the list, in order, with the number of lines that it says they have."""
    rows = re.findall(r"^\| `([\w/]+\.py)` \| (\d+) \|", section("Read in this order"), re.MULTILINE)
    assert len(rows) == len({name for name, _ in rows})
    return {name: int(lines) for name, lines in rows}


def test_reading_list_has_every_file_and_its_length():
    files = {str(path.relative_to(ROOT)): path for path in sources()}
    assert reading_list().keys() == files.keys()
    for name, lines in reading_list().items():
        assert abs(len(files[name].read_text().splitlines()) - lines) <= 10, name


def imported(name: str) -> set[str]:
    """Our own files that a file imports anywhere in it; of a folder, those that its __init__.py imports."""
    modules = set()
    for node in ast.walk(ast.parse((ROOT / name).read_text())):
        if isinstance(node, ast.ImportFrom):
            modules |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
    paths = {module.replace(".", "/") for module in modules if module}
    folders = {f"{path}/__init__.py" for path in paths if (ROOT / path / "__init__.py").is_file()}
    files = {f"{path}.py" for path in paths if (ROOT / f"{path}.py").is_file()}
    return files.union(*map(imported, folders))


def test_imports_only_point_upward():
    above = set()
    for name in reading_list():
        assert imported(name) <= above, name
        above.add(name)


def test_the_paper_imports_nothing_but_itself():
    names = [name for name in reading_list() if "/" not in name][:4]
    assert names == ["rope.py", "motion_tokens.py", "dual_dit.py", "flow.py"]
    for name in names:
        assert imported(name) <= set(names)


def test_every_choice_is_marked_in_the_code():
    rows = section("Choices where the paper is silent").count("\n| ") - 2  # head and rule
    marks = sum((ROOT / name).read_text().count("# paper is silent: ") for name in reading_list())
    assert marks == rows


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


def test_plan_prints_what_the_readme_shows(monkeypatch):
    # the count takes no time, so that it can be held against the text to the last digit
    command = next(arguments for module, arguments in calls() if module == "bench" and "plan" in arguments)
    monkeypatch.setattr(sys, "argv", ["bench", *command])
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        module_of("bench").main()
    shown = re.search(r"```\n(wan2\.1-1\.3b, .*?)```", README, re.DOTALL)[1]
    assert shown in printed.getvalue()


def test_ablation_table_is_what_was_measured(capsys):
    ablate.print_table(json.loads((ROOT / "assets/ablation.json").read_text()))
    assert f"```\n{capsys.readouterr().out}```" in README
