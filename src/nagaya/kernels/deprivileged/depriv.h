/* SPDX-License-Identifier: GPL-2.0 */
#ifndef _DEPRIV_H
#define _DEPRIV_H

/* Entry 7 of the GDT, which Linux has no use for: the kernel's code in user mode. */
#define DEPRIV_CS		0x3b
/* X86_CR3_PWT, which means nothing to who walks page tables in software: set in the page tables of programs. */
#define DEPRIV_USER_CR3		8
#define DEPRIV_STUB_BYTES	16

#endif
