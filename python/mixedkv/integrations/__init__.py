"""Where mixedkv plugs into other libraries, one module for each; none is imported by default."""
