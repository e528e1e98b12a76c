"""What stands on the library: the command line, and what its commands do.

The command line in :mod:`.cli`; reading and measuring a model in :mod:`.demo`, :mod:`.models`,
:mod:`.evaluate`; :mod:`.trace` and :mod:`.bench`. Nothing is imported here: each has needs of its
own, and `import mixedkv` has none but numpy.
"""
