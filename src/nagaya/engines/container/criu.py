"""Where CRIU is, which takes programs out of a kernel and into files."""

from __future__ import annotations

import os

PROGRAM = "criu"


def find_criu() -> str:
    """Its path; "" where it is not installed, or we are not root, without whom it does nothing."""
    if os.geteuid():
        return ""
    for directory in f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin".split(":"):
        if directory and os.access(f"{directory}/{PROGRAM}", os.X_OK):
            return f"{directory}/{PROGRAM}"
    return ""
