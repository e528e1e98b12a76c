"""Where this package keeps what C and C++ programs build with; ``python -m mixedkv.config``.

An installed package carries the headers, both libraries, and what CMake and pkg-config read. A
source tree that was built in place has none of it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from ._core import __version__

__all__ = ["get_cmake_dir", "get_include", "get_lib_dir", "get_pkgconfig_dir", "main"]

_PACKAGE = Path(__file__).resolve().parent


def _directory(*parts: str, holds: str) -> str:
    path = _PACKAGE.joinpath(*parts)
    if not path.joinpath(holds).exists():
        raise FileNotFoundError(
            f"this mixedkv, in {_PACKAGE}, has no {holds}: it is not an installed package"
        )
    return str(path)


def get_include() -> str:
    """Give the directory of the headers, for ``-I``: ``mixedkv/c.h`` and the C++ ones lie in it.

    Raises
    ------
    FileNotFoundError
        This is no installed package; likewise below.
    """
    return _directory("include", holds="mixedkv/c.h")


def get_lib_dir() -> str:
    """Give the directory of the shared and the static library, for ``-L``."""
    _directory("lib", "cmake", "mixedkv", holds="mixedkvConfig.cmake")
    return str(_PACKAGE / "lib")


def get_cmake_dir() -> str:
    """Give the directory of the CMake package: ``-Dmixedkv_DIR=...``."""
    return _directory("lib", "cmake", "mixedkv", holds="mixedkvConfig.cmake")


def get_pkgconfig_dir() -> str:
    """Give the directory of ``mixedkv.pc``, for ``PKG_CONFIG_PATH``."""
    return _directory("lib", "pkgconfig", holds="mixedkv.pc")


def _includes() -> str:
    return f"-I{get_include()}"


def _libs() -> str:
    lib = get_lib_dir()
    return f"-L{lib} -lmixedkv -Wl,-rpath,{lib}"


_OPTIONS: dict[str, tuple[Callable[[], str], str]] = {
    "includes": (_includes, "compiler flags: where the headers are"),
    "libs": (_libs, "linker flags: the shared library, and where a program finds it"),
    "cmakedir": (get_cmake_dir, "directory of the CMake package, for -Dmixedkv_DIR="),
    "pkgconfigdir": (get_pkgconfig_dir, "directory of mixedkv.pc, for PKG_CONFIG_PATH"),
    "version": (lambda: __version__, "the version"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Print what is asked for, a line each, in the order of the help; give the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m mixedkv.config", description="What C and C++ programs build with."
    )
    for name, (_, text) in _OPTIONS.items():
        parser.add_argument(f"--{name}", action="store_true", help=text)
    asked = vars(parser.parse_args(arguments))
    if not any(asked.values()):
        parser.error("nothing is asked for; see --help")
    try:
        lines = [give() for name, (give, _) in _OPTIONS.items() if asked[name]]
    except FileNotFoundError as error:
        print(f"mixedkv: {error}", file=sys.stderr)
        return 1
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
