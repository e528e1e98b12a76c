"""compute_type="auto": what it stands for is settled once, and never changes bits after that."""

from __future__ import annotations

import os
import subprocess
import sys

import mixedkv as mkv
import numpy as np
import pytest
from conftest import normal


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", f"import mixedkv as mkv, numpy as np\n{code}"],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


PREFILL = """
q = np.random.default_rng(0).standard_normal((4, 64, 32), dtype=np.float32)
of = {t: mkv.attention(q, q, q, causal=True, compute_type=t) for t in ("f32", "bf16", "auto")}
print(mkv.isa.auto_compute_type(), *[np.array_equal(of["auto"], of[t]) for t in ("f32", "bf16")])
"""


def test_auto_is_one_of_those_that_the_isa_has(isa: str, rng: np.random.Generator) -> None:
    settled = mkv.isa.auto_compute_type()
    assert settled in mkv.isa.compute_types()
    q, k, v = normal(rng, 1, 6, 70, 64), normal(rng, 1, 3, 300, 64), normal(rng, 1, 3, 300, 32)
    want, want_lse = mkv.attention(q, k, v, compute_type=settled, return_lse=True)
    for _ in range(3):
        out, lse = mkv.attention(q, k, v, compute_type="auto", return_lse=True)
        np.testing.assert_array_equal(out, want)
        np.testing.assert_array_equal(lse, want_lse)
        assert mkv.isa.auto_compute_type() == settled
    state = mkv.AttentionState(num_qo_heads=6, qo_len=70, head_dim=32)
    state.update(q, k, v, compute_type="auto")
    twin = mkv.AttentionState(num_qo_heads=6, qo_len=70, head_dim=32)
    twin.update(q, k, v, compute_type=settled)
    np.testing.assert_array_equal(state.finalize(), twin.finalize())
    # A single query is in f32 whatever is said.
    one = mkv.attention(q[:, :, :1], k, v, compute_type="auto")
    np.testing.assert_array_equal(one, mkv.attention(q[:, :, :1], k, v))


def test_auto_in_a_cache(isa: str, rng: np.random.Generator) -> None:
    cache = mkv.UnifiedKVCache(num_layers=1, num_kv_heads=2, head_dim=32, size=64)
    cache.find_slot(pos=range(40), seq_id=[0] * 40)
    cache.store(0, normal(rng, 2, 40, 32), normal(rng, 2, 40, 32))
    q = normal(rng, 4, 40, 32)
    want = cache.attend(0, q, compute_type=mkv.isa.auto_compute_type())
    np.testing.assert_array_equal(cache.attend(0, q, compute_type="auto"), want)


@pytest.mark.parametrize("pinned", ["f32", "bf16"])
def test_auto_can_be_pinned(pinned: str) -> None:
    result = run(PREFILL, MIXEDKV_COMPUTE_TYPE=pinned, MIXEDKV_ISA="scalar")
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [pinned, str(pinned == "f32"), str(pinned == "bf16")]


def test_auto_pinned_to_what_the_isa_lacks_is_f32() -> None:
    for name in mkv.isa.available():
        if "bf16" not in mkv.isa.compute_types(name):
            result = run(PREFILL, MIXEDKV_COMPUTE_TYPE="bf16", MIXEDKV_ISA=name)
            assert result.stdout.split() == ["f32", "True", "True"], result.stderr
            return
    pytest.skip("every instruction set of this machine has arithmetic in bf16")


def test_auto_refuses_a_bad_pin_and_the_rest_goes_on() -> None:
    code = """
q = np.ones((1, 64, 32), np.float32)
for call in (mkv.isa.auto_compute_type, lambda: mkv.attention(q, q, q, compute_type="auto")):
    for _ in range(2):
        try:
            call()
        except ValueError as error:
            print(error)
mkv.attention(q, q, q, compute_type="f32")
mkv.attention(q, q, q, compute_type="bf16")
mkv.attention(q[:, :1], q, q, compute_type="auto")
"""
    result = run(code, MIXEDKV_COMPUTE_TYPE="f16", MIXEDKV_ISA="scalar")
    assert result.returncode == 0, result.stderr
    assert (
        result.stdout.splitlines()
        == ["MIXEDKV_COMPUTE_TYPE must be 'f32' or 'bf16', got 'f16'"] * 4
    )


def test_auto_settles_once_for_threads_that_ask_at_once() -> None:
    code = """
import threading
q = np.random.default_rng(0).standard_normal((4, 64, 32), dtype=np.float32)
outs, start = [], threading.Barrier(8)
def ask():
    start.wait()
    outs.append(mkv.attention(q, q, q, compute_type="auto").tobytes())
threads = [threading.Thread(target=ask) for _ in range(8)]
[t.start() for t in threads]
[t.join() for t in threads]
print(len(outs), len(set(outs)))
"""
    result = run(code)
    assert result.stdout.split() == ["8", "1"], result.stderr
