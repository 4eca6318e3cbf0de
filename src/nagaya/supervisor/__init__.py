"""One process per machine instead of a daemon: boot, serve the control socket, reap."""
