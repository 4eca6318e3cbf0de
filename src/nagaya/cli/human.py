"""Sizes, times and spans as people read them, in Docker's words."""

from __future__ import annotations

import time

_MINUTE, _HOUR, _DAY = 60, 3600, 86400


def format_size(count: int) -> str:
    """Decimal units, three digits: "12.3MB"."""
    return _scaled(count, 1000, ("B", "kB", "MB", "GB", "TB", "PB"), 3)


def format_binary_size(count: int) -> str:
    """Binary units, four digits: "117.2MiB"."""
    return _scaled(count, 1024, ("B", "KiB", "MiB", "GiB", "TiB", "PiB"), 4)


def _scaled(count: int, base: int, units: tuple[str, ...], digits: int) -> str:
    value, at = float(count), 0
    while at < len(units) - 1 and float(f"{value:.{digits}g}") >= base:
        value /= base
        at += 1
    text = f"{value:.{digits}g}"
    return (f"{value:.0f}" if "e" in text else text) + units[at]


def format_span(seconds: float) -> str:
    """How long: "Less than a second", "5 minutes", "About an hour", "3 weeks"."""
    whole = int(seconds)
    if whole < 1:
        return "Less than a second"
    if whole < _MINUTE:
        return "1 second" if whole == 1 else f"{whole} seconds"
    if whole < _HOUR:
        minutes = whole // _MINUTE
        return "About a minute" if minutes == 1 else f"{minutes} minutes"
    hours = round(whole / _HOUR)
    if hours < 48:
        return "About an hour" if hours == 1 else f"{hours} hours"
    days = hours // 24
    if days < 14:
        return f"{days} days"
    if days < 60:
        return f"{days // 7} weeks"
    if days < 730:
        return f"{days // 30} months"
    return f"{days // 365} years"


def format_age(since_ns: int, now_ns: int) -> str:
    """How long ago: "5 minutes ago"."""
    return format_span(max(0, now_ns - since_ns) / 1e9) + " ago"


def format_time(time_ns: int) -> str:
    """RFC 3339 with nanoseconds, UTC; "" for 0, "not yet"."""
    if not time_ns:
        return ""
    seconds, rest = divmod(time_ns, 1_000_000_000)
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + f".{rest:09d}Z"


def format_local_time(time_ns: int) -> str:
    """As `docker ps` has it: "2026-11-23 13:37:50 +0000 UTC"."""
    return time.strftime("%Y-%m-%d %H:%M:%S %z %Z", time.localtime(time_ns // 1_000_000_000))
