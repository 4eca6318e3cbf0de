"""The image store as processes use it: at once, killed, on a full disk, and what removing leaves."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import pytest

from nagaya.errors import Conflict, IntegrityError, NagayaError, NotFound, UsageError
from nagaya.images.changes import Change, diff
from nagaya.images.image import Image
from nagaya.images.layers import TEMPORARY
from nagaya.images.manifest import host_platform
from nagaya.images.store import ImageStore
from tests.kernel import unpack_tars as t

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="layers have owners: needs root")

SOURCE = str(Path(__file__).parents[2] / "src")


def make_tar(path: Path, files: dict[str, bytes]) -> str:
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size, info.mode, info.mtime = len(data), 0o755, 1_700_000_000
            tar.addfile(info, io.BytesIO(data))
    return str(path)


def make_layout(tmp_path: Path, files: dict[str, bytes], name: str = "app:1") -> str:
    """An OCI layout with one image, made by a store that is gone afterwards."""
    maker = ImageStore(str(tmp_path / "maker"))
    maker.import_rootfs(make_tar(tmp_path / "rootfs.tar", files), name, changes=('CMD ["sh"]',))
    maker.save((name,), str(tmp_path / "layout"), format="oci")
    return f"oci:{tmp_path / 'layout'}:{name}"


MANY = {f"dir{number % 40}/file{number}": bytes([number % 256]) * (number % 3000) for number in range(1500)}


@pytest.fixture
def store(tmp_path: Path) -> ImageStore:
    return ImageStore(str(tmp_path / "images"))


@pytest.fixture
def tar(tmp_path: Path) -> str:
    return make_tar(tmp_path / "small.tar", {"bin/sh": b"#!", "etc/passwd": b"root:x:0:0::/:/bin/sh\n"})


def leftovers(store: ImageStore) -> list[str]:
    """Temporaries, partial files and locks that something left."""
    found = []
    for base, directories, files in os.walk(store.root):
        found += [
            f"{base}/{name}" for name in directories + files if name.endswith((TEMPORARY, ".lock")) or "new-" in name
        ]
    return [path for path in found if not path.endswith(("/names.lock", "/claims.lock", "images/lock"))]


def check_image(store: ImageStore, image: Image) -> None:
    for directory in store.layer_directories(image):
        assert os.path.isdir(directory)
    for blob in (image.id, image.digest):
        assert store.blobs.read(blob)


def run_python(code: str, *arguments: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments], env={**os.environ, "PYTHONPATH": SOURCE}, stderr=subprocess.PIPE
    )


PULL = "import sys; from nagaya.images.store import ImageStore; ImageStore(sys.argv[1]).pull(sys.argv[2])"


# -- the plain path


def test_import_for_another_platform(store: ImageStore, tar: str) -> None:
    assert store.import_rootfs(tar, "here").platform == host_platform()
    assert store.import_rootfs(tar, "there", platform="aarch64").platform == "linux/arm64"
    with pytest.raises(UsageError, match="is not a platform"):
        store.import_rootfs(tar, "nowhere", platform="a/b/c/d")


def test_import_find_inspect(store: ImageStore, tar: str) -> None:
    events: list[tuple[str, str, str]] = []
    store.on_event = lambda *event: events.append(event)
    image = store.import_rootfs(
        tar, "app", message="hello", changes=("ENV A=1 B='two words'", "LABEL k=v", "EXPOSE 80 53/udp", "WORKDIR /w", "USER me",
                                              'ENTRYPOINT ["/bin/sh", "-c"]', "CMD echo hi", "VOLUME /data", "STOPSIGNAL SIGINT"),
    )  # fmt: skip
    assert image.names == ("app:latest",) and image.size_bytes == 24
    config = image.config
    assert config.env == ("A=1", "B=two words") and config.labels == (("k", "v"),)
    assert config.exposed_ports == ("80/tcp", "53/udp") and (config.workdir, config.user) == ("/w", "me")
    assert config.entrypoint == ("/bin/sh", "-c") and config.command == ("/bin/sh", "-c", "echo hi")
    assert config.volumes == ("/data",) and config.stop_signal == "SIGINT"
    for name in ("app", "app:latest", "docker.io/library/app", image.id, image.id[7:], image.id[:15], image.id[7:11]):
        assert store.find(name) == image, name
    for name in ("other", "app:1", "f" * 64, "", "App", "a b", "../x", "app@" + image.id):
        assert store.find(name) is None, name
    assert store.find(f"app@{image.digest}") == image
    (directory,) = store.layer_directories(image)
    assert Path(directory, "bin/sh").read_bytes() == b"#!" and store.list() == [image]
    seen = store.inspect("app")
    assert seen["RepoTags"] == ["app:latest"] and seen["RepoDigests"] == [f"app@{image.digest}"]
    assert seen["Config"]["User"] == "me" and seen["Comment"] == "hello"  # type: ignore[index]
    assert json.dumps(seen)
    (step,) = store.history("app")
    assert (step.size_bytes, step.comment) == (24, "hello")
    assert events == [("import", image.id, "app:latest")] and leftovers(store) == []


def test_directory_import_and_commit(store: ImageStore, tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "etc").mkdir(parents=True)
    (root / "etc/a").write_bytes(b"a")
    base = store.import_rootfs(str(root), "base")
    upper = tmp_path / "upper"
    (upper / "etc").mkdir(parents=True)
    (upper / "etc/b").write_bytes(b"bb")
    os.mknod(upper / "etc/a", 0o20000, 0)
    lower = store.layer_directories(base)
    assert diff(str(upper), lower) == [Change("C", "/etc"), Change("D", "/etc/a"), Change("A", "/etc/b")]
    image = store.commit(base, str(upper), lower, "new:1", author="me", message="why", changes=("CMD ls",))
    assert (
        image.layers[0] == base.layers[0] and len(image.layers) == 2 and image.config.command == ("/bin/sh", "-c", "ls")
    )
    top, bottom = store.layer_directories(image)
    assert Path(top, "etc/b").read_bytes() == b"bb" and bottom == lower[0]
    assert store.history("new:1")[0].comment == "why" and store.inspect("new:1")["Author"] == "me"
    nothing = tmp_path / "nothing"
    nothing.mkdir()
    same = store.commit(image, str(nothing), (top, bottom), "")
    assert same.layers == image.layers and same.names == () and store.history(same.id)[0].empty_layer


def test_a_layer_given_twice_is_mounted_once(store: ImageStore, tar: str) -> None:
    image = store.import_rootfs(tar, "app")
    twice = image._replace(layers=(image.layers[0], image.layers[0]))
    assert store.layer_directories(twice) == store.layer_directories(image)
    (empty,) = store.layer_directories(image._replace(layers=()))
    assert os.listdir(empty) == []


def test_layers_are_unpacked_again_when_missing(store: ImageStore, tar: str) -> None:
    image = store.import_rootfs(tar, "app")
    (directory,) = store.layer_directories(image)
    subprocess.run(["rm", "-r", directory], check=True)
    assert store.layer_directories(image) == (directory,) and os.path.exists(f"{directory}/bin/sh")


def test_formats_round_trip(store: ImageStore, tar: str, tmp_path: Path) -> None:
    image = store.import_rootfs(tar, "app:1")
    for format in ("oci", "oci-archive", "docker-archive"):
        path = str(tmp_path / format)
        store.save(("app:1",), path, format=format)
        other = ImageStore(str(tmp_path / f"images-{format}"))
        (loaded,) = other.load(path)
        assert (loaded.id, loaded.names, loaded.layers) == (image.id, ("app:1",), image.layers)
        pulled = ImageStore(str(tmp_path / f"pulled-{format}")).pull(f"{format}:{path}:app:1")
        assert (pulled.id, pulled.names) == (image.id, ("app:1",))


def test_loading_keeps_the_digest_that_is_known(store: ImageStore, tar: str, tmp_path: Path) -> None:
    image = store.import_rootfs(tar, "app:1")
    store.save(("app:1",), str(tmp_path / "app.tar"), format="docker-archive")
    (loaded,) = store.load(str(tmp_path / "app.tar"))
    assert loaded.digest == image.digest
    store.prune()
    check_image(store, store.get("app:1"))


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda s, tar: s.pull("Bad Name"), UsageError),
        (lambda s, tar: s.pull("./rootfs.tar"), UsageError),
        (lambda s, tar: s.pull("oci:/nonexistent"), NagayaError),
        (lambda s, tar: s.ensure("none", pull="never"), NotFound),
        (lambda s, tar: s.ensure("none", pull="sometimes"), UsageError),
        (lambda s, tar: s.import_rootfs("/nonexistent", "a"), NotFound),
        (lambda s, tar: s.import_rootfs("/dev/null", "a"), UsageError),
        (lambda s, tar: s.import_rootfs("/proc/version", "a"), IntegrityError),
        (lambda s, tar: s.import_rootfs(tar, "Bad"), UsageError),
        (lambda s, tar: s.import_rootfs(tar, "a", changes=("RUN x",)), UsageError),
        (lambda s, tar: s.import_rootfs(tar, "a", changes=('CMD ["x"',)), UsageError),
        (lambda s, tar: s.import_rootfs(tar, "a", changes=("EXPOSE x",)), UsageError),
        (lambda s, tar: s.tag("none", "x"), NotFound),
        (lambda s, tar: s.remove("none"), NotFound),
        (lambda s, tar: s.history("none"), NotFound),
        (lambda s, tar: s.save(("none",), "/tmp/x"), NotFound),
        (lambda s, tar: s.load("/nonexistent"), NotFound),
    ],
)
def test_bad_input(store: ImageStore, tar: str, call: object, error: type[NagayaError]) -> None:
    with pytest.raises(error) as caught:
        call(store, tar)  # type: ignore[operator]
    assert caught.value.message and not caught.value.message.endswith(".")
    assert store.list() == [] and leftovers(store) == []


# -- names, removing, collecting


def test_tag_and_remove(store: ImageStore, tar: str) -> None:
    image = store.import_rootfs(tar, "app:1")
    store.tag("app:1", "app:2")
    assert store.get("app:2").names == ("app:1", "app:2")
    with pytest.raises(Conflict, match="2 names"):
        store.remove(image.id)
    assert store.remove("app:1") == ["untagged: app:1"]
    (directory,) = store.layer_directories(image)
    with pytest.raises(Conflict, match="used by a machine"):
        store.remove("app:2", in_use=lambda: frozenset({image.id}))
    assert store.remove("app:2", in_use=lambda: frozenset({image.id}), force=True) == ["untagged: app:2"]
    assert store.get(image.id).names == () and os.path.isdir(directory), "what a machine uses stays"
    assert store.prune(in_use=lambda: frozenset({image.id})).removed == ()
    assert os.path.isdir(directory)
    assert store.remove(image.id) == [f"deleted: {image.id}"]
    assert store.list() == [] and store.blobs.list() == [] and not os.path.exists(directory)


def test_remove_by_id_with_force(store: ImageStore, tar: str) -> None:
    image = store.import_rootfs(tar, "app:1")
    store.tag("app:1", "app:2")
    assert store.remove(image.id[7:19], force=True) == ["untagged: app:1", "untagged: app:2", f"deleted: {image.id}"]


def test_shared_layers_outlive_one_image(store: ImageStore, tar: str, tmp_path: Path) -> None:
    base = store.import_rootfs(tar, "base")
    (tmp_path / "upper").mkdir()
    (tmp_path / "upper" / "x").write_bytes(b"x")
    store.commit(base, str(tmp_path / "upper"), (), "child")
    store.remove("base")
    check_image(store, store.get("child"))
    assert len(store.layer_directories(store.get("child"))) == 2
    store.remove("child")
    assert os.listdir(f"{store.root}/layers") == [] and store.blobs.list() == []


def test_prune(store: ImageStore, tar: str, tmp_path: Path) -> None:
    first = store.import_rootfs(tar, "app")
    time.sleep(0.01)
    second = store.import_rootfs(make_tar(tmp_path / "b.tar", {"b": b"b" * 9000}), "app")
    assert store.get("app") == second and store.get(first.id).names == (), "the name moved on"
    Path(store.blobs.partial_directory, "sha256-" + "0" * 64).write_bytes(b"x" * 10_000)
    os.mkdir(f"{store.root}/layers/{'0' * 64}{TEMPORARY}")
    pruned = store.prune()
    assert pruned.removed == (first.id,) and pruned.bytes_freed >= 10_000
    assert store.list() == [second] and leftovers(store) == [] and os.listdir(store.blobs.partial_directory) == []
    check_image(store, second)
    assert store.prune().removed == () and store.prune(all=True, in_use=lambda: frozenset({second.id})).removed == ()
    assert store.prune(all=True).removed == (second.id,) and store.blobs.list() == []


def test_paths_too_long_to_say_can_be_removed(store: ImageStore, tmp_path: Path) -> None:
    (tmp_path / "deep.tar").write_bytes(
        t.long_name((b"n" * 250 + b"/") * 16 + b"f" * 70) + t.file(b"x") + t.file(b"y", b"y" * 9000) + t.END
    )
    image = store.import_rootfs(str(tmp_path / "deep.tar"), "deep")
    pruned = store.prune(all=True)
    assert pruned.removed == (image.id,) and pruned.bytes_freed > 9000 and os.listdir(f"{store.root}/layers") == []


def test_removing_does_not_wait_for_a_pull(store: ImageStore, tar: str) -> None:
    image = store.import_rootfs(tar, "app")
    with store.using():
        assert store.remove("app") == ["untagged: app:latest", f"deleted: {image.id}"]
        assert store.blobs.list() != [], "somebody may count on it"
    store.prune()
    assert store.blobs.list() == []


def test_damaged_state(store: ImageStore, tar: str) -> None:
    image = store.import_rootfs(tar, "app")
    record = Path(store.root, "records", image.id[7:] + ".json")
    for damage in (
        b"",
        b"{",
        b"[]",
        b'{"id": 1}',
        record.read_bytes().replace(b'"layers":[', b'"layers":[1,'),
        b"\xff",
    ):
        good = record.read_bytes()
        record.write_bytes(damage)
        assert store.find("app") is None and store.list() == []
        record.write_bytes(good)
    record.write_bytes(b"")
    assert store.import_rootfs(tar, "app").names == ("app:latest",), "the next import mends it"
    store.prune()
    assert not record.exists()
    Path(store.root, "names.json").write_bytes(b"[]")
    with pytest.raises(IntegrityError, match=r"names\.json"):
        store.list()


# -- several processes, kills, a full disk


def test_two_processes_pull_the_same(store: ImageStore, tmp_path: Path) -> None:
    source = make_layout(tmp_path, MANY)
    children = [run_python(PULL, store.root, source) for _ in range(3)]
    assert [child.wait() for child in children] == [0, 0, 0], [
        child.stderr.read() for child in children if child.stderr
    ]
    for child in children:
        assert child.stderr is not None
        child.stderr.close()
    image = store.get("app:1")
    check_image(store, image)
    (directory,) = store.layer_directories(image)
    assert sum(len(files) for _, _, files in os.walk(directory)) == len(MANY) and leftovers(store) == []


def test_kill_at_any_moment(store: ImageStore, tmp_path: Path) -> None:
    """kill -9 during a pull, again and again; the last pull, and the collector, find everything usable."""
    source = make_layout(tmp_path, MANY)
    started = time.monotonic()
    subprocess.run(
        [sys.executable, "-c", PULL, str(tmp_path / "measure"), source],
        check=True,
        env={**os.environ, "PYTHONPATH": SOURCE},
    )
    whole = time.monotonic() - started
    noise = random.Random(5)
    killed = 0
    rounds = 0
    while killed < 3 or rounds < 7:
        rounds += 1
        assert rounds < 40
        child = run_python(PULL, store.root, source)
        try:
            child.wait(noise.uniform(0.1, 1.0) * whole)
        except subprocess.TimeoutExpired:
            os.kill(child.pid, signal.SIGKILL)
            killed += child.wait() == -signal.SIGKILL
        assert child.stderr is not None
        child.stderr.close()
        for image in store.list():  # what counts as there is there
            check_image(store, image)
        if noise.random() < 0.3:
            for image in store.list():
                store.remove(image.id, force=True)
    image = store.pull(source)
    (directory,) = store.layer_directories(image)
    assert sum(len(files) for _, _, files in os.walk(directory)) == len(MANY)
    store.prune()
    assert leftovers(store) == [] and os.listdir(store.blobs.partial_directory) == []
    check_image(store, image)


def test_what_a_killed_writer_left_is_pruned(store: ImageStore, tar: str) -> None:
    image = store.import_rootfs(tar, "app:1")
    left = [f"{store.root}/names.json.4000000.tmp", f"{store.root}/records/{image.id[7:]}.json.4000000.tmp"]
    for path in left:
        Path(path).write_text("{")
    store.prune()
    assert not any(map(os.path.exists, left))
    assert [found.names for found in store.list()] == [image.names]


FULL = """
import os, subprocess, sys
sys.path.insert(0, sys.argv[4])
from nagaya.errors import HostError
from nagaya.images.store import ImageStore
os.makedirs(sys.argv[1])
subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={sys.argv[3]}", "none", sys.argv[1]], check=True)
store = ImageStore(sys.argv[1] + "/images")
try:
    store.pull(sys.argv[2])
except HostError as error:
    assert error.errno == 28 and error.hint, (error.errno, error.message)
    left = [name for base, _, names in os.walk(store.root) for name in names if name not in ("lock", "names.lock", "claims.lock")]
    assert store.list() == []
    partial = [name for name in left if "partial" in name or name.endswith(".tmp")]
    layers = os.listdir(store.root + "/layers") if os.path.isdir(store.root + "/layers") else []
    assert not partial and not layers, (left, layers)
    sys.exit(7)
sys.exit(0)
"""


@pytest.mark.parametrize("size", ["300k", "1m", "4m"])
def test_full_disk(tmp_path: Path, size: str) -> None:
    """In mount namespaces of their own: a store that has no room for the blob, or for the unpacked layer."""
    files = {f"f{number}": random.Random(number).randbytes(30_000) for number in range(30)} | {"zeros": bytes(8 << 20)}
    source = make_layout(tmp_path, files)
    done = subprocess.run(
        ["unshare", "-m", "--propagation", "private", sys.executable, "-c", FULL, str(tmp_path / "full"), source, size, SOURCE],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 7, done.stderr


def test_a_plain_user_s_layers_are_that_user_s(tmp_path: Path) -> None:
    """Giving files away takes privileges: such a store has no owners (rootimage.py gives all to root)."""
    make_layout(tmp_path, {"a": b"a"})
    scratch = tempfile.mkdtemp(prefix="nagaya-test-")  # pytest's own directories are closed to others
    code = (
        "import importlib, os, pkgutil, sys; sys.path.insert(0, sys.argv[3]); import nagaya.images, nagaya.kernel, nagaya.storage\n"
        # All of it now: the checkout may lie where a plain user cannot read, such as /root.
        "for package in (nagaya.images, nagaya.kernel, nagaya.storage):\n"
        "    for module in pkgutil.walk_packages(package.__path__, package.__name__ + '.'): importlib.import_module(module.name)\n"
        "import calendar, hashlib, threading; from nagaya.images.store import ImageStore; import nagaya.errors\n"
        "os.setgroups([]); os.setresgid(65534, 65534, 65534); os.setresuid(65534, 65534, 65534)\n"
        "store = ImageStore(sys.argv[1] + '/images'); print(*store.layer_directories(store.pull(sys.argv[2])))\n"
    )
    try:
        shutil.copytree(tmp_path / "layout", f"{scratch}/layout")
        os.mkdir(f"{scratch}/theirs")
        for base, _, files in os.walk(scratch):
            os.chown(base, 65534, 65534)
            for name in files:
                os.chown(f"{base}/{name}", 65534, 65534)
        source = f"oci:{scratch}/layout:app:1"
        argv = [sys.executable, "-c", code, f"{scratch}/theirs", source, SOURCE]
        done = subprocess.run(argv, capture_output=True, text=True)
        assert done.stderr == ""
        layer = Path(done.stdout.strip())
        assert (layer / "a").read_bytes() == b"a" and (layer / "a").stat().st_uid == 65534
    finally:
        shutil.rmtree(scratch)


def test_finding_costs_little(store: ImageStore, tar: str) -> None:
    """The path of every `run`: few modules, no lock, well under a millisecond on an idle machine."""
    store.import_rootfs(tar, "app")
    code = (
        "import sys, time\n"
        "from nagaya.images.store import ImageStore\n"
        "store = ImageStore(sys.argv[1])\n"
        "image = store.ensure('app'); store.layer_directories(image)\n"
        "print(' '.join(sys.modules))\n"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", f"import sys; sys.path.insert(0, {SOURCE!r})\n{code}", store.root],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    modules = set(done.stdout.split())
    for heavy in ("hashlib", "threading", "subprocess", "dataclasses", "pathlib", "socket", "ctypes", "calendar",
                  "nagaya.images.content", "nagaya.images.manifest", "nagaya.images.sources", "nagaya.images.references"):  # fmt: skip
        assert heavy not in modules, heavy
