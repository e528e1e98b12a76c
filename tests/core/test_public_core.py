"""The public core: programs outside the tree, built against an installed package, have its bits.

What is installed is the wheel's content: where the package that is tested was built in place, there
is nothing to build against. ``MIXEDKV_REQUIRE=core`` makes that a failure.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import mixedkv as mkv
import numpy as np
import pytest
from conftest import lacking, normal
from mixedkv import config

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
WARNINGS = ["-Wall", "-Wextra", "-Wpedantic", "-Werror"]


def call(*command: str | Path, **environment: str) -> str:
    """Run a command and give what it printed; where it fails, all of it is the test's message."""
    done = subprocess.run(
        [str(word) for word in command],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{command}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def tool(*names: str | None) -> str:
    """Give the path of the first of these programs that there is."""
    paths = [path for name in names if name and (path := shutil.which(name))]
    return paths[0] if paths else lacking("core", f"there is no {names[-1]}")


@pytest.fixture(scope="module")
def installed() -> Path:
    """The package's directory, where it has headers and libraries."""
    try:
        return Path(config.get_include()).parent
    except FileNotFoundError as error:
        lacking("core", str(error))


@pytest.fixture(scope="module")
def by_cmake(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every example as its CMakeLists.txt builds it: find_package, and no word of where but one."""
    cmake = tool("cmake")
    tool(os.environ.get("CC"), "cc")
    tool(os.environ.get("CXX"), "c++")
    programs = {}
    for language in ("c", "cpp"):
        build = tmp_path_factory.mktemp(language)
        where = f"-Dmixedkv_DIR={config.get_cmake_dir()}"
        call(cmake, "-S", EXAMPLES / language, "-B", build, where)
        call(cmake, "--build", build)
        for path in build.iterdir():
            if path.is_file() and os.access(path, os.X_OK):
                programs[path.name] = path
    return programs


@pytest.fixture(scope="module")
def by_flags(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same with no more than a compiler and ``python -m mixedkv.config``."""
    # Not this process's word: the command's, as a build asks for it.
    flags = call(sys.executable, "-m", "mixedkv.config", "--includes", "--libs").split()
    build = tmp_path_factory.mktemp("flags")
    c = [tool(os.environ.get("CC"), "cc"), "-std=c99", EXAMPLES / "c" / "carried_state.c"]
    cpp = [tool(os.environ.get("CXX"), "c++"), "-std=c++17", EXAMPLES / "cpp" / "decode_loop.cpp"]
    call(*c, *WARNINGS, *flags, "-o", build / "carried_state")
    call(*cpp, *WARNINGS, *flags, "-o", build / "decode_loop")
    return {name: build / name for name in ("carried_state", "decode_loop")}


def run(program: Path, numbers: list[np.ndarray], tmp_path: Path, isa: str) -> bytes:
    """What a program makes of these numbers, written one after the other."""
    given, got = tmp_path / "input", tmp_path / "output"
    given.write_bytes(b"".join(array.tobytes() for array in numbers))
    printed = call(program, given, got, MIXEDKV_ISA=isa)
    assert f"mixedkv {mkv.__version__} on {isa}:" in printed
    return got.read_bytes()


def carried_state(program: Path, rng: np.random.Generator, tmp_path: Path, isa: str) -> None:
    """Old keys in Q4_0 and new ones in f16, one state over both, causal."""
    heads, kv_heads, qo_len, head_dim, old, new = 6, 2, 5, 96, 700, 77
    q = normal(rng, heads, qo_len, head_dim)
    k, v = (normal(rng, kv_heads, old + new, head_dim) for _ in range(2))
    sizes = np.array([heads, kv_heads, qo_len, head_dim, old, new], np.int32)
    got = run(program, [sizes, q, k, v], tmp_path, isa)

    state = mkv.AttentionState(num_qo_heads=heads, qo_len=qo_len, head_dim=head_dim)
    where = {"causal": True, "q_start": old + new - qo_len}
    packed = [mkv.quantize_q4_0(x[:, :old]) for x in (k, v)]
    state.update(q, *packed, kv_start=0, **where)
    state.update(q, *(x[:, old:].astype(np.float16) for x in (k, v)), kv_start=old, **where)
    out, lse = state.finalize(return_lse=True)
    assert got == out.tobytes() + lse.tobytes()


def decode_loop(program: Path, rng: np.random.Generator, tmp_path: Path, isa: str) -> None:
    """A cache of two tiers, a token at a time, past several moves."""
    layers, heads, kv_heads, head_dim, tokens, hot, cold, group = 2, 4, 2, 64, 300, 64, 512, 32
    sizes = [layers, heads, kv_heads, head_dim, tokens, hot, cold, group]
    rows = normal(rng, tokens, layers, heads + 2 * kv_heads, head_dim)
    got = run(program, [np.array(sizes, np.int32), rows], tmp_path, isa)

    cache = mkv.MixedKVCache(
        num_layers=layers,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        hot_size=hot,
        cold_size=cold,
        group_size=group,
    )
    want = []
    for position in range(tokens):
        assert cache.find_slot(pos=[position], seq_id=[0]) is not None
        for layer in range(layers):
            q, k, v = np.split(rows[position, layer][:, None], [heads, heads + kv_heads])
            cache.store(layer, k, v)
            want.append(cache.attend(layer, q).tobytes())
        cache.commit()
    assert cache.stats().moved > 0
    assert got == b"".join(want)


def test_c_has_pythons_bits(
    by_cmake: dict[str, Path], rng: np.random.Generator, tmp_path: Path, isa: str
) -> None:
    carried_state(by_cmake["carried_state"], rng, tmp_path, isa)


@pytest.mark.parametrize("library", ["mixedkv", "static"])
def test_cpp_has_pythons_bits(
    by_cmake: dict[str, Path], rng: np.random.Generator, tmp_path: Path, isa: str, library: str
) -> None:
    decode_loop(by_cmake[f"decode_loop_{library}"], rng, tmp_path, isa)


def test_flags_suffice(by_flags: dict[str, Path], rng: np.random.Generator, tmp_path: Path) -> None:
    carried_state(by_flags["carried_state"], rng, tmp_path, mkv.isa.active())
    decode_loop(by_flags["decode_loop"], rng, tmp_path, mkv.isa.active())


def test_pkg_config_knows_the_package(installed: Path) -> None:
    def ask(*words: str) -> list[str]:
        where = config.get_pkgconfig_dir()
        return call(tool("pkg-config"), *words, "mixedkv", PKG_CONFIG_PATH=where).split()

    assert ask("--modversion") == [mkv.__version__]
    include, lib, name = ask("--cflags", "--libs")
    assert os.path.samefile(include.removeprefix("-I"), config.get_include())
    assert os.path.samefile(lib.removeprefix("-L"), config.get_lib_dir())
    assert name == "-lmixedkv"


def test_examples_run_without_arguments_and_refuse_bad_input(
    by_flags: dict[str, Path], tmp_path: Path
) -> None:
    for name, program in by_flags.items():
        assert "mixedkv" in call(program)
        (tmp_path / "short").write_bytes(b"")
        done = subprocess.run(
            [program, tmp_path / "short", tmp_path / "out"], capture_output=True, text=True
        )
        assert done.returncode == 1
        assert done.stderr.startswith(f"{name}: the input")


# --- what is exported -----------------------------------------------------------------------------


def exported(path: Path) -> set[str]:
    nm = shutil.which("nm")
    if nm is None or sys.platform != "linux":
        pytest.skip("needs nm and ELF")
    lines = call(nm, "-D", "-C", "--defined-only", path).splitlines()
    return {line.split(maxsplit=2)[2] for line in lines}


def test_library_exports_the_public_alone(installed: Path) -> None:
    (library,) = Path(config.get_lib_dir()).glob("libmixedkv.so.*")
    names = exported(library)
    c = {name for name in names if name.startswith("mixedkv_")}
    header = (installed / "include" / "mixedkv" / "c.h").read_text()
    assert c == set(re.findall(r"^MIXEDKV_API [\w ]+?\*?(mixedkv_\w+)\(", header, re.MULTILINE))
    # The C++ names: declared with MIXEDKV_API, or members of a class that is.
    public = "".join(path.read_text() for path in (installed / "include").glob("*/*.h"))
    words = set(re.findall(r"^(?:class|struct) MIXEDKV_API (\w+)", public, re.MULTILINE))
    words |= set(re.findall(r"^MIXEDKV_API [\w:<>\s]+?[ *&](\w+)\(", public, re.MULTILINE))
    for name in names - c:
        plain = re.sub(r"^(vtable|typeinfo|typeinfo name) for ", "", name)
        match = re.match(r"mixedkv::(\w+)", plain)
        assert match, f"{name} is nobody's business"
        assert match[1] in words, f"{name} is not declared MIXEDKV_API"
        assert "::Impl" not in plain


def test_extension_exports_its_entry_alone() -> None:
    assert exported(Path(mkv._core.__file__)) == {"PyInit__core"}


# --- python -m mixedkv.config ---------------------------------------------------------------------


def test_config_tells_where(installed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert config.main(["--version", "--libs", "--includes", "--cmakedir", "--pkgconfigdir"]) == 0
    includes, libs, cmake, pkgconfig, version = capsys.readouterr().out.splitlines()
    assert includes == f"-I{installed / 'include'}"
    lib = installed / "lib"
    assert libs == f"-L{lib} -lmixedkv -Wl,-rpath,{lib}"
    assert Path(cmake) == lib / "cmake" / "mixedkv"
    assert Path(pkgconfig) == lib / "pkgconfig"
    assert version == mkv.__version__


def test_config_without_an_installed_package(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(config, "_PACKAGE", tmp_path)
    for get in ("get_include", "get_lib_dir", "get_cmake_dir", "get_pkgconfig_dir"):
        with pytest.raises(FileNotFoundError, match="it is not an installed package"):
            getattr(config, get)()
    assert config.main(["--includes"]) == 1
    assert "has no mixedkv/c.h" in capsys.readouterr().err
    assert config.main(["--version"]) == 0
    assert capsys.readouterr().out == f"{mkv.__version__}\n"
    with pytest.raises(SystemExit):
        config.main([])
