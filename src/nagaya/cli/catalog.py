"""The one table of commands: where each lives and what it is for, in one line. Only the one that runs is imported."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from nagaya.cli.flags import Command

# name -> ("module:NAME" below nagaya.cli.commands, summary)
MACHINES: dict[str, tuple[str, str]] = {
    "run": ("run:RUN", "Create a machine from an image and run a program in it"),
    "exec": ("exec:EXEC", "Run a further program in a running machine"),
    "ps": ("ps:PS", "List machines"),
    "create": ("create:CREATE", "Create a machine without starting it"),
    "start": ("start:START", "Start machines"),
    "stop": ("stop:STOP", "Stop machines: their stop signal, then SIGKILL"),
    "restart": ("stop:RESTART", "Stop machines and start them again"),
    "kill": ("kill:KILL", "Send a signal to machines, SIGKILL unless told otherwise"),
    "pause": ("pause:PAUSE", "Freeze all programs of machines"),
    "unpause": ("pause:UNPAUSE", "Let paused machines go on"),
    "fork": ("fork:FORK", "Make further machines that go on from where one is"),
    "wait": ("wait:WAIT", "Wait until machines end, and print their exit status"),
    "rm": ("rm:RM", "Remove machines"),
    "attach": ("attach:ATTACH", "Connect this terminal to a machine's program"),
    "logs": ("logs:LOGS", "Show what a machine's program has written"),
    "cp": ("cp:CP", "Copy files between a machine and this host"),
    "top": ("top:TOP", "List the programs of a machine"),
    "port": ("port:PORT", "Show which ports of this host lead to a machine"),
    "stats": ("stats:STATS", "Show what machines use of CPU, memory, network and disk"),
    "inspect": ("inspect:INSPECT", "Show everything about machines, images or volumes"),
    "rename": ("rename:RENAME", "Give a machine another name"),
    "update": ("update:UPDATE", "Change limits, type and restart policy of machines"),
    "diff": ("diff:DIFF", "Show what a machine has changed of its image"),
    "commit": ("commit:COMMIT", "Make an image of what a machine has changed"),
    "ssh": ("ssh:SSH", "Log in to a whole machine, or run a command in it"),
    "screen": ("screen:SCREEN", "Say how to look at a whole machine's screen"),
    "screenshot": ("screen:SCREENSHOT", "Write what a whole machine's screen shows to a picture"),
    "sendkey": ("screen:SENDKEY", "Press keys of a whole machine"),
    "insert": ("disc:INSERT", "Put a disc into a CD drive of whole machines"),
    "eject": ("disc:EJECT", "Take the disc out of a CD drive of whole machines"),
    "export": ("export:EXPORT", "Write a machine's files as a tar archive"),
}
IMAGES: dict[str, tuple[str, str]] = {
    "images": ("images:IMAGES", "List images"),
    "pull": ("pull:PULL", "Get an image from a registry, archive, directory or bootstrap source"),
    "push": ("pull:PUSH", "Send an image to a registry, archive or directory"),
    "rmi": ("rmi:RMI", "Remove images"),
    "tag": ("tag:TAG", "Give an image a further name"),
    "import": ("import_:IMPORT", "Make an image of a root file system: a tar archive or a directory"),
    "save": ("save:SAVE", "Write images to an archive"),
    "load": ("save:LOAD", "Read images from an archive"),
    "history": ("history:HISTORY", "Show how an image was made"),
    "login": ("login:LOGIN", "Keep credentials for a registry"),
    "logout": ("login:LOGOUT", "Forget credentials for a registry"),
}
HOST: dict[str, tuple[str, str]] = {
    "events": ("events:EVENTS", "Show what happens to machines, images and volumes"),
    "prune": ("prune:PRUNE", "Remove what nothing uses: ended machines, images without a name"),
    "version": ("version:VERSION", "Show the version of Nagaya and what it runs on"),
    "compare": ("compare:COMPARE", "Measure what each type of machine costs here, and say which to use"),
    "doctor": ("doctor:DOCTOR", "Show what this host can run, and why not the rest"),
    "completion": ("completion:COMPLETION", "Print a completion script for bash, zsh or fish"),
}
HIDDEN: dict[str, tuple[str, str]] = {
    "__complete": ("completion:COMPLETE", "Print what may follow (for the completion scripts)"),
}
SECTIONS = (("Machines", MACHINES), ("Images", IMAGES), ("Host", HOST))

# group -> (summary, {word: name of a command above, or "module:NAME"})
GROUPS: dict[str, tuple[str, dict[str, str]]] = {
    "machine": (
        "The machine commands under one word",
        {"ls": "ps", "prune": "prune:PRUNE_MACHINES", "inspect": "inspect:INSPECT_MACHINE"}
        | {name: name for name in MACHINES if name not in ("ps", "inspect")}
        | {"create": "hardware:CREATE", "build": "build_machine:BUILD"}
        | {"attach-disk": "bay:ATTACH", "detach-disk": "bay:DETACH", "resize-disk": "bay:RESIZE"},
    ),
    "image": (
        "The image commands under one word",
        {
            "ls": "images", "rm": "rmi", "inspect": "inspect:INSPECT_IMAGE", "prune": "prune:PRUNE_IMAGES",
            "pull": "pull", "push": "push", "tag": "tag", "import": "import", "save": "save", "load": "load",
            "history": "history",
        },
    ),
    "volume": (
        "Create, list, inspect and remove volumes",
        {
            "create": "volume:CREATE", "ls": "volume:LS", "inspect": "inspect:INSPECT_VOLUME", "rm": "volume:RM",
            "prune": "prune:PRUNE_VOLUMES",
        },
    ),
    "disk": (
        "Make, convert, clone and check the disks of whole machines",
        {
            "create": "disk:CREATE", "ls": "disk:LS", "info": "disk:INFO", "convert": "disk:CONVERT",
            "clone": "disk:CLONE", "resize": "disk:RESIZE", "snapshot": "disk:SNAPSHOT", "check": "disk:CHECK",
            "rm": "disk:RM",
        },
    ),
    "snapshot": (
        "Take, list, restore and remove snapshots of machines",
        {
            "create": "snapshot:CREATE", "ls": "snapshot:LS", "tree": "snapshot:TREE", "inspect": "snapshot:INSPECT",
            "restore": "snapshot:RESTORE", "save": "snapshot:SAVE", "rename": "snapshot:RENAME", "rm": "snapshot:RM", "prune": "snapshot:PRUNE",
        },
    ),
    "network": (
        "Create, list, inspect and remove networks, plug machines in and out",
        {
            "create": "network:CREATE", "ls": "network:LS", "inspect": "network:INSPECT", "rm": "network:RM",
            "connect": "network:CONNECT", "disconnect": "network:DISCONNECT", "prune": "network:PRUNE",
        },
    ),
    "migrate": (
        "Move running machines to another Nagaya",
        {"send": "migrate:SEND", "receive": "migrate:RECEIVE", "resolve": "migrate:RESOLVE"},
    ),
    "autostart": (
        "Have machines start and stop with the host",
        {
            "enable": "autostart:ENABLE", "disable": "autostart:DISABLE", "ls": "autostart:LS",
            "start": "autostart:START", "stop": "autostart:STOP",
        },
    ),
    "generate": ("Make files for other programs", {"systemd": "generate:SYSTEMD"}),
    "kernel": (
        "Build, list and remove the kernels that machines boot",
        {"build": "kernel:BUILD", "ls": "kernel:LS", "path": "kernel:PATH", "rm": "kernel:RM"},
    ),
    "installer": (
        "List and remove the installers that were fetched for whole machines",
        {"ls": "installer:LS", "rm": "installer:RM", "prune": "installer:PRUNE"},
    ),
    "template": (
        "Build, list and remove what machines of type kvm begin from",
        {"build": "template:BUILD", "ls": "template:LS", "rm": "template:RM", "prune": "template:PRUNE"},
    ),
}  # fmt: skip
GROUP_SUMMARIES = {
    "machine create": "Create a whole machine from disks; or, given an image, as 'nagaya create' does",
    "machine build": "Make a disk with a system on it, from this host's package sources",
    "machine attach-disk": "Put a disk into a whole machine, while it runs too",
    "machine detach-disk": "Take a disk out of a whole machine",
    "machine resize-disk": "Make a whole machine's disk larger, while it runs too",
    "machine prune": "Remove machines that do not run",
    "machine inspect": "Show everything about machines",
    "image inspect": "Show everything about images",
    "image prune": "Remove images that nothing uses",
    "volume create": "Create a volume",
    "volume ls": "List volumes",
    "volume inspect": "Show everything about volumes",
    "volume rm": "Remove volumes",
    "volume prune": "Remove volumes that no machine uses",
    "disk create": "Make an empty disk",
    "disk ls": "List the disks of the store",
    "disk info": "Show what disks are, and what they stand on",
    "disk convert": "Write the content of a disk as a new one, in any format",
    "disk clone": "Copy a disk, or make one that stands on it",
    "disk resize": "Make a disk larger, or smaller",
    "disk snapshot": "Keep states of a disk inside it, and go back to them",
    "disk check": "Check the tables of a disk image",
    "disk rm": "Remove disks",
    "snapshot create": "Take a snapshot of a machine, running or not",
    "snapshot ls": "List snapshots",
    "snapshot tree": "Show which snapshot came from which",
    "snapshot inspect": "Show everything about snapshots",
    "snapshot restore": "Make a machine what it was at a snapshot",
    "snapshot save": "Write a snapshot to a file that another host can open",
    "snapshot rename": "Give a snapshot another name",
    "snapshot rm": "Remove snapshots",
    "snapshot prune": "Remove old snapshots",
    "network create": "Create a network",
    "network ls": "List networks",
    "network inspect": "Show networks, and who is where on them",
    "network rm": "Remove networks",
    "network connect": "Plug a machine into a network",
    "network disconnect": "Take a machine off a network",
    "network prune": "Remove networks that no machine is on",
    "migrate send": "Send a running machine to another Nagaya",
    "migrate receive": "Receive running machines",
    "migrate resolve": "Settle where a machine is whose stream broke at the last step",
    "autostart enable": "Have machines start with the host",
    "autostart disable": "Have machines start with the host no more",
    "autostart ls": "List the machines that start with the host",
    "autostart start": "Start the machines that start with the host",
    "autostart stop": "Stop all machines that run, in good order",
    "generate systemd": "Print a unit that starts and stops a machine with the host",
    "kernel build": "Build a guest kernel from this host's source package",
    "kernel ls": "List guest kernels",
    "kernel path": "Show where a guest kernel is",
    "kernel rm": "Remove guest kernels",
    "installer ls": "List the installers in the cache",
    "installer rm": "Remove installers from the cache",
    "installer prune": "Remove installers that nobody has used for a month",
    "template build": "Boot a machine once and save it for others to begin from",
    "template ls": "List templates",
    "template rm": "Remove templates",
    "template prune": "Remove templates that no machine can begin from any more",
}
_ALIASES = {
    "list": "ls",
    "remove": "rm",
    "delete": "rm",
    "revert": "restore",
}  # second words that Docker's users also know
_TOP_ALIASES = {"ls": "ps", "list": "ps"}


def find(words: list[str]) -> tuple[str, str] | None:
    """(full name, where it lives) of the command that `words` begins with; None when there is no such command."""
    first = _TOP_ALIASES.get(words[0], words[0]) if words else ""
    for section in (MACHINES, IMAGES, HOST, HIDDEN):
        if first in section:
            return first, section[first][0]
    if first in GROUPS and len(words) > 1:
        second = _ALIASES.get(words[1], words[1])
        target = GROUPS[first][1].get(second)
        if target is not None:
            return f"{first} {second}", target if ":" in target else _place(target)
    return None


def _place(name: str) -> str:
    for _, section in SECTIONS:
        if name in section:
            return section[name][0]
    raise KeyError(name)


def summary(full_name: str) -> str:
    """The one line about a command, by its full name ("run", "volume ls")."""
    if full_name in GROUP_SUMMARIES:
        return GROUP_SUMMARIES[full_name]
    name = full_name
    if " " in full_name:
        group, word = full_name.split(" ", 1)
        name = GROUPS[group][1][word]
    for section in (MACHINES, IMAGES, HOST, HIDDEN):
        if name in section:
            return section[name][1]
    raise KeyError(full_name)


def load(place: str) -> Command:
    """Import a command."""
    from importlib import import_module  # in sys.modules from the interpreter's start

    module, _, name = place.partition(":")
    command: Command = getattr(import_module(f"nagaya.cli.commands.{module}"), name)
    return command


def every() -> list[str]:
    """The full name of every visible command."""
    names = [name for _, section in SECTIONS for name in section]
    return names + [f"{group} {word}" for group, (_, words) in GROUPS.items() for word in words]
