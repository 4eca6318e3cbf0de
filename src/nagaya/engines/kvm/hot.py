"""Which of Linux's functions `native` runs in user mode while a guest boots.

Chosen by `tools/boot-profile`: what takes more than the 0.1 ms that the way there and back costs, in one call. Seconds
are what they took in a boot with 128 MiB.
"""

from __future__ import annotations

from nagaya.engines.kvm.native import Plan

LINUX = Plan(
    # These do not look at the flags, nor do what they call, but by way of _raw_spin_lock_irqsave().
    run=(
        "memmap_init_range",  # the page structs: 1.0
        "reserve_bootmem_region",  # those of reserved memory
        "__kernel_physical_mapping_init",  # the map of all RAM: 1.1, most of it for looking ranges up in the e820 map
        "memblock_alloc_try_nid",  # early memory, cleared: 0.2
        "__free_pages_core",  # early memory given to the allocator: 0.4
        "vsnprintf",  # 0.7, in 1,300 calls
        "chacha_permute",  # random numbers: 0.2
        "blake2s_compress_generic",
        "clear_page_rep",  # 0.2
        "clear_page_orig",
        "find_entry.isra.0",  # a sysctl by its name: 0.3
    ),
    begin=(
        "parse_args",  # the command line, compared with 400 names, eight times: 0.5
        "kernfs_link_sibling",  # a file of /sys by its name: 0.3
    ),
    # Files that no program needs, 5.5 s in all: /sys/kernel/slab, /sys/module/*/parameters, /sys/kernel/irq.
    skip=("slab_sysfs_init", "param_sysfs_init", "irq_sysfs_init"),
    # It gives back the memory of functions that only a boot needs, some of these among them.
    end="free_initmem",
)
NAMES = (*LINUX.run, *LINUX.begin, *LINUX.skip, LINUX.end)
