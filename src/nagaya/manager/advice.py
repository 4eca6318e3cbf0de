"""What the figures of a comparison mean for who has to choose a type: in words, computed from them alone. Pure."""

from __future__ import annotations

from nagaya.manager.comparing import BARE, MEASURES, Column, Comparison

TRUSTED = "For programs that you trust with this host's kernel"
UNTRUSTED = "For programs that are to have a kernel of their own, because you do not trust them"
NEAR = 1.15  # slower by less than this is not worth a word
_TITLES = {measure.key: measure.title for measure in MEASURES}
_KERNEL = ("syscall", "write", "files", "network")  # what has the guest's kernel at work


def median(values: tuple[float, ...]) -> float:
    """The middle one, or the mean of the middle two. There must be one."""
    ordered = sorted(values)
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2


def costs(column: Column, key: str) -> tuple[float, ...]:
    """How many times as much time (or memory) as the bare host took right beside it, sample by sample."""
    if column.name == BARE:
        return ()
    rate = next(measure.rate for measure in MEASURES if measure.key == key)
    pairs = zip(column.samples.get(key, ()), column.beside.get(key, ()), strict=True)
    return tuple(bare / own if rate else own / bare for own, bare in pairs)


def cost(column: Column, key: str) -> float | None:
    """The middle one of `costs`; None when it was not measured."""
    found = costs(column, key)
    return median(found) if found else None


def advise(comparison: Comparison) -> list[str]:
    """A sentence or two for each type, then which one to take."""
    columns = [column for column in comparison.columns if column.name != BARE]
    lines = [_describe(column) for column in columns]
    lines += [f"{type_}: not measured: {reason}." for type_, reason in comparison.left_out.items()]
    by_name = {column.name: column for column in columns}
    if "container" in by_name and len(columns) > 1:
        lines.append(_container_first(by_name["container"], columns))
    virtual = [by_name[name] for name in ("kvm", "emulated") if name in by_name]
    if len(virtual) == 2:
        lines.append(_between(*virtual))
    elif virtual:
        lines.append(f"{UNTRUSTED}: take {virtual[0].name}, the only type measured here that gives them one.")
    return lines


def _describe(column: Column) -> str:
    words = []
    for key in ("cpu", "memory", *_KERNEL):
        times = cost(column, key)
        if times is not None and times >= NEAR:
            words.append(f"{_TITLES[key]} {_times(times)}")
    start, resident = column.samples.get("start"), column.samples.get("resident")
    begins = [f"starts in {_seconds(median(start))}"] if start else []
    begins += [f"takes {median(resident) / (1 << 20):.0f} MiB of memory"] if resident else []
    slower = (
        f"slower than the bare host: {', '.join(words)}"
        if words
        else "nothing measured is slower than on the bare host"
    )
    return f"{column.name}: {' and '.join(begins)}; {slower}."


def _container_first(container: Column, columns: list[Column]) -> str:
    rest = [column for column in columns if column is not container and column.samples.get("start")]
    start = container.samples.get("start")
    quickest = min((median(column.samples["start"]) for column in rest), default=0.0)
    lead = quickest / median(start) if start else 0.0
    than = f", for it starts {lead:.0f} times as fast as the next" if lead >= 2 else ""
    return f"{TRUSTED}: take container{than}."


def _between(kvm: Column, emulated: Column) -> str:
    """Which of two kernels of one's own: what is slow to start may be quick at work, and the other way round."""
    faster = [key for key in ("cpu", "memory", *_KERNEL) if _lead(emulated, kvm, key) >= NEAR]
    slower = [key for key in ("cpu", "memory", *_KERNEL) if _lead(kvm, emulated, key) >= NEAR]
    start = _start(kvm) - _start(emulated)
    if start <= 0 and not slower:
        return f"{UNTRUSTED}: take kvm, which starts sooner and is as fast or faster in everything measured."
    if start >= 0 and not faster:
        return f"{UNTRUSTED}: take emulated, which starts sooner and is as fast or faster in everything measured."
    sentence = f"{UNTRUSTED}: "
    even = _break_even(kvm, emulated)
    if even is not None and start > 0:
        sentence += (
            f"kvm starts {_seconds(start)} later than emulated and computes {_lead(emulated, kvm, 'cpu'):.1f} times as"
            f" fast: take kvm for work of more than {_seconds(even)} of the bare host's CPU time, emulated for less"
        )
    elif even is not None:
        sentence += (
            f"emulated starts {_seconds(-start)} later than kvm and computes {_lead(kvm, emulated, 'cpu'):.1f} times as"
            f" fast: take emulated for work of more than {_seconds(even)} of the bare host's CPU time, kvm for less"
        )
    else:
        sentence += f"take {'kvm' if start <= 0 else 'emulated'} where starting counts"
    for name, other, keys in (("kvm", "emulated", faster), ("emulated", "kvm", slower)):
        kernel = [_TITLES[key] for key in keys if key in _KERNEL]
        if kernel:
            sentence += f"; {name} is ahead of {other} in {', '.join(kernel)}"
    return sentence + "."


def _start(column: Column) -> float:
    return median(column.samples["start"]) if column.samples.get("start") else 0.0


def _lead(slow: Column, fast: Column, key: str) -> float:
    """How many times as fast as `slow` `fast` is; 0 when one of them is not known."""
    one, other = cost(slow, key), cost(fast, key)
    return one / other if one and other else 0.0


def _break_even(kvm: Column, emulated: Column) -> float | None:
    """Seconds of the bare host's CPU time at which start and work together take both equally long; None for never."""
    one, other = cost(kvm, "cpu"), cost(emulated, "cpu")
    if one is None or other is None or one == other:
        return None
    even = (_start(kvm) - _start(emulated)) / (other - one)
    return even if even > 0 else None


def _seconds(seconds: float) -> str:
    if seconds < 0.001:
        return f"{seconds * 1e6:.0f} us"
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"


def _times(times: float) -> str:
    return f"{times:.1f}x" if times < 10 else f"{times:.0f}x"
