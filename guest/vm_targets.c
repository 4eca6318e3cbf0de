/* VM mode: places in the machine's root, found and made without a link of the image's leading out of it. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/mount.h>
#include <linux/openat2.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "vm.h"

/* <sys/mount.h> and <linux/mount.h> exclude each other in some C libraries. */
int mount(const char *source, const char *target, const char *type, unsigned long flags, const void *data);
#define MAX_LINKS 40 /* as the kernel's own MAXSYMLINKS */

static int open_in_root(const char *path, uint64_t resolve)
{
	struct open_how how = {.flags = O_PATH | O_CLOEXEC, .resolve = RESOLVE_IN_ROOT | resolve};
	int fd;

	do
		fd = (int)syscall(SYS_openat2, vm_root, path, &how, sizeof how);
	while (fd < 0 && errno == EAGAIN);
	return fd;
}

static int find_or_make(const char *path, int is_file, int follow, int links);

/* What is missing, or where a link to it leads. */
static int make_target(const char *path, int is_file, int follow, int links)
{
	const char *slash = strrchr(path, '/'), *name = slash ? slash + 1 : path;
	char parent_path[PATH_MAX], link[PATH_MAX];
	int parent, made = -1;
	ssize_t n = -1;

	snprintf(parent_path, sizeof parent_path, "%.*s", slash ? (int)(slash - path) : 1, slash ? path : ".");
	parent = find_or_make(parent_path, 0, follow, links);
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
		return find_or_make(leads_to, is_file, follow, links + 1);
	}
	return open_in_root(path, follow ? RESOLVE_NO_MAGICLINKS : RESOLVE_NO_SYMLINKS);
}

static int find_or_make(const char *path, int is_file, int follow, int links)
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

int vm_open_target(const char *path, int is_file, int follow)
{
	return find_or_make(path, is_file, follow, 0);
}

int vm_set_mount_flags(int fd, unsigned long flags)
{
	struct mount_attr attributes = {
		.attr_set = (flags & MS_RDONLY ? MOUNT_ATTR_RDONLY : 0) | (flags & MS_NOSUID ? MOUNT_ATTR_NOSUID : 0) |
			    (flags & MS_NODEV ? MOUNT_ATTR_NODEV : 0) | (flags & MS_NOEXEC ? MOUNT_ATTR_NOEXEC : 0)};

	return (int)syscall(SYS_mount_setattr, fd, "", AT_EMPTY_PATH, &attributes, sizeof attributes);
}

int vm_bind(int fd, int target, unsigned long flags)
{
	int tree = (int)syscall(SYS_open_tree, fd, "", OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | AT_EMPTY_PATH), failed;

	if (tree < 0)
		return -1;
	failed = vm_set_mount_flags(tree, flags) ||
		 syscall(SYS_move_mount, tree, "", target, "", MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH);
	int error = errno;
	close(tree);
	errno = error;
	return failed ? -1 : 0;
}

int vm_mount_at(int target, const char *source, const char *type, unsigned long flags, const char *options)
{
	return fchdir(target) || mount(source, ".", type, flags, options) ? -1 : 0;
}
