"""The KVM engine: a virtual machine monitor over /dev/kvm. `machine.Machine` puts its parts together."""
