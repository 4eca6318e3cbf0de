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

/* Make what is missing: 0, -1 with errno, or 1 when there is a link, which leads to nothing. */
static int make_part(int parent, const char *name, int is_file)
{
	int made;

	if (is_file) {
		made = openat(parent, name, O_CREAT | O_EXCL | O_WRONLY | O_CLOEXEC, 0644);
		if (made >= 0)
			close(made);
	} else
		made = mkdirat(parent, name, 0755);
	return made >= 0 ? 0 : errno == EEXIST ? 1 : -1;
}

/* Into `out`, of PATH_MAX bytes: where the link `name` of the directory `path` (of so many bytes) leads, and on by `rest`. */
static int follow_link(int parent, const char *path, size_t length, const char *name, const char *rest, char *out)
{
	char link[PATH_MAX];
	ssize_t n = readlinkat(parent, name, link, sizeof link - 1);

	if (n < 0)
		return -1;
	link[n] = 0;
	if (snprintf(out, PATH_MAX, "%.*s/%s%s%s", link[0] == '/' ? 0 : (int)length, path, link, *rest ? "/" : "", rest) >= PATH_MAX) {
		errno = ENAMETOOLONG;
		return -1;
	}
	return 0;
}

/* The next part of `path`, which ends at `end`, made if it is missing: an O_PATH descriptor; -1 with errno; or -2 when it
 * is a link to what is missing, and `next` the path that has what that says in its place. */
static int open_part(int parent, char *path, char *name, char *end, int is_file, int follow, char *next)
{
	const uint64_t resolve = follow ? RESOLVE_NO_MAGICLINKS : RESOLVE_NO_SYMLINKS;
	char after = *end;
	int fd, made = 0;

	*end = 0;
	fd = open_in_root(path, resolve);
	if (fd < 0 && errno == ENOENT) {
		made = make_part(parent, name, is_file && !after);
		if (!made)
			fd = open_in_root(path, resolve);
		else if (made > 0)
			fd = follow && !follow_link(parent, path, (size_t)(name - path), name, after ? end + 1 : "", next) ? -2 : -1;
	}
	*end = after;
	return fd;
}

/* Part by part, for an image's link may lead to what is missing, and paths may have two thousand parts: neither may cost
 * us our stack. As open_part: the descriptor of the whole, -1, or -2 with the path to go on with in `path` itself. */
static int make_missing(char *path, int is_file, int follow)
{
	char next[PATH_MAX], *name = path, *end;
	int fd = open_in_root(".", 0);

	for (; fd >= 0 && *(name += strspn(name, "/")); name = end) {
		int parent = fd;
		end = name + strcspn(name, "/");
		fd = open_part(parent, path, name, end, is_file, follow, next);
		int error = errno;
		close(parent);
		errno = error;
	}
	if (fd == -2)
		strcpy(path, next);
	return fd;
}

int vm_open_target(const char *path, int is_file, int follow)
{
	const uint64_t resolve = follow ? RESOLVE_NO_MAGICLINKS : RESOLVE_NO_SYMLINKS;
	char wanted[PATH_MAX];
	size_t length;

	path += strspn(path, "/");
	length = strlen(path);
	while (length && path[length - 1] == '/')
		length--;
	if (length >= sizeof wanted) {
		errno = ENAMETOOLONG;
		return -1;
	}
	snprintf(wanted, sizeof wanted, "%.*s", length ? (int)length : 1, length ? path : ".");
	for (int links = 0; links <= MAX_LINKS; links++) {
		int fd = open_in_root(wanted, resolve);
		if (fd < 0 && errno == ENOENT)
			fd = make_missing(wanted, is_file, follow);
		if (fd != -2)
			return fd;
	}
	errno = ELOOP;
	return -1;
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
