/* renew: what a machine knows of its networks, changed while it runs. Files of its /etc, unless it has changed them itself. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "proto.h"
#include "spawn.h"
#include "vm.h"

struct content {
	const char *path;
	const unsigned char *bytes;
	size_t size;
};

/* All of standard input: the number of its bytes, or -1. */
static ssize_t read_all(unsigned char *buffer, size_t room)
{
	size_t used = 0;

	for (ssize_t n = 1; n && used < room; used += (size_t)n)
		if ((n = read(0, buffer + used, room - used)) < 0)
			return -1;
	return used < room ? (ssize_t)used : -1;
}

static int has(int fd, const struct content *c)
{
	unsigned char *found = malloc(c->size + 1);
	ssize_t n = found ? pread(fd, found, c->size + 1, 0) : -1;
	int same = n == (ssize_t)c->size && !memcmp(found, c->bytes, c->size);

	free(found);
	return same;
}

/* In place: what is there is mounted. 0, or -1 with errno. */
static int rewrite(const struct content *old, const struct content *new)
{
	int fd = open(old->path, O_RDWR | O_NONBLOCK | O_CLOEXEC), error = 0;
	struct stat st;

	if (fd < 0)
		return errno == ENOENT ? 0 : -1; /* its own doing, too */
	if (!fstat(fd, &st) && S_ISREG(st.st_mode) && has(fd, old) &&
	    (pwrite(fd, new->bytes, new->size, 0) != (ssize_t)new->size || ftruncate(fd, (off_t)new->size)))
		error = errno ? errno : ENOSPC;
	close(fd);
	errno = error;
	return error ? -1 : 0;
}

/* FILE: path, content. -1 when it is none. */
static int read_content(const struct field *f, struct content *c)
{
	const unsigned char *end = f->size && f->bytes[0] == '/' ? memchr(f->bytes, 0, f->size) : NULL;

	if (f->tag != U_FILE || !end)
		return -1;
	c->path = (const char *)f->bytes;
	c->bytes = end + 1;
	c->size = f->size - (size_t)(end + 1 - f->bytes);
	return 0;
}

static int is_link(const struct field *f)
{
	return f->tag == U_NETWORK && f->size > UN_NAME + 1 && f->size <= UN_NAME + 16 && f->bytes[UN_PREFIX] <= 32 &&
	       f->bytes[UN_PREFIX6] <= 128 && memchr(f->bytes + UN_NAME, 0, f->size - UN_NAME) == f->bytes + f->size - 1;
}

/* renew: standard input has fields as SETUP's: of NETWORK, and pairs of FILE, what one has been told to have and what it is
 * to have. */
int applet_renew(int argc, char **argv)
{
	static unsigned char input[4 * MAX_PAYLOAD];
	struct content old, new;
	struct field f;
	ssize_t size;
	int more, status = 0;

	(void)argv;
	if (argc != 1 || (size = read_all(input, sizeof input)) < 0) {
		fprintf(stderr, "usage: renew < FIELDS\n");
		return 2;
	}
	for (size_t at = 0; (more = next_field(input, (size_t)size, &at, &f)) > 0;) {
		if (is_link(&f)) {
			if (vm_change_link(f.bytes)) {
				fprintf(stderr, "%s\n", vm_report.text);
				status = 1;
			}
			continue;
		}
		if (read_content(&f, &old) || next_field(input, (size_t)size, &at, &f) <= 0 || read_content(&f, &new) ||
		    strcmp(old.path, new.path)) {
			more = -1;
			break;
		}
		if (rewrite(&old, &new)) {
			fprintf(stderr, "cannot renew %s: %s\n", old.path, strerror(errno));
			status = 1;
		}
	}
	if (more < 0) {
		fprintf(stderr, "renew: malformed fields\n");
		return 2;
	}
	return status;
}
