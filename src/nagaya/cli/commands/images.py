"""`nagaya images`."""

from __future__ import annotations

import time

from nagaya.cli import filters, listing, views
from nagaya.cli.context import Context
from nagaya.cli.flags import Command, Flag, Parsed


def images(context: Context, parsed: Parsed) -> int:
    """List images, of one repository when it is named."""
    wanted = filters.parse_filters(parsed.texts("filter"), filters.IMAGE_KEYS)
    if parsed.words:
        wanted.setdefault("reference", []).append(parsed.words[0])
    store = context.host.images
    found = [
        image
        for image in store.list()
        if filters.matches_image(
            wanted, views.image_facts(image), created_ns_of=lambda name: store.get(name).created_ns
        )
    ]
    now_ns, no_trunc = time.time_ns(), parsed.switch("no-trunc")
    layout = views.IMAGES
    if parsed.switch("digests"):
        layout = layout._replace(columns=("Repository", "Tag", "Digest", "ID", "Created", "Size"))
    listing.print_list(
        parsed,
        layout,
        rows=lambda: [row for image in found for row in views.image_rows(image, now_ns=now_ns, no_trunc=no_trunc)],
        records=lambda: [views.image_record(image) for image in found],
        ids=lambda: [image.id if no_trunc else views.short_id(image.id) for image in found],
    )
    return 0


IMAGES = Command(
    images,
    usage="[REPOSITORY[:TAG]]",
    words=(0, 1),
    flags=(
        Flag("-a --all", "Accepted; all images are shown anyway"),
        Flag("--digests", "Show the digests of the manifests"),
        listing.FILTER,
        listing.FORMAT,
        listing.JSON,
        listing.NO_TRUNC,
        listing.QUIET,
    ),
    about="Filters: " + ", ".join(filters.IMAGE_KEYS) + ".\nFields: " + ", ".join(views.IMAGES.headings) + ".",
    examples=(("nagaya images", ""), ("nagaya images --filter dangling=true -q", "")),
)
