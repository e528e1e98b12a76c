"""Attention over keys and values in pages: sequences that grow, share a prefix, and come and go."""

import mixedkv as mkv
import numpy as np

rng = np.random.default_rng(42)
num_qo_heads, num_kv_heads, head_dim, page_size = 8, 2, 64, 16

# One pool of pages for all sequences, as FlashInfer and vLLM have it.
k_pages = np.zeros((64, num_kv_heads, page_size, head_dim), np.float16)
v_pages = np.zeros_like(k_pages)
free = list(rng.permutation(len(k_pages)))


class Sequence:
    """The pages of a sequence, in the order of its tokens."""

    def __init__(self) -> None:
        self.pages: list[int] = []
        self.length = 0

    def append(self, k: np.ndarray, v: np.ndarray) -> None:
        """Store tokens [Hkv, n, D]."""
        for i in range(k.shape[1]):
            if self.length % page_size == 0:
                self.pages.append(free.pop())
            place = (self.pages[-1], slice(None), self.length % page_size)
            k_pages[place], v_pages[place] = k[:, i], v[:, i]
            self.length += 1

    def fork(self) -> "Sequence":
        """Return a sequence that goes on from the same full pages."""
        twin = Sequence()
        twin.pages = self.pages[: self.length // page_size]
        twin.length = len(twin.pages) * page_size
        return twin


def tokens(n: int) -> tuple[np.ndarray, np.ndarray]:
    k, v = rng.standard_normal((2, num_kv_heads, n, head_dim), dtype=np.float32)
    return k, v


def attend(batch: list[Sequence], q: np.ndarray, qo_lens: list[int]) -> np.ndarray:
    """Attend the newest qo_lens[b] tokens of every sequence, in one call."""
    return mkv.attention_paged(
        q,
        (k_pages, v_pages),
        indptr=np.cumsum([0] + [len(s.pages) for s in batch]),
        indices=[page for s in batch for page in s.pages],
        last_page_len=[(s.length - 1) % page_size + 1 for s in batch],
        qo_indptr=np.cumsum([0, *qo_lens]),
        causal=True,
    )


first, second = Sequence(), Sequence()
first.append(*tokens(100))
second.append(*tokens(37))
third = first.fork()  # the first 96 tokens, without a copy
third.append(*tokens(4))

# A prompt's last 4 tokens beside single tokens of other sequences.
batch, qo_lens = [first, second, third], [1, 1, 4]
q = rng.standard_normal((sum(qo_lens), num_qo_heads, head_dim), dtype=np.float32)
out = attend(batch, q, qo_lens)
print("one call for three sequences:", out.shape)

# The same keys side by side give the same bits.
k = np.concatenate([k_pages[p] for p in second.pages], axis=1)[:, : second.length]
v = np.concatenate([v_pages[p] for p in second.pages], axis=1)[:, : second.length]
alone = mkv.attention(q[1:2].swapaxes(0, 1), k, v, causal=True)
print("equal bits:", np.array_equal(alone[:, 0], out[1]))
