"""Tars, gzip streams and documents, mutated. The oracle: unpacked or one of our errors, and nothing outside changes."""

from __future__ import annotations

import gzip
import io
import json
import os
import random
import shutil
from pathlib import Path

import pytest

from nagaya.errors import IntegrityError, NagayaError
from nagaya.images.manifest import parse_config, parse_index, parse_manifest
from nagaya.images.streams import TarStream
from nagaya.images.tar import TarReader
from nagaya.images.unpack import extract, unpack_layer
from tests.kernel import unpack_tars as t

ROUNDS = int(os.environ.get("NAGAYA_FUZZ_ROUNDS", "1500"))
NAMES = (b"a", b"b", b"d", b"d/e", b"d/e/f", b"d/x", b"../x", b"/abs", b"d/../y", b".", b"./", b"", b".wh.a", b"d/.wh.e",
         b"d/.wh..wh..opq", b"\xff", b"n" * 99, b"l", b"l/x", b"l/l/x", b"a/b", b"..", b"../../outside/secret")  # fmt: skip
TARGETS = (b"a", b"d", b"..", b"/", b"../outside", b"/etc", b"l", b"d/e/f", b"", b"../outside/secret", b".wh.a")
NUMBERS = (0, 1, 7, 511, 512, 513, 1 << 20, (1 << 33) - 1)


def make_archive(noise: random.Random) -> bytes:
    """A well-formed archive whose entries contradict each other."""
    parts = []
    for _ in range(noise.randrange(1, 12)):
        name = noise.choice(NAMES)
        kind = noise.choice(b"00012356")
        if noise.random() < 0.2:
            key = noise.choice((b"path", b"linkpath", b"size", b"mtime", b"uid", b"SCHILY.xattr.user.x",
                                b"SCHILY.xattr.trusted.overlay.opaque", b"GNU.sparse.map", b"GNU.sparse.size",
                                b"GNU.sparse.major", b"GNU.sparse.realsize", b"GNU.sparse.name"))  # fmt: skip
            value = noise.choice((*NAMES, b"1", b"0,1", b"9", b"1.5", b"-1"))
            parts.append(t.pax({key: value}, noise.choice((b"x", b"x", b"g"))))
        if noise.random() < 0.1:
            parts.append(t.long_name(noise.choice(NAMES) * noise.randrange(1, 60), noise.choice((b"L", b"K"))))
        if kind == ord("0"):
            parts.append(
                t.file(name, noise.randbytes(noise.choice((0, 1, 511, 513, 2000))), mode=noise.randrange(0o10000))
            )
        else:
            parts.append(
                t.header(
                    name,
                    kind=bytes([kind]),
                    link=noise.choice(TARGETS),
                    mode=noise.randrange(0o10000),
                    major=1,
                    minor=3,
                )
            )
    return b"".join(parts) + t.END


def mutate(noise: random.Random, data: bytes) -> bytes:
    """A few bytes, fields or blocks changed; half of the time with the headers' checksums put right again."""
    out = bytearray(data)
    for _ in range(noise.choice((0, 0, 1, 1, 2, 5))):
        if not out:
            break
        at = noise.randrange(len(out))
        choice = noise.randrange(7)
        if choice == 0:
            out[at] = noise.randrange(256)
        elif choice == 1:
            del out[at : at + noise.choice((1, 512, 700))]
        elif choice == 2:
            out[at:at] = noise.randbytes(noise.choice((1, 512)))
        elif choice == 3:
            del out[at:]
        elif choice == 4:
            block = at - at % 512
            out[block:block] = out[noise.randrange(len(out)) // 512 * 512 :][:512]
        elif choice == 5:
            field = at - at % 512 + 124
            out[field : field + 12] = b"%011o\0" % noise.choice(NUMBERS)
        elif choice == 6:
            out[at - at % 512 + 156 : at - at % 512 + 157] = bytes([noise.choice(b"0123456789xgLKSDMV\0")])
    return fix_checksums(bytes(out)) if noise.random() < 0.7 else bytes(out)


def fix_checksums(data: bytes) -> bytes:
    out = bytearray(data)
    for at in range(0, len(out) - 511, 512):
        if out[at + 257 : at + 262] == b"ustar":
            out[at + 148 : at + 156] = b" " * 8
            out[at + 148 : at + 156] = b"%06o\0 " % sum(out[at : at + 512])
    return bytes(out)


@pytest.mark.skipif(os.geteuid() != 0, reason="layers have owners: needs root")
@pytest.mark.parametrize("layer", [True, False], ids=["layer", "extract"])
def test_tars(tmp_path: Path, layer: bool) -> None:
    noise = random.Random(20261123 + layer)
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret").write_bytes(b"secret")
    os.utime(tmp_path / "outside", (1, 1))
    outcomes = {True: 0, False: 0}
    for number in range(ROUNDS):
        data = mutate(noise, make_archive(noise))
        inside = tmp_path / "inside"
        inside.mkdir()
        before = os.stat(tmp_path / "outside")
        try:
            if layer:
                unpack_layer(t.chunks(data, noise.choice((100, 512, 4096))), str(inside))
            else:
                extract(
                    io.BytesIO(data), str(inside), preserve_owner=bool(number % 2), rename=noise.choice(("", "top"))
                )
            outcomes[True] += 1
        except NagayaError:
            outcomes[False] += 1
        assert (tmp_path / "outside" / "secret").read_bytes() == b"secret"
        after = os.stat(tmp_path / "outside")
        assert (after.st_mtime_ns, after.st_mode, after.st_uid) == (before.st_mtime_ns, before.st_mode, before.st_uid)
        assert sorted(os.listdir(tmp_path)) == ["inside", "outside"], data
        shutil.rmtree(inside)
    assert min(outcomes.values()) > ROUNDS // 50, "the fuzzer only makes archives of one kind"


def test_reader_ends(tmp_path: Path) -> None:
    """Every reading ends, after at most as many entries as there are blocks."""
    noise = random.Random(7)
    for _ in range(ROUNDS):
        data = mutate(noise, make_archive(noise))
        try:
            for count, _entry in enumerate(TarReader(t.chunks(data))):
                assert count <= len(data) // 512
        except IntegrityError:
            continue


def test_compressed_streams() -> None:
    noise = random.Random(9)
    whole = gzip.compress(make_archive(noise) * 5)
    for _ in range(200):
        out = bytearray(whole)
        for _ in range(noise.randrange(1, 4)):
            out[noise.randrange(len(out))] = noise.randrange(256)
        data = bytes(out[: noise.randrange(len(out))]) if noise.random() < 0.3 else bytes(out)
        try:
            with TarStream(io.BytesIO(data)) as stream:
                for _ in stream:
                    pass
        except IntegrityError:
            continue


def test_documents() -> None:
    """JSON of every shape at every place."""
    noise = random.Random(11)
    digest = "sha256:" + "0" * 64
    manifest = {"schemaVersion": 2, "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": digest, "size": 2},
                "layers": [{"mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": digest, "size": 5}]}  # fmt: skip
    index = {
        "schemaVersion": 2,
        "manifests": [{"mediaType": "", "digest": digest, "size": 5, "platform": {"os": "linux", "architecture": "x"}}],
    }
    config = {"os": "linux", "architecture": "amd64", "rootfs": {"type": "layers", "diff_ids": [digest]}, "created": "2024-01-01T00:00:00Z",
              "config": {"Env": ["A=1"], "Labels": {"a": "b"}}, "history": [{"created_by": "x"}]}  # fmt: skip
    values = (None, 0, -1, 1 << 70, 1.5, True, "", "x", "\ud800", "a\0", [], [None], {}, {"a": None}, [[]], "9" * 5000)
    for document, parse in ((manifest, parse_manifest), (index, parse_index), (config, parse_config)):
        for _ in range(ROUNDS // 2):
            data = json.loads(json.dumps(document))
            place: object = data
            while True:
                keys = list(place) if isinstance(place, dict) else list(range(len(place)))  # type: ignore[call-overload, arg-type]
                key = noise.choice(keys)
                below = place[key]  # type: ignore[index]
                if not isinstance(below, (dict, list)) or not below or noise.random() < 0.3:
                    place[key] = noise.choice(values)  # type: ignore[index]
                    break
                place = below
            try:
                parse(json.dumps(data).encode())
            except NagayaError:
                continue
