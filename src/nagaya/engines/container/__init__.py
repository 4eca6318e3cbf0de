"""The container engine: namespaces, mounts, cgroups, capabilities, seccomp. No runc underneath."""
