"""`mixedkv bench`: attention and conversion of this machine's libraries, side by side.

What runs is decided in :mod:`mixedkv.bench.plan`, how it is timed in :mod:`mixedkv.bench.timing`,
and by whom in :mod:`mixedkv.bench.peers`. Nothing is imported here, so that the package costs
nothing until it is used.
"""
