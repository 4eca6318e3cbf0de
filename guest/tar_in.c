/* tar-in DIRECTORY [--no-owner]: unpack ustar, pax and GNU archives from standard input, never leaving the directory.
 *
 * Links inside the directory are followed as if it were the root (openat2, RESOLVE_IN_ROOT). */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/openat2.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/xattr.h>
#include <unistd.h>

#include "spawn.h"
#include "tar.h"

#define MAX_NAME 4096
#define MAX_EXTENDED (1u << 20)

struct xattr {
	char *name, *value;
	size_t size;
	struct xattr *next;
};

struct entry {
	char name[MAX_NAME], link[MAX_NAME];
	char type;
	uint64_t size, real_size; /* real_size: of a sparse file */
	int sparse, has_size;
	unsigned mode;
	uint64_t uid, gid;
	struct timespec mtime;
	unsigned major, minor;
	int has_name, has_link, has_uid, has_gid, has_mtime;
	struct xattr *xattrs;
};

/* A directory's mode and time are set at the end: a read-only one must take its files first. */
struct later {
	char *name;
	unsigned mode;
	struct timespec mtime;
	struct later *next;
};

static int root = -1, keep_owner = 1;
static struct later *laters;

static void __attribute__((noreturn)) bad(const char *what)
{
	fprintf(stderr, "not a valid tar stream: %s\n", what);
	_exit(1);
}

static void __attribute__((noreturn)) give_up(const char *path)
{
	fprintf(stderr, "%s: %s\n", path, strerror(errno));
	_exit(1);
}

/* 0 at a clean end of stream. */
static int read_full(void *to, size_t size)
{
	unsigned char *p = to;
	size_t at = 0;

	while (at < size) {
		ssize_t n = read(0, p + at, size - at);
		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0)
			give_up("standard input");
		if (n == 0) {
			if (at)
				bad("it ends in the middle");
			return 0;
		}
		at += (size_t)n;
	}
	return 1;
}

static void need(void *to, size_t size)
{
	if (size && !read_full(to, size))
		bad("it ends in the middle");
}

static void skip(uint64_t size)
{
	static unsigned char waste[64 << 10];

	for (; size; size -= size < sizeof waste ? size : sizeof waste)
		need(waste, size < sizeof waste ? (size_t)size : sizeof waste);
}

static uint64_t padding(uint64_t size)
{
	return -size & (BLOCK - 1);
}

static uint64_t field_number(const char *field, size_t size)
{
	const unsigned char *p = (const unsigned char *)field;
	uint64_t value = 0;
	size_t i = 0;

	if (p[0] & 0x80) { /* GNU's base 256 */
		if (p[0] != 0x80)
			bad("a number is out of range");
		for (i = 1; i < size; i++) {
			if (value >> 55)
				bad("a number is out of range");
			value = value << 8 | p[i];
		}
		return value;
	}
	while (i < size && p[i] == ' ')
		i++;
	for (; i < size && p[i] >= '0' && p[i] <= '7'; i++)
		value = value << 3 | (uint64_t)(p[i] - '0');
	if (i < size && p[i] && p[i] != ' ')
		bad("a number is malformed");
	return value;
}

static uint64_t pax_value(const char *text)
{
	char *end;

	errno = 0;
	uint64_t value = strtoull(text, &end, 10);
	if (errno || *end || *text < '0' || *text > '9' || value >> 62)
		bad("an extended number is malformed");
	return value;
}

static void copy_name(char *to, const char *from, size_t size)
{
	if (size >= MAX_NAME)
		bad("a name is too long");
	memcpy(to, from, size);
	to[size] = 0;
}

static void pax_time(struct timespec *ts, const char *text)
{
	char *end;
	long nanos = 0, scale = 100000000;

	ts->tv_sec = strtoll(text, &end, 10);
	if (*end == '.')
		for (end++; *end >= '0' && *end <= '9'; end++, scale /= 10)
			nanos += (*end - '0') * scale;
	if (*end)
		bad("an extended time is malformed");
	if (text[0] == '-' && nanos) {
		ts->tv_sec--;
		nanos = 1000000000 - nanos;
	}
	ts->tv_nsec = nanos;
}

static void add_xattr(struct entry *e, const char *name, const char *value, size_t size)
{
	struct xattr *x = malloc(sizeof *x);

	if (!x || !(x->name = strdup(name)) || !(x->value = malloc(size + 1)))
		give_up("memory");
	memcpy(x->value, value, size);
	x->size = size;
	x->next = e->xattrs;
	e->xattrs = x;
}

static void pax_record(struct entry *e, const char *key, const char *value, size_t size)
{
	if (!strcmp(key, "path") && !e->sparse) {
		copy_name(e->name, value, size);
		e->has_name = 1;
	} else if (!strcmp(key, "GNU.sparse.name")) {
		copy_name(e->name, value, size);
		e->has_name = 1;
	} else if (!strcmp(key, "linkpath")) {
		copy_name(e->link, value, size);
		e->has_link = 1;
	} else if (!strcmp(key, "size")) {
		e->size = pax_value(value);
		e->has_size = 1;
	} else if (!strcmp(key, "uid")) {
		e->uid = pax_value(value);
		e->has_uid = 1;
	} else if (!strcmp(key, "gid")) {
		e->gid = pax_value(value);
		e->has_gid = 1;
	} else if (!strcmp(key, "mtime")) {
		pax_time(&e->mtime, value);
		e->has_mtime = 1;
	} else if (!strcmp(key, "GNU.sparse.major")) {
		if (strcmp(value, "1"))
			bad("a sparse file in a format older than 1.0");
		e->sparse = 1;
	} else if (!strcmp(key, "GNU.sparse.realsize"))
		e->real_size = pax_value(value);
	else if (!strncmp(key, "GNU.sparse.", 11) && strcmp(key + 11, "minor"))
		bad("a sparse file in a format older than 1.0");
	else if (!strncmp(key, "SCHILY.xattr.", 13))
		add_xattr(e, key + 13, value, size);
}

static void read_pax(struct entry *e, uint64_t size)
{
	char *text, *at, *end;

	if (size > MAX_EXTENDED || !(text = malloc((size_t)size + 1)))
		bad("an extended header is too long");
	need(text, (size_t)size);
	skip(padding(size));
	text[size] = 0;
	for (at = text; at < text + size; at = end) {
		char *rest, *equals;
		unsigned long length = strtoul(at, &rest, 10);
		if (rest == at || *rest != ' ' || length > (size_t)(text + size - at) || length < (size_t)(rest - at) + 3)
			bad("an extended header is malformed");
		end = at + length;
		equals = memchr(rest + 1, '=', (size_t)(end - rest - 1));
		if (!equals || end[-1] != '\n')
			bad("an extended header is malformed");
		*equals = end[-1] = 0;
		if (strncmp(rest + 1, "SCHILY.xattr.", 13) && memchr(equals + 1, 0, (size_t)(end - equals - 2)))
			bad("an extended header is malformed");
		pax_record(e, rest + 1, equals + 1, (size_t)(end - equals - 2));
	}
	free(text);
}

static void read_gnu_name(char *to, uint64_t size)
{
	if (size > MAX_NAME)
		bad("a name is too long");
	char text[MAX_NAME + 1];
	need(text, (size_t)size);
	skip(padding(size));
	text[size] = 0;
	copy_name(to, text, strlen(text));
}

/* Base 256 may be negative (two's complement): GNU tar's way to say a time before 1970. */
static int64_t field_time(const char *field, size_t size)
{
	uint64_t value = UINT64_MAX;

	if ((unsigned char)field[0] != 0xff)
		return (int64_t)field_number(field, size);
	for (size_t i = 1; i < size; i++)
		value = value << 8 | (unsigned char)field[i];
	return (int64_t)value;
}

static uid_t checked_id(uint64_t id)
{
	if (id >= UINT32_MAX) /* (uid_t)-1 means "leave it" to chown */
		bad("an owner's number is out of range");
	return (uid_t)id;
}

/* The next entry with everything that its extended headers say. 0 at the archive's end. */
static int next_entry(struct entry *e)
{
	struct header h;

	memset(e, 0, sizeof *e);
	for (;;) {
		if (!read_full(&h, sizeof h))
			return 0;
		if (!h.name[0] && field_number(h.chksum, sizeof h.chksum) == 0)
			return 0;
		if (field_number(h.chksum, sizeof h.chksum) != header_sum(&h))
			bad("a header's checksum is wrong");
		uint64_t size = field_number(h.size, sizeof h.size);
		if (h.typeflag == 'x')
			read_pax(e, size);
		else if (h.typeflag == 'g')
			skip(size + padding(size));
		else if (h.typeflag == 'L') {
			read_gnu_name(e->name, size);
			e->has_name = 1;
		} else if (h.typeflag == 'K') {
			read_gnu_name(e->link, size);
			e->has_link = 1;
		} else
			break;
	}
	e->type = h.typeflag ? h.typeflag : '0';
	if (!e->has_name) {
		int ustar = !memcmp(h.magic, "ustar\0", 6) && h.prefix[0];
		snprintf(e->name, sizeof e->name, "%.*s%s%.*s", ustar ? (int)sizeof h.prefix : 0, h.prefix, ustar ? "/" : "",
			 (int)sizeof h.name, h.name);
	}
	if (!e->has_link)
		snprintf(e->link, sizeof e->link, "%.*s", (int)sizeof h.linkname, h.linkname);
	if (!e->has_size)
		e->size = field_number(h.size, sizeof h.size);
	if (!e->has_uid)
		e->uid = field_number(h.uid, sizeof h.uid);
	if (!e->has_gid)
		e->gid = field_number(h.gid, sizeof h.gid);
	checked_id(e->uid);
	checked_id(e->gid);
	if (!e->has_mtime)
		e->mtime.tv_sec = (time_t)field_time(h.mtime, sizeof h.mtime);
	e->mode = (unsigned)field_number(h.mode, sizeof h.mode) & 07777;
	if (e->type == '3' || e->type == '4') {
		e->major = (unsigned)field_number(h.devmajor, sizeof h.devmajor);
		e->minor = (unsigned)field_number(h.devminor, sizeof h.devminor);
	}
	if (e->type >= '1' && e->type <= '6')
		e->size = 0; /* these have no data, whatever size an old writer gave a hard link */
	return 1;
}

/* -- places */

static int open_in_root(const char *path, uint64_t flags)
{
	struct open_how how = {.flags = flags | O_CLOEXEC, .resolve = RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS};

	return (int)syscall(SYS_openat2, root, path, &how, sizeof how);
}

/* Drop leading slashes and "." parts; refuse "..". */
static void clean_name(char *name)
{
	char *from = name, *to = name;

	while (*from) {
		size_t length = strcspn(from, "/");
		if (length == 2 && from[0] == '.' && from[1] == '.')
			bad("a name leads out of the directory");
		if (length && !(length == 1 && from[0] == '.')) {
			if (to != name)
				*to++ = '/';
			memmove(to, from, length);
			to += length;
		}
		from += length + (from[length] == '/');
	}
	*to = 0;
}

/* The directory that `name` is to be in, made when missing: once with the whole path, else part by part. */
static int open_parent(const char *name)
{
	const char *last = strrchr(name, '/');
	char path[MAX_NAME];

	if (!last)
		return open_in_root(".", O_PATH | O_DIRECTORY);
	size_t size = (size_t)(last - name);
	copy_name(path, name, size);
	int fd = open_in_root(path, O_PATH | O_DIRECTORY);
	if (fd >= 0 || errno != ENOENT)
		return fd;
	int above = open_in_root(".", O_PATH | O_DIRECTORY);
	for (size_t start = 0, stop; above >= 0 && start < size; start = stop + 1) {
		stop = start + strcspn(name + start, "/");
		copy_name(path, name, stop);
		fd = open_in_root(path, O_PATH | O_DIRECTORY);
		if (fd < 0 && errno == ENOENT && (!mkdirat(above, path + start, 0755) || errno == EEXIST))
			fd = open_in_root(path, O_PATH | O_DIRECTORY);
		close(above);
		above = fd;
	}
	return above;
}

/* Whether an attribute that could not be set may be missing: this file system or this user has no such attributes. */
static int optional(int error)
{
	return error == EPERM || error == EOPNOTSUPP;
}

/* For a file or directory that is open. Owner first: a change of owner clears set-user-id and capabilities. */
static void set_owner_and_xattrs(int fd, const struct entry *e)
{
	if (keep_owner && fchown(fd, (uid_t)e->uid, (gid_t)e->gid))
		give_up(e->name);
	for (struct xattr *x = e->xattrs; x; x = x->next)
		if (fsetxattr(fd, x->name, x->value, x->size, 0) && !optional(errno))
			give_up(e->name);
}

/* For what is better not opened. A new device has its mode already, a link has none. */
static void set_special(int parent, const char *base, const struct entry *e)
{
	struct timespec times[2] = {{0, UTIME_OMIT}, e->mtime};
	char proc_path[64];

	if (keep_owner && fchownat(parent, base, (uid_t)e->uid, (gid_t)e->gid, AT_SYMLINK_NOFOLLOW))
		give_up(e->name);
	int fd = e->xattrs && e->type != '2' ? openat(parent, base, O_PATH | O_NOFOLLOW | O_CLOEXEC) : -1;
	if (fd >= 0) {
		snprintf(proc_path, sizeof proc_path, "/proc/self/fd/%d", fd);
		for (struct xattr *x = e->xattrs; x; x = x->next)
			if (setxattr(proc_path, x->name, x->value, x->size, 0) && !optional(errno) && errno != ENOENT)
				give_up(e->name); /* ENOENT: no /proc */
		close(fd);
	}
	utimensat(parent, base, times, AT_SYMLINK_NOFOLLOW);
}

static void put_data(int fd, const struct entry *e, off_t at, uint64_t size)
{
	static unsigned char chunk[128 << 10];

	while (size) {
		size_t part = size < sizeof chunk ? (size_t)size : sizeof chunk;
		need(chunk, part);
		for (size_t done = 0; done < part;) {
			ssize_t n = pwrite(fd, chunk + done, part - done, at);
			if (n < 0 && errno == EINTR)
				continue;
			if (n < 0)
				give_up(e->name);
			done += (size_t)n;
			at += n;
		}
		size -= part;
	}
}

/* GNU's sparse map 1.0: decimal lines in blocks, then the segments. */
static uint64_t map_number(unsigned char *block, size_t *at, uint64_t *left)
{
	uint64_t value = 0;
	int digits = 0;

	for (;;) {
		if (*at == BLOCK) {
			if (*left < BLOCK)
				bad("a sparse map is cut off");
			need(block, BLOCK);
			*left -= BLOCK;
			*at = 0;
		}
		unsigned char c = block[(*at)++];
		if (c == '\n' && digits)
			return value;
		if (c < '0' || c > '9' || ++digits > 19 || value > (UINT64_MAX >> 5))
			bad("a sparse map is malformed");
		value = value * 10 + (uint64_t)(c - '0');
	}
}

static void put_sparse(int fd, const struct entry *e)
{
	unsigned char block[BLOCK];
	size_t at = BLOCK;
	uint64_t left = e->size, count = map_number(block, &at, &left);

	if (count > 1u << 20)
		bad("a sparse map is too long");
	uint64_t *pairs = calloc((size_t)count * 2 + 1, sizeof *pairs);
	if (!pairs)
		give_up("memory");
	for (uint64_t i = 0; i < 2 * count; i++)
		pairs[i] = map_number(block, &at, &left);
	if (e->real_size >> 62 || ftruncate(fd, (off_t)e->real_size))
		give_up(e->name);
	for (uint64_t i = 0; i < count; i++) {
		if (pairs[2 * i + 1] > left || pairs[2 * i] > e->real_size || pairs[2 * i + 1] > e->real_size - pairs[2 * i])
			bad("a sparse map does not match its file");
		put_data(fd, e, (off_t)pairs[2 * i], pairs[2 * i + 1]);
		left -= pairs[2 * i + 1];
	}
	free(pairs);
	skip(left);
}

static void make_file(int parent, const char *base, const struct entry *e)
{
	struct timespec times[2] = {{0, UTIME_OMIT}, e->mtime};

	if (unlinkat(parent, base, 0) && errno != ENOENT)
		give_up(e->name);
	int fd = openat(parent, base, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600);
	if (fd < 0)
		give_up(e->name);
	if (e->sparse)
		put_sparse(fd, e);
	else
		put_data(fd, e, 0, e->size);
	skip(padding(e->size));
	set_owner_and_xattrs(fd, e);
	if (fchmod(fd, e->mode))
		give_up(e->name);
	futimens(fd, times);
	if (close(fd))
		give_up(e->name);
}

static void make_directory(int parent, const char *base, const struct entry *e)
{
	if (mkdirat(parent, base, 0700) && errno != EEXIST)
		give_up(e->name);
	/* A link to a directory stays one, as when GNU tar unpacks over a merged /usr. */
	int fd = open_in_root(e->name, O_RDONLY | O_DIRECTORY);
	if (fd < 0)
		give_up(e->name);
	set_owner_and_xattrs(fd, e);
	close(fd);
	struct later *l = malloc(sizeof *l);
	if (!l || !(l->name = strdup(e->name)))
		give_up("memory");
	l->mode = e->mode;
	l->mtime = e->mtime;
	l->next = laters;
	laters = l;
}

static void make_link(int parent, const char *base, struct entry *e)
{
	clean_name(e->link);
	if (!strcmp(e->link, e->name))
		return; /* a link to itself: unlinking it first would lose it */
	int from = open_parent(e->link);
	const char *slash = strrchr(e->link, '/');
	if (from < 0)
		give_up(e->link);
	if (unlinkat(parent, base, 0) && errno != ENOENT)
		give_up(e->name);
	if (linkat(from, slash ? slash + 1 : e->link, parent, base, 0))
		give_up(e->name);
	close(from);
}

static void make_symlink(int parent, const char *base, const struct entry *e)
{
	if (unlinkat(parent, base, 0) && errno != ENOENT)
		give_up(e->name);
	if (symlinkat(e->link, parent, base))
		give_up(e->name);
	set_special(parent, base, e);
}

static void make_special(int parent, const char *base, const struct entry *e)
{
	mode_t type = e->type == '3' ? S_IFCHR : e->type == '4' ? S_IFBLK : S_IFIFO;

	if (unlinkat(parent, base, 0) && errno != ENOENT)
		give_up(e->name);
	if (mknodat(parent, base, type | e->mode, makedev(e->major, e->minor)))
		give_up(e->name);
	set_special(parent, base, e);
}

static void set_top(const struct entry *e)
{
	if (keep_owner && fchownat(root, "", (uid_t)e->uid, (gid_t)e->gid, AT_EMPTY_PATH))
		give_up(".");
}

static void unpack(struct entry *e)
{
	clean_name(e->name);
	if (!e->name[0]) { /* "./": the directory itself */
		if (e->type == '5')
			set_top(e);
		skip(e->size + padding(e->size));
		return;
	}
	int parent = open_parent(e->name);
	const char *slash = strrchr(e->name, '/'), *base = slash ? slash + 1 : e->name;
	if (parent < 0)
		give_up(e->name);
	switch (e->type) {
	case '0':
	case '7':
		make_file(parent, base, e);
		break;
	case '1':
		make_link(parent, base, e);
		break;
	case '2':
		make_symlink(parent, base, e);
		break;
	case '3':
	case '4':
	case '6':
		make_special(parent, base, e);
		break;
	case '5':
		make_directory(parent, base, e);
		break;
	default:
		bad("an entry of an unknown type");
	}
	close(parent);
}

static void free_xattrs(struct entry *e)
{
	while (e->xattrs) {
		struct xattr *next = e->xattrs->next;
		free(e->xattrs->name);
		free(e->xattrs->value);
		free(e->xattrs);
		e->xattrs = next;
	}
}

static void finish_directories(void)
{
	for (struct later *l = laters; l; l = l->next) {
		struct timespec times[2] = {{0, UTIME_OMIT}, l->mtime};
		int fd = open_in_root(l->name, O_RDONLY | O_DIRECTORY);
		if (fd < 0)
			continue; /* replaced by a later entry */
		if (fchmod(fd, l->mode))
			give_up(l->name);
		futimens(fd, times);
		close(fd);
	}
}

int applet_tar_in(int argc, char **argv)
{
	static struct entry e;
	unsigned char rest[4096];

	keep_owner = !(argc == 3 && !strcmp(argv[2], "--no-owner"));
	if (argc != 2 + !keep_owner) {
		fprintf(stderr, "usage: tar-in DIRECTORY [--no-owner]\n");
		return 2;
	}
	umask(0);
	root = open(argv[1], O_PATH | O_DIRECTORY | O_CLOEXEC);
	if (root < 0)
		give_up(argv[1]);
	while (next_entry(&e)) {
		unpack(&e);
		free_xattrs(&e);
	}
	finish_directories();
	while (read(0, rest, sizeof rest) > 0)
		; /* the archive's padding: a writer must not die of SIGPIPE */
	return 0;
}
