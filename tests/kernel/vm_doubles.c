/* What a virtual machine's kernel gives its agent and namespaces on this host do not: disks, shares, a clock and random
 * numbers of its own, device nodes, control groups. Linked by --wrap with the agent's own objects (tests/kernel/vm_agent.py):
 * SETUP's parser and all of vm_*.c run as they are, in a user namespace whose root is nobody here. */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/mount.h>
#include <linux/random.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define MS_RDONLY 1
#define BLKGETSIZE64 0x80081272
#define EXT4_IOC_RESIZE_FS 0x40086610
#define DISK_BYTES (64ull << 20)
#define PORT 3	     /* where the test has left the host's end */
#define HASTE 60     /* by so much less patience: what is not there will not come */

int __real_mount(const char *source, const char *target, const char *type, unsigned long flags, const void *data);
DIR *__real_opendir(const char *path);
ssize_t __real_vm_read_line(const char *path, char *out, size_t size);
int __real_vm_await(int (*look)(void *what), void *what, int limit_ms);
int __real_ioctl(int fd, unsigned long request, void *argument);
long __real_syscall(long number, long a, long b, long c, long d, long e, long f);
int __real_mkdirat(int directory, const char *path, mode_t mode);

static int image = -1, share = -1, groups = -1;

/* The kernel's command has begun: the early mounts are made, as devtmpfs, proc and sysfs would be. */
int __wrap_vm_start(void)
{
	fcntl(PORT, F_SETFL, O_RDWR | O_NONBLOCK);
	return PORT;
}

/* While / is still the initramfs: later these cannot be found. */
static void open_doubles(void)
{
	if (image >= 0)
		return;
	image = open("/doubles/image", O_PATH | O_CLOEXEC);
	share = open("/doubles/share", O_PATH | O_CLOEXEC);
	groups = open("/doubles/groups", O_PATH | O_CLOEXEC);
}

static int bind_double(int fd, const char *target)
{
	int tree = (int)__real_syscall(SYS_open_tree, fd, (long)"", OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | AT_EMPTY_PATH, 0, 0, 0);

	if (tree < 0)
		return -1;
	long moved = __real_syscall(SYS_move_mount, tree, (long)"", AT_FDCWD, (long)target, MOVE_MOUNT_F_EMPTY_PATH, 0);
	int error = errno;
	close(tree);
	errno = error;
	return (int)moved;
}

int __wrap_mount(const char *source, const char *target, const char *type, unsigned long flags, const void *data)
{
	open_doubles();
	if (type && !strcmp(type, "erofs"))
		return bind_double(image, target);
	if (type && !strcmp(type, "ext4"))
		return __real_mount("tmpfs", target, "tmpfs", flags, NULL);
	if (type && !strcmp(type, "cgroup2"))
		return bind_double(groups, target);
	if (type && !strcmp(type, "virtiofs")) {
		errno = EINVAL; /* what the kernel says of a tag that no device has */
		return strcmp(source, "share") ? -1 : bind_double(share, target);
	}
	if (type && !strcmp(type, "overlay")) { /* those who are nobody may not name what they switch off */
		char options[200];
		snprintf(options, sizeof options, "%.*s,userxattr", (int)(strstr(data, ",redirect_dir") - (const char *)data), (const char *)data);
		return __real_mount(source, target, type, flags, options);
	}
	return __real_mount(source, target, type, flags, data);
}

static const char *place_of(const char *path, char *out, size_t size)
{
	if (strncmp(path, "/sys/block", 10))
		return path;
	snprintf(out, size, "/doubles/block%s", path + 10);
	return out;
}

DIR *__wrap_opendir(const char *path)
{
	char double_[300];

	return __real_opendir(place_of(path, double_, sizeof double_));
}

ssize_t __wrap_vm_read_line(const char *path, char *out, size_t size)
{
	char double_[300];

	return __real_vm_read_line(place_of(path, double_, sizeof double_), out, size);
}

int __wrap_vm_await(int (*look)(void *what), void *what, int limit_ms)
{
	return __real_vm_await(look, what, limit_ms / HASTE);
}

int __wrap_ioctl(int fd, unsigned long request, void *argument)
{
	if (request == BLKGETSIZE64) {
		*(uint64_t *)argument = DISK_BYTES;
		return 0;
	}
	if (request == EXT4_IOC_RESIZE_FS) {
		errno = ENOSPC;
		return *(uint64_t *)argument % 2 ? -1 : 0;
	}
	if (request == RNDADDENTROPY) {
		struct rand_pool_info *pool = argument;
		volatile unsigned char byte; /* they are there to be read, as the kernel does */
		for (int i = 0; i < pool->buf_size; i++)
			byte = ((unsigned char *)pool->buf)[i];
		(void)byte;
		errno = EINVAL;
		return pool->entropy_count < 0 || pool->buf_size < 0 ? -1 : 0;
	}
	if (request == RNDRESEEDCRNG)
		return 0;
	return __real_ioctl(fd, request, argument);
}

/* Takes more arguments than there may be, as the C library's own does. */
__attribute__((no_sanitize_address)) long __wrap_syscall(long number, ...)
{
	va_list args;
	long a[6];

	va_start(args, number);
	for (int i = 0; i < 6; i++)
		a[i] = va_arg(args, long);
	va_end(args);
	if (number == SYS_clone3) /* into a control group, which is a directory here */
		return fork();
	return __real_syscall(number, a[0], a[1], a[2], a[3], a[4], a[5]);
}

/* A new control group has files at once. */
int __wrap_mkdirat(int directory, const char *path, mode_t mode)
{
	int made = __real_mkdirat(directory, path, mode);

	if (!made && !strcmp(path, "machine"))
		close(openat(directory, "machine/pids.max", O_CREAT | O_WRONLY | O_CLOEXEC, 0644));
	return made;
}

int __wrap_mknodat(int directory, const char *path, mode_t mode, dev_t device)
{
	(void)device;
	int fd = openat(directory, path, O_CREAT | O_EXCL | O_WRONLY | O_CLOEXEC, mode & 0777);

	return fd < 0 ? -1 : close(fd);
}

int __wrap_mknod(const char *path, mode_t mode, dev_t device)
{
	return __wrap_mknodat(AT_FDCWD, path, mode, device);
}

int __wrap_clock_settime(clockid_t clock, const struct timespec *time)
{
	errno = EINVAL;
	return clock != CLOCK_REALTIME || time->tv_nsec < 0 || time->tv_nsec > 999999999 ? -1 : 0;
}

/* The host's other file systems need not wait for us. */
void __wrap_sync(void)
{
}
