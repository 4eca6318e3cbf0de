"""What a failed request is called: supervisor/requests.py."""

from __future__ import annotations

import pytest

from nagaya.supervisor import requests


@pytest.mark.parametrize("op", requests._REQUESTS)
def test_every_request_has_words_for_people(op: str) -> None:
    assert "_" not in requests.describe({"op": op})


def test_no_words_are_left_of_a_request_that_is_gone() -> None:
    assert set(requests._WORDS) <= set(requests._REQUESTS)


def test_words() -> None:
    assert requests.describe({"op": "plug_disk"}) == "attach the disk"
    assert requests.describe({"op": "resize_disk"}) == "resize the disk"
    assert requests.describe({"op": "pause"}) == "pause"
