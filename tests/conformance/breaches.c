/* What no program may do: each in a process of its own, and by which signal that ended. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

struct __attribute__((packed)) far_pointer {
	unsigned offset;
	unsigned short selector;
};

#define TRY(name, ...)                                                       \
	do {                                                                 \
		int status;                                                  \
		if (!fork()) {                                               \
			alarm(20);                                           \
			__VA_ARGS__;                                         \
			_exit(0);                                            \
		}                                                            \
		wait(&status);                                               \
		printf("%s %d\n", name, WIFSIGNALED(status) ? WTERMSIG(status) : 0); \
		fflush(stdout);                                              \
	} while (0)

#define JUMP(chosen)                                                         \
	static struct far_pointer to = { 0, chosen };                        \
	__asm__ volatile("ljmp *%0" : : "m"(to))

int main(void)
{
	TRY("hlt", __asm__ volatile("hlt"));
	TRY("cli", __asm__ volatile("cli"));
	TRY("out", __asm__ volatile("outb %%al, $0x80" : :));
	TRY("rdmsr", __asm__ volatile("rdmsr" : : "c"(0x10) : "eax", "edx"));
	TRY("cr3", __asm__ volatile("mov %%cr3, %%rax" : : : "rax"));
	TRY("swapgs", __asm__ volatile("swapgs"));
	TRY("sysret", __asm__ volatile("sysretq"));
	TRY("text", *(volatile long *)0xffffffff81000000UL);
	TRY("jump", ((void (*)(void))0xffffffff81000000UL)());
	TRY("memory", *(volatile long *)0xffff888000100000UL);
	TRY("store", *(volatile long *)0xffff888000100000UL = 1);
	TRY("segment", JUMP(0x10));
	TRY("segment3", JUMP(0x3b)); /* that of a kernel in user mode (src/nagaya/kernels/deprivileged) */
	TRY("ud2", __asm__ volatile("ud2"));
	TRY("int3", __asm__ volatile("int3"));
	TRY("step", __asm__ volatile("pushf; orl $0x100, (%rsp); popf; nop"));
	TRY("null", *(volatile int *)0 = 1);
	TRY("flags", __asm__ volatile("pushf; orl $0x3200, (%rsp); popf"));
	return 0;
}
