"""Examples in docstrings are what the code prints, a room of the code imports no room above it, and names exist."""

import ast
import builtins
import dis
import doctest
import importlib
from pathlib import Path
from types import CodeType

import pytest

import rlstab_jax

ROOT = Path(rlstab_jax.__file__).parent
FILES = sorted(path for path in ROOT.rglob("*.py") if path.name != "math_worker.py")  # that one is a script
# From the arrays at the bottom to the command line; a room may import those before it.
LAYERS = (
    ("types",),
    ("checks", "metrics", "progress", "config_file", "own_code"),
    ("parallel",),
    ("rundir",),
    ("stability", "objectives"),
    ("models",),
    ("inference", "tasks"),
    ("learner",),
    ("training", "report"),
    ("cli",),
)


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__")


@pytest.mark.parametrize("path", [path for path in FILES if ">>> " in path.read_text()], ids=module_of)
def test_examples(path: Path) -> None:
    found = doctest.testmod(importlib.import_module(module_of(path)))
    assert found.attempted > 0
    assert found.failed == 0


def globals_of(code: CodeType) -> set[str]:
    """The global names that code reads, and what is defined in it."""
    inner = [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    own = {i.argval for i in dis.get_instructions(code) if i.opname == "LOAD_GLOBAL"}
    return own.union(*map(globals_of, inner))


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_names_exist(path: Path) -> None:
    """Linters cannot say it: shapes in annotations are strings, which they take for names."""
    module = importlib.import_module(module_of(path))
    missing = globals_of(compile(path.read_text(), str(path), "exec")) - set(vars(module)) - set(dir(builtins))
    assert missing == set()


def rooms_of(path: Path) -> set[str]:
    """The rooms that a file imports when it is imported itself."""
    tree, names = ast.parse(path.read_text()), []
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module:
            within = [f"rlstab_jax.{alias.name}" for alias in node.names]
            names += within if node.module == "rlstab_jax" else [node.module]
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    return {name.split(".")[1] for name in names if name.startswith("rlstab_jax.")}


def test_imports_go_down() -> None:
    place = {room: number for number, layer in enumerate(LAYERS) for room in layer}
    upward = []
    for path in FILES:
        room = path.relative_to(ROOT).with_suffix("").parts[0]
        if room != "__init__":
            assert room in place, f"{room} has no place in LAYERS"
            upward += [(module_of(path), other) for other in rooms_of(path) if place[other] > place[room]]
    assert upward == []
