"""Machines that QEMU emulates: for hosts without KVM, and for other CPUs than the host's.

`boards` knows the machines that we emulate and `arguments` puts one into a command line; `rights` are what QEMU keeps,
`monitor` speaks with it, `console` keeps what it says, and `engine` puts it together.
"""
