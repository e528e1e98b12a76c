"""Which instruction sets there are, which one runs, and forcing one."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import mixedkv as mkv
import numpy as np
import pytest
from conftest import F32_REL, normal, relative_error


@pytest.fixture(autouse=True)
def keep_active() -> Iterator[None]:
    before = mkv.isa.active()
    yield
    mkv.isa.select(before)


def run(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("MIXEDKV_")}
    return subprocess.run(
        [sys.executable, "-c", code],
        env=clean | env,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_isa_available_ends_with_scalar() -> None:
    names = mkv.isa.available()
    assert names
    assert all(isinstance(name, str) for name in names)
    assert names[-1] == "scalar"
    assert len(set(names)) == len(names)


def test_isa_available_is_part_of_compiled_in_its_order() -> None:
    compiled, available = mkv.isa.compiled(), mkv.isa.available()
    assert [name for name in compiled if name in available] == available


def test_isa_lists_are_copies() -> None:
    mkv.isa.available().clear()
    assert mkv.isa.available()


def test_isa_default_is_the_best() -> None:
    got = run("import mixedkv as m; print(m.isa.active(), m.isa.available()[0])")
    assert got.returncode == 0, got.stderr
    active, best = got.stdout.split()
    assert active == best


def test_isa_select_is_really_active(isa: str) -> None:
    assert mkv.isa.active() == isa


@pytest.mark.parametrize("name", ["avx9000", "", "AVX2 ", "scalar\0", "Scalar"], ids=repr)
def test_isa_select_refuses_unknown(name: str) -> None:
    before = mkv.isa.active()
    with pytest.raises(ValueError, match="scalar") as error:
        mkv.isa.select(name)
    assert name.rstrip("\0 ") in str(error.value)
    assert mkv.isa.active() == before


@pytest.mark.parametrize("name", [None, 3, b"scalar"], ids=repr)
def test_isa_select_refuses_what_is_no_name(name: Any) -> None:
    with pytest.raises((TypeError, ValueError)):
        mkv.isa.select(name)


def test_isa_select_refuses_what_the_machine_lacks() -> None:
    lacking = [name for name in mkv.isa.compiled() if name not in mkv.isa.available()]
    if not lacking:
        pytest.skip("this machine has every ISA of the build")
    for name in lacking:
        with pytest.raises(ValueError, match=name):
            mkv.isa.select(name)


@pytest.mark.parametrize("name", mkv.isa.compiled())
def test_isa_environment_forces(name: str) -> None:
    got = run("import mixedkv as m; print(m.isa.active())", MIXEDKV_ISA=name)
    if name in mkv.isa.available():
        assert got.returncode == 0, got.stderr
        assert got.stdout.strip() == name
    else:
        assert got.returncode != 0
        assert name in got.stderr


def test_isa_environment_empty_is_unset() -> None:
    got = run("import mixedkv as m; print(m.isa.active())", MIXEDKV_ISA="")
    assert got.returncode == 0
    assert got.stdout.strip() == mkv.isa.available()[0]


def test_isa_environment_unknown_is_an_error() -> None:
    code = "import mixedkv as m, numpy as n; m.quantize_q4_0(n.zeros(32, n.float32))"
    got = run(code, MIXEDKV_ISA="avx9000")
    assert got.returncode == 1
    assert "ValueError" in got.stderr
    assert "avx9000" in got.stderr
    assert "scalar" in got.stderr


def test_isa_environment_is_read_once() -> None:
    code = (
        "import os, mixedkv as m; a = m.isa.active(); os.environ['MIXEDKV_ISA'] = 'scalar'; "
        "print(a == m.isa.active())"
    )
    assert run(code).stdout.strip() == "True"


def test_isa_forced_ones_compute_alike_but_apart(rng: np.random.Generator) -> None:
    """All agree to rounding; different code may round differently, and does where it is vector
    code: that the bits differ from scalar's shows that the forced one really ran."""
    q, k = normal(rng, 8, 3, 128), normal(rng, 2, 500, 128)
    v = normal(rng, 2, 500, 128)
    results = {}
    for name in mkv.isa.available():
        mkv.isa.select(name)
        results[name] = mkv.attention(q, k, v)
    for name, out in results.items():
        assert relative_error(out, results["scalar"]) <= F32_REL
        if name != "scalar":
            assert not np.array_equal(out, results["scalar"]), f"{name} gives scalar's very bits"


# --- threads --------------------------------------------------------------------------------------


def test_threads_set_and_get() -> None:
    before = mkv.get_num_threads()
    try:
        for n in (1, 3, 1024):
            mkv.set_num_threads(n)
            assert mkv.get_num_threads() == n
    finally:
        mkv.set_num_threads(before)


@pytest.mark.parametrize("n", [0, -1, 1025, 1 << 40, 2.5, "2", None], ids=repr)
def test_threads_refuses(n: Any) -> None:
    before = mkv.get_num_threads()
    with pytest.raises((ValueError, TypeError)):
        mkv.set_num_threads(n)
    assert mkv.get_num_threads() == before


def test_threads_environment() -> None:
    got = run("import mixedkv as m; print(m.get_num_threads())", MIXEDKV_NUM_THREADS="3")
    assert got.stdout.strip() == "3", got.stderr


@pytest.mark.parametrize("value", ["0", "-2", "many", "1.5", "99999999999999999999"])
def test_threads_environment_refused(value: str) -> None:
    code = """
import mixedkv as m
try:
    m.get_num_threads()
except ValueError as error:
    print(error)
"""
    got = run(code, MIXEDKV_NUM_THREADS=value)
    assert got.returncode == 0, got.stderr
    assert "MIXEDKV_NUM_THREADS" in got.stdout
    assert f"got '{value}'" in got.stdout


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no CPU affinity here")
def test_threads_default_is_what_the_process_may_use() -> None:
    code = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); "
        "import mixedkv as m; print(m.get_num_threads())"
    )
    assert run(code).stdout.strip() == "1"
