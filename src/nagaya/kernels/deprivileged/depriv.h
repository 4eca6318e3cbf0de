/* SPDX-License-Identifier: GPL-2.0 */
#ifndef _DEPRIV_H
#define _DEPRIV_H

/* Entry 7 of the GDT, which Linux has no use for: the kernel's code in user mode. */
#define DEPRIV_CS		0x3b
#define DEPRIV_STUB_BYTES	16

#endif
