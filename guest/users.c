/* /etc/passwd and /etc/group of the machine, read without NSS: a static program has none, and the files are hostile. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "spawn.h"

#define LINE_MAX_BYTES 4096

/* A FIFO or a device in the file's place must neither block us nor feed us for ever. */
static int open_regular(const char *path, struct stat *st)
{
	int fd = openat(AT_FDCWD, path, O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY); /* musl's open() sets O_CLOEXEC twice */

	if (fd < 0 || (!fstat(fd, st) && S_ISREG(st->st_mode)))
		return fd;
	close(fd);
	return -1;
}

FILE *open_database(const char *path)
{
	struct stat st;
	int fd = open_regular(path, &st);
	FILE *file = fd >= 0 ? fdopen(fd, "r") : NULL;

	if (!file && fd >= 0)
		close(fd);
	return file;
}

/* Split a line at colons into at most n fields; the number found. */
static size_t split(char *line, char **fields, size_t n)
{
	size_t count = 0;

	while (count < n) {
		fields[count++] = line;
		line = strchr(line, ':');
		if (!line)
			break;
		*line++ = 0;
	}
	return count;
}

static int parse_id(const char *text, unsigned long *out)
{
	char *end;

	if (*text < '0' || *text > '9')
		return -1;
	errno = 0;
	*out = strtoul(text, &end, 10);
	return errno || *end || *out > 0xfffffffeUL ? -1 : 0;
}

/* A file's lines. Not by stdio: that takes nine system calls for one of a page, and this four; where a kernel's privileged
 * mode is emulated each takes as long as reading a hundred such files elsewhere. */
struct lines {
	int fd;
	size_t start, end;
	off_t left; /* of the file, as it was when it was opened */
	char bytes[LINE_MAX_BYTES];
};

/* 0, or -1 where there is no such file, or none to be read. */
static int open_lines(struct lines *l, const char *path)
{
	struct stat st;

	l->fd = open_regular(path, &st);
	if (l->fd < 0)
		return -1;
	l->start = l->end = 0;
	l->left = st.st_size ? st.st_size : LONG_MAX; /* some file systems do not know */
	return 0;
}

static void close_lines(struct lines *l)
{
	close(l->fd);
}

static int read_more(struct lines *l)
{
	if (l->left <= 0)
		return 0;
	memmove(l->bytes, l->bytes + l->start, l->end - l->start);
	l->end -= l->start;
	l->start = 0;
	ssize_t n = read(l->fd, l->bytes + l->end, sizeof l->bytes - 1 - l->end);
	l->left = n > 0 ? l->left - n : 0;
	l->end += n > 0 ? (size_t)n : 0;
	return n > 0;
}

/* The next line, without its end; NULL at the file's end. One that does not fit is left out. */
static char *next_line(struct lines *l)
{
	int skipping = 0;

	for (;;) {
		char *line = l->bytes + l->start, *end = memchr(line, '\n', l->end - l->start);
		if (!end && !(l->start == 0 && l->end == sizeof l->bytes - 1)) {
			if (read_more(l))
				continue;
			if (skipping || l->start == l->end)
				return NULL;
			end = l->bytes + l->end; /* the last one, without its newline */
			l->start = l->end;
			*end = 0;
			return line;
		}
		if (!end) { /* as long as there is room for */
			skipping = 1;
			l->start = l->end;
			continue;
		}
		l->start = (size_t)(end + 1 - l->bytes);
		if (!skipping) {
			*end = 0;
			return line;
		}
		skipping = 0;
	}
}

/* Find a user by name, or by number when `number` is given. 1 found, 0 not. */
static int find_user(const char *name, const unsigned long *number, struct identity *id, char *found_name, size_t size)
{
	struct lines lines;
	char *line, *f[7];
	int found = 0;

	if (open_lines(&lines, "/etc/passwd"))
		return 0;
	while (!found && (line = next_line(&lines))) {
		unsigned long uid, gid;
		if (split(line, f, 7) < 6 || parse_id(f[2], &uid) || parse_id(f[3], &gid))
			continue;
		if (number ? uid != *number : strcmp(f[0], name) != 0)
			continue;
		id->uid = (uid_t)uid;
		id->gid = (gid_t)gid;
		snprintf(id->home, sizeof id->home, "%s", f[5][0] ? f[5] : "/");
		snprintf(found_name, size, "%s", f[0]);
		found = 1;
	}
	close_lines(&lines);
	return found;
}

static int find_group(const char *name, gid_t *out)
{
	struct lines lines;
	char *line, *f[4];
	int found = 0;

	if (open_lines(&lines, "/etc/group"))
		return 0;
	while (!found && (line = next_line(&lines))) {
		unsigned long gid;
		if (split(line, f, 4) >= 3 && !strcmp(f[0], name) && !parse_id(f[2], &gid)) {
			*out = (gid_t)gid;
			found = 1;
		}
	}
	close_lines(&lines);
	return found;
}

/* Supplementary groups: every group whose member list has the user's name. */
static void find_memberships(const char *name, struct identity *id)
{
	struct lines lines;
	char *line, *f[4];

	if (open_lines(&lines, "/etc/group"))
		return;
	while (id->group_count < sizeof id->groups / sizeof *id->groups && (line = next_line(&lines))) {
		unsigned long gid;
		char *member, *rest;
		if (split(line, f, 4) < 4 || parse_id(f[2], &gid))
			continue;
		for (member = strtok_r(f[3], ",", &rest); member; member = strtok_r(NULL, ",", &rest))
			if (!strcmp(member, name) && (gid_t)gid != id->gid) {
				id->groups[id->group_count++] = (gid_t)gid;
				break;
			}
	}
	close_lines(&lines);
}

int identity_find(const char *user, struct identity *id, char *why, size_t why_size)
{
	char name[256], login[256] = "";
	const char *colon = strchr(user, ':');
	const char *group = colon && colon[1] ? colon + 1 : NULL;
	unsigned long number;

	memset(id, 0, sizeof *id);
	strcpy(id->home, "/");
	size_t length = strcspn(user, ":");
	if (length >= sizeof name) {
		snprintf(why, why_size, "the user's name is too long");
		return -1;
	}
	memcpy(name, user, length);
	name[length] = 0;
	if (!name[0])
		strcpy(name, "0");
	if (!parse_id(name, &number)) {
		id->uid = (uid_t)number;
		if (!find_user(NULL, &number, id, login, sizeof login) && number == 0)
			strcpy(id->home, "/root"); /* images without /etc/passwd still have a root */
	} else if (!find_user(name, NULL, id, login, sizeof login)) {
		snprintf(why, why_size, "there is no user '%s' in the machine's /etc/passwd", name);
		return -1;
	}
	if (group && !parse_id(group, &number))
		id->gid = (gid_t)number;
	else if (group && !find_group(group, &id->gid)) {
		snprintf(why, why_size, "there is no group '%s' in the machine's /etc/group", group);
		return -1;
	}
	/* The primary group among the supplementary ones too: a set-group-id program could shed it otherwise, and with it
	 * what files deny to that group (CVE-2022-36109). */
	id->groups[id->group_count++] = id->gid;
	if (!group && login[0])
		find_memberships(login, id);
	return 0;
}
