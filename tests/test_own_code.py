"""A user's own code in a config: what of it is told apart, and what of a file is not."""

import functools
import importlib.util
import linecache
import sys
from pathlib import Path

import pytest

from rlstab_jax.own_code import code_of
from rlstab_jax.rundir import open_run, plain, read_manifest
from rlstab_jax.types import UserError

MINE = """
import functools
import jax
import numpy

class Held:
    def __init__(self, held):
        self.held = held
    def method(self):
        pass

def times(k):
    def around(f):
        @functools.wraps(f)
        def inner(*x):
            return k * f(*x)
        return inner
    return around

def scaled(x, by=2):
    return x
"""


def test_an_edited_function_of_the_config_is_refused(tmp_path):
    """By name it is the same; what is called by a partial one counts as well, this package's own functions do not."""
    said = []

    def opened(text, accept_code=False, **numbers):
        file = tmp_path / "mine.py"
        file.write_text(text)
        linecache.checkcache(str(file))
        scope = {"__name__": "mine"}
        exec(compile(text, str(file), "exec"), scope)
        config = {"recipe": functools.partial(scope["mine"], **numbers), "names": (plain,)}
        described = {"config": config, "code": code_of(config)}
        run = open_run(tmp_path / "run", described, say=said.append, accept_code=accept_code)
        run.metrics_path.touch()  # it has begun

    opened("def mine(delta):\n    return 2 * delta\n", delta=1)
    assert read_manifest(tmp_path / "run")["code"].keys() == {"the code of mine.mine"}
    opened("# moved\n\ndef mine(delta):\n    return 2 * delta\n", delta=1)
    with pytest.raises(UserError, match=r"the code of mine\.mine is '\w+' there and '\w+' here.*--accept-code"):
        opened("def mine(delta):\n    return 3 * delta\n", delta=1)
    with pytest.raises(UserError, match=r"recipe\.delta is 1 there and 2 here"):
        opened("def mine(delta):\n    return 2 * delta\n", delta=2)
    before = read_manifest(tmp_path / "run")["code"]
    assert not said
    opened("def mine(delta):\n    return 3 * delta\n", accept_code=True, delta=1)
    assert "goes on with code of your own that has changed" in said[0]
    manifest = read_manifest(tmp_path / "run")
    assert manifest["earlier_code"] == [before] != [manifest["code"]]
    opened("def mine(delta):\n    return 3 * delta\n", delta=1)


def test_what_has_no_source_is_known_by_what_it_does():
    def typed(text):
        scope = {"__name__": "mine"}
        exec(text, scope)
        return code_of({"recipe": scope["mine"]})

    assert typed("def mine(): return 0.2") == typed("def mine(): return 0.2")
    assert typed("def mine(): return 0.2") != typed("def mine(): return 0.9")
    assert typed("def mine(): return [x * 2 for x in y]") != typed("def mine(): return [x * 3 for x in y]")


def imported(file):
    """The module ``mine_of_a_test``, from a file that was just written."""
    linecache.checkcache(str(file))
    # Of the same size and second as the file before, its bytecode would pass for this one's.
    Path(importlib.util.cache_from_source(str(file))).unlink(missing_ok=True)
    spec = importlib.util.spec_from_file_location("mine_of_a_test", file)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_a_function_of_the_config_mentions_counts_too(tmp_path):
    """A piece that a recipe uses, a verifier's own method; not what stands beside them in the file."""

    def code(gate, method, beside, price=1):
        file = tmp_path / "mine.py"
        file.write_text(
            f"import dataclasses\nimport math\n\ndef gate(x):\n    return math.exp({gate})\n\n"
            f"PRICE = {price}\n\ndef recipe():\n    return [PRICE * gate(x) for x in range(3)]\n\n"
            "@dataclasses.dataclass(frozen=True)\nclass Verifier:\n    share: float = 1.0\n"
            f"    def __call__(self, text):\n        return {method}\n\nBESIDE = {beside}\n"
        )
        module = imported(file)
        return code_of({"recipe": module.recipe, "verifier": module.Verifier()})

    try:
        first = code("x", "text == 'a'", 1)
        names = ["the code of mine_of_a_test.Verifier", "the code of mine_of_a_test.recipe"]
        assert sorted(first) == names
        assert code("x", "text == 'a'", 2) == first
        assert [name for name in names if code("x", "text == 'a'", 1, 2)[name] != first[name]] == names[1:]
        assert [name for name in names if code("-x", "text == 'a'", 1)[name] != first[name]] == names[1:]
        assert [name for name in names if code("x", "text != 'a'", 1)[name] != first[name]] == names[:1]
    finally:
        del sys.modules["mine_of_a_test"]


@pytest.mark.parametrize(
    ("data", "edited"),
    [
        ("{'w': 2.0}", "{'w': 3.0}"),
        ("[1, (2, {3})]", "[1, (2, {4})]"),
        ("numpy.arange(3.0)", "numpy.arange(3.0) + 1"),
        ("Held({'k': 1})", "Held({'k': 2})"),
        ("functools.partial(scaled, by=[2])", "functools.partial(scaled, by=[3])"),
        ("jax.numpy.arange(3.0)", "jax.numpy.arange(3.0) + 1"),
        ("{'f': lambda x: 2 * x}", "{'f': lambda x: 3 * x}"),
        ("jax.jit(lambda x: 2 * x)", "jax.jit(lambda x: 3 * x)"),
        ("times(2)(scaled)", "times(3)(scaled)"),
        ("(times(2), lambda x: x, lambda x: 2 * x)", "(times(2), lambda x: x, lambda x: 3 * x)"),
        ("property(lambda self: 2).fget", "property(lambda self: 3).fget"),
        ("type('Own', (), {'price': 2})", "type('Own', (), {'price': 3})"),
        (
            "type('Own', (), {'price': property(lambda self: 2)})",
            "type('Own', (), {'price': property(lambda self: 3)})",
        ),
        ("Held(2).method", "Held(3).method"),
    ],
)
def test_data_that_a_function_mentions_counts_too(tmp_path, data, edited):
    def code(data):
        file = tmp_path / "mine.py"
        file.write_text(f"{MINE}\nDATA = {data}\n\ndef verifier(text):\n    return DATA\n")
        return code_of({"verifier": imported(file).verifier})

    try:
        assert code(data) == code(data) != code(edited)
    finally:
        del sys.modules["mine_of_a_test"]


def test_defaults_and_functions_of_one_name_count_too(tmp_path):
    """Two closures of one function have one name, and each its own checksum."""

    def code(delta, first):
        file = tmp_path / "mine.py"
        file.write_text(
            f"DELTA = {delta}\n\ndef recipe(x, *, delta=DELTA):\n    return x\n\n"
            "def make(k):\n    def verifier(text):\n        return k\n    return verifier\n\n"
            f"VERIFIERS = [make({first}), make(2)]\n"
        )
        module = imported(file)
        return code_of([module.recipe, *module.VERIFIERS])

    try:
        name = "the code of mine_of_a_test.make.<locals>.verifier"
        first = code(1, 1)
        assert list(first) == ["the code of mine_of_a_test.recipe", name, f"{name} (2)"]
        assert [key for key in first if code(2, 1)[key] != first[key]] == ["the code of mine_of_a_test.recipe"]
        assert [key for key in first if code(1, 3)[key] != first[key]] == [name]
        assert list(code(1, 2)) == list(first)[:2]  # equal ones are one
    finally:
        del sys.modules["mine_of_a_test"]


def test_what_lies_in_a_module_that_a_function_mentions_counts_too(tmp_path, monkeypatch):
    """``helpers.grade`` is read through its module."""
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.syspath_prepend(tmp_path)

    def code(sign):
        (tmp_path / "helpers_of_a_test.py").write_text(f"def grade(text):\n    return {sign}len(text)\n")
        (tmp_path / "mine_of_a_test.py").write_text(
            "import helpers_of_a_test as helpers\n\ndef verifier(text):\n    return helpers.grade(text)\n"
        )
        for name in ("helpers_of_a_test", "mine_of_a_test"):
            sys.modules.pop(name, None)
        linecache.checkcache()
        importlib.invalidate_caches()
        return code_of({"verifier": importlib.import_module("mine_of_a_test").verifier})

    try:
        assert code("+") == code("+") != code("-")
    finally:
        for name in ("helpers_of_a_test", "mine_of_a_test"):
            sys.modules.pop(name, None)
