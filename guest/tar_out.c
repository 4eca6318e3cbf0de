/* tar-out PATH [--follow] [--no-mounts]: a pax archive of a file or tree on standard output.
 *
 * With --no-mounts what is mounted below PATH is left out: its place is archived as an empty directory or file.
 * What cannot be read is named on standard error, and the exit status is 1; the archive stays whole all the same. A file
 * that shrinks under us is padded with zeros (and named), one that grows, a log, is archived as long as it was. */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/xattr.h>
#include <unistd.h>

#include "spawn.h"
#include "tar.h"

#define OUT_SIZE (256 << 10)
#define MAX_PATH 4096
#define MAX_DEPTH (MAX_PATH / 2)
#define SPARSE_FROM (64 << 10) /* smaller holes are not worth a form that fewer readers know */
#define RECORD (20 * BLOCK)
#define AT_EMPTY 0x1000 /* AT_EMPTY_PATH */
#define STATX_MOUNT_ROOT 0x2000 /* STATX_ATTR_MOUNT_ROOT, Linux 5.8 */

struct text {
	char *bytes;
	size_t size, room;
};

struct link {
	dev_t dev;
	ino_t ino;
	char *name;
	struct link *next;
};

static unsigned char out[OUT_SIZE];
static size_t out_used;
static uint64_t out_total;
static struct link *links[4096];
static int problems;
static int no_mounts;

static void complain(const char *path, const char *why)
{
	fprintf(stderr, "%s: %s\n", path, why);
	problems = 1;
}

static void __attribute__((noreturn)) give_up(const char *what)
{
	fprintf(stderr, "%s: %s\n", what, strerror(errno));
	_exit(1);
}

static void flush_out(void)
{
	for (size_t at = 0; at < out_used;) {
		ssize_t n = write(1, out + at, out_used - at);
		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0)
			give_up("standard output");
		at += (size_t)n;
	}
	out_used = 0;
}

static void put(const void *bytes, size_t size)
{
	const unsigned char *p = bytes;

	out_total += size;
	while (size) {
		size_t n = OUT_SIZE - out_used < size ? OUT_SIZE - out_used : size;
		if (p) {
			memcpy(out + out_used, p, n);
			p += n;
		} else
			memset(out + out_used, 0, n);
		out_used += n;
		size -= n;
		if (out_used == OUT_SIZE)
			flush_out();
	}
}

static void put_padding(uint64_t size)
{
	put(NULL, (size_t)(-size & (BLOCK - 1)));
}

static void append(struct text *t, const void *bytes, size_t size)
{
	if (t->room - t->size <= size) {
		t->room = 2 * t->room + size + 64;
		t->bytes = realloc(t->bytes, t->room);
		if (!t->bytes)
			give_up("memory");
	}
	if (size)
		memcpy(t->bytes + t->size, bytes, size);
	t->size += size;
	t->bytes[t->size] = 0;
}

/* A pax record: "LENGTH KEY=VALUE\n", where LENGTH counts itself. */
static void pax_record(struct text *t, const char *key, const void *value, size_t size)
{
	size_t body = strlen(key) + size + 3, length = body + 1, digits;
	char head[32];

	do {
		digits = (size_t)snprintf(head, sizeof head, "%zu", length);
		if (digits + body == length)
			break;
		length = digits + body;
	} while (1);
	append(t, head, digits);
	append(t, " ", 1);
	append(t, key, strlen(key));
	append(t, "=", 1);
	append(t, value, size);
	append(t, "\n", 1);
}

static void pax_number(struct text *t, const char *key, uint64_t value)
{
	char digits[32];

	pax_record(t, key, digits, (size_t)snprintf(digits, sizeof digits, "%llu", (unsigned long long)value));
}

static void octal(char *field, size_t size, uint64_t value)
{
	uint64_t limit = size >= 22 ? UINT64_MAX : ((uint64_t)1 << 3 * (size - 1)) - 1;

	snprintf(field, size, "%0*llo", (int)size - 1, (unsigned long long)(value > limit ? limit : value));
}

static void put_header(const char *name, const struct stat *st, char type, uint64_t size, const char *target)
{
	struct header h;

	memset(&h, 0, sizeof h);
	memcpy(h.name, name, strnlen(name, sizeof h.name));
	octal(h.mode, sizeof h.mode, st->st_mode & 07777);
	octal(h.uid, sizeof h.uid, st->st_uid);
	octal(h.gid, sizeof h.gid, st->st_gid);
	octal(h.size, sizeof h.size, size);
	octal(h.mtime, sizeof h.mtime, st->st_mtim.tv_sec < 0 ? 0 : (uint64_t)st->st_mtim.tv_sec);
	h.typeflag = type;
	memcpy(h.linkname, target, strnlen(target, sizeof h.linkname));
	memcpy(h.magic, "ustar", 6);
	memcpy(h.version, "00", 2);
	if (type == '3' || type == '4') {
		octal(h.devmajor, sizeof h.devmajor, major(st->st_rdev));
		octal(h.devminor, sizeof h.devminor, minor(st->st_rdev));
	}
	snprintf(h.chksum, sizeof h.chksum, "%06o", header_sum(&h));
	h.chksum[7] = ' ';
	put(&h, sizeof h);
}

/* `fd` is open for reading, or -1: then `proc_path` leads to a special file that is better not opened. */
static void pax_xattrs(struct text *t, int fd, const char *proc_path)
{
	static char names[64 << 10], value[64 << 10];
	ssize_t size = fd >= 0 ? flistxattr(fd, names, sizeof names) : listxattr(proc_path, names, sizeof names);

	for (char *name = names; size > 0 && name < names + size; name += strlen(name) + 1) {
		char key[300];
		ssize_t n = fd >= 0 ? fgetxattr(fd, name, value, sizeof value) : getxattr(proc_path, name, value, sizeof value);
		if (n >= 0 && (size_t)snprintf(key, sizeof key, "SCHILY.xattr.%s", name) < sizeof key)
			pax_record(t, key, value, (size_t)n);
	}
}

/* Seconds with a fraction. A time before 1970 is a negative number of seconds and a positive rest in the kernel. */
static void pax_time(struct text *t, const char *key, const struct timespec *ts)
{
	long long seconds = ts->tv_sec;
	long nanos = ts->tv_nsec;
	char stamp[48];

	int negative = seconds < 0;
	if (negative && nanos) {
		seconds++;
		nanos = 1000000000 - nanos;
	}
	pax_record(t, key, stamp, (size_t)snprintf(stamp, sizeof stamp, "%s%lld.%09ld", negative ? "-" : "",
						   negative ? -seconds : seconds, nanos));
}

/* What does not fit a ustar header goes into an extended one before it. */
static void put_entry(const char *name, const struct stat *st, char type, uint64_t size, const char *target, struct text *pax)
{
	if (strlen(name) > sizeof ((struct header *)0)->name)
		pax_record(pax, "path", name, strlen(name));
	if (strlen(target) > sizeof ((struct header *)0)->linkname)
		pax_record(pax, "linkpath", target, strlen(target));
	if (size > 077777777777ULL)
		pax_number(pax, "size", size);
	if (st->st_uid > 07777777)
		pax_number(pax, "uid", st->st_uid);
	if (st->st_gid > 07777777)
		pax_number(pax, "gid", st->st_gid);
	if (st->st_mtim.tv_nsec || st->st_mtim.tv_sec < 0 || st->st_mtim.tv_sec > 077777777777LL)
		pax_time(pax, "mtime", &st->st_mtim);
	if (pax->size) {
		struct stat plain = {.st_mode = 0644};
		put_header("@PaxHeader", &plain, 'x', pax->size, "");
		put(pax->bytes, pax->size);
		put_padding(pax->size);
	}
	put_header(name, st, type, size, target);
	free(pax->bytes);
}

/* Exactly `size` bytes from `offset` on, whatever has become of the file. */
static void put_range(int fd, const char *name, off_t offset, uint64_t size)
{
	static unsigned char chunk[128 << 10];

	while (size) {
		ssize_t n = pread(fd, chunk, size < sizeof chunk ? (size_t)size : sizeof chunk, offset);
		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0) {
			complain(name, n < 0 ? strerror(errno) : "the file shrank while it was read");
			while (size) {
				size_t part = size < sizeof chunk ? (size_t)size : sizeof chunk;
				put(NULL, part);
				size -= part;
			}
			return;
		}
		put(chunk, (size_t)n);
		offset += n;
		size -= (uint64_t)n;
	}
}

/* The data segments of a file with holes as GNU's sparse map 1.0: "COUNT\nOFFSET\nSIZE\n…". 0 when it has none. */
static int sparse_map(int fd, const struct stat *st, struct text *map, uint64_t *data_size)
{
	struct text body = {0};
	size_t count = 0;
	off_t at = 0;
	char line[64];

	*data_size = 0;
	if ((uint64_t)st->st_blocks * 512 + SPARSE_FROM > (uint64_t)st->st_size)
		return 0;
	while (at < st->st_size) {
		off_t start = lseek(fd, at, SEEK_DATA);
		if ((start < 0 && errno == ENXIO) || start >= st->st_size)
			break;
		off_t stop = start < 0 ? -1 : lseek(fd, start, SEEK_HOLE);
		if (stop < 0) {
			free(body.bytes);
			return 0; /* this file system does not tell */
		}
		if (stop > st->st_size)
			stop = st->st_size;
		append(&body, line, (size_t)snprintf(line, sizeof line, "%lld\n%lld\n", (long long)start, (long long)(stop - start)));
		*data_size += (uint64_t)(stop - start);
		count++;
		at = stop;
	}
	append(&body, line, (size_t)snprintf(line, sizeof line, "%lld\n0\n", (long long)st->st_size)); /* ends a trailing hole */
	append(map, line, (size_t)snprintf(line, sizeof line, "%zu\n", count + 1));
	append(map, body.bytes, body.size);
	free(body.bytes);
	while (map->size % BLOCK)
		append(map, "", 1);
	return 1;
}

static void put_sparse(int fd, const char *name, const struct stat *st, struct text *map, uint64_t data_size, struct text *pax)
{
	static char stored[MAX_PATH + 32];
	const char *slash = strrchr(name, '/');
	long long start, size;

	pax_record(pax, "GNU.sparse.major", "1", 1);
	pax_record(pax, "GNU.sparse.minor", "0", 1);
	pax_record(pax, "GNU.sparse.name", name, strlen(name));
	pax_number(pax, "GNU.sparse.realsize", (uint64_t)st->st_size);
	snprintf(stored, sizeof stored, "%.*sGNUSparseFile.0/%s", slash ? (int)(slash - name) + 1 : 0, name,
		 slash ? slash + 1 : name);
	put_entry(stored, st, '0', map->size + data_size, "", pax);
	put(map->bytes, map->size);
	append(map, "", 1); /* a map of whole blocks ends without a NUL */
	char *at = map->bytes;
	for (unsigned long long left = strtoull(at, &at, 10); left; left--) {
		start = strtoll(at, &at, 10);
		size = strtoll(at, &at, 10);
		put_range(fd, name, start, (uint64_t)size);
	}
	put_padding(data_size);
}

static void put_file(int fd, const char *name, const struct stat *st, struct text *pax)
{
	struct text map = {0};
	uint64_t data_size;

	if (sparse_map(fd, st, &map, &data_size)) {
		put_sparse(fd, name, st, &map, data_size, pax);
	} else {
		put_entry(name, st, '0', (uint64_t)st->st_size, "", pax);
		put_range(fd, name, 0, (uint64_t)st->st_size);
		put_padding((uint64_t)st->st_size);
	}
	free(map.bytes);
}

/* The name under which this inode was archived before, or NULL after remembering it. */
static const char *earlier_link(const struct stat *st, const char *name)
{
	struct link **slot = &links[(st->st_ino ^ st->st_dev) % (sizeof links / sizeof *links)], *l;

	for (l = *slot; l; l = l->next)
		if (l->ino == st->st_ino && l->dev == st->st_dev)
			return l->name;
	l = malloc(sizeof *l);
	if (!l)
		give_up("memory");
	*l = (struct link){st->st_dev, st->st_ino, strdup(name), *slot};
	*slot = l;
	return NULL;
}

static char path[MAX_PATH + 1]; /* of the entry at hand, inside the archive */
static size_t path_size;

static void walk(int parent, const char *entry, int follow, int depth);

/* Whether something is mounted right here. statx(2) by hand: its structure is in headers that clash between C libraries.
 * The second 64-bit word is stx_attributes, the eighth says which of them this kernel and file system know. */
static int is_mount_root(int fd)
{
	uint64_t answer[32] = {0};

	if (syscall(SYS_statx, fd, "", AT_EMPTY, 0, answer))
		return 0;
	return (answer[1] & answer[7] & STATX_MOUNT_ROOT) != 0;
}

/* Takes `fd` over. A tree as deep as a path can be must not exhaust the stack: only small things live in here. */
static void put_directory(int fd, const struct stat *st, int depth, struct text *pax)
{
	size_t size = path_size;
	struct dirent *e;
	DIR *dir;

	path[size] = '/';
	path[size + 1] = 0;
	put_entry(path, st, '5', 0, "", pax);
	path[size] = 0;
	if (no_mounts && depth > 0 && is_mount_root(fd)) {
		close(fd);
		return;
	}
	if (depth > MAX_DEPTH || !(dir = fdopendir(fd))) {
		complain(path, depth > MAX_DEPTH ? "nested too deep" : strerror(errno));
		close(fd);
		return;
	}
	while (errno = 0, (e = readdir(dir))) {
		size_t length = strlen(e->d_name);
		if (!strcmp(e->d_name, ".") || !strcmp(e->d_name, ".."))
			continue;
		if (size + length + 2 >= MAX_PATH) {
			complain(path, "a path below it is too long");
			continue;
		}
		path[size] = '/';
		memcpy(path + size + 1, e->d_name, length + 1);
		path_size = size + 1 + length;
		walk(dirfd(dir), e->d_name, 0, depth + 1);
		path_size = size;
		path[size] = 0;
	}
	if (errno)
		complain(path, strerror(errno));
	closedir(dir);
}

/* Links, devices and FIFOs: `fd` only points at them (O_PATH), since opening a device may do things. */
static void put_special(int fd, const struct stat *st, struct text *pax)
{
	static char target[MAX_PATH];
	char proc_path[64];

	if (S_ISLNK(st->st_mode)) {
		ssize_t n = readlinkat(fd, "", target, sizeof target - 1);
		target[n < 0 ? 0 : n] = 0;
		put_entry(path, st, '2', 0, target, pax);
		return;
	}
	snprintf(proc_path, sizeof proc_path, "/proc/self/fd/%d", fd);
	pax_xattrs(pax, -1, proc_path);
	put_entry(path, st, S_ISCHR(st->st_mode) ? '3' : S_ISBLK(st->st_mode) ? '4' : '6', 0, "", pax);
}

/* Archive `entry` of the directory `parent` under the name in `path`. Needs no /proc: an image at rest may have none. */
static void walk(int parent, const char *entry, int follow, int depth)
{
	int flags = O_CLOEXEC | (follow ? 0 : O_NOFOLLOW);
	struct text pax = {0};
	struct stat st;
	const char *link;
	int fd = openat(parent, entry, O_PATH | flags);

	if (fd >= 0 && !fstat(fd, &st) && (S_ISREG(st.st_mode) || S_ISDIR(st.st_mode))) {
		mode_t type = st.st_mode & S_IFMT;
		close(fd);
		fd = openat(parent, entry, O_RDONLY | O_NONBLOCK | O_NOCTTY | flags);
		if (fd >= 0 && !fstat(fd, &st) && (st.st_mode & S_IFMT) != type) {
			complain(path, "it was replaced while it was read");
			close(fd);
			return;
		}
	}
	if (fd < 0) {
		complain(path, strerror(errno));
		return;
	}
	if (S_ISSOCK(st.st_mode)) {
		close(fd); /* means nothing elsewhere */
		return;
	}
	if (no_mounts && depth > 0 && !S_ISDIR(st.st_mode) && is_mount_root(fd)) {
		put_entry(path, &st, '0', 0, "", &pax);
	} else if (!S_ISDIR(st.st_mode) && st.st_nlink > 1 && (link = earlier_link(&st, path))) {
		put_entry(path, &st, '1', 0, link, &pax);
	} else if (S_ISDIR(st.st_mode)) {
		pax_xattrs(&pax, fd, NULL);
		put_directory(fd, &st, depth, &pax);
		return;
	} else if (S_ISREG(st.st_mode)) {
		pax_xattrs(&pax, fd, NULL);
		put_file(fd, path, &st, &pax);
	} else
		put_special(fd, &st, &pax);
	close(fd);
}

/* A descriptor for each level of the tree. */
static void allow_descriptors(void)
{
	struct rlimit limit;

	if (!getrlimit(RLIMIT_NOFILE, &limit) && limit.rlim_cur < MAX_DEPTH + 16) {
		limit.rlim_cur = limit.rlim_max < MAX_DEPTH + 16 ? limit.rlim_max : MAX_DEPTH + 16;
		setrlimit(RLIMIT_NOFILE, &limit);
	}
}

int applet_tar_out(int argc, char **argv)
{
	int follow = 0;
	char source[MAX_PATH];
	size_t length;

	for (; argc > 2; argc--) {
		if (!strcmp(argv[argc - 1], "--follow"))
			follow = 1;
		else if (!strcmp(argv[argc - 1], "--no-mounts"))
			no_mounts = 1;
		else
			break;
	}
	if (argc != 2 || !argv[1][0] || strlen(argv[1]) >= sizeof source) {
		fprintf(stderr, "usage: tar-out PATH [--follow] [--no-mounts]\n");
		return 2;
	}
	strcpy(source, argv[1]);
	length = strlen(source);
	/* A slash at the end asks for what a link leads to, everywhere in Unix. */
	if (source[length - 1] == '/' || (length >= 2 && !strcmp(source + length - 2, "/.")))
		follow = 1;
	while (length > 1 && source[length - 1] == '/')
		source[--length] = 0;
	const char *name = strrchr(source, '/');
	name = name ? name + 1 : source;
	if (!*name || !strcmp(name, ".."))
		name = "."; /* the root, or a directory that only its child names */
	path_size = strlen(name);
	memcpy(path, name, path_size + 1);
	allow_descriptors();
	walk(AT_FDCWD, source, follow, 0);
	put(NULL, 2 * BLOCK);
	put(NULL, (size_t)((RECORD - out_total % RECORD) % RECORD));
	flush_out();
	return problems;
}
