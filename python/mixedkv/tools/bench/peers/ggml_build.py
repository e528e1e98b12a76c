"""Builds ggml's shared libraries for this machine, at the user's request.

The source is the sdist of llama-cpp-python, which pip fetches from wherever the user's pip fetches.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

#: What is built: a version whose C interface the bench knows.
SDIST = "llama-cpp-python==0.3.36"

_OPTIONS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DBUILD_SHARED_LIBS=ON",
    "-DGGML_NATIVE=ON",
    # As llama.cpp itself sets it: its fast matrix products.
    "-DGGML_LLAMAFILE=ON",
    "-DGGML_BUILD_TESTS=OFF",
    "-DGGML_BUILD_EXAMPLES=OFF",
)


class BuildError(Exception):
    """A step failed; the message holds the end of what it printed."""


def build_directory() -> Path | None:
    """Return where the build goes, in the user's cache; None without platformdirs."""
    try:
        import platformdirs
    except ImportError:
        return None
    return Path(platformdirs.user_cache_dir("mixedkv")) / f"ggml-{SDIST.partition('==')[2]}"


def build(directory: Path, say: Callable[[str], None]) -> Path:
    """Fetch and build ggml into a directory, and return where its libraries lie.

    Needs pip, CMake and a C++ compiler.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        say(f"fetching the source of {SDIST}")
        _run(
            [
                *(sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(work)),
                *("--no-binary", "llama-cpp-python", SDIST),
            ]
        )
        (archive,) = work.glob("llama_cpp_python-*.tar.gz")
        with tarfile.open(archive) as tar:
            if hasattr(tarfile, "data_filter"):
                tar.extractall(work, filter="data")
            else:
                tar.extractall(work)
        (source,) = work.glob("llama_cpp_python-*/vendor/llama.cpp/ggml")
        # The sdist leaves out a template that the configuration asks for.
        (source / "ggml.pc.in").touch()
        say("configuring")
        _run([_cmake(), "-S", str(source), "-B", str(directory), *_OPTIONS])
        say("compiling, which takes a minute or so")
        jobs = str(len(os.sched_getaffinity(0)))
        _run([_cmake(), "--build", str(directory), "--parallel", jobs])
    return directory / "src"


def _cmake() -> str:
    """Return CMake's path: the system's, or the one that pip installed beside this Python."""
    beside = Path(sys.executable).parent / "cmake"
    return shutil.which("cmake") or (str(beside) if beside.is_file() else "cmake")


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise BuildError(f"{command[0]} is not installed") from None
    if done.returncode:
        tail = "\n".join((done.stdout + done.stderr).splitlines()[-20:])
        raise BuildError(f"{' '.join(command)} failed:\n{tail}")
