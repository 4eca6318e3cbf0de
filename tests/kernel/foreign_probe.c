/* A program for machines with another CPU: says what it runs on, how many CPUs there are, and its standard input. */

#include <stdio.h>
#include <stdlib.h>
#include <sys/utsname.h>
#include <unistd.h>

int main(int count, char **words)
{
	struct utsname name;
	char buffer[65536];
	ssize_t size;

	if (uname(&name))
		return 1;
	printf("%s %ld\n", name.machine, sysconf(_SC_NPROCESSORS_ONLN));
	fflush(stdout);
	while ((size = read(0, buffer, sizeof buffer)) > 0)
		if (write(1, buffer, (size_t)size) != size)
			return 2;
	return count > 1 ? atoi(words[1]) : 0;
}
