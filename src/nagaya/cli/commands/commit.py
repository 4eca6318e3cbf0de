"""`nagaya commit`."""

from __future__ import annotations

from nagaya.cli.context import Context
from nagaya.cli.flags import Command, Flag, Parsed


def commit(context: Context, parsed: Parsed) -> int:
    """Make the image, and print its id."""
    machine = context.host.machines.get(parsed.words[0])
    image = machine.commit(
        parsed.words[1],
        author=parsed.text("author"),
        message=parsed.text("message"),
        changes=tuple(parsed.texts("change")),
        pause=parsed.switch("pause"),
    )
    print(image.id)
    return 0


COMMIT = Command(
    commit,
    usage="MACHINE REPOSITORY[:TAG]",
    words=(2, 2),
    flags=(
        Flag("-a --author", "Author", value="TEXT"),
        Flag("-m --message", "What was changed", value="TEXT"),
        Flag("-c --change", "Apply a Dockerfile instruction: CMD, ENTRYPOINT, ENV, …", value="INSTRUCTION", many=True),
        Flag("-p --pause", "Pause the machine meanwhile", default=True),
    ),
    examples=(("nagaya commit -m 'with nginx' -c 'CMD [\"nginx\"]' web web:1", ""),),
)
