"""Root images for virtual machines: `roots/HEX.erofs`, what an image's layers show together as one read-only disk.

HEX is the chain id of the layers (OCI image specification, config.md, "Layer ChainID"), so that images of the same
layers have one. mkfs.erofs writes it, uncompressed (docs/disks.md has the figures that chose this), into
`HEX.erofs.tmp`; when that is on the disk it is renamed: without the ending it is whole. flock on `HEX.erofs.lock` makes
two makers do the work once. `collect` removes those that no image needs.

A plain layer is packed as it lies in the store. Several are shown to mkfs.erofs as a read-only overlay at `HEX.merged.tmp`,
in a mount namespace of its own. Where that will not do, `HEX.merged.tmp` becomes a tree of new directories and of hard links
to the layers' files: for a plain user, for very many layers, and where an overlay would list a deletion that has nothing
below it, a name that cannot be looked up.
"""

from __future__ import annotations

import os
import stat
import struct

from nagaya.errors import HostError, LaunchError, Unsupported
from nagaya.images.image import Image

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from nagaya.images.merged import Node
    from nagaya.images.progress import Progress
    from nagaya.images.store import ImageStore

DIRECTORY = "roots"
ENDING = ".erofs"
OPTIONS_MAX = 4000  # mount(2) takes one page of options
NAME_MAX = 254  # one less than the kernel's: what mkfs.erofs up to 1.5 can read
_EMPTY = "sha256:" + 64 * "0"  # of an image without layers; no SHA-256 is known to come out so
_BLOCK = 4096
_SUPERBLOCK = 1024  # where it is
_MAGIC = 0xE0F5E1E2
# The beginning of struct erofs_super_block: magic, checksum, feature_compat, blkszbits, sb_extslots, root_nid, inos,
# build_time, build_time_nsec, blocks, meta_blkaddr, xattr_blkaddr, uuid
_FIELDS = struct.Struct("<IIIBBHQQIIII16s")


def chain_id(diff_ids: tuple[str, ...]) -> str:
    """The ChainID of layers, bottom first: that of one layer is its diff id."""
    if not diff_ids:
        return _EMPTY
    chain = diff_ids[0]
    for diff_id in diff_ids[1:]:
        import hashlib  # lazy: 3 ms, and an image of one layer needs none

        chain = f"sha256:{hashlib.sha256(f'{chain} {diff_id}'.encode()).hexdigest()}"
    return chain


def root_image_path(root: str, diff_ids: tuple[str, ...]) -> str:
    """Where the root image of these layers is, or would be, in the store at `root`."""
    return f"{root}/{DIRECTORY}/{chain_id(diff_ids).partition(':')[2]}{ENDING}"


def find_root_image(store: ImageStore, image: Image) -> str | None:
    """The image's root image, if it has been made. One that was cut short, or is another's, counts as not made."""
    path = root_image_path(store.root, image.layers)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise HostError.from_os(error, f"cannot read the root image of {_name(image)}") from None
    try:
        raw = os.pread(fd, _FIELDS.size, _SUPERBLOCK)
        size = os.fstat(fd).st_size
    finally:
        os.close(fd)
    if len(raw) < _FIELDS.size:
        return None
    magic, *_, blocks, _meta, _xattr, uuid = _FIELDS.unpack(raw)
    whole = magic == _MAGIC and blocks and blocks * _BLOCK <= size and uuid == _uuid(image.layers)
    return path if whole else None


def make_root_image(store: ImageStore, image: Image, *, progress: Progress) -> str:
    """The path of the image's root image, which is made when it is missing.

    Raises `HostError` (no room), `IntegrityError`, `NotFound` (a layer and its blob are missing), `Unsupported` (no
    mkfs.erofs, or the image has what it cannot read), `LaunchError`; leaves nothing then. A kill leaves a temporary
    file that the next maker, or `prune`, removes.
    """
    found = find_root_image(store, image)
    if found is not None:
        return found
    from nagaya.images.locks import Lock  # lazy: rare from here on

    program = _find_program()
    path = root_image_path(store.root, image.layers)
    with store.using(), Lock(f"{path}.lock", remove=True):
        found = find_root_image(store, image)
        if found is not None:
            return found
        try:
            _make(store, image, path, program, progress)
        except OSError as error:
            raise HostError.from_os(error, f"cannot make the root image of {_name(image)}") from None
    return path


def _find_program() -> str:
    import shutil  # lazy: 5 ms

    program = shutil.which("mkfs.erofs", path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin")
    if program is None:
        raise Unsupported(
            "a machine with a kernel of its own needs mkfs.erofs, to make its root image",
            hint="apt install erofs-utils",
            finding="mkfs.erofs is not in the PATH, nor in /usr/sbin",
        )
    return program


def _make(store: ImageStore, image: Image, path: str, program: str, progress: Progress) -> None:
    from nagaya.images.merged import merge
    from nagaya.storage import records
    from nagaya.storage.tree import remove_tree

    key = f"root image {image.id}"
    progress.start(key, f"making the root image of {_name(image)}", 0)
    layers = store.layer_directories(image)
    merged = merge(layers)
    _check_names(merged.directories)
    tree, temporary = f"{path.removesuffix(ENDING)}.merged.tmp", f"{path}.tmp"
    try:
        remove_tree(tree)
        remove_tree(temporary)
        if len(layers) == 1 and not merged.marked:
            _run(program, temporary, layers[0], _uuid(image.layers))
        elif merged.dangling or not _run_on_overlay(program, temporary, tree, layers, _uuid(image.layers)):
            _link_tree(merged.directories, tree)
            _run(program, temporary, tree, _uuid(image.layers))
        os.rename(temporary, path)
    finally:
        remove_tree(temporary)
        remove_tree(tree)
    records.sync(os.path.dirname(path))
    progress.finish(key)


def _check_names(nodes: list[Node]) -> None:
    for node in nodes:
        for name, _ in node.children:
            if len(name) > NAME_MAX:
                raise Unsupported(
                    f"the image has a file name of {len(name)} bytes, and mkfs.erofs reads {NAME_MAX} at most",
                    hint="use the image with --type container",
                    finding=f"in {os.fsdecode(node.path)}",
                )


def _run_on_overlay(program: str, target: str, place: str, layers: tuple[str, ...], uuid: bytes) -> bool:
    """As `_run`, on a read-only overlay that only mkfs.erofs sees. False where none can be mounted."""
    import subprocess

    from nagaya.kernel import mount as kernel
    from nagaya.kernel import namespaces

    store = os.path.dirname(layers[0])
    options = f"lowerdir={':'.join(os.path.relpath(layer, store) for layer in layers)}"
    if os.geteuid() != 0 or len(layers) < 2 or len(options) > OPTIONS_MAX:
        return False

    def mount() -> None:
        namespaces.unshare(namespaces.CLONE_NEWNS)
        kernel.mount("", "/", "", kernel.MS_PRIVATE | kernel.MS_REC)
        os.chdir(store)
        kernel.mount("overlay", place, "overlay", kernel.MS_RDONLY, options)

    os.mkdir(place, 0o700)
    try:
        _run(program, target, place, uuid, before=mount)
    except subprocess.SubprocessError:  # raised by `mount`
        os.unlink(target)
        os.rmdir(place)
        return False
    return True


def _run(program: str, target: str, source: str, uuid: bytes, *, before: Callable[[], None] | None = None) -> None:
    """Pack the directory `source` into the new file `target`, and wait until that is on the disk."""
    import subprocess  # lazy: 16 ms

    text = uuid.hex()
    text = "-".join((text[:8], text[8:12], text[12:16], text[16:20], text[20:]))
    fd = os.open(target, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        # By descriptor: should we be killed, it goes on writing to this file, and never to the next maker's.
        owners = [] if os.geteuid() == 0 else ["--all-root"]  # a plain user's layers have none
        argv = [program, "--quiet", "-d1", f"-U{text}", *owners, f"/proc/self/fd/{fd}", source]
        done = subprocess.run(
            argv,
            pass_fds=(fd,),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
            preexec_fn=before,
        )
        if done.returncode:
            tail = done.stdout.decode(errors="replace").strip()[-2000:]
            reason = tail.splitlines()[0].removeprefix("<E> erofs: ").strip() if tail else f"status {done.returncode}"
            raise LaunchError(
                f"mkfs.erofs could not make the root image: {reason}",
                hint="look whether the disk is full: df -h",
                command=" ".join(argv), status=done.returncode, log_tail=tail,
            )  # fmt: skip
        os.fsync(fd)
    finally:
        os.close(fd)


def _link_tree(nodes: list[Node], target: str) -> None:
    """The merged tree as a directory: directories are made, everything else is a further name of the layers' file."""
    top = os.fsencode(target)
    places = {id(nodes[0]): top}
    os.mkdir(top, 0o700)
    directories = []
    for node in nodes:
        place = places.pop(id(node), None)
        if place is None:
            continue
        directories.append((place, node))
        for name, child in node.children:
            there = place + b"/" + name
            if stat.S_ISDIR(child.found.st_mode):
                os.mkdir(there, 0o700)
                places[id(child)] = there
            else:
                os.link(child.path, there, follow_symlinks=False)
    for place, node in reversed(directories):  # times last: what is made in a directory changes its own
        found = node.found
        os.chown(place, found.st_uid, found.st_gid)
        for attribute, value in node.xattrs:
            os.setxattr(place, attribute, value)
        os.chmod(place, stat.S_IMODE(found.st_mode))
        os.utime(place, ns=(found.st_atime_ns, found.st_mtime_ns))


def _uuid(diff_ids: tuple[str, ...]) -> bytes:
    """The file system's UUID, from the chain id: which file this is can be read in the file itself."""
    return bytes.fromhex(chain_id(diff_ids).partition(":")[2][:32])


def _name(image: Image) -> str:
    return image.names[0] if image.names else image.id[7:19]
