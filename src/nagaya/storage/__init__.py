"""What lies on disk: paths, locks, records, volumes, rootfs plans."""
