"""mixedkv from torch: its attention beside scaled_dot_product_attention, with and without Q4_0.

Needs: pip install 'mixedkv[torch]'
"""

import time

import mixedkv as mkv
import torch

torch.manual_seed(0)
batch, num_qo_heads, num_kv_heads, kv_len, head_dim = 1, 32, 8, 4096, 128

q = torch.randn(batch, num_qo_heads, 1, head_dim)
k = torch.randn(batch, num_kv_heads, kv_len, head_dim)
v = torch.randn(batch, num_kv_heads, kv_len, head_dim)
k16, v16 = k.half(), v.half()
k4, v4 = mkv.quantize_q4_0(k), mkv.quantize_q4_0(v)


def timed(name, function, *arguments, **options):
    function(*arguments, **options)
    best = min(_seconds(function, arguments, options) for _ in range(20))
    print(f"{name:>28}: {best * 1e6:6.0f} microseconds")
    return function(*arguments, **options)


def _seconds(function, arguments, options):
    start = time.perf_counter()
    function(*arguments, **options)
    return time.perf_counter() - start


def difference(a, b):
    return ((a - b).norm() / b.norm()).item()


sdpa = torch.nn.functional.scaled_dot_product_attention
torch_out = timed("torch SDPA, f32", sdpa, q, k16.float(), v16.float(), enable_gqa=True)
f16_out = timed("mixedkv, f16 keys and values", mkv.attention, q, k16, v16)
q4_out = timed("mixedkv, Q4_0", mkv.attention, q, k4, v4)

print(f"f16 against torch: {difference(f16_out, torch_out):.1e} relative")
back = mkv.attention(q, mkv.dequantize_q4_0(k4), mkv.dequantize_q4_0(v4))
print(f"Q4_0 against the same values in f32: {difference(q4_out, back):.1e} relative")
print(f"what 4.5 bits cost on random data: {difference(q4_out, torch_out):.2f} relative")

# Queries and results stay in their own dtype; bf16 works too. Four queries, causal:
out = mkv.attention(q.bfloat16().expand(-1, -1, 4, -1), k16, v16, causal=True)
print(out.dtype, tuple(out.shape))
