"""What the object files of the instruction set variants export.

A file compiled for AVX-512 must bring nothing into the link but its table. If it also held, say, an
inline function of the standard library, that copy (with AVX-512 in it) is a weak symbol, and the
linker may pick it for every caller on every machine.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

BUILD_DIR_VARIABLE = "MIXEDKV_BUILD_DIR"


def object_files() -> list[Path]:
    """The objects of CMake's `mixedkv_<isa>` libraries, one source file each."""
    build_dir = os.environ.get(BUILD_DIR_VARIABLE)
    if not build_dir:
        return []
    return sorted(
        path
        for suffix in ("o", "obj")
        for path in Path(build_dir).glob(f"**/mixedkv_*.dir/csrc/kernels/isa/*.{suffix}")
        if "mixedkv_core.dir" not in path.parts
    )


def global_symbols(nm: str, path: Path) -> list[tuple[str, str]]:
    """(type, name) of each defined symbol that the linker sees outside of the file."""
    listing = subprocess.run(
        [nm, "-C", "--defined-only", str(path)], check=True, capture_output=True, text=True
    ).stdout
    symbols = []
    for line in listing.splitlines():
        _, kind, name = line.split(maxsplit=2)
        # Upper case is global; weak and unique symbols are global in either case.
        if kind.isupper() or kind in "vwu":
            symbols.append((kind, name))
    return symbols


@pytest.fixture(scope="module")
def nm() -> str:
    program = shutil.which("nm")
    if program is None:
        pytest.skip("nm (binutils) is not installed")
    return program


@pytest.fixture(scope="module")
def objects() -> list[Path]:
    if not os.environ.get(BUILD_DIR_VARIABLE):
        pytest.skip(f"{BUILD_DIR_VARIABLE} (a CMake build directory) is not set")
    return object_files()


def test_isa_objects_exist(objects: list[Path]) -> None:
    names = {path.name.split(".")[0] for path in objects}
    assert "scalar" in names, f"no ISA objects below {os.environ[BUILD_DIR_VARIABLE]}"


@pytest.mark.parametrize(
    "path", object_files(), ids=lambda path: path.name.split(".")[0] if path else ""
)
def test_isa_object_exports_its_table_alone(nm: str, path: Path) -> None:
    isa = path.name.split(".")[0]
    symbols = global_symbols(nm, path)
    assert [name for _, name in symbols] == [f"mixedkv::kernels_{isa}"]
    kind = symbols[0][0]
    assert kind in "RDB", f"the table of {isa} is of symbol type {kind}, not plain data"
