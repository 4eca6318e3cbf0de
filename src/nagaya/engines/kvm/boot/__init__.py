"""From a kernel's file to what a machine starts from: bytes in guest memory, and the first vCPU's registers.

`load` is the front door. `elf` and `bzimage` read files that may be anything, `linux` and `pvh` are the two ways to hand
over to a kernel. All of it is data: nothing here touches a guest.
"""
