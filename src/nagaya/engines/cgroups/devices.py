"""A line of the list of devices that the processes of a control group may use."""

from __future__ import annotations

from nagaya.static import NamedTuple

ANY = -1


class DeviceRule(NamedTuple):
    """One line of the allow-list; -1 stands for any number."""

    type: str  # "c" or "b"
    major: int
    minor: int
    access: str  # out of "rwm"

    def v1(self) -> str:
        """As devices.allow takes it."""
        numbers = [("*" if number == ANY else str(number)) for number in (self.major, self.minor)]
        return f"{self.type} {numbers[0]}:{numbers[1]} {self.access}"

    def bpf(self) -> tuple[str, int, int, str]:
        """As `kernel.bpf.device_program` takes it."""
        return (self.type, self.major, self.minor, self.access)
