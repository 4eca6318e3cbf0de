"""Disk images of whole machines: raw, qcow2, VMDK, VDI, VHD and VHDX.

`formats` is the table of them, `headers` reads what one says of itself, `chain` opens one with all that lies under it,
`program` runs qemu-img, and `store` is what `nagaya disk` calls. A guest may have written every byte of an image: what a
format is, nobody but a name or a caller says, and a header is believed only after it was checked.
"""
