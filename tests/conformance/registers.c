/* Whether programs that run at once have each its own AVX registers: "apart", "mixed", or "none" on a CPU without. */
#include <stdio.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

static int keeps(int number)
{
	long long put[4], got[4];
	for (int i = 0; i < 4; i++)
		put[i] = 0x1111111111111111LL * (number + 1) + i;
	for (int round = 0; round < 100000; round++) {
		__asm__ volatile("vmovdqu %0, %%ymm7" : : "m"(put));
		for (volatile int i = 0; i < 50; i++)
			;
		if (round % 100 == 0)
			getppid();
		__asm__ volatile("vmovdqu %%ymm7, %0" : "=m"(got));
		if (memcmp(put, got, sizeof(put)))
			return 0;
	}
	return 1;
}

int main(void)
{
	int status, mixed = 0;
	if (!__builtin_cpu_supports("avx")) {
		puts("none");
		return 0;
	}
	for (int number = 0; number < 4; number++)
		if (!fork())
			_exit(!keeps(number));
	while (wait(&status) > 0)
		mixed |= status;
	puts(mixed ? "mixed" : "apart");
	return 0;
}
