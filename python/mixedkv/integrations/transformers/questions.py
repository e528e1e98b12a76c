"""What stand-ins for tensors answer as any tensor would."""

from __future__ import annotations

from typing import Any

import torch

QUESTIONS: frozenset[Any] = frozenset(
    {
        torch.Tensor.size,
        torch.Tensor.dim,
        torch.Tensor.stride,
        torch.Tensor.numel,
        torch.Tensor.__len__,
        torch.Tensor.is_floating_point,
        torch.Tensor.is_contiguous,
        *(
            getattr(torch.Tensor, name).__get__
            for name in (
                "shape",
                "dtype",
                "device",
                "layout",
                "ndim",
                "requires_grad",
                "is_cpu",
                "is_cuda",
                "is_meta",
                "is_sparse",
                "is_quantized",
                "grad_fn",
                "is_leaf",
            )
        ),
    }
)
"""Functions that ask for shape and kind and read no element."""
