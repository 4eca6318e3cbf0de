"""`nagaya completion SHELL`: small scripts that ask `nagaya __complete` what may follow.

The scripts know nothing of commands or flags, so they need no renewal when those change.
"""

from __future__ import annotations

from nagaya.cli import catalog
from nagaya.cli.context import Context
from nagaya.cli.flags import MANY, Command, Flag, Parsed
from nagaya.errors import NagayaError, UsageError

_BASH = """\
_nagaya() {
    local IFS=$'\\n' cur=${COMP_WORDS[COMP_CWORD]}
    # Bash cuts words at ':' and '='; what stands before the last of them is not to be repeated.
    local line=${COMP_LINE:0:COMP_POINT}
    local -a words
    IFS=$' \\t\\n' read -r -a words <<< "$line"
    [[ $line == *[[:space:]] ]] && words+=("")
    local last=${words[${#words[@]}-1]}
    COMPREPLY=($(nagaya __complete -- "${words[@]:1}" 2>/dev/null))
    if [[ ${#COMPREPLY[@]} -eq 0 ]]; then
        COMPREPLY=($(compgen -f -- "$cur"))
    elif [[ $last == *[:=]* ]]; then
        COMPREPLY=("${COMPREPLY[@]#"${last%"$cur"}"}")
    fi
}
complete -o filenames -o nosort -F _nagaya nagaya 2>/dev/null || complete -F _nagaya nagaya
"""
_ZSH = """\
#compdef nagaya
_nagaya() {
    local -a found
    found=("${(@f)$(nagaya __complete -- "${(@)words[2,CURRENT]}" 2>/dev/null)}")
    if [[ -n "${found[1]}" ]]; then
        compadd -Q -- "${found[@]}"
    else
        _files
    fi
}
compdef _nagaya nagaya
"""
_FISH = """\
function __nagaya_complete
    set -l words (commandline -opc) (commandline -ct)
    nagaya __complete -- $words[2..-1] 2>/dev/null
end
complete -c nagaya -a '(__nagaya_complete)'
"""
_SCRIPTS = {"bash": _BASH, "zsh": _ZSH, "fish": _FISH}

# What the words of a command name; a volume's or an image's command is found by its name.
_IMAGE_COMMANDS = (
    "run", "create", "images", "push", "rmi", "tag", "save", "history", "image rm", "image push", "image tag",
    "image save", "image history", "image inspect", "machine run", "machine create",
)  # fmt: skip
_VOLUME_COMMANDS = ("volume rm", "volume inspect")
_DISK_COMMANDS = ("disk info", "disk convert", "disk clone", "disk resize", "disk check", "disk rm")
_NETWORK_COMMANDS = (
    "network rm", "network inspect", "network connect", "network disconnect",
)  # fmt: skip
_KERNEL_COMMANDS = ("kernel rm", "kernel path")
_INSTALLER_COMMANDS = ("installer rm",)
_FLAG_VALUES = {
    "network": ("bridge", "host", "none", "user"),
    "pull": ("always", "missing", "never"),
    "restart": ("always", "no", "on-failure", "unless-stopped"),
    "type": ("container", "emulated", "kvm"),
    "userns": ("auto", "host"),
    "signal": ("HUP", "INT", "KILL", "QUIT", "TERM", "USR1", "USR2"),
    "stop-signal": ("HUP", "INT", "KILL", "QUIT", "TERM", "USR1", "USR2"),
}


def completion(context: Context, parsed: Parsed) -> int:
    """Print the script."""
    shell = parsed.words[0]
    if shell not in _SCRIPTS:
        raise UsageError(f"there is no completion for '{shell}'", hint="one of: bash, zsh, fish")
    print(_SCRIPTS[shell], end="")
    return 0


def complete(context: Context, parsed: Parsed) -> int:
    """Print what may stand in place of the last word, a line each; nothing where a file's name is expected."""
    for candidate in candidates(context, list(parsed.words)):
        print(candidate)
    return 0


def candidates(context: Context, words: list[str]) -> list[str]:
    """All that may stand in place of the last of `words` (which follow "nagaya")."""
    *before, current = words or [""]
    found = catalog.find(before) if before else None
    if found is None:
        return _matching(current, _first_words(before))
    name, place = found
    command = catalog.load(place)
    before = before[name.count(" ") + 1 :]
    known = {spelling: flag for flag in command.flags for spelling in flag.names}
    given, pending = _read(command, known, before)
    if command.program_after and given >= command.program_after:
        return []
    if pending is not None:
        return _matching(current, list(_FLAG_VALUES.get(pending.key, ())))
    if current.startswith("-"):
        return _matching(current, sorted(s for s in [*known, "--help"] if s.startswith("--") or current == "-"))
    return _matching(current, _names(context, name))


def _first_words(before: list[str]) -> list[str]:
    if not before:
        names = [name for _, section in catalog.SECTIONS for name in section]
        return sorted([*names, *catalog.GROUPS, "help", "--help", "--version", "--root", "--run-dir", "--debug"])
    if before == ["help"]:
        return _first_words([])
    if len(before) == 1 and before[0] in catalog.GROUPS:
        return sorted(catalog.GROUPS[before[0]][1])
    return []


def _read(command: Command, known: dict[str, Flag], words: list[str]) -> tuple[int, Flag | None]:
    """(words given so far, the flag whose value comes next). Tolerant: a line that is being typed may be wrong."""
    count, pending = 0, None
    for word in words:
        if pending is not None:
            pending = None
        elif word.startswith("-") and word != "-" and not (command.program_after and count >= command.program_after):
            spelling = word if word.startswith("--") else "-" + word[-1]
            flag = known.get(spelling)
            pending = flag if flag is not None and flag.value else None
        else:
            count += 1
    return count, pending


def _names(context: Context, command: str) -> list[str]:
    """Names of what the command works on; none when the store cannot be read."""
    try:
        if command == "completion":
            return sorted(_SCRIPTS)
        if command in _VOLUME_COMMANDS:
            return [volume.name for volume in context.host.volumes.list()]
        if command in _DISK_COMMANDS:
            return [disk.name for disk in context.host.disks.list()]
        if command in _NETWORK_COMMANDS:
            from nagaya.net.networks import names as network_names

            found = network_names(context.host.paths.root)
            plugs = command.endswith("connect")
            return found + ([machine.name for machine in context.host.machines.list()] if plugs else [])
        if command in _KERNEL_COMMANDS:
            from nagaya.kernels.cache import list_kernels

            return [kernel.id for kernel in list_kernels()]
        if command in _INSTALLER_COMMANDS:
            from nagaya.storage.disk_images.installer_cache import list_kept

            return [one.id for one in list_kept()]
        names: list[str] = []
        if command in _IMAGE_COMMANDS or command == "inspect":
            names += [name for image in context.host.images.list() for name in image.names]
        takes_machine = "MACHINE" in catalog.load((catalog.find(command.split()) or ("", ""))[1]).usage
        if takes_machine or command == "inspect":
            machines = [machine.name for machine in context.host.machines.list()]
            names += [name + ":" for name in machines] if command.endswith("cp") else machines
        return names
    except (NagayaError, OSError):
        return []


def _matching(current: str, words: list[str]) -> list[str]:
    return [word for word in words if word.startswith(current)]


COMPLETION = Command(
    completion,
    usage="bash|zsh|fish",
    words=(1, 1),
    examples=(
        ('eval "$(nagaya completion bash)"', "in ~/.bashrc"),
        ('eval "$(nagaya completion zsh)"', "in ~/.zshrc, after compinit"),
        ("nagaya completion fish | source", "in config.fish"),
    ),
)
COMPLETE = Command(complete, usage="WORDS", words=(0, MANY))
