"""What every command gets: the host that it works on, made when it is first asked for."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from nagaya.manager.host import Host


class Context:
    """The global flags, and `host`."""

    def __init__(self, *, root: str = "", run_dir: str = "", debug: bool = False) -> None:
        self.root = root
        self.run_dir = run_dir
        self.debug = debug
        self._host: Host | None = None

    @property
    def host(self) -> Host:
        if self._host is None:
            from nagaya.manager.host import Host  # lazy: `--help` and `version` need none

            self._host = Host(root=self.root, run_dir=self.run_dir)
        return self._host
