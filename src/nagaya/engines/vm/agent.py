"""Where the guest agent's programs are: one for each CPU that machines of ours have."""

from __future__ import annotations

import os


def agent_path(architecture: str = "") -> str:
    """The agent for `architecture` (as uname(2) says it; "" = the host's): NAGAYA_AGENT, or the package's own.

    NAGAYA_AGENT may hold `{arch}`; without, it stands for the host's CPU only.
    """
    host = os.uname().machine
    architecture = architecture or host
    override = os.environ.get("NAGAYA_AGENT", "")
    if "{arch}" in override:
        return override.replace("{arch}", architecture)
    if override and architecture == host:
        return override
    package = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    suffix = "" if architecture == host else f"-{architecture}"
    return f"{package}/_guest/nagaya-agent{suffix}"
