"""`python -m nagaya`."""

from __future__ import annotations

import sys

from nagaya.cli import main

sys.exit(main())
