/* VM mode: the user's mounts, and our files over the image's. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/mount.h>
#include <linux/openat2.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "vm.h"

/* <sys/mount.h> and <linux/mount.h> exclude each other in some C libraries. */
int mount(const char *source, const char *target, const char *type, unsigned long flags, const void *data);
int umount2(const char *target, int flags);
#ifndef MNT_DETACH
#define MNT_DETACH 2
#endif

#define MAX_SHARES 64
#define MAX_FILES 16 /* that may change: ours are three */

static int file_count, share_count;
static char shares[MAX_SHARES][64];
static char files[MAX_FILES][64]; /* their paths */

static int is_proc_file(const char *name)
{
	/* What may be mounted over in /proc, as runc has it: files that tell a machine of its own limits (lxcfs). */
	static const char *const names[] = {"cpuinfo", "diskstats", "loadavg", "meminfo", "slabinfo", "stat", "swaps", "uptime"};

	for (size_t i = 0; i < sizeof names / sizeof *names; i++)
		if (!strcmp(name, names[i]))
			return 1;
	return 0;
}

/* The target again, now that the image's links are resolved: what is written to /proc is to reach the kernel. */
static int check_place(int target, const char *path)
{
	char descriptor[32], place[PATH_MAX];

	snprintf(descriptor, sizeof descriptor, "self/fd/%d", target);
	ssize_t n = readlinkat(vm_proc, descriptor, place, sizeof place - 1);
	if (n < 0)
		return vm_fail(errno, "cannot find out where %s is", path);
	place[n] = 0;
	if (!strcmp(place, "/") || !strcmp(place, "/proc") || (!strncmp(place, "/proc/", 6) && !is_proc_file(place + 6)))
		return vm_fail(EPERM, "nothing can be mounted at '%s', which leads to the machine's own %s", path, place);
	return 0;
}

static int cannot_mount(int error, const char *path)
{
	return vm_fail(error, "cannot mount %s", path);
}

int vm_mount_file(const char *path, const unsigned char *content, size_t size)
{
	char name[32];
	int fd, target, failed;

	if (file_count < MAX_FILES)
		snprintf(files[file_count], sizeof files[0], "%s", path);
	snprintf(name, sizeof name, "files/%d", file_count++);
	fd = openat(vm_initramfs, name, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0644);
	if (fd < 0)
		return vm_fail(errno, "cannot make the file for %s", path);
	for (size_t at = 0; at < size;) {
		ssize_t n = write(fd, content + at, size - at);
		if (n <= 0) {
			close(fd);
			return vm_fail(errno, "cannot write the file for %s", path);
		}
		at += (size_t)n;
	}
	target = vm_open_target(path, 1, 1);
	failed = target < 0 ? cannot_mount(errno, path) : check_place(target, path);
	if (!failed && vm_bind(fd, target, 0))
		failed = cannot_mount(errno, path);
	if (target >= 0)
		close(target);
	close(fd);
	return failed;
}

int vm_rewrite_file(const char *path, const unsigned char *content, size_t size)
{
	char name[32];
	int i, fd;

	for (i = 0; i < file_count && i < MAX_FILES && strcmp(files[i], path); i++)
		;
	if (i == file_count || i == MAX_FILES)
		return 0; /* the machine was set up without it */
	snprintf(name, sizeof name, "files/%d", i);
	/* In place: what is bound over the image's file is this very one. */
	fd = openat(vm_initramfs, name, O_WRONLY | O_TRUNC | O_CLOEXEC | O_NOFOLLOW);
	if (fd < 0)
		return -1;
	for (size_t at = 0; at < size;) {
		ssize_t n = write(fd, content + at, size - at);
		if (n <= 0) {
			close(fd);
			return -1;
		}
		at += (size_t)n;
	}
	close(fd);
	return 0;
}

static int mount_tmpfs(const char *path, unsigned long flags, uint32_t mode, uint64_t size)
{
	char options[64];
	int target = vm_open_target(path, 0, 1), failed;

	if (target < 0)
		return cannot_mount(errno, path);
	snprintf(options, sizeof options, size ? "mode=%o,size=%llu" : "mode=%o", mode & 07777, (unsigned long long)size);
	failed = check_place(target, path);
	if (!failed && vm_mount_at(target, "tmpfs", "tmpfs", flags, options))
		failed = cannot_mount(errno, path);
	close(target);
	return failed;
}

/* A descriptor of the host's share, mounted out of the programs' sight, once for all the machine's mounts of it. */
static int open_share(const char *tag)
{
	char name[32];
	int i, fd;

	for (i = 0; i < share_count && strcmp(shares[i], tag); i++)
		;
	snprintf(name, sizeof name, "shares/%d", i);
	if (i == share_count) {
		if (i == MAX_SHARES || strlen(tag) >= sizeof shares[0]) {
			errno = E2BIG;
			return -1;
		}
		if (mkdirat(vm_initramfs, name, 0755) || fchdir(vm_initramfs) || mount(tag, name, "virtiofs", 0, NULL))
			return -1;
		strcpy(shares[share_count++], tag);
	}
	fd = openat(vm_initramfs, name, O_PATH | O_CLOEXEC);
	return fd;
}

static int mount_share(const char *source, const char *path, unsigned long flags)
{
	size_t tag_length = strcspn(source, "/");
	char tag[64];
	struct stat st;
	int share, part, target, failed;

	snprintf(tag, sizeof tag, "%.*s", (int)tag_length, source);
	if (tag_length >= sizeof tag || (share = open_share(tag)) < 0)
		return vm_fail(errno, "cannot mount the host's share '%s' for %s", source, path);
	struct open_how how = {.flags = O_PATH | O_CLOEXEC, .resolve = RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS};
	part = source[tag_length] && source[tag_length + 1] ? (int)syscall(SYS_openat2, share, source + tag_length + 1, &how, sizeof how)
							    : dup(share);
	int error = errno;
	close(share);
	if (part < 0 || fstat(part, &st))
		return vm_fail(error, "the host's share does not have %s", source);
	target = vm_open_target(path, !S_ISDIR(st.st_mode), 1);
	failed = target < 0 ? cannot_mount(errno, path) : check_place(target, path);
	if (!failed) {
		struct stat there;
		if (!fstat(target, &there) && S_ISDIR(there.st_mode) != S_ISDIR(st.st_mode))
			failed = cannot_mount(S_ISDIR(there.st_mode) ? EISDIR : ENOTDIR, path); /* move_mount(2) has only EINVAL */
		else if (vm_bind(part, target, flags))
			failed = cannot_mount(errno, path);
	}
	if (target >= 0)
		close(target);
	close(part);
	return failed;
}

int vm_mount_user(const unsigned char *field)
{
	const char *source = (const char *)field + 24, *target = source + strlen(source) + 1;
	unsigned long flags = get32(field + 4) & (MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC);

	if (get32(field) == UM_TMPFS)
		return mount_tmpfs(target, flags, get32(field + 8), get64(field + 16));
	return mount_share(source, target, flags);
}

int vm_drop_shares(void)
{
	char name[32];

	for (int i = 0; i < share_count; i++) {
		snprintf(name, sizeof name, "shares/%d", i);
		if (fchdir(vm_initramfs) || umount2(name, MNT_DETACH))
			return vm_fail(errno, "cannot let go of the host's share '%s'", shares[i]);
	}
	return 0;
}
