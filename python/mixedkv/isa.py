"""Instruction sets: which ones this build carries, which this machine can run, which is in use.

The environment variable ``MIXEDKV_ISA`` forces one from the start; a name that is unknown, or that
this machine lacks, is an error at first use.
"""

from __future__ import annotations

from . import _core
from ._arrays import shown

__all__ = [
    "active",
    "auto_compute_type",
    "available",
    "compiled",
    "compute_types",
    "requires",
    "select",
]


def compiled() -> list[str]:
    """Return every variant of this build, best first; "scalar" is the last."""
    return [name for name, *_ in _core.compiled_isas()]


def available() -> list[str]:
    """Return the variants that this machine can run, best first."""
    return [name for name, can_run, *_ in _core.compiled_isas() if can_run]


def requires(name: str) -> str:
    """Return the CPU features that a variant needs, separated by spaces.

    Raises
    ------
    ValueError
        Where this build has no such variant.
    """
    return str(_row(name)[2])


def compute_types(name: str | None = None) -> list[str]:
    """Return the kinds of arithmetic that a variant (None: the one in use) has kernels for.

    "f32" always; "bf16" where ``compute_type="bf16"`` of :func:`mixedkv.attention` makes a
    difference. Having them says nothing of speed: see :func:`auto_compute_type`.

    Raises
    ------
    ValueError
        Where this build has no such variant.
    """
    has_bf16 = _row(_core.active_isa() if name is None else name)[3]
    return ["f32", "bf16"] if has_bf16 else ["f32"]


def auto_compute_type() -> str:
    """Return what ``compute_type="auto"`` stands for with the variant in use: "f32" or "bf16".

    Measured the first time that it matters, here or in a prefill, on one thread, in some
    milliseconds, and kept for the rest of the process, so that results keep their bits: "bf16"
    where it takes at least a tenth less time. The environment variable ``MIXEDKV_COMPUTE_TYPE``,
    "f32" or "bf16", decides beforehand.

    Raises
    ------
    ValueError
        Where ``MIXEDKV_COMPUTE_TYPE`` holds anything else.
    """
    return _core.auto_compute_type()


def active() -> str:
    """Return the variant in use."""
    return _core.active_isa()


def select(name: str) -> None:
    """Use the named variant from now on, in every thread.

    Results of different variants agree within rounding, not bit for bit.

    Raises
    ------
    ValueError
        Where the name is unknown or this machine lacks the variant; nothing changes then.
    """
    _check_is_text(name)
    try:
        _core.select_isa(name)
    except ValueError as error:
        raise ValueError(f"name: {error}") from None


def _row(name: str) -> tuple[str, bool, str, bool]:
    """Return what the core tells of a variant; ValueError and TypeError name it."""
    _check_is_text(name)
    for row in _core.compiled_isas():
        if row[0] == name:
            return row
    raise ValueError(f"name must be one of {', '.join(compiled())}, got {name!r}")


def _check_is_text(name: object) -> None:
    if not isinstance(name, str):
        raise TypeError(f"name must be a str, got {shown(name)}")
