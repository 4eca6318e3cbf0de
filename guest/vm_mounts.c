/* VM mode: from two disks to the machine's root, shaped as a container's (src/nagaya/engines/container/mounts.py).
 *
 * The initramfs stays below the machine's root, out of the programs' sight, and keeps what only we need: the disks'
 * own mounts, and the shares of the host while the machine's mounts are being made of them. */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/mount.h>
#include <linux/openat2.h>
#include <linux/sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include "stub.h"
#include "vm.h"

int unshare(int flags); /* <sched.h> and <linux/sched.h> exclude each other, as <sys/mount.h> and <linux/mount.h> do */

/* <sys/mount.h> and <linux/mount.h> exclude each other in some C libraries. */
int mount(const char *source, const char *target, const char *type, unsigned long flags, const void *data);
int umount2(const char *target, int flags);
#ifndef MNT_DETACH
#define MNT_DETACH 2
#endif

#define BLKGETSIZE64 _IOR(0x12, 114, size_t) /* linux/fs.h, which has mount flags of its own */
#define EXT4_IOC_RESIZE_FS _IOW('f', 16, uint64_t)
#define QUIET (MS_NOSUID | MS_NODEV | MS_NOEXEC)
#define MAX_LINKS 40 /* as the kernel's own MAXSYMLINKS */
#define MAX_SHARES 64
#define DISK_PATIENCE_MS 3000 /* disks are there before the first program runs, but for those of a module */

struct disk {
	const char *serial;
	char device[40];
};

static int initramfs = -1, data_disk = -1, root = -1, own_proc = -1, null_device = -1, programs = -1;
static int file_count, share_count;
static char shares[MAX_SHARES][64];

/* -- the disks */

static int find_disk(void *what)
{
	struct disk *disk = what;
	DIR *dir = opendir("/sys/block");
	struct dirent *entry;
	char path[300], serial[64];
	int found = 0;

	while (dir && !found && (entry = readdir(dir))) {
		snprintf(path, sizeof path, "/sys/block/%s/serial", entry->d_name);
		if (strncmp(entry->d_name, "vd", 2) || vm_read_line(path, serial, sizeof serial) <= 0 ||
		    strcmp(serial, disk->serial))
			continue;
		snprintf(disk->device, sizeof disk->device, "/dev/%.30s", entry->d_name);
		found = 1;
	}
	if (dir)
		closedir(dir);
	return found;
}

static int mount_disk(const char *serial, const char *place, const char *type, unsigned long flags, const char *options,
		      char *device)
{
	struct disk disk = {.serial = serial};

	if (!vm_await(find_disk, &disk, DISK_PATIENCE_MS))
		return vm_fail(ENODEV, "the machine has no disk with the serial number '%s'", serial);
	if (mount(disk.device, place, type, flags, options))
		return vm_fail(errno, "cannot mount the %s disk (%s, %s)", serial, disk.device, type);
	if (device)
		memcpy(device, disk.device, sizeof disk.device);
	return 0;
}

/* The machine's / itself: it begins as the image's is, and at once, for the machine may be cut off at any time. */
static int make_upper(void)
{
	struct stat image;

	if (!faccessat(data_disk, "upper", F_OK, 0))
		return 0;
	if (stat("/lower", &image) || (mkdirat(data_disk, "upper.new", 0755) && errno != EEXIST) ||
	    fchownat(data_disk, "upper.new", image.st_uid, image.st_gid, 0) ||
	    fchmodat(data_disk, "upper.new", image.st_mode & 07777, 0) ||
	    renameat(data_disk, "upper.new", data_disk, "upper"))
		return vm_fail(errno, "cannot make the directory for the machine's changes");
	return 0;
}

static uint32_t read_u32(const unsigned char *at)
{
	return at[0] | at[1] << 8 | at[2] << 16 | (uint32_t)at[3] << 24;
}

/* The host has made the disk larger: the file system takes the rest. Asking the kernel when there is nothing to do would
 * cost a flush of the journal. (Offsets: Documentation/filesystems/ext4/super.rst.) */
static void grow_data_disk(const char *device)
{
	unsigned char super[1024];
	uint64_t bytes, blocks, wanted;
	int fd = open(device, O_RDONLY | O_CLOEXEC);

	if (fd < 0 || ioctl(fd, BLKGETSIZE64, &bytes) || pread(fd, super, sizeof super, 1024) != sizeof super) {
		vm_warn("cannot see how large the data disk is: %s", strerror(errno));
	} else {
		blocks = read_u32(super + 4) | (uint64_t)read_u32(super + 336) << 32; /* s_blocks_count_lo, _hi */
		wanted = bytes >> (10 + read_u32(super + 24) % 16);                  /* s_log_block_size */
		if (wanted > blocks && ioctl(data_disk, EXT4_IOC_RESIZE_FS, &wanted))
			vm_warn("cannot grow the data disk's file system: %s", strerror(errno));
	}
	if (fd >= 0)
		close(fd);
}

static int mount_data_disk(void)
{
	char device[sizeof((struct disk *)0)->device];

	/* noinit_itable: nobody is to write zeros over the holes of a sparse file. discard: what is deleted becomes one. */
	if (mount_disk("data", "/data", "ext4", 0, "discard,noinit_itable", device))
		return -1;
	data_disk = open("/data", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	if (data_disk < 0)
		return vm_fail(errno, "cannot open the data disk");
	grow_data_disk(device);
	return 0;
}

int vm_mount_data_only(void)
{
	if (mount_data_disk())
		return -1;
	return mkdirat(data_disk, "upper", 0755) && errno != EEXIST
		       ? vm_fail(errno, "cannot make the directory for the machine's changes")
		       : 0;
}

int vm_enter_data_disk(void)
{
	if (data_disk < 0) {
		errno = ENODEV;
		return -1;
	}
	return fchdir(data_disk) || chroot(".") ? -1 : 0;
}

int vm_mount_disks(void)
{
	if (mount_disk("root", "/lower", "erofs", MS_RDONLY, NULL, NULL) || mount_data_disk() || make_upper())
		return -1;
	if (mkdirat(data_disk, "work", 0755) && errno != EEXIST)
		return vm_fail(errno, "cannot make overlay's working directory");
	/* In the plainest form, so that the host can read it back whatever the kernel's defaults are. */
	if (mount("overlay", "/root", "overlay", 0,
		  "lowerdir=/lower,upperdir=/data/upper,workdir=/data/work,redirect_dir=off,metacopy=off,index=off"))
		return vm_fail(errno, "cannot mount the root file system, an overlay of the image and the data disk");
	return 0;
}

void vm_flush(void)
{
	if (data_disk >= 0)
		syncfs(data_disk);
}

void vm_rest_disks(void)
{
	if (data_disk < 0)
		return;
	/* Best effort, for a disk that is clean needs no recovery at the next start; a flushed one loses nothing either. */
	mount(NULL, "/", NULL, MS_REMOUNT | MS_RDONLY, NULL);
	if (!fchdir(data_disk))
		mount(NULL, ".", NULL, MS_REMOUNT | MS_RDONLY, NULL);
}

/* As switch_root(8): pivot_root(2) does not take an initramfs. */
int vm_switch_root(void)
{
	unlink("/init"); /* its pages stay as long as we run */
	initramfs = open("/", O_PATH | O_DIRECTORY | O_CLOEXEC);
	own_proc = open("/proc", O_PATH | O_DIRECTORY | O_CLOEXEC); /* that of the programs may not know us */
	if (initramfs < 0 || own_proc < 0 || mount("tmpfs", "/files", "tmpfs", QUIET, "mode=755,size=4m") || chdir("/root") ||
	    mount(".", "/", NULL, MS_MOVE, NULL) || chroot(".") || chdir("/"))
		return vm_fail(errno, "cannot change the root");
	root = open("/", O_PATH | O_DIRECTORY | O_CLOEXEC);
	return root < 0 ? vm_fail(errno, "cannot open the root") : 0;
}

/* -- targets */

static int open_in_root(const char *path, uint64_t resolve)
{
	struct open_how how = {.flags = O_PATH | O_CLOEXEC, .resolve = RESOLVE_IN_ROOT | resolve};
	int fd;

	do
		fd = (int)syscall(SYS_openat2, root, path, &how, sizeof how);
	while (fd < 0 && errno == EAGAIN);
	return fd;
}

static int open_target(const char *path, int is_file, int follow, int links);

/* What is missing, or where a link to it leads. */
static int make_target(const char *path, int is_file, int follow, int links)
{
	const char *slash = strrchr(path, '/'), *name = slash ? slash + 1 : path;
	char parent_path[PATH_MAX], link[PATH_MAX];
	int parent, made = -1;
	ssize_t n = -1;

	snprintf(parent_path, sizeof parent_path, "%.*s", slash ? (int)(slash - path) : 1, slash ? path : ".");
	parent = open_target(parent_path, 0, follow, links);
	if (parent < 0)
		return -1;
	/* Only its last part may be missing now: no link of the image's is followed in making it. */
	if (is_file) {
		made = openat(parent, name, O_CREAT | O_EXCL | O_WRONLY | O_CLOEXEC, 0644);
		if (made >= 0)
			close(made);
	} else
		made = mkdirat(parent, name, 0755);
	int error = errno;
	if (made < 0 && error == EEXIST && follow)
		n = readlinkat(parent, name, link, sizeof link - 1);
	close(parent);
	if (made < 0 && error != EEXIST) {
		errno = error;
		return -1;
	}
	if (n >= 0) {
		char leads_to[2 * PATH_MAX];
		link[n] = 0;
		if (links == MAX_LINKS) {
			errno = ELOOP;
			return -1;
		}
		snprintf(leads_to, sizeof leads_to, "%s/%s", link[0] == '/' ? "" : parent_path, link);
		return open_target(leads_to, is_file, follow, links + 1);
	}
	return open_in_root(path, follow ? RESOLVE_NO_MAGICLINKS : RESOLVE_NO_SYMLINKS);
}

/* An O_PATH descriptor of `path` in the machine's root, made when missing: directories, or an empty file. */
static int open_target(const char *path, int is_file, int follow, int links)
{
	char relative[PATH_MAX];
	size_t length;

	path += strspn(path, "/");
	length = strlen(path);
	while (length && path[length - 1] == '/')
		length--;
	if (length >= sizeof relative) {
		errno = ENAMETOOLONG;
		return -1;
	}
	snprintf(relative, sizeof relative, "%.*s", length ? (int)length : 1, length ? path : ".");
	int fd = open_in_root(relative, follow ? RESOLVE_NO_MAGICLINKS : RESOLVE_NO_SYMLINKS);
	return fd >= 0 || errno != ENOENT ? fd : make_target(relative, is_file, follow, links);
}

/* Raise flags of the mount that `fd` is the root of. */
static int set_mount_flags(int fd, unsigned long flags)
{
	struct mount_attr attributes = {
		.attr_set = (flags & MS_RDONLY ? MOUNT_ATTR_RDONLY : 0) | (flags & MS_NOSUID ? MOUNT_ATTR_NOSUID : 0) |
			    (flags & MS_NODEV ? MOUNT_ATTR_NODEV : 0) | (flags & MS_NOEXEC ? MOUNT_ATTR_NOEXEC : 0)};

	return (int)syscall(SYS_mount_setattr, fd, "", AT_EMPTY_PATH, &attributes, sizeof attributes);
}

/* Mount a copy of what `fd` is open on, a directory or a file, over `target`. */
static int bind_tree(int fd, int target, unsigned long flags)
{
	int tree = (int)syscall(SYS_open_tree, fd, "", OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | AT_EMPTY_PATH), failed;

	if (tree < 0)
		return -1;
	failed = set_mount_flags(tree, flags) || syscall(SYS_move_mount, tree, "", target, "", MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH);
	int error = errno;
	close(tree);
	errno = error;
	return failed ? -1 : 0;
}

/* mount(2) at a descriptor: its target is a path, and "." is the one that cannot be led astray. */
static int mount_at(int target, const char *source, const char *type, unsigned long flags, const char *options)
{
	return fchdir(target) || mount(source, ".", type, flags, options) ? -1 : 0;
}

/* -- the kernel's file systems */

static int mount_system(const char *type, const char *source, const char *path, unsigned long flags, const char *options)
{
	int target = open_target(path, 0, 0, 0), failed;

	if (target < 0 && errno == ELOOP)
		return vm_fail(0, "the image has a symbolic link where the machine's %s belongs", path);
	if (target < 0)
		return vm_fail(errno, "cannot make %s", path);
	/* Without a type: what has been mounted in the initramfs moves over. */
	failed = type ? mount_at(target, source, type, flags, options)
		      : (int)syscall(SYS_move_mount, initramfs, source, target, "", MOVE_MOUNT_T_EMPTY_PATH);
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

static int limit_pids(uint32_t most)
{
	int groups = open("/sys/fs/cgroup", O_RDONLY | O_DIRECTORY | O_CLOEXEC), failed;
	char text[16];

	snprintf(text, sizeof text, "%u", most);
	failed = groups < 0 || vm_write_file(groups, "cgroup.subtree_control", "+pids") ||
		 mkdirat(groups, "machine", 0755) || vm_write_file(groups, "machine/pids.max", text) ||
		 (programs = openat(groups, "machine", O_RDONLY | O_DIRECTORY | O_CLOEXEC)) < 0;
	int error = errno;
	if (groups >= 0)
		close(groups);
	return failed ? vm_fail(error, "the guest kernel cannot limit the number of processes") : 0;
}

static int protect_groups(void)
{
	int groups = open("/sys/fs/cgroup", O_PATH | O_CLOEXEC), failed;

	failed = groups >= 0 && set_mount_flags(groups, MS_RDONLY) && errno != EINVAL ? errno : 0; /* EINVAL: no mount */
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
	return (pids && limit_pids(pids)) || protect_groups() ? -1 : 0;
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
	if (fstatat(initramfs, kernels, &st, 0) || !(S_ISCHR(st.st_mode) || S_ISBLK(st.st_mode)))
		return vm_fail(ENODEV, "the guest kernel has no device %s", node);
	if (!slash || strncmp(path, "/dev/", 5) || strstr(path, ".."))
		return vm_fail(EINVAL, "the device's path inside, '%s', is not below /dev", path);
	snprintf(parent_path, sizeof parent_path, "%.*s", (int)(slash - path), path);
	int parent = open_target(parent_path, 0, 0, 0), failed;
	mode_t mask = umask(0);
	failed = parent < 0 || mknodat(parent, slash + 1, st.st_mode, st.st_rdev) ? errno : 0;
	umask(mask);
	if (parent >= 0)
		close(parent);
	return failed && failed != EEXIST ? vm_fail(failed, "cannot make the device %s", path) : 0;
}

/* -- the user's mounts, and our files over the image's */

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
	ssize_t n = readlinkat(own_proc, descriptor, place, sizeof place - 1);
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

	snprintf(name, sizeof name, "files/%d", file_count++);
	fd = openat(initramfs, name, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0644);
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
	target = open_target(path, 1, 1, 0);
	failed = target < 0 ? cannot_mount(errno, path) : check_place(target, path);
	if (!failed && bind_tree(fd, target, 0))
		failed = cannot_mount(errno, path);
	if (target >= 0)
		close(target);
	close(fd);
	return failed;
}

static int mount_tmpfs(const char *path, unsigned long flags, uint32_t mode, uint64_t size)
{
	char options[64];
	int target = open_target(path, 0, 1, 0), failed;

	if (target < 0)
		return cannot_mount(errno, path);
	snprintf(options, sizeof options, size ? "mode=%o,size=%llu" : "mode=%o", mode & 07777, (unsigned long long)size);
	failed = check_place(target, path);
	if (!failed && mount_at(target, "tmpfs", "tmpfs", flags, options))
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
		if (mkdirat(initramfs, name, 0755) || fchdir(initramfs) || mount(tag, name, "virtiofs", 0, NULL))
			return -1;
		strcpy(shares[share_count++], tag);
	}
	fd = openat(initramfs, name, O_PATH | O_CLOEXEC);
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
	target = open_target(path, !S_ISDIR(st.st_mode), 1, 0);
	failed = target < 0 ? cannot_mount(errno, path) : check_place(target, path);
	if (!failed) {
		struct stat there;
		if (!fstat(target, &there) && S_ISDIR(there.st_mode) != S_ISDIR(st.st_mode))
			failed = cannot_mount(S_ISDIR(there.st_mode) ? EISDIR : ENOTDIR, path); /* move_mount(2) has only EINVAL */
		else if (bind_tree(part, target, flags))
			failed = cannot_mount(errno, path);
	}
	if (target >= 0)
		close(target);
	close(part);
	return failed;
}

int vm_mount_user(const unsigned char *field, size_t size)
{
	const char *source = (const char *)field + 24, *target = source + strlen(source) + 1;
	unsigned long flags = get32(field + 4) & (MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC);

	(void)size;
	if (get32(field) == UM_TMPFS)
		return mount_tmpfs(target, flags, get32(field + 8), get64(field + 16));
	return mount_share(source, target, flags);
}

int vm_drop_shares(void)
{
	char name[32];

	for (int i = 0; i < share_count; i++) {
		snprintf(name, sizeof name, "shares/%d", i);
		if (fchdir(initramfs) || umount2(name, MNT_DETACH))
			return vm_fail(errno, "cannot let go of the host's share '%s'", shares[i]);
	}
	return 0;
}

/* -- what makes things read-only */

int vm_protect_root(void)
{
	return set_mount_flags(root, MS_RDONLY) ? vm_fail(errno, "cannot make the root read-only") : 0;
}

static int protect(const char *path)
{
	int fd = open(path, O_PATH | O_CLOEXEC), failed;

	if (fd < 0)
		return 0; /* this kernel does not have it */
	failed = bind_tree(fd, fd, MS_RDONLY | QUIET) ? errno : 0;
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
		failed = mount_at(fd, "tmpfs", "tmpfs", MS_RDONLY | QUIET, "size=0k");
	else
		failed = bind_tree(null_device, fd, 0);
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
