"""Thin bindings to Linux: one function per call, plain `OSError`, no policy."""
