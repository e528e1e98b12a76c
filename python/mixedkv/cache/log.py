"""The caches' logger."""

from __future__ import annotations

import logging
import os

logger = logging.getLogger("mixedkv.cache")

if os.environ.get("MIXEDKV_DEBUG", "0") not in ("", "0"):
    # On request, without any logging set-up of the program's own.
    _handler = logging.StreamHandler()
    _handler.setFormatter(logging.Formatter("%(message)s"))
    logger.addHandler(_handler)
    logger.setLevel(logging.DEBUG)
