"""Manifests, indexes, configs and platforms: what is read, and that everything malformed is refused."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pytest

from nagaya.errors import IntegrityError, NagayaError, NotFound, Unsupported, UsageError
from nagaya.images import manifest as m

D1, D2, D3 = (f"sha256:{hashlib.sha256(text).hexdigest()}" for text in (b"1", b"2", b"3"))


def make_manifest(**changes: Any) -> dict[str, Any]:
    return {
        "schemaVersion": 2,
        "mediaType": m.OCI_MANIFEST,
        "config": {"mediaType": m.OCI_CONFIG, "digest": D1, "size": 10},
        "layers": [{"mediaType": m.OCI_LAYER_GZIP, "digest": D2, "size": 20}],
        **changes,
    }


def make_config(**changes: Any) -> dict[str, Any]:
    return {"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": [D3]}, **changes}


def dump(data: object) -> bytes:
    return json.dumps(data).encode()


def test_manifest() -> None:
    raw = dump(make_manifest())
    parsed = m.parse_manifest(raw)
    assert parsed.digest == f"sha256:{hashlib.sha256(raw).hexdigest()}"
    assert parsed.config == m.Descriptor(m.OCI_CONFIG, D1, 10)
    assert parsed.layers == (m.Descriptor(m.OCI_LAYER_GZIP, D2, 20),)
    assert m.parse_manifest(raw, digest=parsed.digest, media_type=f"{m.OCI_MANIFEST}; charset=utf-8") == parsed
    assert m.parse_manifest(raw, digest=f"sha512:{hashlib.sha512(raw).hexdigest()}").layers == parsed.layers


def test_docker_manifest() -> None:
    data = make_manifest(
        mediaType=m.DOCKER_MANIFEST,
        config={"mediaType": m.DOCKER_CONFIG, "digest": D1, "size": 1},
        layers=[{"mediaType": m.DOCKER_LAYER_GZIP, "digest": D2, "size": 2}],
    )
    assert m.parse_manifest(dump(data)).media_type == m.DOCKER_MANIFEST


def layer(**changes: Any) -> dict[str, Any]:
    return {"mediaType": m.OCI_LAYER_GZIP, "digest": D2, "size": 20, **changes}


@pytest.mark.parametrize(
    "data",
    [
        [], "x", 1, None, {}, make_manifest(schemaVersion=3), make_manifest(schemaVersion="2"),
        make_manifest(config=None), make_manifest(config=[]), make_manifest(layers=None), make_manifest(layers={}),
        make_manifest(layers=[None]), make_manifest(layers=[layer(size=-1)]), make_manifest(layers=[layer(size=1 << 60)]),
        make_manifest(layers=[layer(size=1.5)]), make_manifest(layers=[layer(size=True)]),
        make_manifest(layers=[layer(size="1")]), make_manifest(layers=[layer(digest="sha256:xyz")]),
        make_manifest(layers=[layer(digest=D2.upper())]), make_manifest(layers=[layer(digest="sha256:../../etc/passwd")]),
        make_manifest(layers=[layer(digest="md5:" + "0" * 32)]), make_manifest(layers=[layer(digest=7)]),
        make_manifest(layers=[layer(mediaType="text/plain")]), make_manifest(layers=[layer(mediaType=7)]),
        make_manifest(layers=[layer()] * 1025), make_manifest(mediaType=7), make_manifest(mediaType=m.OCI_INDEX),
        make_manifest(manifests=[]), make_manifest(layers=[layer(annotations=[])]),
        make_manifest(layers=[layer(annotations={"a": 1})]), make_manifest(layers=[layer(platform="linux")]),
        make_manifest(config={"mediaType": m.OCI_CONFIG, "digest": D1, "size": 9 << 20}),
    ],
)  # fmt: skip
def test_malformed_manifest(data: object) -> None:
    with pytest.raises(IntegrityError):
        m.parse_manifest(dump(data))


@pytest.mark.parametrize("raw", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 50_000, b" " * (9 << 20)])
def test_no_json(raw: bytes) -> None:
    for parse in (m.parse_manifest, m.parse_index, m.parse_config):
        with pytest.raises(IntegrityError):
            parse(raw)


def test_wrong_digest() -> None:
    with pytest.raises(IntegrityError, match="does not match its digest"):
        m.parse_manifest(dump(make_manifest()), digest=D1)


def test_transport_and_document_must_agree() -> None:
    with pytest.raises(IntegrityError):
        m.parse_manifest(dump(make_manifest()), media_type=m.DOCKER_MANIFEST)


def test_schema_1_is_named() -> None:
    with pytest.raises(Unsupported, match="schema 1"):
        m.parse_manifest(dump({"schemaVersion": 1, "fsLayers": []}))


def test_artifact_is_no_image() -> None:
    config = {"mediaType": "application/vnd.oci.empty.v1+json", "digest": D1, "size": 2}
    with pytest.raises(Unsupported, match="no image"):
        m.parse_manifest(dump(make_manifest(config=config)))


@pytest.mark.parametrize(
    "bad",
    [
        layer(urls=["file:///etc/passwd"]),
        layer(mediaType="application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"),
        layer(mediaType="application/vnd.oci.image.layer.nondistributable.v1.tar+gzip"),
    ],
)
def test_foreign_layer(bad: dict[str, Any]) -> None:
    with pytest.raises(IntegrityError, match="foreign"):
        m.parse_manifest(dump(make_manifest(layers=[bad])))


def test_config() -> None:
    inner = {
        "Entrypoint": ["/e"], "Cmd": ["c", "d"], "Env": ["A=1"], "WorkingDir": "/w", "User": "u:g", "Labels": {"k": "v"},
        "StopSignal": "SIGINT", "Volumes": {"/v": {}}, "ExposedPorts": {"80/tcp": {}},
    }  # fmt: skip
    history = [{"created": "2024-01-02T03:04:05Z", "created_by": "RUN x", "empty_layer": True}, {"comment": "c"}]
    parsed = m.parse_config(dump(make_config(config=inner, history=history, created="1970-01-01T00:00:01.5Z")))
    config, diff_ids, steps, created_ns, platform = parsed
    assert config == m.ImageConfig(
        ("/e",), ("c", "d"), ("A=1",), "/w", "u:g", (("k", "v"),), "SIGINT", ("/v",), ("80/tcp",)
    )
    assert (diff_ids, created_ns, platform) == ((D3,), 1_500_000_000, "linux/amd64")
    assert [step.empty_layer for step in steps] == [True, False]


def test_nulls_in_config_are_nothing() -> None:
    inner = dict.fromkeys(("Entrypoint", "Cmd", "Env", "WorkingDir", "User", "Labels", "Volumes", "ExposedPorts"))
    assert m.parse_config(dump(make_config(config=inner, history=None))).config == m.ImageConfig()
    assert m.parse_config(dump(make_config(config=None))).config == m.ImageConfig()


@pytest.mark.parametrize(
    "data",
    [
        {}, make_config(rootfs=None), make_config(rootfs={"type": "x", "diff_ids": []}), make_config(os=None),
        make_config(architecture=""), make_config(rootfs={"type": "layers", "diff_ids": ["sha256:0"]}),
        make_config(config={"Cmd": 1}), make_config(config={"Cmd": [1]}), make_config(config={"Cmd": [None]}),
        make_config(config={"Env": ["A\0B"]}), make_config(config={"Labels": {"a": 1}}), make_config(config={"Labels": []}), make_config(config={"User": 1}), make_config(history={}),
        make_config(config={"User": "\ud800"}), make_config(history=[1]), make_config(history=[{"empty_layer": "x"}]),
        make_config(history={"a": 1}), make_config(config=[1]), make_config(config={"WorkingDir": ["/"]}),
    ],
)  # fmt: skip
def test_malformed_config(data: object) -> None:
    with pytest.raises(IntegrityError):
        m.parse_config(dump(data))


def test_layers_and_diff_ids_must_be_as_many() -> None:
    config = m.parse_config(dump(make_config(rootfs={"type": "layers", "diff_ids": [D2, D3]})))
    with pytest.raises(IntegrityError, match="1 layers"):
        m.check_layers(m.parse_manifest(dump(make_manifest())), config)


def entry(digest: str, system: str = "", architecture: str = "", variant: str = "") -> dict[str, Any]:
    platform = {"os": system, "architecture": architecture, "variant": variant}
    plain = {"mediaType": m.OCI_MANIFEST, "digest": digest, "size": 5}
    return {**plain, "platform": platform} if system else plain


def index(*entries: dict[str, Any]) -> tuple[m.Descriptor, ...]:
    return m.parse_index(dump({"schemaVersion": 2, "mediaType": m.OCI_INDEX, "manifests": list(entries)}))


@pytest.mark.parametrize(
    ("platform", "digest"),
    [
        ("linux/amd64", D1), ("amd64", D1), ("x86_64", D1), ("linux/amd64/v3", D1), ("linux/arm64", D2), ("aarch64", D2),
        ("linux/arm64/v8", D2), ("linux/arm/v7", D3), ("armhf", D3),
    ],
)  # fmt: skip
def test_select_platform(platform: str, digest: str) -> None:
    there = index(
        entry("sha256:" + "f" * 64, "unknown", "unknown"),
        entry(D1, "linux", "amd64"),
        entry(D2, "linux", "arm64", "v8"),
        entry(D3, "linux", "arm", "v6"),
    )
    assert m.select_platform(there, platform).digest == digest


def test_best_variant_wins() -> None:
    there = index(entry(D1, "linux", "arm", "v5"), entry(D2, "linux", "arm", "v7"), entry(D3, "linux", "arm", "v6"))
    assert m.select_platform(there, "linux/arm/v7").digest == D2
    assert m.select_platform(there, "linux/arm/v6").digest == D3


def test_default_platform_is_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(m, "host_platform", lambda: "linux/riscv64")
    assert m.select_platform(index(entry(D1, "linux", "amd64"), entry(D2, "linux", "riscv64")), "").digest == D2


def test_missing_platform_names_those_there_are() -> None:
    with pytest.raises(NotFound) as caught:
        m.select_platform(index(entry(D1, "linux", "s390x"), entry(D2, "unknown", "unknown")), "linux/amd64")
    assert "s390x" in caught.value.hint and "unknown" not in caught.value.hint


def test_single_silent_manifest_is_taken() -> None:
    assert m.select_platform(index(entry(D1)), "linux/arm64").digest == D1
    with pytest.raises(NotFound):
        m.select_platform(index(entry(D1), entry(D2)), "linux/arm64")


@pytest.mark.parametrize("text", ["", "/", "linux/", "a/b/c/d", "linux/am d64", "linux/\0"])
def test_bad_platform(text: str) -> None:
    with pytest.raises(UsageError):
        m.normalise_platform(text)


def test_is_index() -> None:
    manifest, listing = dump(make_manifest()), dump({"schemaVersion": 2, "manifests": []})
    assert not m.is_index("", manifest) and m.is_index("", listing)
    assert m.is_index(m.DOCKER_INDEX, listing) and not m.is_index(m.DOCKER_MANIFEST, listing)


@pytest.mark.parametrize(
    ("text", "time_ns"),
    [
        ("1970-01-01T00:00:00Z", 0), ("1970-01-01T00:00:01.000000001Z", 1_000_000_001),
        ("2024-02-29T12:00:00+02:00", 1_709_200_800_000_000_000), ("2024-02-29T12:00:00-01:30", 1_709_213_400_000_000_000),
        ("0001-01-01T00:00:00Z", 0), ("", 0), ("yesterday", 0), ("2024-13-01T00:00:00Z", 0), ("2024-01-01", 0),
        ("2024-01-01T00:00:00.xZ", 0), ("2024-01-01T00:00:00", 1_704_067_200_000_000_000),
    ],
)  # fmt: skip
def test_times(text: str, time_ns: int) -> None:
    assert m.parse_time(text) == time_ns
    if time_ns:
        assert m.parse_time(m.format_time(time_ns)) == time_ns


def test_garbage_is_always_one_of_our_errors() -> None:
    """Cut and mutate a manifest, an index and a config everywhere: parsed or refused, nothing else."""
    for raw, parse in ((dump(make_manifest()), m.parse_manifest), (dump(make_config()), m.parse_config)):
        for at in range(0, len(raw), 3):
            for bad in (raw[:at], raw[:at] + b"0" + raw[at + 1 :], raw[:at] + b"null" + raw[at + 1 :]):
                try:
                    parse(bad)
                except NagayaError:
                    continue
