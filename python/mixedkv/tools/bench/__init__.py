"""`mixedkv bench`: attention and conversion of this machine's libraries, side by side.

What runs is decided in :mod:`.plan`, how it is timed in :mod:`.timing`, and by whom in
:mod:`.peers`. Nothing is imported here, so that the package costs nothing until it is used.
"""
