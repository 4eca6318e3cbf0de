"""Rates as the words that tc and nft are told."""

from __future__ import annotations

from nagaya.net import rates


def test_a_bucket_holds_a_packet_before_segmentation() -> None:
    assert rates.burst_bytes(8000) > 2 * 65536
    assert rates.burst_bytes(10**10) == 62_500_000  # 50 ms of it


def test_both_directions_have_the_rate() -> None:
    words = rates.tc_words("ngy0", 10_000_000)
    assert words[words.index("rate") + 1] == "10000000bit"
    assert "limit rate over 1250000 bytes/second" in rates.nft_text("ngy0", 10_000_000)
    assert 'device "ngy0"' in rates.nft_text("ngy0", 10_000_000)
