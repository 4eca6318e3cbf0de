"""`python -m nagaya.supervisor ROOT RUN ID ATTACH ROWS COLUMNS SAVED`: launch socket on 3, command lock on 4 (launch.py)."""

from __future__ import annotations

import os
import sys

from nagaya.storage.paths import Paths
from nagaya.supervisor.entry import run

if __name__ == "__main__":
    root, run_dir, machine_id, attach, rows, columns, saved = sys.argv[1:]
    for fd in (3, 4):
        os.set_inheritable(fd, False)
    if os.fork():
        os._exit(0)
    size = (int(rows), int(columns))
    os._exit(run(Paths(root, run_dir), machine_id, 3, 4, attach=attach == "1", size=size, saved=saved))
