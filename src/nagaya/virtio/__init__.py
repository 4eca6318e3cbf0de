"""Virtio devices over shared memory: bytes and descriptors, and no idea of KVM. After virtio 1.2, an OASIS standard."""
