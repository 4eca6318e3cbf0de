"""Imports only go down: the table of README.md, "How it is built", checked on every import statement."""

from __future__ import annotations

import ast

import pytest

from tests.repo.sources import imports, package_sources

# A layer may import what its line names, and itself.
BELOW_MANAGER = {
    "supervisor", "engines", "virtio", "memory", "kernels", "images", "storage", "net", "protocol", "kernel", "model", "errors",
    "migration",
}  # fmt: skip
MAY_IMPORT = {
    "cli": {"manager", *BELOW_MANAGER},
    "manager": BELOW_MANAGER,
    "supervisor": {"engines", "migration", "storage", "net", "protocol", "kernel", "model", "errors"},
    "engines": {"virtio", "memory", "kernels", "migration", "storage", "net", "protocol", "kernel", "model", "errors"},
    "migration": {"storage", "kernel", "model", "errors"},  # a machine's way to another host: frames and their stream
    "virtio": {"memory", "protocol", "kernel", "errors"},  # memory and bytes, never KVM
    "memory": {"kernel", "errors"},
    "kernels": {"storage", "kernel", "model", "errors"},
    "images": {"storage", "protocol", "kernel", "model", "errors"},
    "net": {"storage", "kernel", "model", "errors"},
    "storage": {"protocol", "kernel", "model", "errors"},
    "protocol": {"model", "errors"},
    "kernel": set(),  # plain OSError, and no idea of what it is used for
    "model": {"errors"},
    "errors": set(),
    "static": set(),
}
FRONT_DOOR = {"nagaya", "nagaya.__main__"}  # the library's surface, and `python -m nagaya`
ENGINES = {
    "container",
    "kvm",
    "qemu",
}  # siblings; below them is what they share: engines.cgroups, and of virtual ones engines.vm
VIRTUAL = {"kvm", "qemu"}


def find_violations(module: str, tree: ast.AST) -> list[str]:
    """What a module of ours imports and may not."""
    if module in FRONT_DOOR:
        return []
    parts = module.split(".")
    layer, found = parts[1], []
    for line, name in imports(tree):
        target = name.split(".")  # of `from nagaya.x import y`: nagaya, x, y
        if target[1] in ("__version__", layer):
            ours, theirs = {*parts[2:3]} & ENGINES, {*target[2:3]} & ENGINES
            if layer == "engines" and ours and theirs and ours != theirs:
                found.append(f"{module}:{line} imports its sibling {name}")
            if layer == "engines" and parts[2:3] in (["vm"], ["cgroups"]) and theirs:
                found.append(f"{module}:{line} imports {name}, which stands on it")
            if layer == "engines" and (ours - VIRTUAL or parts[2:3] == ["cgroups"]) and target[2:3] == ["vm"]:
                found.append(f"{module}:{line} imports {name}, which is for virtual machines")
        elif target[1] not in MAY_IMPORT[layer] | {"static"}:
            found.append(f"{module}:{line} imports {name}")
    return found


def test_every_module_is_in_a_layer() -> None:
    layers = {source.module.split(".")[1] for source in package_sources() if source.module not in FRONT_DOOR}
    assert layers <= set(MAY_IMPORT)


def test_imports_go_down() -> None:
    violations = [line for source in package_sources() for line in find_violations(source.module, source.tree)]
    assert violations == []


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("nagaya.kernel.mount", "from nagaya.errors import HostError"),
        ("nagaya.storage.paths", "def f():\n    from nagaya.manager import host"),
        ("nagaya.images.store", "import nagaya.net.plan"),
        ("nagaya.supervisor.loop", "from nagaya import cli"),
        ("nagaya.engines.container.boot", "from nagaya.engines.kvm import vm"),
        ("nagaya.model.spec", "from . import state"),
        ("nagaya.engines.vm.setup", "from nagaya.engines.kvm import vm"),
        ("nagaya.engines.container.boot", "from nagaya.engines.vm import setup"),
        ("nagaya.engines.cgroups.group", "from nagaya.engines.container import devices"),
        ("nagaya.engines.cgroups.group", "from nagaya.engines.vm import rules"),
    ],
)
def test_a_wrong_import_is_found(module: str, text: str) -> None:
    assert find_violations(module, ast.parse(text))
