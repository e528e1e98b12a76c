"""What tests of wrong use share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

B, HQ, HKV, LQ, LKV, D, DV = 2, 6, 3, 4, 11, 32, 64
WRONG = (ValueError, TypeError)


def f32(*shape: int) -> np.ndarray:
    return np.ones(shape, np.float32)


def refused(call: Callable[[], Any]) -> str:
    """The message of the ValueError that a call raises; empty where it is taken."""
    try:
        call()
    except ValueError as error:
        return str(error)
    return ""
