/* SPDX-License-Identifier: GPL-2.0 */
/*
 * A kernel in user mode: what privileged mode does for it, and the way between the two.
 *
 * A KVM without hardware behind it (PVM) runs a guest's user mode on the CPU and emulates its privileged mode, about a
 * microsecond an instruction. So this kernel runs in user mode, in page tables that no program of its own ever has, and
 * privileged mode is a few dozen instructions: those between the "ring 0" marks here, and what ring0_call() is asked for.
 *
 * Interrupts are off when depriv_cpu.vif is 0. The CPU's own flag stays on: an interrupt that comes meanwhile is noted in
 * depriv_cpu.pending, and then the CPU's flag is off until depriv_irq_slow() has served it. 0xff there: nothing is to be
 * served, but the CPU's flag is off.
 */
#include <linux/linkage.h>
#include <asm/segment.h>
#include <asm/percpu.h>
#include <asm/asm-offsets.h>
#include <asm/errno.h>
#include <asm/asm.h>
#include <asm/unwind_hints.h>
#include <asm/processor-flags.h>
#include "../entry/calling.h"
#include "depriv.h"

#define VIF		PER_CPU_VAR(depriv_cpu + 0)
#define PENDING		PER_CPU_VAR(depriv_cpu + 1)
#define KERNEL_CR3	PER_CPU_VAR(depriv_cpu + 8)
#define USER_CR3	PER_CPU_VAR(depriv_cpu + 16)
#define CR2		PER_CPU_VAR(depriv_cpu + 24)
#define CALL_FRAME	PER_CPU_VAR(depriv_cpu + 32)

#define IF_OFF		0xff

/* Leave ring 0 for \target, with RAX pointing at what is on the stack. */
.macro LEAVE target flags:req
	movq	%rsp, %rax
	pushq	$__USER_DS
	pushq	%rax
	pushq	\flags
	pushq	$DEPRIV_CS
	pushq	$\target
	iretq
.endm

/* A far jump gives a program the kernel's code segment, but not its page tables. Changes RAX. */
.macro OR_USER target:req
	movq	%cr3, %rax
	testb	$DEPRIV_USER_CR3, %al
	jnz	\target
.endm

/* ---- ring 0 ---- */

	.text
	.align 16
SYM_CODE_START(depriv_stubs)
vector = 0
	.rept 256
	.align DEPRIV_STUB_BYTES
	.if vector == 6
	jmp	ring0_undefined
	.elseif vector == 14
	jmp	ring0_page_fault
	.elseif vector >= 32
	pushq	$vector
	jmp	ring0_interrupt
	.else
	.if !(vector == 8 || (vector >= 10 && vector <= 13) || vector == 17 || vector == 21 || vector == 29 || vector == 30)
	pushq	$0
	.endif
	pushq	$vector
	jmp	ring0_exception
	.endif
	vector = vector + 1
	.endr
SYM_CODE_END(depriv_stubs)

/* vector, error code, RIP, CS, RFLAGS, RSP, SS */
SYM_CODE_START_LOCAL(ring0_exception)
	pushq	%rax
	cmpl	$DEPRIV_CS, 32(%rsp)
	je	1f
	testb	$3, 32(%rsp)
	jz	3f
2:	swapgs
	movq	KERNEL_CR3, %rax
	movq	%rax, %cr3
	LEAVE	from_user $0x202
3:	popq	%rax
	jmp	ring0_own_fault
1:	OR_USER	2b
	movzbl	VIF, %eax
	movb	$0, VIF
	pushq	%rax
	LEAVE	from_kernel 48(%rax)
SYM_CODE_END(ring0_exception)

/* error code, RIP, CS, RFLAGS, RSP, SS. Also each system call: `syscall` lands on LSTAR in user mode, where nothing is. */
SYM_CODE_START_LOCAL(ring0_page_fault)
	pushq	$14
	pushq	%rax
	cmpl	$__USER_CS, 32(%rsp)
	jne	1f
2:	swapgs
	movq	KERNEL_CR3, %rax
	movq	%rax, %cr3
	movq	%cr2, %rax
	movq	%rax, CR2
	LEAVE	from_user $0x202
1:	cmpl	$DEPRIV_CS, 32(%rsp)
	jne	3f
	OR_USER	2b
	movq	%cr2, %rax
	movq	%rax, CR2
	movzbl	VIF, %eax
	movb	$0, VIF
	pushq	%rax
	LEAVE	from_kernel 48(%rax)
3:	testb	$3, 32(%rsp)
	jnz	2b
	popq	%rax
	jmp	ring0_exception
SYM_CODE_END(ring0_page_fault)

/* vector, RIP, CS, RFLAGS, RSP, SS, on a stack of its own. */
SYM_CODE_START_LOCAL(ring0_interrupt)
	pushq	%rax
	cmpl	$DEPRIV_CS, 24(%rsp)
	je	1f
	testb	$3, 24(%rsp)
	jz	3f
4:	swapgs
	movq	KERNEL_CR3, %rax
	movq	%rax, %cr3
	LEAVE	interrupt_from_user $0x2
1:	OR_USER	4b
	cmpb	$0, VIF
	je	2f
	LEAVE	interrupt_from_kernel $0x2
2:	movb	8(%rsp), %al
	movb	%al, PENDING
	popq	%rax
	addq	$8, %rsp
	andl	$~X86_EFLAGS_IF, 16(%rsp)
	iretq
3:	/* From ring0_halt. */
	movb	8(%rsp), %al
	movb	%al, PENDING
	movq	CALL_FRAME, %rsp
	andl	$~X86_EFLAGS_IF, 16(%rsp)
	iretq
SYM_CODE_END(ring0_interrupt)

/* RIP, CS, RFLAGS, RSP, SS */
SYM_CODE_START_LOCAL(ring0_undefined)
	cmpl	$DEPRIV_CS, 8(%rsp)
	jne	1f
	cmpq	$depriv_enter_user, (%rsp)
	je	ring0_enter_user
	cmpq	$ring0, (%rsp)
	jne	1f
	addq	$2, (%rsp)
	jmp	*ring0_requests(, %rax, 8)
1:	pushq	$0
	pushq	$6
	jmp	ring0_exception
SYM_CODE_END(ring0_undefined)

SYM_CODE_START_LOCAL(ring0_enter_user)
	movq	24(%rsp), %rsp
	cmpb	$0, PENDING
	jne	2f
1:	pushq	%rax
	movq	USER_CR3, %rax
	movq	%rax, %cr3
	popq	%rax
	swapgs
	iretq
2:	pushq	%rax
	movzbl	PENDING, %eax
	cmpb	$IF_OFF, %al
	je	3f
	movb	$IF_OFF, PENDING
	pushq	%rax
	LEAVE	interrupt_before_user $0x2
3:	movb	$0, PENDING
	popq	%rax
	jmp	1b
SYM_CODE_END(ring0_enter_user)

SYM_CODE_START_LOCAL(ring0_do_call)
	subq	$8, %rsp
	movq	%rdi, %rax
	movq	%rsi, %rdi
	movq	%rdx, %rsi
	movq	%rcx, %rdx
	movq	%r8, %rcx
	call	*%rax
	addq	$8, %rsp
	iretq
SYM_CODE_END(ring0_do_call)

SYM_CODE_START_LOCAL(ring0_allow)
	orl	$X86_EFLAGS_IF, 16(%rsp)
	iretq
SYM_CODE_END(ring0_allow)

SYM_CODE_START_LOCAL(ring0_write_cr3)
	movq	%rdi, %cr3
	iretq
SYM_CODE_END(ring0_write_cr3)

SYM_CODE_START_LOCAL(ring0_halt)
	cmpb	$0, PENDING
	jne	1f
	sti
	hlt
	cli
1:	iretq
SYM_CODE_END(ring0_halt)

/* A fault of what ring0_call() called: an MSR that is not there, say. vector, error code, RIP, CS, RFLAGS, RSP, SS */
SYM_CODE_START_LOCAL(ring0_own_fault)
	xchgq	%rdi, (%rsp)
	pushq	%rsi
	pushq	%rdx
	pushq	%rcx
	pushq	%rax
	pushq	%r8
	pushq	%r9
	pushq	%r10
	pushq	%r11
	pushq	%rbx
	pushq	%rbp
	pushq	%r12
	pushq	%r13
	pushq	%r14
	pushq	%r15
	movq	%rdi, %rsi
	movq	%rsp, %rdi
	call	depriv_ring0_fault
	POP_REGS
	addq	$8, %rsp
	iretq
SYM_CODE_END(ring0_own_fault)

	.section .rodata, "a"
	.align 8
ring0_requests:
	.quad	ring0_do_call
	.quad	ring0_allow
	.quad	ring0_write_cr3
	.quad	ring0_halt

/* ---- user mode: the kernel ---- */

	.text
/* Have ring 0 do request RAX. Anything that a C function may change is changed. */
SYM_FUNC_START(ring0)
	ud2
	RET
SYM_FUNC_END(ring0)

/* u64 ring0_call(void *function, u64, u64, u64, u64) */
SYM_FUNC_START(ring0_call)
	xorl	%eax, %eax
	jmp	ring0
SYM_FUNC_END(ring0_call)

SYM_FUNC_START(depriv_load_cr3)
	movl	$2, %eax
	jmp	ring0
SYM_FUNC_END(depriv_load_cr3)

/* RAX, vector, error code, RIP, CS, RFLAGS, RSP, SS, on the way from ring 0. */
SYM_CODE_START_LOCAL(from_user)
	movq	PER_CPU_VAR(cpu_current_top_of_stack), %rsp
	cmpq	$entry_SYSCALL_64, 24(%rax)
	je	1f
	pushq	56(%rax)
	pushq	48(%rax)
	pushq	40(%rax)
	pushq	32(%rax)
	pushq	24(%rax)
	pushq	16(%rax)
	PUSH_AND_CLEAR_REGS rax=(%rax)
	movq	8(%rax), %rsi
	movq	%rsp, %rdi
	call	depriv_exception
	jmp	depriv_return_to_user
1:	pushq	$__USER_DS
	pushq	48(%rax)
	pushq	%r11
	pushq	$__USER_CS
	pushq	%rcx
	pushq	(%rax)
	PUSH_AND_CLEAR_REGS rax=$-ENOSYS
	movq	%rsp, %rdi
	movslq	ORIG_RAX(%rsp), %rsi
	call	do_syscall_64
SYM_INNER_LABEL(depriv_return_to_user, SYM_L_GLOBAL)
	cmpw	$DEPRIV_CS, CS(%rsp)
	je	3f
2:	POP_REGS
	addq	$8, %rsp
SYM_INNER_LABEL(depriv_enter_user, SYM_L_GLOBAL)
	ud2
3:	/* A signal's frame may ask for it: no program gets it. */
	movq	$__USER_CS, CS(%rsp)
	jmp	2b
SYM_CODE_END(from_user)

/* VIF, RAX, vector, error code, RIP, CS, RFLAGS, RSP, SS */
SYM_CODE_START_LOCAL(from_kernel)
	movq	56(%rax), %rsp
	subq	$64, %rsp		/* A breakpoint's handler may push on that stack. */
	andq	$-16, %rsp
	pushq	$__KERNEL_DS
	pushq	56(%rax)
	pushq	48(%rax)
	andl	$~X86_EFLAGS_IF, (%rsp)
	cmpb	$0, (%rax)
	je	1f
	orl	$X86_EFLAGS_IF, (%rsp)
1:	pushq	$__KERNEL_CS
	pushq	32(%rax)
	pushq	24(%rax)
	cmpb	$14, 16(%rax)
	jne	2f
	andl	$~4, (%rsp)		/* X86_PF_USER */
2:	PUSH_AND_CLEAR_REGS rax=8(%rax)
	movq	16(%rax), %rsi
	movq	%rsp, %rdi
	call	depriv_exception
	jmp	return_to_kernel
SYM_CODE_END(from_kernel)

/* RAX, vector, RIP, CS, RFLAGS, RSP, SS; the CPU's interrupt flag is off. */
SYM_CODE_START_LOCAL(interrupt_from_user)
	movb	$IF_OFF, PENDING
	movq	PER_CPU_VAR(cpu_current_top_of_stack), %rsp
	pushq	48(%rax)
	pushq	40(%rax)
	pushq	32(%rax)
	pushq	24(%rax)
	pushq	16(%rax)
	pushq	8(%rax)
	PUSH_AND_CLEAR_REGS rax=(%rax)
1:	movq	ORIG_RAX(%rsp), %rsi
	movq	$-1, ORIG_RAX(%rsp)
	movq	%rsp, %rdi
	call	depriv_interrupt
	jmp	depriv_return_to_user
/* vector, RAX, RIP, CS, RFLAGS, RSP, SS, on the task's stack. */
interrupt_before_user:
	movq	8(%rsp), %rax
	popq	(%rsp)
	PUSH_AND_CLEAR_REGS
	jmp	1b
SYM_CODE_END(interrupt_from_user)

SYM_CODE_START_LOCAL(interrupt_from_kernel)
	movb	$IF_OFF, PENDING
	movb	$0, VIF
	movq	40(%rax), %rsp
	andq	$-16, %rsp
	pushq	$__KERNEL_DS
	pushq	40(%rax)
	pushq	32(%rax)
	orl	$X86_EFLAGS_IF, (%rsp)
	pushq	$__KERNEL_CS
	pushq	16(%rax)
	pushq	8(%rax)
	PUSH_AND_CLEAR_REGS rax=(%rax)
	movq	ORIG_RAX(%rsp), %rsi
	movq	$-1, ORIG_RAX(%rsp)
	movq	%rsp, %rdi
	call	depriv_interrupt
	jmp	return_to_kernel
SYM_CODE_END(interrupt_from_kernel)

/*
 * IRET cannot do it: the code segment that it would load is not the CPU's. RIP and RFLAGS go to where RSP is to be; that is
 * above this frame, or its last two words.
 */
SYM_CODE_START_LOCAL(return_to_kernel)
	movq	RSP(%rsp), %rdi
	movq	RIP(%rsp), %rax
	movq	EFLAGS(%rsp), %rcx
	movq	%rax, -8(%rdi)
	movq	%rcx, -16(%rdi)
	subq	$16, %rdi
	movq	%rdi, ORIG_RAX(%rsp)
	testl	$X86_EFLAGS_IF, %ecx
	jz	1f
	POP_REGS
	popq	%rsp
	movb	$1, VIF
	cmpb	$0, PENDING
	jne	2f
	popfq
	RET
1:	POP_REGS
	popq	%rsp
	popfq
	RET
2:	movb	$0, VIF
	popfq
	jmp	depriv_irq_slow
SYM_CODE_END(return_to_kernel)

/* Serve what is pending as if it came at the return address, with VIF 0; then go there with VIF 1. Changes no register. */
SYM_CODE_START_LOCAL(depriv_irq_slow)
	pushfq
	pushq	%rax
	leaq	24(%rsp), %rax
	pushq	$__KERNEL_DS
	pushq	%rax
	movq	24(%rsp), %rax
	orl	$X86_EFLAGS_IF, %eax
	pushq	%rax
	pushq	$__KERNEL_CS
	pushq	48(%rsp)
	pushq	$-1
	movq	48(%rsp), %rax
	PUSH_AND_CLEAR_REGS
	movzbl	PENDING, %ebx
	movb	$0, PENDING
	movl	$1, %eax
	call	ring0
	cmpb	$IF_OFF, %bl
	je	1f
	movq	%rsp, %rdi
	movl	%ebx, %esi
	call	depriv_interrupt
1:	jmp	return_to_kernel
SYM_CODE_END(depriv_irq_slow)

SYM_FUNC_START(depriv_irq_enable)
	movb	$1, VIF
	cmpb	$0, PENDING
	jne	1f
	RET
1:	movb	$0, VIF
	jmp	depriv_irq_slow
SYM_FUNC_END(depriv_irq_enable)

SYM_FUNC_START(depriv_irq_disable)
	movb	$0, VIF
	RET
SYM_FUNC_END(depriv_irq_disable)

SYM_FUNC_START(depriv_save_fl)
	movzbl	VIF, %eax
	shll	$9, %eax
	RET
SYM_FUNC_END(depriv_save_fl)

SYM_FUNC_START(depriv_read_cr2)
	movq	CR2, %rax
	RET
SYM_FUNC_END(depriv_read_cr2)

/* A page-table entry, which user mode may use if it is present. */
SYM_FUNC_START(depriv_make_entry)
	movq	%rdi, %rax
	testb	$1, %al
	jz	1f
	orq	$4, %rax
1:	RET
SYM_FUNC_END(depriv_make_entry)

SYM_FUNC_START(depriv_safe_halt)
	movl	$3, %eax
	call	ring0
	jmp	depriv_irq_enable
SYM_FUNC_END(depriv_safe_halt)

/* From privileged mode, once on each CPU: return in user mode. */
SYM_FUNC_START(depriv_leave_ring0)
	popq	%rdx
	movq	%rsp, %rax
	pushq	$__USER_DS
	pushq	%rax
	pushq	$0x202
	pushq	$DEPRIV_CS
	pushq	%rdx
	iretq
SYM_FUNC_END(depriv_leave_ring0)
