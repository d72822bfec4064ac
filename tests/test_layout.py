"""The house: the method stands alone, imports form a ladder, and no file is out of its place."""

import ast
from graphlib import TopologicalSorter

from conftest import ROOT

METHOD = ("rope.py", "motion_tokens.py", "dual_dit.py", "flow.py")
FILES = {
    str(path.relative_to(ROOT)): path
    for pattern in ("*.py", "kit/**/*.py", "study/**/*.py", "bench/**/*.py")
    for path in ROOT.glob(pattern)
}


def modules(name: str) -> set[str]:
    """All that a file imports, anywhere in it, by full name."""
    found = set()
    for node in ast.walk(ast.parse(FILES[name].read_text())):
        if isinstance(node, ast.ImportFrom):
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


def imported(name: str) -> set[str]:
    """Our own files that a file imports; of a folder, its __init__.py."""
    paths = {module.replace(".", "/") for module in modules(name)}
    return {f for path in paths for f in (f"{path}.py", f"{path}/__init__.py") if f in FILES and f != name}


def test_the_method_imports_torch_einops_and_itself():
    standard = {"collections", "dataclasses", "enum", "functools", "itertools", "math", "typing"}
    for name in METHOD:
        assert imported(name) <= set(METHOD)
        tops = {module.split(".")[0] for module in modules(name)} - standard
        assert tops <= {"torch", "einops", *(file.removesuffix(".py") for file in METHOD)}, name


def test_imports_have_no_circles():
    TopologicalSorter({name: imported(name) for name in FILES}).prepare()  # CycleError names one


def test_kit_knows_nothing_of_what_uses_it_and_study_is_used_by_itself_alone():
    for name in FILES:
        not_for = ("study/", "bench/", "train", "sample") if name.startswith("kit/") else ("study/",)
        if not name.startswith("study/"):
            assert not [file for file in imported(name) if file.startswith(not_for)], name


def test_the_root_holds_what_a_reader_reads():
    assert {path.name for path in ROOT.glob("*.py")} == {*METHOD, "train.py", "sample.py"}
