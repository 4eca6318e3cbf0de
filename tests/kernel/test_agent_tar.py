"""The agent's tar-out, tar-in and stat against GNU tar and Python's tarfile, on every kind of file there is."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import socket
import stat
import subprocess
import tarfile
import threading
import time
from pathlib import Path

import pytest

from tests.kernel.agent_machine import Machine, build_agent

BLOCK = 512
DEEP = "/".join(["d" * 100] * 12)


@pytest.fixture(scope="module")
def agent() -> str:
    return build_agent()


def applet(agent: str, *argv: str, data: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([agent, "--applet", *argv], input=data, capture_output=True, timeout=60)


def tar_out(agent: str, *argv: str) -> bytes:
    done = applet(agent, "tar-out", *argv)
    assert (done.returncode, done.stderr) == (0, b""), done.stderr
    assert len(done.stdout) % (20 * BLOCK) == 0
    return done.stdout


def tar_in(agent: str, data: bytes, directory: Path, *argv: str) -> None:
    directory.mkdir(exist_ok=True)
    done = applet(agent, "tar-in", str(directory), *argv, data=data)
    assert (done.returncode, done.stderr) == (0, b""), done.stderr


XATTRS = ("--xattrs", "--xattrs-include=*")  # implies pax


def gnu_tar(*argv: str, data: bytes = b"") -> bytes:
    return subprocess.run(["tar", *argv], input=data, check=True, capture_output=True).stdout


def has_xattrs(path: Path) -> bool:
    try:
        os.setxattr(path, "user.probe", b"1")
    except OSError:
        return False
    os.removexattr(path, "user.probe")
    return True


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """One of everything."""
    top = tmp_path / "tree"
    top.mkdir()
    (top / "plain").write_bytes(b"hello\n")
    (top / "empty").touch()
    (top / "block").write_bytes(bytes(range(256)) * 2)
    (top / "big").write_bytes(os.urandom(700_001))
    (top / "link").symlink_to("plain")
    (top / "long link").symlink_to("t" * 300)
    (top / "dangling").symlink_to("/no/such")
    os.link(top / "big", top / "hard")
    (top / DEEP).mkdir(parents=True)
    (top / DEEP / "leaf").write_text("deep")
    (top / ("n" * 100)).write_text("exactly a header's name")
    (top / ("n" * 255)).write_text("the longest name")
    (top / "üñí\n\t").write_text("unicode")
    with open(os.fsencode(top) + b"/raw\xff\xfe", "wb") as file:
        file.write(b"not UTF-8")
    os.mkfifo(top / "fifo")
    os.mknod(top / "null", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    (top / "suid").write_bytes(b"x")
    os.chown(top / "suid", 1234, 5_000_000)
    (top / "suid").chmod(0o6751)
    os.lchown(top / "link", 77, 78)
    (top / "private").mkdir(mode=0o700)
    (top / "private" / "file").write_text("in a private directory")
    (top / "readonly").mkdir()
    (top / "readonly" / "file").write_text("1")
    (top / "readonly").chmod(0o1555)
    with open(top / "sparse", "wb") as file:
        file.truncate(40 << 20)
        for at in (0, 5 << 20, (30 << 20) + 4096):
            file.seek(at)
            file.write(os.urandom(5000))
    with open(top / "hole", "wb") as file:
        file.truncate(3 << 20)
    if has_xattrs(top):
        os.setxattr(top / "plain", "user.note", b"a\0b=c\nd")
        os.setxattr(top / "readonly", "user.note", b"directory")
        os.setxattr(top / "suid", "security.capability", bytes.fromhex("0100000200200000000000000000000000000000"))
    paths = [os.path.join(d, n) for d, names, files in os.walk(os.fsencode(top)) for n in names + files]
    for at, path in enumerate(sorted(paths, reverse=True)):  # directories after what is in them
        os.utime(path, ns=(10**18, 1_600_000_000_123_456_789 + at), follow_symlinks=False)
    os.utime(top / "empty", ns=(0, -1_500_000_000))
    os.utime(top / "plain", ns=(0, 1_600_000_000_000_000_000))
    return top


def look(top: Path) -> dict[str, tuple[object, ...]]:
    """All that matters of a tree, by relative name."""
    seen: dict[str, tuple[object, ...]] = {}
    inodes: dict[int, str] = {}
    for directory, names, files in os.walk(os.fsencode(top)):
        for name in sorted(names + files):
            path = os.path.join(directory, name)
            st = os.lstat(path)
            relative = os.fsdecode(os.path.relpath(path, os.fsencode(top)))
            content: object = None
            if stat.S_ISREG(st.st_mode):
                with open(path, "rb") as file:
                    content = hashlib.file_digest(file, "sha256").hexdigest()
            elif stat.S_ISLNK(st.st_mode):
                content = os.readlink(path)
            xattrs = {n: os.getxattr(path, n, follow_symlinks=False) for n in os.listxattr(path, follow_symlinks=False)}
            first = inodes.setdefault(st.st_ino, relative) if not stat.S_ISDIR(st.st_mode) else relative
            seen[relative] = (
                oct(st.st_mode), st.st_uid, st.st_gid, st.st_rdev, st.st_mtime_ns, content, tuple(sorted(xattrs.items())),
                first if st.st_nlink > 1 else "",
            )  # fmt: skip
    return seen


def same_trees(left: Path, right: Path) -> None:
    one, two = look(left), look(right)
    assert one.keys() == two.keys()
    first_names = {name: value[-1] for name, value in one.items()}
    for name, value in one.items():
        assert two[name][:-1] == value[:-1], name
        assert bool(two[name][-1]) == bool(first_names[name]), name


# -- tar-out


def test_out_and_in_again(agent: str, tree: Path, tmp_path: Path) -> None:
    tar_in(agent, tar_out(agent, str(tree)), tmp_path / "new")
    same_trees(tree, tmp_path / "new" / "tree")
    assert os.stat(tmp_path / "new/tree/hole").st_blocks * 512 < 1 << 20, "the hole was filled"
    assert os.stat(tmp_path / "new/tree/sparse").st_blocks * 512 < 2 << 20


def test_gnu_tar_reads_it(agent: str, tree: Path, tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    gnu_tar("-xp", *XATTRS, "-C", str(tmp_path / "new"), "--numeric-owner", data=tar_out(agent, str(tree)))
    same_trees(tree, tmp_path / "new" / "tree")


def test_python_reads_it(agent: str, tree: Path) -> None:
    with tarfile.open(fileobj=io.BytesIO(tar_out(agent, str(tree)))) as tar:
        members = {member.name: member for member in tar}
        for name, member in members.items():
            if not member.isreg() or member.sparse:
                continue
            reader = tar.extractfile(member)
            assert reader is not None
            assert reader.read() == (tree.parent / name).read_bytes(), name
        sparse = tar.extractfile("tree/sparse")
        assert sparse is not None
        assert sparse.read() == (tree / "sparse").read_bytes()
        hard = [m for m in members.values() if m.islnk()]
    assert [{m.name, m.linkname} for m in hard] == [{"tree/big", "tree/hard"}]
    assert members["tree/long link"].linkname == "t" * 300
    assert (members["tree/suid"].uid, members["tree/suid"].gid) == (1234, 5_000_000)
    assert (members["tree/null"].devmajor, members["tree/null"].devminor) == (1, 3)
    assert float(members["tree/empty"].mtime) == -1.5
    assert all(m.uname == m.gname == "" for m in members.values())


def test_names_start_with_the_base_name_or_a_dot(agent: str, tree: Path) -> None:
    def names(*argv: str) -> list[str]:
        with tarfile.open(fileobj=io.BytesIO(tar_out(agent, *argv))) as tar:
            return sorted(tar.getnames())

    here = f"{tree}/private"
    assert names(here) == names(here + "/") == names(here + "//") == ["private", "private/file"]
    assert names(here + "/.") == [".", "./file"]
    assert names(here + "/file") == ["file"]
    os.symlink("private", tree / "to-private")
    assert names(f"{tree}/to-private") == ["to-private"]
    assert names(f"{tree}/to-private", "--follow") == names(f"{tree}/to-private/") == ["to-private", "to-private/file"]
    assert names(f"{tree}/to-private/.") == [".", "./file"]
    assert all(name == "." or name.startswith("./") for name in names(f"{tree}/private/.."))


def test_sockets_are_left_out(agent: str, tmp_path: Path) -> None:
    top = tmp_path / "s"
    top.mkdir()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(top / "a"))
        os.link(top / "a", top / "b")
        with tarfile.open(fileobj=io.BytesIO(tar_out(agent, str(top)))) as tar:
            assert tar.getnames() == ["s"]


def test_missing(agent: str, tmp_path: Path) -> None:
    done = applet(agent, "tar-out", str(tmp_path / "nosuch"))
    assert (done.returncode, done.stderr) == (1, b"nosuch: No such file or directory\n")


def test_as_deep_as_a_path_can_be(agent: str, tmp_path: Path) -> None:
    """Two thousand levels, more than a thread's stack or 1024 descriptors would hold with a careless walk."""
    fd = os.open(tmp_path, os.O_RDONLY)
    for name in ["top"] + ["d"] * 2000:
        os.mkdir(name, dir_fd=fd)
        below = os.open(name, os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    os.close(os.open("leaf", os.O_CREAT | os.O_WRONLY, dir_fd=fd))
    os.close(fd)
    try:
        data = tar_out(agent, str(tmp_path / "top"))
        tar_in(agent, data, tmp_path / "new")
        assert tar_out(agent, str(tmp_path / "new/top")).count(b"leaf") == data.count(b"leaf") > 0
        deep = "x/" * 2000 + "leaf"  # every level is missing
        tar_in(agent, archive(entry(deep, b"1")), tmp_path / "deep")
        assert (tmp_path / "deep" / deep).read_bytes() == b"1"
    finally:
        for name in ("top", "new", "deep"):
            subprocess.run(["rm", "-rf", str(tmp_path / name)], check=True)


def test_a_path_beyond_the_limit_is_named_and_left_out(agent: str, tmp_path: Path) -> None:
    fd = os.open(tmp_path, os.O_RDONLY)
    for name in ["top"] + ["d" * 250] * 17:
        os.mkdir(name, dir_fd=fd)
        below = os.open(name, os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    os.close(fd)
    done = applet(agent, "tar-out", str(tmp_path / "top"))
    subprocess.run(["rm", "-rf", str(tmp_path / "top")], check=True)
    assert done.returncode == 1
    assert done.stderr.endswith(b": a path below it is too long\n")
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as tar:
        assert len(tar.getnames()) == 17


def test_files_that_change_while_they_are_read(agent: str, tmp_path: Path) -> None:
    """The writer stands still behind a full pipe after the header: what happens to the file then must not show."""
    top = tmp_path / "t"
    top.mkdir()
    size = 8 << 20
    for name, change in (("shrinks", 1000), ("grows", size + 4096)):
        path = top / name
        path.write_bytes(b"x" * size)
        with subprocess.Popen([agent, "--applet", "tar-out", str(top)], stdout=-1, stderr=-1) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            first = process.stdout.read(4096)
            os.truncate(path, change)
            data = first + process.stdout.read()
            complaint = process.stderr.read()
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            assert tar.getnames() == ["t", f"t/{name}"]
            reader = tar.extractfile(f"t/{name}")
            assert reader is not None
            content = reader.read()
        assert len(content) == size
        if name == "grows":
            assert (process.returncode, complaint, content) == (0, b"", b"x" * size)
        else:
            assert (process.returncode, complaint) == (1, b"t/shrinks: the file shrank while it was read\n")
            assert content.strip(b"\0").strip(b"x") == b""
        path.unlink()


def test_a_file_of_more_than_8_gib(agent: str, tmp_path: Path) -> None:
    huge = tmp_path / "huge"
    with open(huge, "wb") as file:
        try:
            file.truncate(20 << 30)
        except OSError:
            pytest.skip("this file system has no files of 20 GiB")
        file.seek((9 << 30) + 17)
        file.write(b"needle")
    data = tar_out(agent, str(huge))
    tar_in(agent, data, tmp_path / "new")
    with open(tmp_path / "new/huge", "rb") as file:
        assert os.fstat(file.fileno()).st_size == 20 << 30
        file.seek((9 << 30) + 17)
        assert file.read(6) == b"needle"
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        assert tar.getmember("huge").size == 20 << 30
        assert len(data) < 1 << 20


# -- tar-in


def entry(name: str, data: bytes = b"", **fields: object) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.mtime = len(data), 0o644, 1_000_000_000
    for key, value in fields.items():
        setattr(info, key, value)
    return info, data


def archive(*entries: tuple[tarfile.TarInfo, bytes], format: int = tarfile.PAX_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format) as tar:
        for info, data in entries:
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


@pytest.mark.parametrize("format", ["gnu", "pax", "ustar"])
def test_reads_gnu_tar(agent: str, tree: Path, tmp_path: Path, format: str) -> None:
    left_out = ["--exclude=n*n", f"--exclude={'d' * 100}", "--exclude=long link"] if format == "ustar" else []
    sparse = ["--sparse", "--sparse-version=1.0", *XATTRS] if format == "pax" else []
    if format != "pax":  # the older formats keep whole seconds and no attributes
        left_out += ["--mtime=@1000000000"]
    options = [f"--format={format}", "--numeric-owner", *sparse, *left_out]
    if format == "ustar":
        os.chown(tree / "suid", 1234, 1234)
    data = gnu_tar("-c", *options, "-C", str(tree.parent), "tree")
    tar_in(agent, data, tmp_path / "new")
    (tmp_path / "reference").mkdir()
    gnu_tar("-xp", *XATTRS, "--numeric-owner", "-C", str(tmp_path / "reference"), data=data)
    same_trees(tmp_path / "reference" / "tree", tmp_path / "new" / "tree")


def test_reads_python(agent: str, tree: Path, tmp_path: Path) -> None:
    for number, format in enumerate((tarfile.PAX_FORMAT, tarfile.GNU_FORMAT)):
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w", format=format) as tar:
            tar.add(tree / "plain", "a/b/plain")
            tar.add(tree / ("n" * 255), f"{'p' * 120}/{'n' * 255}")
            tar.add(tree / "suid", "suid")
        new = tmp_path / f"new{number}"
        tar_in(agent, out.getvalue(), new)
        assert (new / "a/b/plain").read_bytes() == b"hello\n"
        assert (new / ("p" * 120) / ("n" * 255)).read_text() == "the longest name"
        assert stat.S_IMODE((new / "suid").stat().st_mode) == 0o6751
        assert (new / "suid").stat().st_gid == 5_000_000


def test_old_time_of_gnu_tar(agent: str, tmp_path: Path) -> None:
    old = tmp_path / "old"
    old.touch()
    os.utime(old, (0, -86400))
    tar_in(agent, gnu_tar("-c", "--format=gnu", "-C", str(tmp_path), "old"), tmp_path / "new")
    assert (tmp_path / "new/old").stat().st_mtime == -86400


def test_no_owner(agent: str, tmp_path: Path) -> None:
    data = archive(
        entry("f", b"1", uid=1000, gid=1000), entry("d", type=tarfile.DIRTYPE, uid=1000, gid=1000, mode=0o750)
    )
    tar_in(agent, data, tmp_path / "new", "--no-owner")
    for name in ("f", "d"):
        found = (tmp_path / "new" / name).stat()
        assert (found.st_uid, found.st_gid) == (0, 0)


def test_what_is_there_is_replaced_and_directories_stay(agent: str, tmp_path: Path) -> None:
    new = tmp_path / "new"
    (new / "dir").mkdir(parents=True)
    (new / "dir/kept").write_text("kept")
    (new / "file").write_text("old")
    os.link(new / "file", tmp_path / "other name")
    (new / "link").symlink_to("file")
    (new / "todir").symlink_to("dir")
    data = archive(
        entry("dir", type=tarfile.DIRTYPE, mode=0o711),
        entry("file", b"new"),
        entry("link", b"a file now"),
        entry("todir", type=tarfile.DIRTYPE),
        entry("todir/through", b"in dir"),
    )
    tar_in(agent, data, new)
    assert (new / "dir/kept").read_text() == "kept"
    assert (new / "file").read_text() == "new"
    assert (tmp_path / "other name").read_text() == "old", "written through a hard link instead of replaced"
    assert (new / "link").read_text() == "a file now"
    assert not (new / "link").is_symlink()
    assert (new / "todir").is_symlink()
    assert (new / "dir/through").read_text() == "in dir"


def test_hard_links(agent: str, tmp_path: Path) -> None:
    data = archive(
        entry("a/file", b"1"),
        entry("b/hard", type=tarfile.LNKTYPE, linkname="a/file"),
        entry("a/file", type=tarfile.LNKTYPE, linkname="a/file"),
        entry("c", type=tarfile.LNKTYPE, linkname="/a/file"),
    )
    tar_in(agent, data, tmp_path / "new")
    assert {(tmp_path / "new" / name).stat().st_ino for name in ("a/file", "b/hard", "c")} == {
        (tmp_path / "new/a/file").stat().st_ino
    }
    sized, _ = entry("hard", type=tarfile.LNKTYPE, linkname="file")
    sized.size = 3  # as some old writers did, without any data
    tar_in(
        agent, archive(entry("file", b"123"))[:1024] + sized.tobuf() + archive(entry("after", b"4")), tmp_path / "sized"
    )
    assert (tmp_path / "sized/hard").read_bytes() == b"123"
    assert (tmp_path / "sized/after").read_bytes() == b"4"


ESCAPES = {
    "dot dot": [entry("../out", b"1")],
    "dot dot inside": [entry("a/../../out", b"1")],
    "link target": [entry("hard", type=tarfile.LNKTYPE, linkname="../secret")],
    "through a link up": [entry("up", type=tarfile.SYMTYPE, linkname="../.."), entry("up/out", b"1")],
    "through an absolute link": [entry("abs", type=tarfile.SYMTYPE, linkname="TOP"), entry("abs/out", b"1")],
    "onto a link": [entry("out", type=tarfile.SYMTYPE, linkname="TOP/secret"), entry("out", b"1")],
    "hard link through a link": [
        entry("abs", type=tarfile.SYMTYPE, linkname="TOP"),
        entry("hard", type=tarfile.LNKTYPE, linkname="abs/secret"),
        entry("hard", b"1"),
    ],
    "directory onto a link": [
        entry("abs", type=tarfile.SYMTYPE, linkname="TOP"),
        entry("abs", type=tarfile.DIRTYPE, mode=0o777, uid=4711),
    ],
    "absolute": [entry("/tmp/nagaya-test-out", b"1")],
}


@pytest.mark.parametrize("name", ESCAPES)
def test_never_leaves_the_directory(agent: str, tmp_path: Path, name: str) -> None:
    top = tmp_path / "top"
    (top / "in").mkdir(parents=True)
    (top / "secret").write_text("secret")
    before = look(tmp_path)
    entries = []
    for info, data in ESCAPES[name]:
        copy = tarfile.TarInfo.frombuf(info.tobuf(), "utf-8", "surrogateescape")
        copy.linkname = copy.linkname.replace("TOP", str(top))
        copy.name = info.name
        entries.append((copy, data))
    applet(agent, "tar-in", str(top / "in"), data=archive(*entries))
    after = {path: value for path, value in look(tmp_path).items() if not path.startswith("top/in")}
    assert after == {path: value for path, value in before.items() if not path.startswith("top/in")}
    assert not os.path.exists("/tmp/nagaya-test-out")


GOOD = archive(entry("f", b"data"))


def _with_checksum(block: bytearray) -> bytes:
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def _changed(at: int, value: bytes) -> bytes:
    block = bytearray(GOOD[:BLOCK])
    block[at : at + len(value)] = value
    return _with_checksum(block) + GOOD[BLOCK:]


def _pax(records: bytes) -> bytes:
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.XHDTYPE, len(records)
    return info.tobuf(tarfile.USTAR_FORMAT) + records + bytes(-len(records) % BLOCK) + GOOD


def _sparse(map_: bytes, size: int = 1 << 20) -> bytes:
    records = b"22 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n" + b"%d GNU.sparse.realsize=%d\n" % (
        len(b"00 GNU.sparse.realsize=%d\n" % size), size,
    )  # fmt: skip
    info = tarfile.TarInfo("f")
    body = map_ + bytes(-len(map_) % BLOCK)
    info.size = len(body)
    return _pax(records)[: 2 * BLOCK] + info.tobuf(tarfile.USTAR_FORMAT) + body + bytes(2 * BLOCK)


BROKEN = {
    "checksum": b"X" + GOOD[1:],
    "not a tar": b"PK\x03\x04" * 300,
    "cut in the header": GOOD[:300],
    "cut in the data": GOOD[: BLOCK + 2],
    "cut in the padding": GOOD[: BLOCK + 100],
    "size is no number": _changed(124, b"12z4"),
    "size beyond everything": _changed(124, b"\x80" + b"\xff" * 11),
    "owner beyond 32 bits": _changed(108, b"\x80\0\0\1\0\0\0\0"),
    "owner -1": _changed(108, b"\x80\0\0\0\xff\xff\xff\xff"),
    "unknown type": _changed(156, b"S"),
    "pax length lies": _pax(b"99 path=x\n"),
    "pax without length": _pax(b"path=x\n"),
    "pax length 0": _pax(b"0 path=x\n"),
    "pax without =": _pax(b"8 pathx\n"),
    "pax without newline": _pax(b"9 path=xy"),
    "pax nul in the name": _pax(b"11 path=a\0b\n"),
    "pax size is no number": _pax(b"13 size=0x10\n"),
    "pax name too long": _pax(b"5012 path=" + b"n" * 5001 + b"\n"),
    "pax header too long": _changed(124, b"77777777777\0")[:156] + b"x" + GOOD[157:],
    "sparse map is no number": _sparse(b"x\n"),
    "sparse map is cut": _sparse(b"5\n0\n"),
    "sparse beyond the end": _sparse(b"1\n2000000\n512\n" + bytes(BLOCK - 14) + bytes(BLOCK)),
    "sparse with more data than there is": _sparse(b"1\n0\n100000\n"),
    "sparse count beyond reason": _sparse(b"99999999999\n"),
    "old sparse": _pax(b"28 GNU.sparse.size=10000000\n"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_archives(agent: str, tmp_path: Path, name: str) -> None:
    done = applet(agent, "tar-in", str(tmp_path), data=BROKEN[name])
    assert done.returncode == 1, name
    assert done.stderr.count(b"\n") == 1, done.stderr


def test_errors_say_what(agent: str, tmp_path: Path) -> None:
    (tmp_path / "f").mkdir()
    done = applet(agent, "tar-in", str(tmp_path), data=GOOD)
    assert (done.returncode, done.stderr) == (1, b"f: Is a directory\n")
    done = applet(agent, "tar-in", str(tmp_path / "nosuch"), data=GOOD)
    assert done.returncode == 1
    assert b"No such file" in done.stderr


def test_full_disk(agent: str, tmp_path: Path) -> None:
    place = tmp_path / "small"
    place.mkdir()
    script = 'mount -t tmpfs -o size=64k none "$1" && exec "$0" --applet tar-in "$1"'
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", script, agent, str(place)],
        input=archive(entry("f", bytes(1 << 20))),
        capture_output=True,
    )
    assert (done.returncode, done.stderr) == (1, b"f: No space left on device\n")


def test_without_proc(agent: str, tree: Path, tmp_path: Path) -> None:
    """An image at rest may have no /proc: `cp` into a machine that has never started."""
    (tmp_path / "root/in").mkdir(parents=True)
    shutil.copy(agent, tmp_path / "root/agent")
    inside = ["chroot", str(tmp_path / "root"), "/agent", "--applet"]
    data = tar_out(agent, str(tree))
    done = subprocess.run([*inside, "tar-in", "/in"], input=data, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")
    same_trees(tree, tmp_path / "root/in/tree")
    done = subprocess.run([*inside, "tar-out", "/in/tree"], capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")
    tar_in(agent, done.stdout, tmp_path / "again")
    same_trees(tree, tmp_path / "again" / "tree")


# -- stat


def test_stat(agent: str, tree: Path) -> None:
    def ask(path: Path, *argv: str) -> dict[str, object]:
        done = applet(agent, "stat", str(path), *argv)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count(b"\n") == 1
        answer = json.loads(done.stdout)
        assert isinstance(answer, dict)
        return answer

    found = (tree / "suid").stat()
    assert ask(tree / "suid") == {
        "type": "file", "mode": 0o6751, "uid": 1234, "gid": 5_000_000, "size": 1, "mtime_ns": found.st_mtime_ns,
    }  # fmt: skip
    assert ask(tree / "link")["target"] == "plain"
    assert ask(tree / "link", "--follow")["type"] == "file"
    types = {name: ask(tree / name)["type"] for name in ("private", "fifo", "null", "dangling")}
    assert types == {"private": "dir", "fifo": "fifo", "null": "char", "dangling": "link"}
    strange = 'a"b\\c\n\udcff\udc80é\x7f'
    os.symlink(strange, tree / "strange")
    assert ask(tree / "strange")["target"] == strange


def test_stat_of_nothing(agent: str, tmp_path: Path) -> None:
    done = applet(agent, "stat", str(tmp_path / "no"))
    assert (done.returncode, done.stdout) == (1, b"")
    assert done.stderr == f"{tmp_path}/no: No such file or directory\n".encode()


def test_unknown_applet(agent: str) -> None:
    assert applet(agent, "nosuch").returncode == 127
    assert applet(agent, "stat").returncode == 2


# -- over the protocol


def test_through_the_agent(agent: str, tree: Path, tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    with Machine(agent) as machine:
        out = machine.run("tar-out", str(tree), applet=True)
        assert (out.status, out.err) == (0, b"")
        done = machine.run("tar-in", str(tmp_path / "new"), applet=True, stdin=out.out)
        assert (done.status, done.err) == (0, b"")
        missing = machine.run("stat", "/no/such", applet=True)
        assert (missing.status, missing.err) == (1, b"/no/such: No such file or directory\n")
        broken = machine.run("tar-in", str(tmp_path / "new"), applet=True, stdin=b"garbage" * 100_000)
        assert broken.status == 1
    same_trees(tree, tmp_path / "new" / "tree")


def test_names_that_change_while_they_are_read(agent: str, tmp_path: Path) -> None:
    """A program swaps files for directories, links and FIFOs under the reader: it must come to an end, with a whole tar."""
    top = tmp_path / "busy"
    top.mkdir()
    stop = threading.Event()

    def churn() -> None:
        while not stop.is_set():
            for make in (Path.touch, Path.mkdir, lambda p: p.symlink_to("/etc/passwd"), lambda p: os.mkfifo(p)):
                for number in range(20):
                    make(top / str(number))  # type: ignore[operator]
                for number in range(20):
                    path = top / str(number)
                    path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()

    thread = threading.Thread(target=churn)
    thread.start()
    try:
        ends = time.monotonic() + 1
        while time.monotonic() < ends:
            data = applet(agent, "tar-out", str(top)).stdout
            with tarfile.open(fileobj=io.BytesIO(data)) as tar:
                for member in tar:
                    assert not member.isreg() or member.size == 0, "followed a link out of the tree"
    finally:
        stop.set()
        thread.join()
