"""`mixedkv bench --end-to-end`: a whole model in transformers, with one KV cache after another.

Who takes part is in :mod:`.contenders`, how attention's share is told from the rest's in
:mod:`.stopwatch`, what runs in :mod:`.plan`, tables and pictures in :mod:`.report` and
:mod:`.plot`. Nothing is imported here, so that the package costs nothing until it is used.
"""

#: Backends of transformers' QuantizedCache: peers that a user may choose.
PEERS = ("fp8", "quanto", "hqq")
#: Lengths of the context, and the one of a quick run.
CONTEXTS = (512, 2048, 8192)
QUICK_CONTEXTS = (512,)
