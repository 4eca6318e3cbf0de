"""A running machine of type kvm with 512 MiB, idle, that moves between two stores of this host: how long it stands, and where
that time goes.

The stream is a TCP connection over the loopback. It goes back and forth, begun from a template the first time.
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import subprocess
import tempfile

from benches.measure import Check, Sample, report
from benches.stores import open_stores
from nagaya.kernels.cache import cache_directory, find_kernel

STANDS_MS = 100.0
WARM_UP = 2


def main(rounds: int) -> bool:
    if find_kernel() is None:
        print("\nmigration: left out, no guest kernel is built (nagaya kernel build)")
        return True
    with open_stores() as here, open_stores() as there, tempfile.TemporaryDirectory() as cache:
        os.mkdir(f"{cache}/nagaya")
        os.symlink(cache_directory(), f"{cache}/nagaya/kernels")
        environment = {**os.environ, "XDG_CACHE_HOME": cache, "NAGAYA_TEMPLATES": "1", "NAGAYA_TYPE": "kvm"}

        def nagaya(store: list[str], *words: str) -> str:
            ran = subprocess.run([*store, *words], env=environment, check=True, capture_output=True, text=True)
            return ran.stdout

        def move(source: list[str], target: list[str]) -> dict[str, object]:
            to = f"tcp:127.0.0.1:{_free_port()}"
            receive = [*target, "migrate", "receive", to]
            with subprocess.Popen(
                receive, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
            ) as receiver:
                assert receiver.stderr is not None
                receiver.stderr.readline()  # that it listens
                sent = nagaya(source, "migrate", "send", "--json", "m", "--to", to).splitlines()
            moved: dict[str, object] = json.loads(sent[-1])
            return moved

        nagaya(here.nagaya, "template", "build", "-q", "--network", "none", "busybox")
        nagaya(
            here.nagaya, "run", "-d", "-m", "512m", "--network", "none", "--name", "m", "busybox", "sleep", "1000000"
        )
        stores = [here.nagaya, there.nagaya]
        moves = []
        for number in range(rounds + WARM_UP):
            moved = move(*stores)
            stores.reverse()
            if number >= WARM_UP:
                moves.append(moved)
        stood = Sample("it stands", tuple(float(str(one["downtime_ms"])) for one in moves))
        steps = {
            name: statistics.median(one["downtime_steps_ms"][name] for one in moves)  # type: ignore[index]
            for name in moves[0]["downtime_steps_ms"]  # type: ignore[attr-defined]
        }
        whole = Sample("all of it", tuple(1000 * float(str(one["total_s"])) for one in moves))
        print("\nof it, medians: " + ", ".join(f"{name} {took:.1f} ms" for name, took in steps.items()))
        sent = statistics.median(int(str(one["sent_bytes"])) for one in moves) / (1 << 20)
        print(f"{sent:.1f} MiB sent in {statistics.median(int(str(one['rounds'])) for one in moves):.0f} rounds")
        return report("migration of an idle machine", [stood, whole], [Check("it stands, ms", stood.median, STANDS_MS)])


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])
