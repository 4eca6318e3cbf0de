/* VM mode: from two disks to the machine's root. The initramfs stays below it, out of the programs' sight, and keeps what
 * only we need: the disks' own mounts, and the shares of the host while the machine's mounts are being made of them. */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <unistd.h>

#include "vm.h"

#ifndef BLKGETSIZE64
#define BLKGETSIZE64 _IOR(0x12, 114, size_t) /* linux/fs.h, which has mount flags of its own */
#endif
#ifndef FIFREEZE /* as above */
#define FIFREEZE _IOWR('X', 119, int)
#define FITHAW _IOWR('X', 120, int)
#endif
#define EXT4_IOC_RESIZE_FS _IOW('f', 16, uint64_t)
#define DISK_PATIENCE_MS 3000 /* disks are there before the first program runs, but for those of a module */

struct disk {
	const char *serial;
	char device[40];
};

int vm_initramfs = -1, vm_root = -1, vm_proc = -1;
static int data_disk = -1;

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
		blocks = get32(super + 4) | (uint64_t)get32(super + 336) << 32; /* s_blocks_count_lo, _hi */
		wanted = bytes >> (10 + get32(super + 24) % 16);                  /* s_log_block_size */
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

int vm_freeze_disk(int frozen)
{
	if (data_disk < 0)
		return 0;
	return ioctl(data_disk, frozen ? FIFREEZE : FITHAW, 0) ? -1 : 0;
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
	vm_initramfs = open("/", O_PATH | O_DIRECTORY | O_CLOEXEC);
	vm_proc = open("/proc", O_PATH | O_DIRECTORY | O_CLOEXEC); /* that of the programs may not know us */
	if (vm_initramfs < 0 || vm_proc < 0 || mount("tmpfs", "/files", "tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, "mode=755,size=4m") ||
	    chdir("/root") || mount(".", "/", NULL, MS_MOVE, NULL) || chroot(".") || chdir("/"))
		return vm_fail(errno, "cannot change the root");
	vm_root = open("/", O_PATH | O_DIRECTORY | O_CLOEXEC);
	return vm_root < 0 ? vm_fail(errno, "cannot open the root") : 0;
}
