/* VM mode: the kernel's file systems, the devices and the programs' walls, shaped as a container's
 * (src/nagaya/engines/container/mounts.py). */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/mount.h>
#include <linux/sched.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include "spawn.h"
#include "stub.h"
#include "vm.h"

/* <sched.h> and <linux/sched.h> exclude each other, and so do <sys/mount.h> and <linux/mount.h>, in some C libraries. */
int unshare(int flags);

#define STACK_USED (32 << 10)
#define HEAP_USED (16 << 10)
#define QUIET (MS_NOSUID | MS_NODEV | MS_NOEXEC)

#define FREEZE_PATIENCE_MS 2000

static int null_device = -1, programs = -1, writable_groups = -1;

static int mount_system(const char *type, const char *source, const char *path, unsigned long flags, const char *options)
{
	int target = vm_open_target(path, 0, 0), failed;

	if (target < 0 && errno == ELOOP)
		return vm_fail(0, "the image has a symbolic link where the machine's %s belongs", path);
	if (target < 0)
		return vm_fail(errno, "cannot make %s", path);
	/* Without a type: what has been mounted in the vm_initramfs moves over. */
	failed = type ? vm_mount_at(target, source, type, flags, options)
		      : (int)syscall(SYS_move_mount, vm_initramfs, source, target, "", MOVE_MOUNT_T_EMPTY_PATH);
	int error = errno;
	close(target);
	return failed ? vm_fail(error, "cannot mount %s", path) : 0;
}

static int make_devices(void)
{
	static const struct {
		const char *name;
		unsigned major, minor;
	} nodes[] = {{"null", 1, 3}, {"zero", 1, 5}, {"full", 1, 7}, {"random", 1, 8}, {"urandom", 1, 9}, {"tty", 5, 0}};
	static const char *const links[][2] = {{"/proc/self/fd", "fd"}, {"/proc/self/fd/0", "stdin"}, {"/proc/self/fd/1", "stdout"},
					       {"/proc/self/fd/2", "stderr"}, {"pts/ptmx", "ptmx"}, {"/proc/kcore", "core"}};
	char path[32];

	for (size_t i = 0; i < sizeof nodes / sizeof *nodes; i++) {
		snprintf(path, sizeof path, "/dev/%s", nodes[i].name);
		if (mknod(path, S_IFCHR | 0666, makedev(nodes[i].major, nodes[i].minor)))
			return vm_fail(errno, "cannot make %s", path);
	}
	for (size_t i = 0; i < sizeof links / sizeof *links; i++) {
		snprintf(path, sizeof path, "/dev/%s", links[i][1]);
		if ((strcmp(links[i][1], "core") || !access("/proc/kcore", F_OK)) && symlink(links[i][0], path))
			return vm_fail(errno, "cannot make %s", path);
	}
	null_device = open("/dev/null", O_PATH | O_CLOEXEC);
	return null_device < 0 ? vm_fail(errno, "cannot open /dev/null") : 0;
}

/* The control group of all programs: with one they can be stopped together, and with `most` counted. */
static int make_group(uint32_t most)
{
	int groups = open("/sys/fs/cgroup", O_RDONLY | O_DIRECTORY | O_CLOEXEC), failed;
	char text[16];

	snprintf(text, sizeof text, "%u", most);
	failed = groups < 0 || (most && vm_write_file(groups, "cgroup.subtree_control", "+pids")) ||
		 mkdirat(groups, "machine", 0755) || (most && vm_write_file(groups, "machine/pids.max", text)) ||
		 (programs = openat(groups, "machine", O_RDONLY | O_DIRECTORY | O_CLOEXEC)) < 0;
	/* Ours stays writable when the programs' becomes read-only, which a descriptor open for writing would forbid. */
	writable_groups = failed ? -1 : (int)syscall(SYS_open_tree, groups, "", OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | AT_EMPTY_PATH);
	int error = errno;
	if (groups >= 0)
		close(groups);
	return failed ? vm_fail(error, "the guest kernel cannot make a control group for the programs") : 0;
}

/* Until no program is between two of its instructions. */
static int await_frozen(void)
{
	char text[256];
	int fd = openat(programs, "cgroup.events", O_RDONLY | O_CLOEXEC), ready = 1, frozen = 0;

	while (fd >= 0 && ready > 0 && !frozen) {
		ssize_t n = pread(fd, text, sizeof text - 1, 0);
		text[n > 0 ? n : 0] = 0;
		frozen = strstr(text, "frozen 1") != NULL;
		struct pollfd change = {.fd = fd, .events = POLLPRI};
		if (!frozen)
			ready = poll(&change, 1, FREEZE_PATIENCE_MS);
	}
	if (fd >= 0)
		close(fd);
	errno = EBUSY;
	return frozen ? 0 : -1;
}

int vm_freeze_programs(int frozen)
{
	if (writable_groups < 0)
		return 0; /* a kernel without control groups */
	if (vm_write_file(writable_groups, "machine/cgroup.freeze", frozen ? "1" : "0"))
		return -1;
	return frozen ? await_frozen() : 0;
}

static int protect_groups(void)
{
	int groups = open("/sys/fs/cgroup", O_PATH | O_CLOEXEC), failed;

	failed = groups >= 0 && vm_set_mount_flags(groups, MS_RDONLY) && errno != EINVAL ? errno : 0; /* EINVAL: no mount */
	if (groups >= 0)
		close(groups);
	return failed ? vm_fail(failed, "cannot protect the control groups") : 0;
}

pid_t vm_fork(void)
{
	struct clone_args args = {.flags = CLONE_INTO_CGROUP, .exit_signal = SIGCHLD, .cgroup = (uint64_t)programs};

	/* Born there: to move it in later would wait for a grace period of RCU's, tens of milliseconds. */
	return programs < 0 ? fork() : (pid_t)syscall(SYS_clone3, &args, sizeof args);
}

/* The first process of a PID namespace of the programs' own, which MAIN will take the place of. It mounts their /proc:
 * one shows the namespace of who has mounted it. */
static void __attribute__((noreturn)) become_stub(int fd)
{
	int failed = mount_system("proc", "proc", "/proc", QUIET, NULL) ? (int)vm_report.error : 0;

	if (write(fd, &failed, sizeof failed) != sizeof failed || failed)
		_exit(125);
	stub_become(fd);
}

/* What a forked child writes to is copied then, page by page: in a machine that is about to be saved rather now. */
static void touch_pages(void)
{
	volatile char stack[STACK_USED];
	volatile char *heap = malloc(HEAP_USED);

	for (size_t at = 0; at < sizeof stack; at += 1024)
		stack[at] = 0;
	for (size_t at = 0; heap && at < HEAP_USED; at += 1024)
		heap[at] = 0;
	free((void *)heap);
}

int vm_start_early_stub(uint64_t bound)
{
	int pair[2];

	if (vm_stub_fd >= 0)
		return 0;
	if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) || (vm_stub = vm_fork()) < 0)
		return vm_fail(errno, "cannot start a process");
	if (!vm_stub) {
		close(pair[0]);
		touch_pages();
		spawn_rehearse();
		if (policy_bound(bound))
			_exit(125);
		stub_become(pair[1]);
	}
	close(pair[1]);
	vm_stub_fd = pair[0];
	return 0;
}

static int start_stub(void)
{
	int pair[2], failed;

	if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) || unshare(CLONE_NEWPID) || (vm_stub = vm_fork()) < 0)
		return vm_fail(errno, "cannot make a PID namespace");
	if (!vm_stub) {
		close(pair[0]);
		become_stub(pair[1]);
	}
	close(pair[1]);
	vm_stub_fd = pair[0];
	if (read(vm_stub_fd, &failed, sizeof failed) != sizeof failed || failed)
		return vm_fail(failed, "cannot mount the PID namespace's /proc");
	return 0;
}

static int mount_groups(uint32_t pids)
{
	if (mount_system("cgroup2", "cgroup", "/sys/fs/cgroup", QUIET, NULL))
		return !pids && (vm_report.error == ENODEV || vm_report.error == ENOENT) ? 0 : -1; /* a kernel without */
	return make_group(pids) || protect_groups() ? -1 : 0;
}

int vm_mount_system(uint32_t pids, int own_pids)
{
	umask(0);
	if (mount_system(NULL, "sys", "/sys", 0, NULL) || mount_groups(pids) ||
	    (own_pids ? start_stub() : mount_system(NULL, "proc", "/proc", 0, NULL)) ||
	    mount_system("tmpfs", "tmpfs", "/dev", MS_NOSUID | MS_STRICTATIME, "mode=755,size=65536k") ||
	    mount_system("devpts", "devpts", "/dev/pts", MS_NOSUID | MS_NOEXEC, "newinstance,ptmxmode=0666,mode=0620,gid=5") ||
	    mount_system("tmpfs", "shm", "/dev/shm", QUIET, "mode=1777,size=65536k") || make_devices())
		return -1;
	if (mount_system("mqueue", "mqueue", "/dev/mqueue", QUIET, NULL) && vm_report.error != ENODEV)
		return -1;
	umask(022);
	return 0;
}

int vm_make_device(const char *node, const char *path)
{
	char kernels[PATH_MAX], parent_path[PATH_MAX];
	const char *slash = strrchr(path, '/');
	struct stat st;

	snprintf(kernels, sizeof kernels, "dev/%s", !strncmp(node, "/dev/", 5) ? node + 5 : node);
	if (fstatat(vm_initramfs, kernels, &st, 0) || !(S_ISCHR(st.st_mode) || S_ISBLK(st.st_mode)))
		return vm_fail(ENODEV, "the guest kernel has no device %s", node);
	if (!slash || strncmp(path, "/dev/", 5) || strstr(path, ".."))
		return vm_fail(EINVAL, "the device's path inside, '%s', is not below /dev", path);
	snprintf(parent_path, sizeof parent_path, "%.*s", (int)(slash - path), path);
	int parent = vm_open_target(parent_path, 0, 0), failed;
	mode_t mask = umask(0);
	failed = parent < 0 || mknodat(parent, slash + 1, st.st_mode, st.st_rdev) ? errno : 0;
	umask(mask);
	if (parent >= 0)
		close(parent);
	return failed && failed != EEXIST ? vm_fail(failed, "cannot make the device %s", path) : 0;
}

/* -- what makes things read-only */

int vm_protect_root(void)
{
	return vm_set_mount_flags(vm_root, MS_RDONLY) ? vm_fail(errno, "cannot make the root read-only") : 0;
}

static int protect(const char *path)
{
	int fd = open(path, O_PATH | O_CLOEXEC), failed;

	if (fd < 0)
		return 0; /* this kernel does not have it */
	failed = vm_bind(fd, fd, MS_RDONLY | QUIET) ? errno : 0;
	close(fd);
	return failed ? vm_fail(failed, "cannot protect %s", path) : 0;
}

static int mask(const char *path)
{
	struct stat st;
	int fd = open(path, O_PATH | O_CLOEXEC), failed;

	if (fd < 0)
		return 0;
	if (fstat(fd, &st))
		failed = -1;
	else if (S_ISDIR(st.st_mode))
		failed = vm_mount_at(fd, "tmpfs", "tmpfs", MS_RDONLY | QUIET, "size=0k");
	else
		failed = vm_bind(null_device, fd, 0);
	int error = errno;
	close(fd);
	return failed ? vm_fail(error, "cannot hide %s", path) : 0;
}

int vm_mask(void)
{
	static const char *const protected[] = {"/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"};
	static const char *const masked[] = {
		"/proc/acpi", "/proc/asound", "/proc/interrupts", "/proc/kcore", "/proc/keys", "/proc/latency_stats",
		"/proc/sched_debug", "/proc/scsi", "/proc/timer_list", "/proc/timer_stats", "/sys/devices/virtual/powercap",
		"/sys/firmware", "/sys/fs/selinux",
	};
	for (size_t i = 0; i < sizeof protected / sizeof *protected; i++)
		if (protect(protected[i]))
			return -1;
	for (size_t i = 0; i < sizeof masked / sizeof *masked; i++)
		if (mask(masked[i]))
			return -1;
	return 0;
}
