"""The blob store: nothing gets a name that is not what the name says."""

from __future__ import annotations

import hashlib
import os
import threading
from pathlib import Path

import pytest

from nagaya.errors import IntegrityError, NotFound
from nagaya.images.content import Blobs


def digest_of(data: bytes, algorithm: str = "sha256") -> str:
    return f"{algorithm}:{hashlib.new(algorithm, data).hexdigest()}"


@pytest.fixture
def blobs(tmp_path: Path) -> Blobs:
    return Blobs(str(tmp_path / "images"))


def partials(blobs: Blobs) -> list[str]:
    return os.listdir(blobs.partial_directory)


def test_put_and_read(blobs: Blobs) -> None:
    assert blobs.list() == []
    digest = blobs.put(b"hello")
    assert digest == digest_of(b"hello")
    assert blobs.put(b"hello") == digest
    assert blobs.has(digest) and blobs.read(digest) == b"hello" and blobs.size(digest) == 5
    assert blobs.list() == [digest] and partials(blobs) == []
    assert os.stat(blobs.path(digest)).st_mode & 0o777 == 0o644
    assert blobs.remove(digest) == 5 and blobs.remove(digest) == 0 and not blobs.has(digest)


def test_empty_blob(blobs: Blobs) -> None:
    assert blobs.read(blobs.put(b"")) == b""


def test_sha512(blobs: Blobs) -> None:
    digest = digest_of(b"abc", "sha512")
    with blobs.writer(digest, 3) as writer:
        writer.write(b"abc")
    assert blobs.read(digest) == b"abc" and blobs.list() == [digest]


def test_wrong_digest_leaves_nothing(blobs: Blobs) -> None:
    with pytest.raises(IntegrityError, match="does not match"), blobs.writer(digest_of(b"abc"), 3) as writer:
        writer.write(b"abd")
    assert blobs.list() == [] and partials(blobs) == []


def test_overlong_leaves_nothing(blobs: Blobs) -> None:
    with pytest.raises(IntegrityError, match="longer"), blobs.writer(digest_of(b"abc"), 3) as writer:
        writer.write(b"ab")
        writer.write(b"cd")
    assert blobs.list() == [] and partials(blobs) == []


def test_resume(blobs: Blobs) -> None:
    digest = digest_of(b"abcdef")
    with pytest.raises(RuntimeError), blobs.writer(digest, 6) as writer:
        writer.write(b"abc")
        raise RuntimeError("the line went dead")
    assert not blobs.has(digest)
    with blobs.writer(digest, 6) as writer:
        assert writer.offset == 3 and not writer.complete
        writer.write(b"def")
    assert blobs.read(digest) == b"abcdef"
    with blobs.writer(digest, 6) as writer:
        assert writer.complete and writer.offset == 6


def test_short_download_is_an_error_and_resumes(blobs: Blobs) -> None:
    digest = digest_of(b"abcdef")
    with pytest.raises(IntegrityError, match="3 of 6"), blobs.writer(digest, 6) as writer:
        writer.write(b"abc")
    with blobs.writer(digest, 6) as writer:
        writer.write(b"def")
    assert blobs.has(digest)


def test_restart_forgets_the_partial(blobs: Blobs) -> None:
    digest = digest_of(b"abcdef")
    with pytest.raises(IntegrityError), blobs.writer(digest, 6) as writer:
        writer.write(b"xyz")
    with blobs.writer(digest, 6) as writer:
        writer.restart()
        assert writer.offset == 0
        writer.write(b"abcdef")
    assert blobs.read(digest) == b"abcdef"


def test_damaged_partial_is_found_out(blobs: Blobs) -> None:
    digest = digest_of(b"abcdef")
    with pytest.raises(IntegrityError), blobs.writer(digest, 6) as writer:
        writer.write(b"xyz")
    with pytest.raises(IntegrityError, match="does not match"), blobs.writer(digest, 6) as writer:
        writer.write(b"def")
    assert partials(blobs) == []


def test_two_writers_do_the_work_once(blobs: Blobs) -> None:
    data = os.urandom(100_000)
    digest, written, errors = digest_of(data), [], []
    barrier = threading.Barrier(4)

    def work() -> None:
        try:
            barrier.wait()
            with blobs.writer(digest, len(data)) as writer:
                if not writer.complete:
                    written.append(1)
                    for at in range(0, len(data), 1000):
                        writer.write(data[at : at + 1000])
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == [] and len(written) == 1 and blobs.read(digest) == data and partials(blobs) == []


def test_damaged_blob_is_found_out(blobs: Blobs) -> None:
    digest = blobs.put(b"hello")
    Path(blobs.path(digest)).write_bytes(b"hallo")
    with pytest.raises(IntegrityError, match="does not match"):
        blobs.read(digest)


def test_cut_blob_is_written_anew(blobs: Blobs) -> None:
    digest = blobs.put(b"hello")
    Path(blobs.path(digest)).write_bytes(b"")
    assert blobs.put(b"hello") == digest and blobs.read(digest) == b"hello"


def test_read_limit(blobs: Blobs) -> None:
    digest = blobs.put(b"x" * 100)
    with pytest.raises(IntegrityError, match="beyond"):
        blobs.read(digest, limit=99)


def test_links_are_not_followed(blobs: Blobs, tmp_path: Path) -> None:
    digest = blobs.put(b"hello")
    (tmp_path / "elsewhere").write_bytes(b"hello")
    os.unlink(blobs.path(digest))
    os.symlink(tmp_path / "elsewhere", blobs.path(digest))
    with pytest.raises(OSError):
        blobs.open(digest)


@pytest.mark.parametrize("digest", ["", "sha256:", "sha256:../../x", "x", "sha256:" + "A" * 64, "md5:" + "0" * 32])
def test_what_is_no_digest(blobs: Blobs, digest: str) -> None:
    with pytest.raises(IntegrityError):
        blobs.has(digest)


def test_missing(blobs: Blobs) -> None:
    for call in (blobs.open, blobs.read, blobs.size):
        with pytest.raises(NotFound):
            call(digest_of(b"none"))


def test_new_blob(blobs: Blobs) -> None:
    with blobs.new() as blob:
        blob.write(b"ab")
        blob.write(b"c")
    assert blob.digest == digest_of(b"abc") and blob.size == 3 and blobs.read(blob.digest) == b"abc"
    with pytest.raises(RuntimeError), blobs.new() as blob:
        blob.write(b"zzz")
        raise RuntimeError
    assert partials(blobs) == [] and len(blobs.list()) == 1
