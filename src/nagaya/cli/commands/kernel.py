"""`nagaya kernel build`, `ls`, `path` and `rm`: the kernels that machines of type kvm and emulated boot."""

from __future__ import annotations

import time

from nagaya.cli import listing
from nagaya.cli.build_progress import open_build_progress
from nagaya.cli.context import Context
from nagaya.cli.each import each_name
from nagaya.cli.flags import MANY, Command, Flag, Parsed
from nagaya.cli.human import format_age, format_local_time, format_size, format_time
from nagaya.cli.listing import Layout
from nagaya.cli.template_functions import Row
from nagaya.errors import UsageError
from nagaya.kernels import cache
from nagaya.kernels.cache import Kernel

KERNELS = Layout(
    columns=("ID", "Version", "Config", "Created", "Size"),
    headings={
        "ID": "KERNEL ID", "Version": "VERSION", "Config": "CONFIG", "Created": "CREATED", "CreatedAt": "CREATED AT",
        "Size": "SIZE", "Architecture": "ARCHITECTURE", "Path": "PATH", "Source": "SOURCE", "Compiler": "COMPILER",
    },
    elastic=("Config",),
)  # fmt: skip


def build(context: Context, parsed: Parsed) -> int:
    """Build a kernel, or find it built already, and print the path of its vmlinux."""
    from nagaya.kernels.build import Request, build_kernel  # lazy: the other commands build nothing

    request = Request(
        jobs=_parse_jobs(parsed.text("jobs")),
        fragment=parsed.text("config"),
        source=parsed.text("source"),
        force=parsed.switch("force"),
        keep=parsed.switch("keep"),
        architecture=parsed.text("arch"),
    )
    progress = open_build_progress(quiet=parsed.switch("quiet"))
    try:
        built = build_kernel(request, progress)
    finally:
        progress.close()
    print(built.path)
    return 0


def _parse_jobs(text: str) -> int:
    """A number of 1 to 1024; 0 for "", which is one for each CPU."""
    if not text:
        return 0
    if not (text.isascii() and text.isdigit()) or not 1 <= int(text[:5]) <= 1024:
        raise UsageError(f"'{text}' is no number of jobs", hint="for example --jobs 4; without it, one for each CPU")
    return int(text)


def ls(context: Context, parsed: Parsed) -> int:
    """List built kernels, the newest first."""
    found, now_ns = cache.list_kernels(), time.time_ns()
    listing.print_list(
        parsed,
        KERNELS,
        rows=lambda: [kernel_row(kernel, now_ns=now_ns) for kernel in found],
        records=lambda: [kernel_record(kernel) for kernel in found],
        ids=lambda: [kernel.id for kernel in found],
    )
    return 0


def kernel_row(kernel: Kernel, *, now_ns: int) -> Row:
    record = kernel.record
    return Row(
        ID=kernel.id,
        Version=record.version,
        Config=record.fragment,
        Created=format_age(record.built_ns, now_ns),
        CreatedAt=format_local_time(record.built_ns),
        Size=format_size(record.size_bytes),
        Architecture=record.architecture,
        Path=kernel.path,
        Source=record.source,
        Compiler=record.compiler,
    )


def kernel_record(kernel: Kernel) -> dict[str, object]:
    record = kernel.record
    return {
        "id": kernel.id,
        "version": record.version,
        "architecture": record.architecture,
        "config": record.fragment,
        "path": kernel.path,
        "size_bytes": record.size_bytes,
        "digest": f"sha256:{record.digest}",
        "source": record.source,
        "compiler": record.compiler,
        "created_at": format_time(record.built_ns),
        "build_seconds": record.build_s,
    }


def path(context: Context, parsed: Parsed) -> int:
    """Print where a kernel's vmlinux is: the one that machines boot when none is named."""
    print(cache.get_kernel(parsed.words[0] if parsed.words else "").path)
    return 0


def rm(context: Context, parsed: Parsed) -> int:
    """Remove kernels. With --all every one, and what the last build has left."""
    if parsed.switch("all") == bool(parsed.words):
        raise UsageError("name kernels to remove, or give --all", hint="'nagaya kernel ls' lists them")

    def remove(name: str) -> None:
        kernel = cache.get_kernel(name)
        cache.remove_kernel(kernel)
        print(kernel.id)

    if not parsed.switch("all"):
        return each_name(context, parsed.words, remove)
    cache.remove_build()
    return each_name(context, [kernel.id for kernel in cache.list_kernels()], remove)


BUILD = Command(
    build,
    flags=(
        Flag("-j --jobs", "Compilers to run at once (default: one for each CPU)", value="NUMBER"),
        Flag("--arch", "CPU to build for: x86_64, aarch64 or riscv64 (default: the host's)", value="NAME"),
        Flag("--config", "Lines of CONFIG_NAME=value that win over the shipped ones", value="FILE"),
        Flag("--source", "A tar archive of a Linux (default: /usr/src/linux-source-*.tar.xz)", value="FILE"),
        Flag("-f --force", "Build it anew although it is here"),
        Flag("--keep", "Keep the source and object files until the next build"),
        Flag("-q --quiet", "Do not show progress"),
    ),
    about="Takes minutes, once: what was built from the same source, configuration and compiler is used again. "
    "Needs Debian's linux-source package and what builds a kernel; it says what is missing.",
    examples=(("nagaya kernel build", ""), ("nagaya kernel build --config my.config --jobs 8", "with further drivers")),
)
LS = Command(
    ls,
    flags=(listing.FORMAT, listing.JSON, listing.NO_TRUNC, listing.QUIET),
    about="Fields: " + ", ".join(KERNELS.headings) + ".",
    examples=(("nagaya kernel ls", ""), ("nagaya kernel ls --format '{{.ID}} {{.Path}}'", "")),
)
PATH = Command(
    path,
    usage="[KERNEL]",
    words=(0, 1),
    examples=(("nagaya kernel path", "the newest"), ("nagaya kernel path 3f2a", "the one whose id begins so")),
)
RM = Command(
    rm,
    usage="KERNEL [KERNEL...]",
    words=(0, MANY),
    flags=(Flag("-a --all", "Remove every one, and what is left of builds"),),
    examples=(("nagaya kernel rm 3f2a", ""), ("nagaya kernel rm --all", "")),
)
