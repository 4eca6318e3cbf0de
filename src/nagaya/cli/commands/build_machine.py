"""`nagaya machine build`."""

from __future__ import annotations

from nagaya.cli import values
from nagaya.cli.context import Context
from nagaya.cli.flags import Command, Flag, Parsed
from nagaya.cli.progress import open_progress


def build(context: Context, parsed: Parsed) -> int:
    """Build it, and print the disk's name."""
    from nagaya.manager.building import BuildOptions, build_debian  # lazy: few build

    system, *name = parsed.words
    options = BuildOptions(
        system=system,
        disk=name[0] if name else system.replace(":", "-"),
        size_bytes=values.parse_size(parsed.text("size", "8g"), "--size"),
        packages=tuple(word for text in parsed.texts("include") for word in text.replace(",", " ").split()),
        architecture=parsed.text("arch"),
    )
    with open_progress(quiet=parsed.switch("quiet"), eager=True) as progress:
        build_debian(context.host.paths, options, progress)
    print(options.disk)
    return 0


BUILD = Command(
    build,
    usage="debian[:SUITE] [DISK]",
    words=(1, 2),
    flags=(
        Flag("--size", "Size of the disk (default 8g); it takes space as it is written to", value="SIZE"),
        Flag(
            "--arch",
            "CPU: x86_64, aarch64 or riscv64 (default: the host's); another one's needs qemu-user-static",
            value="NAME",
        ),
        Flag("--include", "Further packages", value="PACKAGES", many=True),
        Flag("-q --quiet", "Show no progress"),
    ),
    about="A disk in the store with a Debian that boots by UEFI, on a PC by BIOS too, with cloud-init and an ssh server, made of"
    " the packages that this host's apt has sources for (mmdebstrap). Needs root; takes minutes.",
    examples=(
        ("nagaya machine build debian", ""),
        ("nagaya machine build debian arm --arch arm64", "for another CPU"),
        ("nagaya machine create web --disk debian,clone --cloud-init", "a machine of it; then nagaya ssh web"),
    ),
)
