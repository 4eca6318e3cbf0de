/* VM mode, from the kernel's first program to the machine's end: early mounts, the host's port, SETUP, power-off. */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/netlink.h>
#include <linux/random.h>
#include <poll.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
#if defined(__x86_64__) || defined(__i386__)
#include <sys/io.h>
#endif

#include "vm.h"

#define PORT_NAME "nagaya.agent"
#define PORTS "/sys/class/virtio-ports"
#define MODULES "/modules"
#define PATIENCE_MS 60000  /* a kernel that is emulated instruction by instruction takes its time */
#define SLEEP_CONTROL 0x600 /* src/nagaya/engines/kvm/power.py */
#define SLEEP_S5 (1 << 5 | 5 << 2)
#define FILES_SOFT 1024 /* as everywhere: select(2) breaks above */
#define FILES_HARD (1 << 20)

struct vm_report vm_report;
pid_t vm_stub;
int vm_stub_fd = -1;
static int prepared, random_device = -1;
static uint32_t power_off_by = UP_REBOOT; /* until SETUP says; every VMM understands it, with panic=-1 a panic too */

int vm_fail(int error, const char *format, ...)
{
	const char *reason = error ? strerror(error) : "", *colon = error ? ": " : "";
	const size_t room = sizeof vm_report.text - strlen(reason) - strlen(colon);
	va_list args;

	va_start(args, format);
	int used = vsnprintf(vm_report.text, room, format, args); /* a long path leaves room for the reason */
	va_end(args);
	used = used < 0 ? 0 : (size_t)used < room ? used : (int)room - 1;
	snprintf(vm_report.text + used, sizeof vm_report.text - (size_t)used, "%s%s", colon, reason);
	vm_report.error = (uint32_t)error;
	return -1;
}

void vm_warn(const char *format, ...)
{
	size_t used = strlen(vm_report.warnings), room = sizeof vm_report.warnings - used;
	va_list args;
	int n;

	va_start(args, format);
	n = vsnprintf(vm_report.warnings + used, room, format, args);
	va_end(args);
	if (n < 0 || (size_t)n + 2 > room || vm_report.warning_count == MAX_WARNINGS) {
		vm_report.warnings[used] = 0; /* no room for a whole one: the first ones say enough */
		return;
	}
	for (char *c = vm_report.warnings + used; *c; c++)
		if (*c == '\n')
			*c = ' ';
	memcpy(vm_report.warnings + used + n, "\n", 2);
	vm_report.warning_count++;
}

ssize_t vm_read_line(const char *path, char *out, size_t size)
{
	int fd = open(path, O_RDONLY | O_CLOEXEC);

	if (fd < 0)
		return -1;
	ssize_t n = read(fd, out, size - 1);
	close(fd);
	if (n >= 0) {
		out[n] = 0;
		out[strcspn(out, "\n")] = 0;
	}
	return n;
}

int vm_write_file(int directory, const char *path, const char *text)
{
	int fd = openat(directory, path, O_WRONLY | O_CLOEXEC | O_NOFOLLOW), error;

	if (fd < 0)
		return -1;
	ssize_t n = write(fd, text, strlen(text));
	error = errno;
	close(fd);
	errno = error;
	return n < 0 ? -1 : 0;
}

static int64_t now_ms(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (int64_t)t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

int vm_await(int (*look)(void *what), void *what, int limit_ms)
{
	int64_t end = now_ms() + limit_ms;
	int found = look(what), uevents;
	struct sockaddr_nl address = {.nl_family = AF_NETLINK, .nl_groups = 1};
	char event[4096];

	if (found)
		return found;
	uevents = socket(AF_NETLINK, SOCK_DGRAM | SOCK_CLOEXEC | SOCK_NONBLOCK, NETLINK_KOBJECT_UEVENT);
	if (uevents >= 0 && bind(uevents, (struct sockaddr *)&address, sizeof address)) {
		close(uevents);
		uevents = -1;
	}
	/* The time limit is for what comes without an event, or too soon for us to hear it. */
	while (!(found = look(what)) && now_ms() < end) {
		poll(&(struct pollfd){.fd = uevents, .events = POLLIN}, 1, 100);
		while (uevents >= 0 && recv(uevents, event, sizeof event, 0) > 0)
			;
	}
	if (uevents >= 0)
		close(uevents);
	return found;
}

/* -- the host */

static int find_port(void *fd)
{
	DIR *dir = opendir(PORTS);
	struct dirent *entry;
	char path[300], name[64];
	int found = 0;

	while (dir && !found && (entry = readdir(dir))) {
		snprintf(path, sizeof path, PORTS "/%s/name", entry->d_name);
		if (entry->d_name[0] == '.' || vm_read_line(path, name, sizeof name) <= 0 || strcmp(name, PORT_NAME))
			continue;
		snprintf(path, sizeof path, "/dev/%s", entry->d_name);
		*(int *)fd = open(path, O_RDWR | O_NONBLOCK | O_CLOEXEC);
		found = *(int *)fd >= 0;
	}
	if (dir)
		closedir(dir);
	return found;
}

/* A port without its host reads as ended, and its POLLHUP cannot be masked: only edges tell when the host comes. */
static int await_host(int port)
{
	int64_t end = now_ms() + PATIENCE_MS;
	int edges = epoll_create1(EPOLL_CLOEXEC), gone;
	struct epoll_event event = {.events = EPOLLIN | EPOLLOUT | EPOLLET};
	struct pollfd state = {.fd = port};

	epoll_ctl(edges, EPOLL_CTL_ADD, port, &event);
	while ((gone = poll(&state, 1, 0) == 1 && state.revents & POLLHUP) && now_ms() < end)
		epoll_wait(edges, &event, 1, 1000);
	close(edges);
	return gone ? -1 : 0;
}

static void __attribute__((noreturn)) give_up(const char *why)
{
	fprintf(stderr, "nagaya-agent: %s: %s\n", why, strerror(errno));
	vm_finish();
}

/* A distribution's kernel: what it needs to find us, and we our disks. Files in the order of their names. */
static void load_modules(void)
{
	struct dirent **list;
	int count = scandir(MODULES, &list, NULL, alphasort);

	for (int i = 0; i < count; i++) {
		char path[sizeof MODULES + 257];
		snprintf(path, sizeof path, MODULES "/%s", list[i]->d_name);
		int fd = list[i]->d_name[0] == '.' ? -1 : open(path, O_RDONLY | O_CLOEXEC);
		if (fd >= 0) {
			if (syscall(SYS_finit_module, fd, "", 0) && errno != EEXIST)
				vm_warn("cannot load the kernel module %s: %s", list[i]->d_name, strerror(errno));
			close(fd);
			unlink(path); /* it lies in the machine's memory */
		}
		free(list[i]);
	}
	if (count >= 0)
		free(list);
}

int vm_start(void)
{
	const unsigned long quiet = MS_NOSUID | MS_NODEV | MS_NOEXEC;
	struct rlimit files = {FILES_SOFT, FILES_HARD};
	int port = -1;

	if (mount("devtmpfs", "/dev", "devtmpfs", MS_NOSUID | MS_NOEXEC, NULL) && errno != EBUSY)
		give_up("cannot mount /dev");
	if (mount("proc", "/proc", "proc", quiet, NULL) && errno != EBUSY)
		give_up("cannot mount /proc");
	if (mount("sysfs", "/sys", "sysfs", quiet | MS_RDONLY, NULL) && errno != EBUSY)
		give_up("cannot mount /sys");
	load_modules();
	setrlimit(RLIMIT_NOFILE, &files); /* the kernel gives its first program 4096, for programs of another time */
	if (!vm_await(find_port, &port, PATIENCE_MS)) {
		errno = ENODEV;
		give_up("no virtio port is named " PORT_NAME);
	}
	if (await_host(port)) {
		errno = ENOTCONN;
		give_up("the host has not opened its end of the port " PORT_NAME);
	}
	return port;
}

/* -- SETUP */

/* Whether the bytes are exactly `count` strings, each with its NUL. */
static int are_strings(const unsigned char *bytes, size_t size, int count)
{
	for (; count; count--) {
		const unsigned char *end = memchr(bytes, 0, size);
		if (!end)
			return 0;
		size -= (size_t)(end + 1 - bytes);
		bytes = end + 1;
	}
	return !size;
}

static int is_well_formed(const struct field *f)
{
	switch (f->tag) {
	case U_WARM:
		return f->size > 1 && f->bytes[0] == '/' && are_strings(f->bytes, f->size, 1);
	case U_HOSTNAME:
		return f->size <= 64 && !memchr(f->bytes, 0, f->size);
	case U_FLAGS:
	case U_PIDS:
		return f->size == 4;
	case U_POWER_OFF:
		return f->size == 4 && get32(f->bytes) >= UP_ACPI && get32(f->bytes) <= UP_PORT;
	case U_TIME:
	case U_BOUND:
		return f->size == 8;
	case U_ENTROPY:
		return f->size <= 512;
	case U_FILE:
		return f->size && f->bytes[0] == '/' && memchr(f->bytes, 0, f->size);
	case U_MOUNT:
		return f->size > 24 && (get32(f->bytes) == UM_VIRTIOFS || get32(f->bytes) == UM_TMPFS) &&
		       are_strings(f->bytes + 24, f->size - 24, 2);
	case U_NETWORK:
		return f->size > UN_NAME + 1 && f->size <= UN_NAME + 16 && f->bytes[6] <= 32 && f->bytes[7] <= 128 &&
		       are_strings(f->bytes + UN_NAME, f->size - UN_NAME, 1) && !memchr(f->bytes + UN_NAME, '/', f->size - UN_NAME);
	case U_SYSCTL:
	case U_DEVICE:
		return are_strings(f->bytes, f->size, 2);
	case U_MACHINE_ID:
		return f->size == 32 && !memchr(f->bytes, 0, f->size);
	}
	return 0;
}

int vm_set_clock(uint64_t time_ns)
{
	struct timespec t = {.tv_sec = (time_t)(time_ns / 1000000000), .tv_nsec = (long)(time_ns % 1000000000)};

	return clock_settime(CLOCK_REALTIME, &t);
}

int vm_ran_out_of_memory(void)
{
	static int told;
	char text[8192], *count;
	int fd = told ? -1 : open("/proc/vmstat", O_RDONLY | O_CLOEXEC);

	if (fd < 0)
		return 0;
	size_t used = 0;
	for (ssize_t n; (n = read(fd, text + used, sizeof text - 1 - used)) > 0;) /* a page at a time */
		used += (size_t)n;
	close(fd);
	text[used] = 0;
	count = strstr(text, "\noom_kill ");
	told = count && strtoul(count + strlen("\noom_kill "), NULL, 10) > 0;
	return told;
}

/* What another machine that came from the same memory does not know goes in before anything is drawn from it. */
static int add_entropy(const unsigned char *bytes, size_t size)
{
	union {
		struct rand_pool_info info;
		unsigned char room[sizeof(struct rand_pool_info) + 512];
	} pool;
	int failed;

	if (random_device < 0 && (random_device = open("/dev/urandom", O_WRONLY | O_CLOEXEC)) < 0)
		return vm_fail(errno, "cannot open the kernel's random numbers");
	pool.info.entropy_count = (int)size * 8;
	pool.info.buf_size = (int)size;
	memcpy(pool.room + sizeof pool.info, bytes, size);
	/* And at once: the kernel would go on with its old key for up to a minute, in every copy of a machine. */
	failed = ioctl(random_device, RNDADDENTROPY, &pool) || ioctl(random_device, RNDRESEEDCRNG) ? errno : 0;
	if (!prepared) {
		close(random_device);
		random_device = -1;
	}
	return failed ? vm_fail(failed, "cannot give the kernel entropy") : 0;
}

/* As in sysctl(8), a slash in the key stands for a dot in a name: net.ipv4.conf.eth0/5.mtu. */
static int set_sysctl(const char *key, const char *value)
{
	char path[300];
	int n = snprintf(path, sizeof path, "/proc/sys/%s", key);

	if (n < 0 || (size_t)n >= sizeof path || strstr(key, ".."))
		return vm_fail(EINVAL, "cannot set sysctl %.100s", key);
	for (char *c = path + strlen("/proc/sys/"); *c; c++)
		*c = *c == '.' ? '/' : *c == '/' ? '.' : *c;
	return vm_write_file(AT_FDCWD, path, value) ? vm_fail(errno, "cannot set sysctl %s=%s", key, value) : 0;
}

/* What needs nothing of the machine's root yet; the rest of the steps follow in the order of `phases`. */
static int early(const struct field *f)
{
	switch (f->tag) {
	case U_POWER_OFF:
		power_off_by = get32(f->bytes);
		return 0;
	case U_TIME:
		return get64(f->bytes) && vm_set_clock(get64(f->bytes)) ? vm_fail(errno, "cannot set the clock") : 0;
	case U_ENTROPY:
		return add_entropy(f->bytes, f->size);
	case U_HOSTNAME:
		return sethostname((const char *)f->bytes, f->size) ? vm_fail(errno, "cannot set the host name") : 0;
	}
	return 0;
}

static int device(const struct field *f)
{
	const char *node = (const char *)f->bytes;

	return f->tag == U_DEVICE ? vm_make_device(node, node + strlen(node) + 1) : 0;
}

static int file(const struct field *f)
{
	const char *name = (const char *)f->bytes;
	size_t path = f->tag == U_FILE ? strlen(name) + 1 : 0;

	if (path && prepared)
		return vm_rewrite_file(name, f->bytes + path, f->size - path) ? vm_fail(errno, "cannot write %s", name) : 0;
	return path ? vm_mount_file(name, f->bytes + path, f->size - path) : 0;
}

static int prepared_file(const struct field *f)
{
	return f->tag == U_FILE ? vm_mount_file((const char *)f->bytes, NULL, 0) : 0;
}

/* Programs of the image that most machines will run: read once, and in the memory of all. */
static int warm(const struct field *f)
{
	static unsigned char buffer[1 << 16];
	int fd = f->tag == U_WARM ? open((const char *)f->bytes, O_RDONLY | O_CLOEXEC) : -1;

	while (fd >= 0 && read(fd, buffer, sizeof buffer) > 0)
		;
	if (fd >= 0)
		close(fd);
	return 0; /* an image without it */
}

static int user_mount(const struct field *f)
{
	return f->tag == U_MOUNT ? vm_mount_user(f->bytes) : 0;
}

static int prepared_network(const struct field *f)
{
	return f->tag == U_NETWORK ? vm_prepare_link(f->bytes) : 0;
}

static int network(const struct field *f)
{
	return f->tag == U_NETWORK ? vm_configure_link(f->bytes) : 0;
}

static int sysctl(const struct field *f)
{
	const char *key = (const char *)f->bytes;

	return f->tag == U_SYSCTL ? set_sysctl(key, key + strlen(key) + 1) : 0;
}

static int each(const unsigned char *payload, size_t size, int (*step)(const struct field *))
{
	struct field f;

	for (size_t at = 0; next_field(payload, size, &at, &f) > 0;)
		if (step(&f))
			return -1;
	return 0;
}

/* 0 or -2. */
static int read_flags(const unsigned char *payload, size_t size, uint32_t *flags, uint32_t *pids)
{
	struct field f;
	int more;

	*flags = *pids = 0;
	for (size_t at = 0; (more = next_field(payload, size, &at, &f)) > 0;) {
		if (!is_well_formed(&f))
			return -2;
		if (f.tag == U_FLAGS)
			*flags = get32(f.bytes);
		if (f.tag == U_PIDS)
			*pids = get32(f.bytes);
	}
	return more < 0 ? -2 : 0;
}

static int power_off_only(const struct field *f)
{
	return f->tag == U_POWER_OFF ? early(f) : 0;
}

static uint64_t bound = ~(uint64_t)0;

static int read_bound(const struct field *f)
{
	if (f->tag == U_BOUND)
		bound = get64(f->bytes);
	return 0;
}

int vm_prepare(const unsigned char *payload, size_t size)
{
	uint32_t flags, pids;

	if (read_flags(payload, size, &flags, &pids))
		return -2;
	random_device = open("/dev/urandom", O_WRONLY | O_CLOEXEC);
	if (each(payload, size, power_off_only) || vm_mount_disks() || vm_switch_root() ||
	    vm_mount_system(pids, !!(flags & UF_OWN_PIDS)) || each(payload, size, prepared_file) ||
	    (flags & UF_READ_ONLY && vm_protect_root()) || vm_bring_up_loopback() || each(payload, size, prepared_network) ||
	    (!(flags & UF_UNMASK) && vm_mask()) || each(payload, size, warm))
		return -1;
	prepared = 1;
	if (chdir("/"))
		return vm_fail(errno, "cannot enter the root");
	if (each(payload, size, read_bound) || vm_start_early_stub(bound))
		return -1;
	vm_flush(); /* as little as can be is left to be written: whoever goes on would have to do it */
	return 0;
}

int vm_setup(const unsigned char *payload, size_t size)
{
	uint32_t flags, pids;

	if (read_flags(payload, size, &flags, &pids))
		return -2;
	if (prepared) /* the host asks a prepared machine for nothing that would have to come before */
		return each(payload, size, early) || each(payload, size, file) || each(payload, size, network) ? -1 : 0;
	if (flags & UF_DATA_ONLY)
		return each(payload, size, early) || vm_mount_data_only() ? -1 : 0;
	/* The same order as a container's: ours first, the user's over them, and only then what makes things read-only. */
	if (each(payload, size, early) || vm_mount_disks() || vm_switch_root() ||
	    vm_mount_system(pids, !!(flags & UF_OWN_PIDS)) || each(payload, size, device) || each(payload, size, file) ||
	    each(payload, size, user_mount) || vm_drop_shares() || (flags & UF_READ_ONLY && vm_protect_root()) || vm_bring_up_loopback() ||
	    each(payload, size, network) || each(payload, size, sysctl) || (!(flags & UF_UNMASK) && vm_mask()))
		return -1;
	return chdir("/") ? vm_fail(errno, "cannot enter the root") : 0;
}

/* -- HOLD and CONTINUE */

int vm_freeze(void)
{
	int failed = vm_freeze_programs(1) ? errno : 0;

	vm_flush();
	return vm_freeze_disk(1) ? errno : failed;
}

void vm_thaw(void)
{
	vm_freeze_disk(0);
	vm_freeze_programs(0);
}

/* What stands at /etc/machine-id, where an image has one that says something: this machine is not the one it was. */
static void change_machine_id(const unsigned char *digits)
{
	char line[33];
	struct stat st;
	int fd = openat(vm_root, "etc/machine-id", O_RDWR | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);

	memcpy(line, digits, 32);
	line[32] = '\n';
	if (fd < 0 || fstat(fd, &st) || !S_ISREG(st.st_mode) || !st.st_size) {
		if (fd >= 0)
			close(fd);
		return;
	}
	if (ftruncate(fd, 0) || write(fd, line, sizeof line) != sizeof line)
		vm_warn("cannot write /etc/machine-id: %s", strerror(errno));
	close(fd);
}

static int renew(const struct field *f)
{
	const char *path = (const char *)f->bytes;
	size_t length;

	switch (f->tag) {
	case U_TIME:
	case U_ENTROPY:
	case U_HOSTNAME:
		if (early(f))
			vm_warn("%s", vm_report.text);
		return 0;
	case U_FILE:
		length = strlen(path) + 1;
		if (vm_rewrite_file(path, f->bytes + length, f->size - length))
			vm_warn("cannot renew %.200s: %s", path, strerror(errno));
		return 0;
	case U_NETWORK:
		if (vm_reconfigure_link(f->bytes))
			vm_warn("%s", vm_report.text);
		return 0;
	}
	return 0;
}

static int renew_id(const struct field *f)
{
	if (f->tag == U_MACHINE_ID)
		change_machine_id(f->bytes);
	return 0;
}

int vm_continue(const unsigned char *payload, size_t size)
{
	struct field f;
	int more;

	for (size_t at = 0; (more = next_field(payload, size, &at, &f)) > 0;)
		if (!is_well_formed(&f))
			return -1;
	if (more < 0)
		return -1;
	each(payload, size, renew);
	vm_freeze_disk(0);
	each(payload, size, renew_id); /* that is on the disk */
	vm_freeze_programs(0);
	return 0;
}

/* -- the end */

static void __attribute__((noreturn)) power_off(void)
{
#if defined(__x86_64__) || defined(__i386__)
	if (power_off_by == UP_PORT && !ioperm(SLEEP_CONTROL, 1, 1)) {
		outb(SLEEP_S5, SLEEP_CONTROL);
		sleep(1); /* the VMM ends us in the middle of that instruction, or has no such register */
	}
#endif
	reboot(power_off_by == UP_ACPI ? RB_POWER_OFF : RB_AUTOBOOT);
	_exit(1); /* the first program's end is a panic, and that restarts the machine */
}

void vm_finish(void)
{
	vm_flush();
	vm_rest_disks();
	sync(); /* the shares, and whatever else there is */
	power_off();
}
