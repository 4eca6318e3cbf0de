# A kernel whose functions `test_kvm_native.py` has run in user mode. It may not be there for long: see IMAGE_BASE.
	.text
	.globl _start
_start:
	mov $7, %eax
	call nothing
	mov %rax, results(%rip)
	mov $MANY, %ecx
	call work
	mov %rax, results+8(%rip)
	call locked			# interrupts are off
	mov %rax, results+16(%rip)
	mov $100, %ecx
	call begun
	mov %rax, results+24(%rip)
	sti
	mov $MANY, %ecx
	call begun
	cli
	mov %rax, results+32(%rip)
	call over
	mov $1000, %ecx
	call work
	mov %rax, results+40(%rip)
	mov %cs, %eax
	mov %rax, results+48(%rip)
	mov $FOREVER, %ecx
	out %al, $0x10
	hlt

	.type nothing, @function
nothing:
	mov $5, %eax
	add $4, %eax
	ret

	.type work, @function
work:					# how often it went round
	push %r12
	xor %eax, %eax
1:	inc %rax
	dec %ecx
	jnz 1b
	pop %r12
	ret

	.type locked, @function
locked:					# the flags as they were
	push %r12
	push %rbx
	pushf
	pop %rbx
	cli
	mov %rbx, %rax
	pop %rbx
	pop %r12
	ret

	.type begun, @function
begun:					# likewise, after a while
	push %r13
1:	dec %ecx
	jnz 1b
	pushf
	pop %r13
	cli
	mov %r13, %rax
	test $0x200, %eax
	jz 2f
	sti
2:	pop %r13
	ret

	.type over, @function
over:
	push %rax
	pop %rax
	ret

	.type endless, @function
endless:
	push %r12
1:	inc %rax
	jmp 1b

	.globl call_endless
call_endless:
	call endless
	hlt

	.balign 8
results:
	.fill 7, 8, 0
