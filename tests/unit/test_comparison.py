"""What `compare` makes of figures: costs, words, bars. The figures themselves are measured in tests/e2e/test_compare.py."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nagaya.cli import comparison
from nagaya.manager.advice import advise, cost, costs, median
from nagaya.manager.comparing import BARE, MEASURES, Column, Comparison

HOST = {
    "start": (0.001,) * 3, "cpu": (1e8, 2e8, 1e8), "memory": (1e10,) * 3, "syscall": (1e-7,) * 3, "write": (1e9,) * 3,
    "files": (1e4,) * 3, "network": (1e-5,) * 3, "resident": (2e5,) * 3,
}  # fmt: skip


def make_column(name: str, start_s: float, **times: float) -> Column:
    """A type that takes `times` as much of everything as the bare host did right beside it."""
    rates = {measure.key: measure.rate for measure in MEASURES}
    samples = {
        key: tuple(value / times.get(key, 1) if rates[key] else value * times.get(key, 1) for value in values)
        for key, values in HOST.items()
    }
    return Column(name, samples | {"start": (start_s,) * 3}, HOST, {})


CONTAINER = make_column("container", 0.05)
KVM = make_column("kvm", 10.0, syscall=50, write=10, files=8, network=40)
EMULATED = make_column("emulated", 1.0, cpu=10, memory=8, syscall=2, write=5, files=2, network=8)
ALL = Comparison((Column(BARE, HOST, {}, {}), CONTAINER, KVM, EMULATED), {})


def test_the_middle() -> None:
    assert median((3.0, 1.0, 2.0)) == 2.0
    assert median((4.0, 1.0, 2.0, 3.0)) == 2.5
    assert median((7.0,)) == 7.0


def test_costs_are_taken_pair_by_pair() -> None:
    """A host that doubles its speed half-way has made nothing slower."""
    assert costs(CONTAINER, "cpu") == (1.0, 1.0, 1.0)
    assert costs(EMULATED, "cpu") == pytest.approx((10.0,) * 3)
    assert cost(KVM, "syscall") == pytest.approx(50)
    assert costs(ALL.columns[0], "cpu") == ()
    assert cost(Column("kvm", {}, {}, {"network": "no address"}), "network") is None


def test_the_advice_follows_from_the_figures() -> None:
    lines = advise(ALL)
    assert (
        lines[0]
        == "container: starts in 50 ms and takes 0 MiB of memory; nothing measured is slower than on the bare host."
    )
    assert "CPU-bound work 10x" in lines[2] and "CPU-bound work" not in lines[1]
    assert lines[3].endswith("take container, for it starts 20 times as fast as the next.")
    # kvm starts 9 s later and computes 10 times as fast: even at 9 / (10 - 1) = 1 s.
    assert "kvm starts 9.0 s later than emulated and computes 10.0 times as fast" in lines[4]
    assert "take kvm for work of more than 1.0 s of the bare host's CPU time, emulated for less" in lines[4]
    assert "emulated is ahead of kvm in one system call, file written and synced" in lines[4]


def test_a_hardware_kvm_is_simply_better() -> None:
    kvm = make_column("kvm", 0.3, write=1.1)
    assert "take kvm, which starts sooner" in advise(ALL._replace(columns=(ALL.columns[0], kvm, EMULATED)))[-1]


def test_what_a_host_lacks_is_said() -> None:
    lines = advise(Comparison((ALL.columns[0], CONTAINER, EMULATED), {"kvm": "there is no /dev/kvm"}))
    assert "kvm: not measured: there is no /dev/kvm." in lines
    assert lines[-1].endswith("take emulated, the only type measured here that gives them one.")


def test_the_table_has_every_measure_and_its_spread() -> None:
    lines = comparison.render_table(ALL, width=0)
    assert lines[0].split() == ["bare", "host", "container", "kvm", "emulated"]
    assert len(lines) == 1 + 2 * len(MEASURES)
    assert "10 s (10000x)" in lines[1]
    cpu = lines[1 + 2 * [measure.key for measure in MEASURES].index("cpu") + 1]
    assert "100 Msteps/s .. 200 Msteps/s, n=3" in cpu


def test_bars_grow_with_the_cost() -> None:
    for unicode, block in ((True, "█"), (False, "#")):
        lines = comparison.render_bars(ALL, unicode=unicode)
        assert all(line.isascii() for line in lines) != unicode
        container, kvm, emulated = [line.count(block) for line in lines[1:4]]
        assert 0 < container < emulated < kvm == comparison.BAR_CELLS


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [("start", 1.31, "1.31 s"), ("start", 0.0421, "42.1 ms"), ("syscall", 1.2e-7, "120 ns"), ("network", 2.5e-5, "25 us"),
     ("memory", 1.72e10, "17.2 GB/s"), ("cpu", 3.1e8, "310 Msteps/s"), ("files", 950.0, "950 files/s"),
     ("resident", 11 << 20, "11 MiB")],
)  # fmt: skip
def test_figures(key: str, value: float, text: str) -> None:
    assert comparison.format_figure(next(m for m in MEASURES if m.key == key), value) == text


def test_the_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="optional: matplotlib")
    path = tmp_path / "walls.png"
    comparison.write_picture(ALL, str(path), title="test")
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert os.path.getsize(path) > 10_000
