"""What somebody may have meant who typed something unknown. Imported only once something is wrong."""

from __future__ import annotations

from difflib import get_close_matches

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

# Flags that Docker's users know and this version does not have: what to do instead.
_INSTEAD = {
    "--privileged": "give what the program needs: --cap-add ALL, --device, --security-opt systempaths=unconfined",
    "--memory-swap": "a machine gets no swap limit of its own; -m limits its memory",
    "--shm-size": "mount it yourself: --tmpfs /dev/shm:size=256m",
    "--gpus": "pass the device nodes with --device",
    "--runtime": "--type selects what kind of wall a machine has: container, kvm or emulated",
    "--group-add": "groups come from the machine's /etc/group; -u USER:GROUP picks the main one",
    "--cpu-shares": "--cpus limits the processor time",
    "--cpu-quota": "--cpus limits the processor time",
    "--volumes-from": "name the volumes: -v NAME:/path",
    "--log-driver": "logs are files below the store; see --log-opt max-size and max-file",
}
_GLOBAL = ("--root", "--run-dir", "--debug")


def guess_flag(spelling: str, known: Iterable[str]) -> str:
    """A hint for an unknown flag, or ""."""
    if spelling in _INSTEAD:
        return _INSTEAD[spelling]
    if spelling in _GLOBAL:
        return f"{spelling} goes before the command: nagaya {spelling} … COMMAND"
    longs = [name for name in known if name.startswith("--")]
    prefixed = [name for name in longs if len(spelling) > 3 and name.startswith(spelling)]
    close = prefixed or get_close_matches(spelling, longs, n=1, cutoff=0.6)
    if spelling.startswith("--") and close:
        return f"did you mean {close[0]}?"
    return ""


def guess_word(word: str, known: Iterable[str]) -> str:
    """A hint for an unknown word out of a closed list, or ""."""
    close = get_close_matches(word.lower(), list(known), n=1, cutoff=0.6)
    return f"did you mean '{close[0]}'?" if close else ""
