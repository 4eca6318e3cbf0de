"""Guest kernels: built once from the distribution's own source package, kept in the user's cache, found by the engines.

Layers, from the bottom: `config` (what is wanted of a kernel, as text), `sources` (where a Linux comes from), `cache`
(what has been built), `build` (from the one to the other).
"""
