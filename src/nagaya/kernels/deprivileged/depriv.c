// SPDX-License-Identifier: GPL-2.0
/*
 * A kernel in user mode, for a KVM that emulates privileged mode (PVM). See depriv_entry.S. Asked for with "depriv" on the
 * command line; without, nothing of this is used but the hooks that Xen's paravirtual guests need too.
 */
#include <linux/init.h>
#include <linux/kernel.h>
#include <linux/mm.h>
#include <linux/extable.h>
#include <linux/percpu.h>
#include <linux/sched.h>
#include <asm/apic.h>
#include <asm/cmdline.h>
#include <asm/cpufeature.h>
#include <asm/debugreg.h>
#include <asm/desc.h>
#include <asm/idtentry.h>
#include <asm/insn.h>
#include <asm/io.h>
#include <asm/paravirt.h>
#include <asm/pgalloc.h>
#include <asm/setup.h>
#include <asm/special_insns.h>
#include <asm/syscall.h>
#include <asm/tlbflush.h>
#include <asm/trap_pf.h>
#include "depriv.h"

/* depriv_entry.S knows where these are. */
struct depriv_cpu {
	u8 vif;
	u8 pending;
	unsigned long kernel_cr3;
	unsigned long user_cr3;
	unsigned long cr2;
	unsigned long call_frame;
};
DEFINE_PER_CPU(struct depriv_cpu, depriv_cpu);

struct depriv_tables {
	u8 stack[PAGE_SIZE];
	u8 interrupt_stack[PAGE_SIZE];
	struct desc_struct gdt[GDT_ENTRIES] __aligned(64);
	struct x86_hw_tss tss __aligned(64);
} __aligned(PAGE_SIZE);

static struct depriv_tables boot_tables;
static struct depriv_tables *tables[NR_CPUS] = { &boot_tables };
static gate_desc gates[256] __aligned(PAGE_SIZE);
bool depriv_on;
/* Of the tables that a boot begins with. */
static unsigned long early_cr3;

extern const u8 depriv_stubs[];
u64 ring0_call(void *function, ...);
void depriv_load_cr3(unsigned long cr3);
void depriv_leave_ring0(void);
void depriv_safe_halt(void);
void depriv_irq_enable(void);
void depriv_irq_disable(void);
unsigned long depriv_save_fl(void);
unsigned long depriv_read_cr2(void);
u64 depriv_make_entry(u64 value);

/* ---- what needs privileged mode ---- */

static void depriv_cpuid(unsigned int *eax, unsigned int *ebx, unsigned int *ecx, unsigned int *edx)
{
	ring0_call(native_cpuid, eax, ebx, ecx, edx);
}

static unsigned long depriv_get_debugreg(int number)
{
	return ring0_call(native_get_debugreg, (long)number);
}

static void depriv_set_debugreg(int number, unsigned long value)
{
	ring0_call(native_set_debugreg, (long)number, value);
}

static unsigned long depriv_read_cr0(void)
{
	return ring0_call(native_read_cr0);
}

static void depriv_write_cr0(unsigned long value)
{
	ring0_call(native_write_cr0, value);
}

static void depriv_write_cr4(unsigned long value)
{
	ring0_call(native_write_cr4, value & ~(X86_CR4_SMEP | X86_CR4_SMAP | X86_CR4_UMIP));
}

static u64 depriv_read_msr(unsigned int msr)
{
	return ring0_call(native_read_msr, (long)msr);
}

static void depriv_write_msr(unsigned int msr, unsigned int low, unsigned int high)
{
	ring0_call(native_write_msr, (long)msr, (long)low, (long)high);
}

static u64 depriv_read_msr_safe(unsigned int msr, int *error)
{
	return ring0_call(native_read_msr_safe, (long)msr, error);
}

static int depriv_write_msr_safe(unsigned int msr, unsigned int low, unsigned int high)
{
	return ring0_call(native_write_msr_safe, (long)msr, (long)low, (long)high);
}

static void depriv_load_gs_index(unsigned int selector)
{
	ring0_call(native_load_gs_index, (long)selector);
}

static void depriv_load_tls(struct thread_struct *thread, unsigned int cpu)
{
	unsigned int number;

	for (number = 0; number < GDT_ENTRY_TLS_ENTRIES; number++)
		tables[cpu]->gdt[GDT_ENTRY_TLS_MIN + number] = thread->tls_array[number];
}

static void depriv_load_descriptors(const struct desc_ptr *descriptors)
{
}

static void depriv_set_ldt(const void *entries, unsigned int count)
{
}

static unsigned long depriv_store_tr(void)
{
	return GDT_ENTRY_TSS * 8;
}

static void depriv_load_sp0(unsigned long sp0)
{
}

static void depriv_halt(void)
{
	ring0_call(native_halt);
}

static void depriv_write_cr2(unsigned long value)
{
	this_cpu_write(depriv_cpu.cr2, value);
}

static unsigned long depriv_read_cr3(void)
{
	return this_cpu_read(depriv_cpu.kernel_cr3);
}

static void depriv_flush_tlb_user(void)
{
	depriv_load_cr3(this_cpu_read(depriv_cpu.kernel_cr3));
}

static void depriv_flush_tlb_kernel(void)
{
	ring0_call(native_flush_tlb_global);
}

static void depriv_flush_tlb_one_user(unsigned long address)
{
	ring0_call(native_flush_tlb_one_user, address);
}

/*
 * ---- two tables of one address space ----
 *
 * A program's table differs from the kernel's in its top level: there the kernel's half is not user mode's.
 */

static void depriv_write_cr3(unsigned long cr3)
{
	struct page *page = pfn_to_page(cr3 >> PAGE_SHIFT);
	unsigned long user = 0;

	if (__va(cr3 & PAGE_MASK) != swapper_pg_dir && system_state >= SYSTEM_SCHEDULING)
		user = page_private(page);
	this_cpu_write(depriv_cpu.kernel_cr3, cr3);
	this_cpu_write(depriv_cpu.user_cr3, user ? __pa(user) | DEPRIV_USER_CR3 : cr3);
	depriv_load_cr3(cr3);
}

static int depriv_pgd_alloc(struct mm_struct *mm)
{
	pgd_t *user = (pgd_t *)get_zeroed_page(GFP_KERNEL_ACCOUNT);
	int number;

	if (!user)
		return -ENOMEM;
	for (number = KERNEL_PGD_BOUNDARY; number < PTRS_PER_PGD; number++)
		user[number].pgd = swapper_pg_dir[number].pgd & ~_PAGE_USER;
	set_page_private(virt_to_page(mm->pgd), (unsigned long)user);
	return 0;
}

static void depriv_pgd_free(struct mm_struct *mm, pgd_t *pgd)
{
	free_page(page_private(virt_to_page(pgd)));
	set_page_private(virt_to_page(pgd), 0);
}

static void depriv_set_p4d(p4d_t *entry, p4d_t value)
{
	unsigned long number = (unsigned long)entry % PAGE_SIZE / sizeof(*entry);
	pgd_t *user;

	WRITE_ONCE(*entry, value);
	if (number >= KERNEL_PGD_BOUNDARY || system_state < SYSTEM_SCHEDULING)
		return;
	user = (pgd_t *)page_private(virt_to_page(entry));
	if (user)
		WRITE_ONCE(user[number].pgd, value.pgd.pgd);
}

static void *early_table(unsigned long entry, bool early)
{
	unsigned long pa = entry & PTE_PFN_MASK;

	return early ? (void *)(pa + __START_KERNEL_map - phys_base) : __va(pa);
}

/* Make the kernel's page at `address` user mode's; false if it was. */
static bool depriv_open(unsigned long address)
{
	bool early = this_cpu_read(depriv_cpu.kernel_cr3) == early_cr3;
	unsigned long *table = early_table(this_cpu_read(depriv_cpu.kernel_cr3), early);
	bool changed = false;
	int shift;

	for (shift = PGDIR_SHIFT; shift >= PAGE_SHIFT; shift -= 9) {
		unsigned long *entry = &table[address >> shift & 511];

		if (!(*entry & _PAGE_PRESENT))
			return false;
		if (!(*entry & _PAGE_USER)) {
			*entry |= _PAGE_USER;
			changed = true;
		}
		if (*entry & _PAGE_PSE && shift != PGDIR_SHIFT)
			break;
		table = early_table(*entry, early);
	}
	if (changed && !early)
		depriv_flush_tlb_one_user(address);
	else if (changed)
		depriv_flush_tlb_user();
	return changed;
}

/* At the start: all of the kernel's half. */
static void __init depriv_open_all(unsigned long *table, int shift)
{
	int number;

	for (number = shift == PGDIR_SHIFT ? KERNEL_PGD_BOUNDARY : 0; number < 512; number++) {
		if (!(table[number] & _PAGE_PRESENT))
			continue;
		table[number] |= _PAGE_USER;
		if (shift > PAGE_SHIFT && !(table[number] & _PAGE_PSE && shift != PGDIR_SHIFT))
			depriv_open_all(early_table(table[number], true), shift - 9);
	}
}

/* ---- exceptions and interrupts ---- */

static u64 ring0_in(unsigned long port, unsigned long size)
{
	return size == 1 ? inb(port) : size == 2 ? inw(port) : inl(port);
}

static void ring0_out(unsigned long port, unsigned long size, unsigned long value)
{
	if (size == 1)
		outb(value, port);
	else if (size == 2)
		outw(value, port);
	else
		outl(value, port);
}

static void ring0_xsetbv(unsigned long index, unsigned long low, unsigned long high)
{
	asm volatile("xsetbv" : : "c" (index), "a" (low), "d" (high));
}

static u64 ring0_read_cr4(void)
{
	return native_read_cr4();
}

/* A privileged instruction that no hook has taken the place of. */
static bool depriv_emulate(struct pt_regs *regs)
{
	const u8 *at = (const u8 *)regs->ip;
	unsigned long size = 4, *registers[8] = {
		&regs->ax, &regs->cx, &regs->dx, &regs->bx, &regs->sp, &regs->bp, &regs->si, &regs->di,
	};

	if (*at == 0x66) {
		size = 2;
		at++;
	}
	switch (*at) {
	case 0xe4: case 0xe5:
		size = *at == 0xe4 ? 1 : size;
		regs->ax = ring0_call(ring0_in, (long)at[1], size);
		at += 2;
		break;
	case 0xe6: case 0xe7:
		size = *at == 0xe6 ? 1 : size;
		ring0_call(ring0_out, (long)at[1], size, regs->ax);
		at += 2;
		break;
	case 0xec: case 0xed: {
		unsigned long mask;

		size = *at == 0xec ? 1 : size;
		mask = size == 4 ? ~0UL : (1UL << 8 * size) - 1;
		regs->ax = (regs->ax & ~mask) | (ring0_call(ring0_in, regs->dx & 0xffff, size) & mask);
		at++;
		break;
	}
	case 0xee: case 0xef:
		size = *at == 0xee ? 1 : size;
		ring0_call(ring0_out, regs->dx & 0xffff, size, regs->ax);
		at++;
		break;
	case 0xf4:
		ring0_call(native_halt);
		at++;
		break;
	case 0x0f:
		switch (at[1]) {
		case 0x01:
			if (at[2] != 0xd1)
				return false;
			ring0_call(ring0_xsetbv, regs->cx, regs->ax, regs->dx);
			at += 3;
			break;
		case 0x06: case 0x09:
			at += 2;
			break;
		case 0x20:
			if ((at[2] & 0xf8) == 0xe0)
				*registers[at[2] & 7] = ring0_call(ring0_read_cr4);
			else if ((at[2] & 0xf8) == 0xc0)
				*registers[at[2] & 7] = depriv_read_cr0();
			else if ((at[2] & 0xf8) == 0xd0)
				*registers[at[2] & 7] = depriv_read_cr2();
			else if ((at[2] & 0xf8) == 0xd8)
				*registers[at[2] & 7] = depriv_read_cr3();
			else
				return false;
			at += 3;
			break;
		case 0x30:
			depriv_write_msr(regs->cx, regs->ax, regs->dx);
			at += 2;
			break;
		default:
			return false;
		}
		break;
	default:
		return false;
	}
	regs->ip = (unsigned long)at;
	return true;
}

/* Nothing can be told from there: without an IDT the next exception is a triple fault, which the VMM reports. */
__visible void depriv_ring0_fault(struct pt_regs *regs, unsigned long vector)
{
	unsigned long code = regs->orig_ax;
	struct desc_ptr none = {};

	regs->orig_ax = -1;
	if (fixup_exception(regs, vector, code, 0))
		return;
	native_load_idt(&none);
	asm volatile("ud2");
}

static __ref void depriv_early_exception(struct pt_regs *regs, unsigned long vector)
{
	do_early_exception(regs, vector);
}

__visible noinstr void depriv_exception(struct pt_regs *regs, unsigned long vector)
{
	unsigned long code = regs->orig_ax;
	unsigned long address = this_cpu_read(depriv_cpu.cr2);

	regs->orig_ax = -1;
	if (!user_mode(regs)) {
		if (vector == X86_TRAP_PF && code & X86_PF_PROT && (long)address < 0 && depriv_open(address))
			return;
		if (vector == X86_TRAP_GP && depriv_emulate(regs))
			return;
	}
	if (this_cpu_read(depriv_cpu.kernel_cr3) == early_cr3) {
		depriv_early_exception(regs, vector);
		return;
	}
	switch (vector) {
	case X86_TRAP_DE: exc_divide_error(regs); break;
	case X86_TRAP_DB:
		if (user_mode(regs))
			noist_exc_debug(regs);
		else
			exc_debug(regs);
		break;
	case X86_TRAP_BP: exc_int3(regs); break;
	case X86_TRAP_OF: exc_overflow(regs); break;
	case X86_TRAP_BR: exc_bounds(regs); break;
	case X86_TRAP_UD: exc_invalid_op(regs); break;
	case X86_TRAP_NM: exc_device_not_available(regs); break;
	case X86_TRAP_TS: exc_invalid_tss(regs, code); break;
	case X86_TRAP_NP: exc_segment_not_present(regs, code); break;
	case X86_TRAP_SS: exc_stack_segment(regs, code); break;
	case X86_TRAP_GP: exc_general_protection(regs, code); break;
	case X86_TRAP_PF: exc_page_fault(regs, code); break;
	case X86_TRAP_MF: exc_coprocessor_error(regs); break;
	case X86_TRAP_AC: exc_alignment_check(regs, code); break;
	case X86_TRAP_XF: exc_simd_coprocessor_error(regs); break;
	default: exc_spurious_interrupt_bug(regs); break;
	}
}

__visible noinstr void depriv_interrupt(struct pt_regs *regs, unsigned long vector)
{
	switch (vector) {
#ifdef CONFIG_SMP
	case RESCHEDULE_VECTOR: sysvec_reschedule_ipi(regs); break;
	case CALL_FUNCTION_VECTOR: sysvec_call_function(regs); break;
	case CALL_FUNCTION_SINGLE_VECTOR: sysvec_call_function_single(regs); break;
	case IRQ_MOVE_CLEANUP_VECTOR: sysvec_irq_move_cleanup(regs); break;
	case REBOOT_VECTOR: sysvec_reboot(regs); break;
#endif
	case LOCAL_TIMER_VECTOR: sysvec_apic_timer_interrupt(regs); break;
	case X86_PLATFORM_IPI_VECTOR: sysvec_x86_platform_ipi(regs); break;
#ifdef CONFIG_IRQ_WORK
	case IRQ_WORK_VECTOR: sysvec_irq_work(regs); break;
#endif
#ifdef CONFIG_KVM_GUEST
	case HYPERVISOR_CALLBACK_VECTOR: sysvec_kvm_asyncpf_interrupt(regs); break;
#endif
	case SPURIOUS_APIC_VECTOR: sysvec_spurious_apic_interrupt(regs); break;
	case ERROR_APIC_VECTOR: sysvec_error_interrupt(regs); break;
	default:
		if (vector < FIRST_SYSTEM_VECTOR)
			common_interrupt(regs, vector);
		else
			spurious_interrupt(regs, vector);
		break;
	}
}

/* ---- the start ---- */

static void depriv_take_cpu(struct depriv_tables *own)
{
	struct desc_ptr gdt = { sizeof(own->gdt) - 1, (unsigned long)own->gdt };
	struct desc_ptr idt = { sizeof(gates) - 1, (unsigned long)gates };
	tss_desc tss;

	own->gdt[GDT_ENTRY_KERNEL32_CS] = (struct desc_struct)GDT_ENTRY_INIT(0xc09b, 0, 0xfffff);
	own->gdt[GDT_ENTRY_KERNEL_CS] = (struct desc_struct)GDT_ENTRY_INIT(0xa09b, 0, 0xfffff);
	own->gdt[GDT_ENTRY_KERNEL_DS] = (struct desc_struct)GDT_ENTRY_INIT(0xc093, 0, 0xfffff);
	own->gdt[GDT_ENTRY_DEFAULT_USER32_CS] = (struct desc_struct)GDT_ENTRY_INIT(0xc0fb, 0, 0xfffff);
	own->gdt[GDT_ENTRY_DEFAULT_USER_DS] = (struct desc_struct)GDT_ENTRY_INIT(0xc0f3, 0, 0xfffff);
	own->gdt[GDT_ENTRY_DEFAULT_USER_CS] = (struct desc_struct)GDT_ENTRY_INIT(0xa0fb, 0, 0xfffff);
	own->gdt[DEPRIV_CS >> 3] = (struct desc_struct)GDT_ENTRY_INIT(0xa0fb, 0, 0xfffff);
	own->tss.sp0 = (unsigned long)(own->stack + sizeof(own->stack));
	own->tss.ist[0] = (unsigned long)(own->interrupt_stack + sizeof(own->interrupt_stack));
	own->tss.io_bitmap_base = sizeof(own->tss);
	set_tssldt_descriptor(&tss, (unsigned long)&own->tss, DESC_TSS, sizeof(own->tss) - 1);
	memcpy(&own->gdt[GDT_ENTRY_TSS], &tss, sizeof(tss));

	this_cpu_write(depriv_cpu.vif, 0);
	this_cpu_write(depriv_cpu.pending, 0);
	this_cpu_write(depriv_cpu.kernel_cr3, __native_read_cr3());
	this_cpu_write(depriv_cpu.user_cr3, __native_read_cr3());
	this_cpu_write(depriv_cpu.call_frame, own->tss.sp0 - 5 * 8);
	native_load_gdt(&gdt);
	native_load_idt(&idt);
	asm volatile("ltr %w0" : : "q" (GDT_ENTRY_TSS * 8));
	depriv_leave_ring0();
}

/* On the CPU that starts another one. */
int depriv_prepare_cpu(int cpu)
{
	if (depriv_on && !tables[cpu])
		tables[cpu] = (struct depriv_tables *)__get_free_pages(GFP_KERNEL | __GFP_ZERO,
								       get_order(sizeof(*tables[cpu])));
	return depriv_on && !tables[cpu] ? -ENOMEM : 0;
}

/* On the CPU that starts, in privileged mode. */
void depriv_start_cpu(void)
{
	if (depriv_on)
		depriv_take_cpu(tables[raw_smp_processor_id()]);
}

void __init depriv_start(void)
{
	int number;

	if (!cmdline_find_option_bool(boot_command_line, "depriv"))
		return;
	depriv_on = true;
	setup_force_cpu_cap(X86_FEATURE_XENPV);
	setup_force_cpu_cap(X86_FEATURE_CX16);
	setup_clear_cpu_cap(X86_FEATURE_PCID);
	setup_clear_cpu_cap(X86_FEATURE_SMEP);
	setup_clear_cpu_cap(X86_FEATURE_SMAP);
	setup_clear_cpu_cap(X86_FEATURE_UMIP);
	setup_clear_cpu_cap(X86_FEATURE_INVPCID);
	setup_clear_cpu_cap(X86_FEATURE_XSAVES);	/* privileged; XSAVEC is not */

	pv_info.name = "user mode";
	pv_ops.cpu.cpuid = depriv_cpuid;
	pv_ops.cpu.get_debugreg = depriv_get_debugreg;
	pv_ops.cpu.set_debugreg = depriv_set_debugreg;
	pv_ops.cpu.read_cr0 = depriv_read_cr0;
	pv_ops.cpu.write_cr0 = depriv_write_cr0;
	pv_ops.cpu.write_cr4 = depriv_write_cr4;
	pv_ops.cpu.wbinvd = paravirt_nop;
	pv_ops.cpu.read_msr = depriv_read_msr;
	pv_ops.cpu.write_msr = depriv_write_msr;
	pv_ops.cpu.read_msr_safe = depriv_read_msr_safe;
	pv_ops.cpu.write_msr_safe = depriv_write_msr_safe;
	pv_ops.cpu.load_tr_desc = paravirt_nop;
	pv_ops.cpu.set_ldt = depriv_set_ldt;
	pv_ops.cpu.load_gdt = depriv_load_descriptors;
	pv_ops.cpu.load_idt = depriv_load_descriptors;
	pv_ops.cpu.store_tr = depriv_store_tr;
	pv_ops.cpu.load_tls = depriv_load_tls;
	pv_ops.cpu.load_gs_index = depriv_load_gs_index;
	pv_ops.cpu.load_sp0 = depriv_load_sp0;
	pv_ops.cpu.io_delay = paravirt_nop;
	pv_ops.irq.save_fl = __PV_IS_CALLEE_SAVE(depriv_save_fl);
	pv_ops.irq.irq_disable = __PV_IS_CALLEE_SAVE(depriv_irq_disable);
	pv_ops.irq.irq_enable = __PV_IS_CALLEE_SAVE(depriv_irq_enable);
	pv_ops.irq.safe_halt = depriv_safe_halt;
	pv_ops.irq.halt = depriv_halt;
	pv_ops.mmu.flush_tlb_user = depriv_flush_tlb_user;
	pv_ops.mmu.flush_tlb_kernel = depriv_flush_tlb_kernel;
	pv_ops.mmu.flush_tlb_one_user = depriv_flush_tlb_one_user;
	pv_ops.mmu.read_cr2 = __PV_IS_CALLEE_SAVE(depriv_read_cr2);
	pv_ops.mmu.write_cr2 = depriv_write_cr2;
	pv_ops.mmu.read_cr3 = depriv_read_cr3;
	pv_ops.mmu.write_cr3 = depriv_write_cr3;
	pv_ops.mmu.pgd_alloc = depriv_pgd_alloc;
	pv_ops.mmu.pgd_free = depriv_pgd_free;
	pv_ops.mmu.set_p4d = depriv_set_p4d;
	pv_ops.mmu.make_pte = __PV_IS_CALLEE_SAVE(depriv_make_entry);
	pv_ops.mmu.make_pmd = __PV_IS_CALLEE_SAVE(depriv_make_entry);
	pv_ops.mmu.make_pud = __PV_IS_CALLEE_SAVE(depriv_make_entry);
	pv_ops.mmu.make_pgd = __PV_IS_CALLEE_SAVE(depriv_make_entry);

	early_cr3 = __native_read_cr3();
	depriv_open_all((unsigned long *)early_top_pgt, PGDIR_SHIFT);
	native_write_cr3(__native_read_cr3());
	for (number = 0; number < 256; number++)
		pack_gate(&gates[number], GATE_INTERRUPT, (unsigned long)depriv_stubs + number * DEPRIV_STUB_BYTES,
			  number == X86_TRAP_BP || number == X86_TRAP_OF ? 3 : 0, number >= 32 ? 1 : 0, __KERNEL_CS);
	depriv_take_cpu(&boot_tables);
}
