"""The name under which transformers finds mixedkv."""

from __future__ import annotations

from transformers import AttentionInterface, AttentionMaskInterface

from .attention import attention_forward
from .masks import describe_mask

NAME = "mixedkv"
"""What to give as ``attn_implementation``."""


def register() -> None:
    """Make ``attn_implementation="mixedkv"`` known to transformers. Calling it again is harmless.

    Both the attention function and the mask function are registered: without the second,
    transformers would hand over no mask at all and padding would be ignored.
    """
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, describe_mask)
