/* Ways out of a container that must all fail. `escape NAME` exits 0 when it got out, 1 (and says why) when it did not,
 * 2 for a name that it does not know. Run by test_container_escapes.py as root of a container. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/bpf.h>
#include <linux/capability.h>
#include <linux/keyctl.h>
#include <linux/userfaultfd.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/ptrace.h>
#include <sys/reboot.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

/* Every attempt answers 0 for "out", -1 with errno for "refused". */

static int write_file(const char *path, const char *text)
{
	int fd = open(path, O_WRONLY | O_CLOEXEC);

	if (fd < 0)
		return -1;
	return write(fd, text, strlen(text)) < 0 ? -1 : 0;
}

/* The host's own settings: that they could be opened is bad enough, and leaves the host as it is. */
static int open_for_writing(const char *path) { return open(path, O_WRONLY | O_CLOEXEC); }

static int try_mount(void) { return mount("none", "/tmp", "tmpfs", 0, ""); }
static int try_mount_proc(void) { return mount("none", "/tmp", "proc", 0, ""); }
static int try_remount_sys(void) { return mount("", "/sys", "", MS_REMOUNT | MS_BIND, ""); }
static int try_umount_mask(void) { return umount2("/proc/kcore", MNT_DETACH); }
static int try_umount_proc_sys(void) { return umount2("/proc/sys", MNT_DETACH); }
static int try_fsopen(void) { return (int)syscall(SYS_fsopen, "tmpfs", 0); }
static int try_open_tree(void) { return (int)syscall(SYS_open_tree, AT_FDCWD, "/", 1); }
static int try_pivot_root(void) { return (int)syscall(SYS_pivot_root, "/tmp", "/tmp"); }
static int try_setns(void) { return setns(open("/proc/1/ns/mnt", O_RDONLY), 0); }
static int try_unshare_user(void) { return unshare(CLONE_NEWUSER); }
static int try_unshare_mount(void) { return unshare(CLONE_NEWNS); }

static int try_clone_user(void)
{
	long pid = syscall(SYS_clone, CLONE_NEWUSER | SIGCHLD, 0, 0, 0, 0);

	if (pid == 0)
		_exit(0);
	return pid < 0 ? -1 : 0;
}

static int try_clone3_user(void)
{
	unsigned long long arguments[11] = {CLONE_NEWUSER, 0, 0, 0, SIGCHLD};
	long pid = syscall(SYS_clone3, arguments, sizeof arguments);

	if (pid == 0)
		_exit(0);
	return pid < 0 ? -1 : 0;
}

/* Make a node for each disk of the host that /proc/partitions names, and read it. */
static int try_disk(void)
{
	FILE *list = fopen("/proc/partitions", "r");
	char line[256], name[64];
	unsigned major, minor;
	int last = ENOENT;

	while (list && fgets(line, sizeof line, list)) {
		char byte;
		if (sscanf(line, "%u %u %*u %63s", &major, &minor, name) != 3)
			continue;
		unlink("/tmp/disk");
		if (mknod("/tmp/disk", S_IFBLK | 0600, makedev(major, minor))) {
			last = errno;
			continue;
		}
		int fd = open("/tmp/disk", O_RDONLY);
		if (fd >= 0 && read(fd, &byte, 1) == 1)
			return 0;
		last = errno;
	}
	errno = last;
	return -1;
}

static int open_node(unsigned major, unsigned minor)
{
	unlink("/tmp/node");
	if (mknod("/tmp/node", S_IFCHR | 0600, makedev(major, minor)))
		return -1;
	return open("/tmp/node", O_RDWR) < 0 ? -1 : 0;
}

static int try_mem(void) { return open_node(1, 1); }
static int try_kmsg(void) { return open_node(1, 11); }
static int try_tun(void) { return open_node(10, 200); }
static int try_kvm(void) { return open_node(10, 232); }

/* chroot into a directory with a descriptor of the old root in hand, climb, chroot again. */
static int try_chroot_climb(void)
{
	struct stat root, here;
	int fd = open("/", O_RDONLY | O_DIRECTORY);

	if (stat("/", &root) || mkdir("/tmp/jail", 0700) & (errno != EEXIST) || chroot("/tmp/jail") || fchdir(fd))
		return -1;
	for (int i = 0; i < 64; i++)
		if (chdir(".."))
			return -1;
	if (chroot(".") || stat("/", &here))
		return -1;
	if (here.st_dev == root.st_dev && here.st_ino == root.st_ino) {
		errno = EXDEV; /* out of the jail, but the container's root is where climbing ends */
		return -1;
	}
	return 0;
}

static int try_file_handle(void)
{
	struct {
		struct file_handle head;
		unsigned char bytes[128];
	} handle = {.head = {.handle_bytes = 8, .handle_type = 1}, .bytes = {2}};
	int fd = open("/etc/hostname", O_RDONLY);

	if (fd < 0)
		fd = open("/", O_RDONLY);
	return (int)syscall(SYS_open_by_handle_at, fd, &handle, O_RDONLY);
}

static int try_ptrace_init(void) { return (int)ptrace(PTRACE_SEIZE, 1, 0, 0); }
static int try_read_init(void) { return open("/proc/1/mem", O_RDONLY); }
static int try_init_root(void) { return open("/proc/1/root/", O_RDONLY | O_DIRECTORY); }
static int try_init_descriptors(void) { return open("/proc/1/fd/3", O_RDWR); }
static int try_init_program(void) { return open("/proc/1/exe", O_WRONLY); }
static int try_init_program_read(void) { return open("/proc/1/exe", O_RDONLY); }

static int try_init_memory_write(void)
{
	char byte = 0;
	struct iovec ours = {&byte, 1}, theirs = {(void *)0x400000, 1};

	return process_vm_writev(1, &ours, 1, &theirs, 1, 0) < 0 ? -1 : 0;
}

static int try_pidfd_getfd(void)
{
	int init = (int)syscall(SYS_pidfd_open, 1, 0);

	return init < 0 ? -1 : (int)syscall(SYS_pidfd_getfd, init, 3, 0);
}

static int try_kill_init(void)
{
	if (kill(1, SIGKILL))
		return -1;
	usleep(50000); /* PID 1 is not hit by signals from inside: if it had been, we would not be here */
	errno = EPERM;
	return -1;
}

static int try_core_pattern(void) { return open_for_writing("/proc/sys/kernel/core_pattern"); }
static int try_modprobe(void) { return open_for_writing("/proc/sys/kernel/modprobe"); }
static int try_sysrq(void) { return open_for_writing("/proc/sysrq-trigger"); }
static int try_uevent_helper(void) { return open_for_writing("/sys/kernel/uevent_helper"); }
static int try_oom_adjust_init(void) { return write_file("/proc/1/oom_score_adj", "-1000"); }
static int try_binfmt(void) { return open_for_writing("/proc/sys/fs/binfmt_misc/register"); }

static int try_release_agent(void)
{
	const char *controllers[] = {"memory", "cpu", "pids", "devices", "freezer", "blkio", "rdma", "cpuset"};
	char path[128];

	for (size_t i = 0; i < sizeof controllers / sizeof *controllers; i++) {
		snprintf(path, sizeof path, "/sys/fs/cgroup/%s/release_agent", controllers[i]);
		if (open_for_writing(path) >= 0)
			return 0;
	}
	return -1;
}

static int try_devices_allow(void)
{
	if (open_for_writing("/sys/fs/cgroup/devices/devices.allow") >= 0)
		return 0;
	return open_for_writing("/sys/fs/cgroup/cgroup.procs");
}

static int try_keyctl(void) { return (int)syscall(SYS_keyctl, KEYCTL_GET_KEYRING_ID, KEY_SPEC_SESSION_KEYRING, 1); }
static int try_add_key(void) { return (int)syscall(SYS_add_key, "user", "x", "y", 1, KEY_SPEC_PROCESS_KEYRING); }
static int try_bpf(void)
{
	union bpf_attr attribute = {.map_type = BPF_MAP_TYPE_ARRAY, .key_size = 4, .value_size = 4, .max_entries = 1};

	return (int)syscall(SYS_bpf, BPF_MAP_CREATE, &attribute, sizeof attribute);
}
static int try_kexec(void) { return (int)syscall(SYS_kexec_load, 0, 0, 0, 0); }
static int try_module(void) { return (int)syscall(SYS_finit_module, open("/dev/null", O_RDONLY), "", 0); }
static int try_reboot(void) { return reboot(RB_DISABLE_CAD); }
static int try_uring(void) { char p[256] = {0}; return (int)syscall(SYS_io_uring_setup, 1, p); }
static int try_userfaultfd(void) { return (int)syscall(SYS_userfaultfd, 0); }
static int try_perf(void) { char p[128] = {0}; return (int)syscall(SYS_perf_event_open, p, -1, 0, -1, 0); }
static int try_syslog(void) { char b[64]; return (int)syscall(SYS_syslog, 3, b, sizeof b); }
static int try_vsock(void) { return socket(40, SOCK_STREAM, 0); }
static int try_iopl(void) { return (int)syscall(SYS_iopl, 3); }
static int try_swapon(void) { return (int)syscall(SYS_swapon, "/tmp/x", 0); }
static int try_hostname(void) { return sethostname("x", 1); }

static int try_clock(void)
{
	struct timespec now;

	clock_gettime(CLOCK_REALTIME, &now);
	return clock_settime(CLOCK_REALTIME, &now);
}

static int try_rlimit(void)
{
	struct rlimit limit;

	getrlimit(RLIMIT_NOFILE, &limit);
	limit.rlim_max += 1;
	return setrlimit(RLIMIT_NOFILE, &limit);
}

static int try_priority(void) { return setpriority(PRIO_PROCESS, 0, -20); }

static int try_all_capabilities(void)
{
	struct __user_cap_header_struct header = {_LINUX_CAPABILITY_VERSION_3, 0};
	struct __user_cap_data_struct data[2] = {{~0u, ~0u, ~0u}, {0x1ff, 0x1ff, 0x1ff}};

	return (int)syscall(SYS_capset, &header, data);
}

/* The 32-bit way into the kernel: int 0x80 with i386's number of mount. */
static int try_mount_32_bit(void)
{
	long result = -38;
#ifdef __x86_64__
	__asm__ volatile("int $0x80" : "=a"(result) : "a"(21), "b"(0), "c"(0), "d"(0), "S"(0), "D"(0) : "memory");
#endif
	errno = (int)-result;
	return result == -EPERM || result == -ENOSYS ? -1 : 0; /* EFAULT would say that the filter let it pass */
}

static int try_terminal_input(void)
{
	char letter = 'x';

	return ioctl(open("/dev/tty", O_RDWR), TIOCSTI, &letter);
}

static const struct {
	const char *name;
	int (*run)(void);
} attempts[] = {
	{"mount", try_mount}, {"mount-proc", try_mount_proc}, {"remount-sys", try_remount_sys},
	{"umount-mask", try_umount_mask}, {"umount-proc-sys", try_umount_proc_sys}, {"fsopen", try_fsopen},
	{"open-tree", try_open_tree}, {"pivot-root", try_pivot_root}, {"setns", try_setns},
	{"unshare-user", try_unshare_user}, {"unshare-mount", try_unshare_mount}, {"clone-user", try_clone_user},
	{"clone3-user", try_clone3_user}, {"disk", try_disk}, {"mem", try_mem}, {"kmsg", try_kmsg}, {"tun", try_tun},
	{"kvm", try_kvm}, {"chroot-climb", try_chroot_climb}, {"file-handle", try_file_handle},
	{"ptrace-init", try_ptrace_init}, {"read-init", try_read_init}, {"init-root", try_init_root},
	{"init-descriptors", try_init_descriptors}, {"init-program", try_init_program},
	{"init-program-read", try_init_program_read}, {"init-memory-write", try_init_memory_write},
	{"pidfd-getfd", try_pidfd_getfd}, {"kill-init", try_kill_init}, {"core-pattern", try_core_pattern},
	{"modprobe", try_modprobe}, {"sysrq", try_sysrq}, {"uevent-helper", try_uevent_helper},
	{"oom-adjust-init", try_oom_adjust_init}, {"binfmt", try_binfmt}, {"release-agent", try_release_agent},
	{"devices-allow", try_devices_allow}, {"keyctl", try_keyctl}, {"add-key", try_add_key}, {"bpf", try_bpf},
	{"kexec", try_kexec}, {"module", try_module}, {"reboot", try_reboot}, {"io-uring", try_uring},
	{"userfaultfd", try_userfaultfd}, {"perf", try_perf}, {"syslog", try_syslog}, {"vsock", try_vsock},
	{"iopl", try_iopl}, {"swapon", try_swapon}, {"hostname", try_hostname}, {"clock", try_clock},
	{"rlimit", try_rlimit}, {"priority", try_priority}, {"all-capabilities", try_all_capabilities},
	{"mount-32-bit", try_mount_32_bit}, {"terminal-input", try_terminal_input},
};

int main(int argc, char **argv)
{
	for (size_t i = 0; i < sizeof attempts / sizeof *attempts; i++) {
		if (argc < 2)
			puts(attempts[i].name);
		else if (!strcmp(argv[1], attempts[i].name)) {
			errno = 0;
			int result = attempts[i].run();
			printf("%s\n", result < 0 ? strerror(errno) : "OUT");
			return result < 0;
		}
	}
	return argc < 2 ? 0 : 2;
}
