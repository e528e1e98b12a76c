"""torch's scaled_dot_product_attention: as it is written by most, and as it is fastest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..problem import Problem, aligned_empty
from ..shapes import DEFAULT_FORMATS
from . import Arithmetic, Contender, Peer, Task, imported, rival

_TOLERANCE = {"f32": 1e-4, "bf16": 3e-2}


class Torch(Peer):
    """torch as a peer."""

    name = "torch"

    def __init__(self, torch: Any) -> None:
        super().__init__()
        self._torch = torch
        self.version: str = torch.__version__

    def attention(
        self, task: Task, problem: Problem, formats: Sequence[str] = DEFAULT_FORMATS
    ) -> list[Contender]:
        """Return SDPA in f32 and bf16, with enable_gqa and with the group folded in."""
        contenders = []
        kinds: tuple[Arithmetic, ...] = ("f32", "bf16")
        for kv_type in kinds:
            against = rival(kv_type, formats)
            if against is None:
                continue
            k, v = self._tensor(problem.k, kv_type), self._tensor(problem.v, kv_type)
            contenders.append(self._sdpa(problem, kv_type, k, v, against, fold=False))
            if problem.shape.group > 1:
                contenders.append(self._sdpa(problem, kv_type, k, v, against, fold=True))
        return contenders

    def _tensor(self, array: NDArray[Any], kv_type: str) -> Any:
        """Return [1, heads, n, d] of the type, on memory that begins on a cache line."""
        torch = self._torch
        if kv_type == "f32":
            tensor = torch.from_numpy(aligned_empty(array.shape, np.float32))
        else:
            tensor = torch.from_numpy(aligned_empty(array.shape, np.int16)).view(torch.bfloat16)
        tensor.copy_(torch.from_numpy(np.ascontiguousarray(array)))
        return tensor[None]

    def _sdpa(
        self, problem: Problem, kv_type: Arithmetic, k: Any, v: Any, against: str, *, fold: bool
    ) -> Contender:
        torch = self._torch
        _, hkv, d = problem.shape.sizes
        q = self._tensor(problem.q, kv_type)
        if fold:
            q = q.reshape(1, hkv, problem.shape.group * problem.qo_len, d)
        options: dict[str, Any] = {}
        if not fold and problem.shape.group > 1:
            options["enable_gqa"] = True
        if problem.qo_len > 1:
            if problem.qo_len == problem.kv_len and not fold:
                options["is_causal"] = True
            else:
                options["attn_mask"] = self._mask(problem, q)
        sdpa = torch.nn.functional.scaled_dot_product_attention
        last: list[Any] = [None]

        def bind(threads: int) -> Callable[[], object]:
            def call() -> None:
                if torch.get_num_threads() != threads:
                    torch.set_num_threads(threads)
                with torch.inference_mode():
                    last[0] = sdpa(q, k, v, **options)

            return call

        def answer() -> NDArray[np.float64]:
            if kv_type == "f32":
                return problem.answer_in("f16")
            return problem.answer(
                "bf16",
                lambda head: (k[0, head].float().numpy(), v[0, head].float().numpy()),
                q.float().numpy().reshape(problem.q.shape),
            )

        way = "group folded in" if fold else "enable_gqa" if "enable_gqa" in options else "SDPA"
        return Contender(
            peer=self.name,
            name=f"torch {kv_type} SDPA, {way}" if way != "SDPA" else f"torch {kv_type} SDPA",
            kv_type=kv_type,
            against=against,
            kv_bytes=problem.kv_len * problem.row_bytes(kv_type),
            answer=answer,
            tolerance=_TOLERANCE[kv_type],
            bind=bind,
            result=lambda: last[0].float().numpy().reshape(problem.q.shape),
            arithmetic=kv_type,
        )

    def _mask(self, problem: Problem, q: Any) -> Any:
        """Return the causal mask in q's dtype, which is what the fast path takes as it is."""
        torch = self._torch
        last = problem.kv_len - problem.qo_len + torch.arange(problem.qo_len)
        hidden = torch.arange(problem.kv_len) > last[:, None]
        mask = torch.zeros(hidden.shape, dtype=q.dtype).masked_fill_(hidden, -torch.inf)
        return mask.repeat(q.shape[2] // problem.qo_len, 1)[None, None]


def load() -> Torch:
    """Return torch, or raise AbsentError."""
    return Torch(*imported("torch"))
