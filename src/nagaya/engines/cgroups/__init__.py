"""Control groups: what all processes of one machine may use of this host together. All engines stand on this."""
