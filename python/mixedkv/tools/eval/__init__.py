"""``mixedkv eval``: what caches cost in quality, measured on a model and a text."""
