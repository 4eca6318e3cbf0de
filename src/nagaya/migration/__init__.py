"""A machine on its way to another Nagaya: the stream's frames, the offer, the stream itself. docs/migration.md."""
