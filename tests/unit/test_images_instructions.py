"""`--change`: Dockerfile instructions on an image's config."""

from __future__ import annotations

from typing import Any

import pytest

from nagaya.errors import UsageError
from nagaya.images.instructions import apply_instructions


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ('CMD ["a", "b c"]', {"Cmd": ["a", "b c"]}),
        ("cmd echo hi", {"Cmd": ["/bin/sh", "-c", "echo hi"]}),
        ('ENTRYPOINT ["/e"]', {"Entrypoint": ["/e"]}),
        ("ENV A=1 B='x y'", {"Env": ["OLD=0", "A=1", "B=x y"], "Cmd": ["old"]}),
        ("ENV OLD new value", {"Env": ["OLD=new value"], "Cmd": ["old"]}),
        ("LABEL a=b", {"Labels": {"k": "v", "a": "b"}, "Cmd": ["old"]}),
        ("EXPOSE 80 53/UDP 8000-8010", {"ExposedPorts": {"80/tcp": {}, "53/udp": {}, "8000-8010/tcp": {}}, "Cmd": ["old"]}),
        ('VOLUME ["/a", "/b"]', {"Volumes": {"/a": {}, "/b": {}}, "Cmd": ["old"]}),
        ("VOLUME /a", {"Volumes": {"/a": {}}, "Cmd": ["old"]}),
        ("WORKDIR /x", {"WorkingDir": "/x", "Cmd": ["old"]}),
        ("WORKDIR y", {"WorkingDir": "/w/y", "Cmd": ["old"]}),
        ("USER u:g", {"User": "u:g", "Cmd": ["old"]}),
        ("STOPSIGNAL SIGINT", {"StopSignal": "SIGINT", "Cmd": ["old"]}),
    ],
)  # fmt: skip
def test_apply(change: str, expected: dict[str, Any]) -> None:
    config: dict[str, Any] = {"Env": ["OLD=0"], "Labels": {"k": "v"}, "WorkingDir": "/w", "Cmd": ["old"]}
    before = dict(config)
    apply_instructions(config, (change,))
    changed = {key: value for key, value in config.items() if before.get(key) != value or key in expected}
    assert changed == expected
    if change.startswith("ENTRYPOINT"):
        assert "Cmd" not in config, "an image's Cmd was meant for its old entrypoint"


@pytest.mark.parametrize(
    "change",
    ["", "RUN x", "CMD", "CMD   ", 'CMD ["a"', "CMD [1]", "ENV A", "ENV =x", "ENV A='x", "LABEL x", "EXPOSE 0", "EXPOSE 99999",
     "EXPOSE 80/icmp", "EXPOSE a", "VOLUME data", 'VOLUME ["data"]', "USER a\0b"],
)  # fmt: skip
def test_refused(change: str) -> None:
    with pytest.raises(UsageError):
        apply_instructions({}, (change,))
