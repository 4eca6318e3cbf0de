"""`nagaya login` and `nagaya logout`."""

from __future__ import annotations

import sys

from nagaya.cli.context import Context
from nagaya.cli.flags import Command, Flag, Parsed
from nagaya.errors import UsageError

HUB = "docker.io"


def login(context: Context, parsed: Parsed) -> int:
    """Ask for what was not given, let the registry check it, and keep it."""
    from nagaya.images.sources import registry_login  # lazy: this command only

    registry = parsed.words[0] if parsed.words else HUB
    if parsed.switch("password-stdin") and parsed.given("password"):
        raise UsageError("--password and --password-stdin exclude each other", hint="use --password-stdin")
    user = parsed.text("username") or _ask_user(parsed)
    if parsed.switch("password-stdin"):
        password = sys.stdin.read(1 << 16).rstrip("\r\n")
    else:
        password = parsed.text("password") or _ask_password(user)
    if not user or not password or ":" in user:
        raise UsageError("a user name (without ':') and a password are needed", hint="nagaya login -u USER REGISTRY")
    registry_login.check(registry, user, password, insecure=parsed.switch("insecure"))
    kept = registry_login.keep(registry, user, password)
    print(f"Login succeeded, kept in {kept.place}")
    if kept.plain:
        print("  It is not encrypted there; only you can read the file.", file=sys.stderr)
    return 0


def logout(context: Context, parsed: Parsed) -> int:
    """Forget what `login` kept."""
    from nagaya.images.sources import registry_login  # lazy: this command only

    registry = parsed.words[0] if parsed.words else HUB
    kept = registry_login.forget(registry)
    print(f"Removed the credentials for {registry} from {kept.place}")
    return 0


def _ask_user(parsed: Parsed) -> str:
    if parsed.switch("password-stdin") or not sys.stdin.isatty():
        raise UsageError("there is no user name", hint="nagaya login -u USER --password-stdin REGISTRY < secret")
    sys.stderr.write("User name: ")
    sys.stderr.flush()
    return sys.stdin.readline().strip()


def _ask_password(user: str) -> str:
    if not sys.stdin.isatty():
        raise UsageError(
            "there is no terminal to ask for the password on", hint="--password-stdin reads it from a pipe"
        )
    from getpass import getpass  # lazy: asks without echo

    return getpass(f"Password of {user}: ", stream=sys.stderr)


LOGIN = Command(
    login,
    usage="[REGISTRY]",
    words=(0, 1),
    flags=(
        Flag("-u --username", "User name", value="USER"),
        Flag("-p --password", "Password; other users of this host can see it while the command runs", value="PASSWORD"),
        Flag("--password-stdin", "Read the password from standard input"),
        Flag("--insecure", "Allow a registry on loopback without TLS"),
    ),
    about="Credentials are kept where Docker and containers tools look for them: REGISTRY_AUTH_FILE, or config.json in"
    " DOCKER_CONFIG (default ~/.docker), or the credential helper that it names.",
    examples=(("nagaya login -u me --password-stdin registry.example < token", ""),),
)
LOGOUT = Command(logout, usage="[REGISTRY]", words=(0, 1), examples=(("nagaya logout registry.example", ""),))
