/* The first program of the kernel's test: says on the console what it finds, as "name value" lines, and restarts.
 * Built with -nostdlib: no C library, so that what is measured is the kernel. */

#define STDOUT 1
#define AT_FDCWD (-100)

static long call(long number, long a, long b, long c, long d, long e)
{
	long result;
	register long r10 asm("r10") = d;
	register long r8 asm("r8") = e;

	asm volatile("syscall"
		     : "=a"(result)
		     : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8)
		     : "rcx", "r11", "memory");
	return result;
}

static unsigned long length(const char *text)
{
	unsigned long count = 0;

	while (text[count])
		count++;
	return count;
}

static void say(const char *text)
{
	call(1, STDOUT, (long)text, (long)length(text), 0, 0);
}

static void say_result(const char *name, long result)
{
	char digits[24];
	unsigned long value = result < 0 ? -(unsigned long)result : (unsigned long)result;
	int at = sizeof digits - 1;

	digits[at] = 0;
	do
		digits[--at] = (char)('0' + value % 10);
	while (value /= 10);
	if (result < 0)
		digits[--at] = '-';
	say(name);
	say(" ");
	say(digits + at);
	say("\n");
}

static void show_file(const char *name, const char *path)
{
	static char content[65536];
	long fd = call(257, AT_FDCWD, (long)path, 0, 0, 0), count;

	if (fd < 0) {
		say_result(name, fd);
		return;
	}
	while ((count = call(0, fd, (long)content, sizeof content, 0, 0)) > 0)
		call(1, STDOUT, (long)content, count, 0, 0);
	call(3, fd, 0, 0, 0, 0);
}

static void try_mount(const char *type, const char *source, const char *where, const char *options)
{
	call(83, (long)where, 0755, 0, 0, 0);
	say("mount-");
	say_result(type, call(165, (long)source, (long)where, (long)type, 0, (long)options));
}

static void try_open(const char *path)
{
	long fd = call(257, AT_FDCWD, (long)path, 0, 0, 0);

	say("open-");
	say_result(path, fd < 0 ? fd : 0);
	if (fd >= 0)
		call(3, fd, 0, 0, 0, 0);
}

/* In a child: whoever is in a user namespace of its own may not restart the machine. */
static long unshare_all(void)
{
	int status = -1;
	long child = call(57, 0, 0, 0, 0, 0);

	if (child == 0) /* mnt, cgroup, uts, ipc, user, pid, net, time */
		call(231, -call(272, 0x7e020080, 0, 0, 0, 0), 0, 0, 0, 0);
	call(61, child, (long)&status, 0, 0, 0);
	return status;
}

/* The ports of a virtio console come by messages that nobody waits for: on a busy host the first program can be here
 * before its console is, and has no standard output then. */
static void await_console(void)
{
	static const long pause[2] = {0, 10000000};
	int tries;

	for (tries = 0; tries < 1000 && call(1, STDOUT, (long)"", 0, 0, 0) < 0; tries++) {
		long fd = call(257, AT_FDCWD, (long)"/dev/console", 2, 0, 0);

		if (fd < 0)
			call(35, (long)pause, 0, 0, 0, 0);
		else if (fd != STDOUT)
			call(33, fd, STDOUT, 0, 0, 0);
	}
}

__attribute__((force_align_arg_pointer)) void _start(void)
{
	await_console();
	say("INIT\n");
	try_mount("devtmpfs", "none", "/dev", 0); /* an initramfs has to do this itself */
	try_mount("proc", "none", "/proc", 0);
	try_mount("sysfs", "none", "/sys", 0);
	try_mount("cgroup2", "none", "/cgroup", 0);
	try_mount("tmpfs", "none", "/tmp", 0);
	try_mount("devpts", "none", "/dev/pts", 0);
	try_mount("mqueue", "none", "/mqueue", 0);
	try_mount("binfmt_misc", "none", "/binfmt", 0);
	call(83, (long)"/tmp/lower", 0755, 0, 0, 0);
	call(83, (long)"/tmp/upper", 0755, 0, 0, 0);
	call(83, (long)"/tmp/work", 0755, 0, 0, 0);
	try_mount("overlay", "none", "/overlay", "lowerdir=/tmp/lower,upperdir=/tmp/upper,workdir=/tmp/work");
	try_open("/dev/hvc0");
	try_open("/dev/hwrng");
	try_open("/dev/vsock");
	try_open("/dev/net/tun");
	try_open("/dev/fuse");
	try_open("/dev/loop-control");
	try_open("/sys/class/net/eth0");
	try_open("/sys/bus/virtio/drivers/virtio_balloon/virtio4");
	try_open("/dev/vda");
	try_mount("ext4", "/dev/vda", "/disk", 0);
	call(83, (long)"/disk/made", 0755, 0, 0, 0);
	try_open("/disk/made");
	say_result("umount", call(166, (long)"/disk", 0, 0, 0, 0));
	say_result("socket-inet", call(41, 2, 1, 0, 0, 0));
	say_result("socket-inet6", call(41, 10, 1, 0, 0, 0));
	say_result("socket-packet", call(41, 17, 3, 0, 0, 0));
	say_result("socket-vsock", call(41, 40, 1, 0, 0, 0));
	say_result("socket-netfilter", call(41, 16, 3, 12, 0, 0));
	say_result("unshare", unshare_all());
	say_result("io_uring", call(425, 1, 0, 0, 0, 0));
	say_result("fanotify", call(300, 0, 0, 0, 0, 0));
	say_result("userfaultfd", call(323, 1, 0, 0, 0, 0));
	say_result("swapon", call(167, (long)"/none", 0, 0, 0, 0));
	say("--filesystems\n");
	show_file("filesystems", "/proc/filesystems");
	say("--cgroups\n");
	show_file("controllers", "/cgroup/cgroup.controllers");
	say("--cpus\n");
	show_file("cpus", "/sys/devices/system/cpu/online");
	say("--end\n");
	call(169, 0xfee1dead, 672274793, 0x1234567, 0, 0); /* reboot(2), LINUX_REBOOT_CMD_RESTART */
	for (;;)
		call(34, 0, 0, 0, 0, 0);
}
