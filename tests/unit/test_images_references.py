"""Image names: what is one, what it is called here and what its registry calls it."""

from __future__ import annotations

import pytest

from nagaya.errors import UsageError
from nagaya.images.references import normalise, parse_reference

DIGEST = "sha256:" + "0a" * 32


@pytest.mark.parametrize(
    ("text", "name", "canonical"),
    [
        ("debian", "debian:latest", "docker.io/library/debian:latest"),
        ("debian:12", "debian:12", "docker.io/library/debian:12"),
        ("docker.io/library/debian", "debian:latest", "docker.io/library/debian:latest"),
        ("docker.io/debian", "debian:latest", "docker.io/library/debian:latest"),
        ("index.docker.io/team/app:1", "team/app:1", "docker.io/team/app:1"),
        ("library/debian", "debian:latest", "docker.io/library/debian:latest"),
        ("team/app", "team/app:latest", "docker.io/team/app:latest"),
        ("localhost/app", "localhost/app:latest", "localhost/app:latest"),
        ("localhost:5000/x", "localhost:5000/x:latest", "localhost:5000/x:latest"),
        ("127.0.0.1:5000/a/b/c:v1.2-rc_3", "127.0.0.1:5000/a/b/c:v1.2-rc_3", "127.0.0.1:5000/a/b/c:v1.2-rc_3"),
        ("[::1]:5000/x", "[::1]:5000/x:latest", "[::1]:5000/x:latest"),
        ("example.com/a__b/c-d/e.f", "example.com/a__b/c-d/e.f:latest", "example.com/a__b/c-d/e.f:latest"),
        ("a--b", "a--b:latest", "docker.io/library/a--b:latest"),
    ],
)
def test_names(text: str, name: str, canonical: str) -> None:
    reference = parse_reference(text)
    assert (reference.name, reference.canonical) == (name, canonical)
    assert parse_reference(reference.canonical) == reference, "its canonical form means the same"


def test_digest() -> None:
    reference = parse_reference(f"ghcr.io/a/b@{DIGEST}")
    assert (reference.tag, reference.digest, str(reference)) == ("", DIGEST, f"ghcr.io/a/b@{DIGEST}")
    both = parse_reference(f"app:1@{DIGEST}")
    assert (both.tag, both.digest) == ("1", DIGEST)
    with pytest.raises(UsageError):
        normalise(f"app@{DIGEST}")


@pytest.mark.parametrize(
    "text",
    [
        "", ":", "a:", ":tag", "/a", "a/", "a//b", "-a", "a-", "a..b", "a.-b", "a___b", "a:b:c", "a b", "a\nb", "ä",
        "a@", "a@sha256:00", "a@md5:" + "0" * 32, f"a@{DIGEST.upper()}", "a:" + "x" * 129, "a:-x", "a:.x", "x" * 256,
        "host:0/x", "host:99999/x", "host:port/x", "-h.x/y", "[::1/x", "[]:5/x", "../x", "./x", "a/../b", "a\0b",
    ],
)  # fmt: skip
def test_refused(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_reference(text)
    assert "\n" not in caught.value.message and "\0" not in caught.value.message


def test_upper_case_gets_a_hint() -> None:
    with pytest.raises(UsageError) as caught:
        parse_reference("Debian")
    assert "'debian'" in caught.value.hint


@pytest.mark.parametrize(("text", "bare"), [("debian:12", True), ("a/b", False), ("localhost/a", False)])
def test_bare(text: str, bare: bool) -> None:
    assert parse_reference(text).is_bare is bare
