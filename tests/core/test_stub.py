"""``_core.pyi`` beside the extension's own signatures.

mypy's stubtest (in ``.ci/run``) compares names and kinds of things; it can't see the parameters of
pybind11's functions, but their docstrings begin with them.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import mixedkv as mkv
import pytest

CORE = mkv._core
STUB = Path(mkv.__file__).parent / "_core.pyi"
OWN_NAMES = {"__exit__"}
"""Called by Python alone, by position: their parameters go without names."""


def functions() -> Iterator[tuple[str, list[tuple[str, bool]]]]:
    """Each function of the stub: its dotted name, its parameters, whether each has a default."""
    for node in ast.parse(STUB.read_text()).body:
        for item in node.body if isinstance(node, ast.ClassDef) else [node]:
            if not isinstance(item, ast.FunctionDef):
                continue
            of = f"{node.name}." if isinstance(node, ast.ClassDef) else ""
            arguments = item.args
            plain = arguments.posonlyargs + arguments.args
            defaults = [False] * (len(plain) - len(arguments.defaults))
            defaults += [True] * len(arguments.defaults)
            defaults += [value is not None for value in arguments.kw_defaults]
            names = [argument.arg for argument in plain + arguments.kwonlyargs]
            if arguments.kwarg:
                names.append("**")
                defaults.append(False)
            yield of + item.name, list(zip(names, defaults, strict=True))


def signature(doc: str) -> list[tuple[str, bool]]:
    """Parameters from the line that pybind11 writes: ``name(a: int, b: str = '') -> None``."""
    line = doc.splitlines()[0]
    inner = line[line.index("(") + 1 : line.rindex(") ->")]
    depth, parts = 0, [""]
    for character in inner:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    words = [part.strip() for part in parts if part.strip() not in ("", "*", "/")]
    return [(re.findall(r"^(\*\*|\w+)", word)[0], "=" in word) for word in words]


@pytest.mark.parametrize(("name", "parameters"), list(functions()), ids=lambda value: str(value))
def test_stub_has_the_extensions_parameters(name: str, parameters: list[tuple[str, bool]]) -> None:
    thing = CORE
    for part in name.split("."):
        thing = getattr(thing, part)
    doc = inspect.getdoc(thing)
    assert doc is not None, f"{name} has no docstring"
    got = signature(doc)
    if name.split(".")[-1] in OWN_NAMES:
        assert len(got) == len(parameters)
    else:
        assert got == parameters


def test_stub_leaves_nothing_out() -> None:
    names = {name for name, _ in functions()}
    for name, thing in vars(CORE).items():
        if inspect.isbuiltin(thing):
            assert name in names
        elif inspect.isclass(thing) and not issubclass(thing, Exception):
            own = {f"{name}.{method}" for method in vars(thing) if not method.startswith("_")}
            functions_of = {part for part in names if part.startswith(f"{name}.")}
            assert own <= functions_of | properties_of(name)


def properties_of(name: str) -> set[str]:
    """Attributes that the stub gives a class otherwise than as functions."""
    (node,) = [
        node
        for node in ast.parse(STUB.read_text()).body
        if isinstance(node, ast.ClassDef) and node.name == name
    ]
    return {
        f"{name}.{item.target.id}"
        for item in node.body
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
    }
