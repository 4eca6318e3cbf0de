"""A migration's stream, handed on frame by frame between standard input and output and a socket, for tests that disturb it.

    relay.py SOCKET [--at WAY:TYPE[,WAY:TYPE…] (--tell SOCKET | --order ORDER)] [--rate BYTES] [--round SECONDS]

With `--at` it stands when the frames named there have come in that order, the last one not handed on yet, and says so to
`--tell`. An order from there has it go on: "g" as if nothing had been, "b" that the stream breaks there, "p" that this frame
still gets through, and then the stream breaks. With `--order` it does not ask. `--rate` is how many bytes go to the target in a second, `--round` how
long each round takes longer than it does.
"""

from __future__ import annotations

import argparse
import os
import socket
import threading
import time

from nagaya.migration import frames

TYPES = {name: value for name, value in vars(frames).items() if name.isupper() and isinstance(value, int)}


class Relay:
    def __init__(self) -> None:
        parser = argparse.ArgumentParser()
        parser.add_argument("socket")
        parser.add_argument("--at", default="")
        parser.add_argument("--tell", default="")
        parser.add_argument("--order", default="")
        parser.add_argument("--rate", type=int, default=0)
        parser.add_argument("--round", type=float, default=0.0)
        self.options = parser.parse_args()
        self.awaited = [tuple(word.split(":")) for word in self.options.at.split(",") if word]
        self.one_at_a_time = threading.Lock()
        self.far = socket.socket(socket.AF_UNIX)
        self.far.connect(self.options.socket)

    def run(self) -> None:
        threading.Thread(target=self.carry, args=("back", self.far.fileno(), 1, 0), daemon=True).start()
        self.carry("out", 0, self.far.fileno(), self.options.rate)

    def carry(self, way: str, source: int, target: int, rate: int) -> None:
        write(target, take(source, frames.PREFACE_BYTES))
        free_s = (
            0.0  # when all that came so far has got through: what nobody sends meanwhile is not sent later on at once
        )
        while True:
            header = take(source, frames.HEADER.size)
            type_, length, _, _ = frames.parse_header(header)
            frame = header + take(source, length)
            order = self.look(way, type_)
            if order != b"b":
                write(target, frame)
            if order != b"g":
                os._exit(0)
            if type_ == frames.ROUND and way == "out":
                time.sleep(self.options.round)
            if rate and way == "out":
                free_s = max(free_s, time.monotonic()) + len(frame) / rate
                time.sleep(max(0.0, free_s - time.monotonic()))

    def look(self, way: str, type_: int) -> bytes:
        """What is to be done with a frame."""
        with self.one_at_a_time:
            if not self.awaited or (way, type_) != (self.awaited[0][0], TYPES[self.awaited[0][1]]):
                return b"g"
            del self.awaited[0]
            if self.awaited:
                return b"g"
            if self.options.order:
                return self.options.order.encode()
            with socket.socket(socket.AF_UNIX) as tell:
                tell.connect(self.options.tell)
                return tell.recv(1) or b"b"


def take(fd: int, count: int) -> bytes:
    data = b""
    while len(data) < count:
        try:
            part = os.read(fd, count - len(data))
        except OSError:
            part = b""
        if not part:
            os._exit(0)
        data += part
    return data


def write(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(fd, view) :]
        except OSError:
            os._exit(0)


if __name__ == "__main__":
    Relay().run()
