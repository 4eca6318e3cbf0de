/* ps: one JSON line for each process of this PID namespace, from /proc. */
#define _GNU_SOURCE
#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "spawn.h"

#define KERNEL_THREAD 0x00200000 /* PF_KTHREAD, include/linux/sched.h: a virtual machine shows its kernel's */

static ssize_t read_file(int proc, const char *pid, const char *name, char *out, size_t size)
{
	char path[64];
	int fd;

	snprintf(path, sizeof path, "%.20s/%s", pid, name);
	fd = openat(proc, path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return -1;
	ssize_t n = read(fd, out, size - 1);
	close(fd);
	if (n >= 0)
		out[n] = 0;
	return n;
}

static void user_name(uid_t uid, char *name, size_t size)
{
	char line[1024];
	FILE *file = open_database("/etc/passwd");

	snprintf(name, size, "%u", (unsigned)uid);
	while (file && fgets(line, sizeof line, file)) {
		char *colon = strchr(line, ':'), *id = colon ? strchr(colon + 1, ':') : NULL;
		if (id && isdigit((unsigned char)id[1]) && strtoul(id + 1, NULL, 10) == uid) {
			snprintf(name, size, "%.*s", (int)(colon - line), line);
			break;
		}
	}
	if (file)
		fclose(file);
}

static void print_process(int proc, const char *pid)
{
	char stat_text[1024], status_text[4096], command[4096], name[128], *uid_line;
	unsigned long utime, stime;
	unsigned flags;
	long rss;
	int ppid;
	char state;

	if (read_file(proc, pid, "stat", stat_text, sizeof stat_text) <= 0 ||
	    read_file(proc, pid, "status", status_text, sizeof status_text) <= 0)
		return; /* it has just ended */
	/* Not the owner of /proc/PID: that is root for a process that may not be dumped. The name in it has no newline. */
	if (!(uid_line = strstr(status_text, "\nUid:\t")))
		return;
	unsigned uid = (unsigned)strtoul(uid_line + 6, NULL, 10);
	/* The name stands in parentheses and may hold any byte, a ')' too: the last one closes it. */
	char *open = strchr(stat_text, '('), *close = strrchr(stat_text, ')');
	if (!open || !close ||
	    sscanf(close + 1, " %c %d %*d %*d %*d %*d %u %*u %*u %*u %*u %lu %lu %*d %*d %*d %*d %*d %*d %*u %*u %ld", &state,
		   &ppid, &flags, &utime, &stime, &rss) != 6 ||
	    flags & KERNEL_THREAD)
		return;
	ssize_t n = read_file(proc, pid, "cmdline", command, sizeof command);
	while (n > 0 && !command[n - 1])
		n--;
	for (ssize_t i = 0; i < n; i++)
		if (!command[i])
			command[i] = ' ';
	if (n <= 0)
		n = snprintf(command, sizeof command, "[%.*s]", (int)(close - open - 1), open + 1);
	long tick = sysconf(_SC_CLK_TCK);
	user_name(uid, name, sizeof name);
	printf("{\"pid\":%s,\"ppid\":%d,\"uid\":%u,\"user\":", pid, ppid, uid);
	json_string(name, strlen(name));
	printf(",\"cpu_ms\":%lu,\"rss_bytes\":%lld,\"state\":\"%c\",\"command\":", (utime + stime) * 1000 / (unsigned long)tick,
	       (long long)rss * sysconf(_SC_PAGESIZE), isalpha((unsigned char)state) ? state : '?');
	json_string(command, (size_t)n);
	printf("}\n");
}

int applet_ps(int argc, char **argv)
{
	DIR *dir;
	struct dirent *entry;

	if (argc != 1) {
		fprintf(stderr, "usage: %s\n", argv[0]);
		return 2;
	}
	if (!(dir = opendir("/proc"))) {
		fprintf(stderr, "/proc: %s\n", strerror(errno));
		return 1;
	}
	while ((entry = readdir(dir)))
		if (isdigit((unsigned char)entry->d_name[0]) && strtol(entry->d_name, NULL, 10) != getpid())
			print_process(dirfd(dir), entry->d_name);
	closedir(dir);
	return fflush(stdout) ? 1 : 0;
}
