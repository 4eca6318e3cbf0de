"""Machines that QEMU emulates: for hosts without KVM, and for other CPUs than the host's.

`boards` knows the machines that we emulate and `arguments` puts one into a command line; `process` starts it with the
least rights, `monitor` speaks with it, and `engine` puts it together.
"""
