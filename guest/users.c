/* /etc/passwd and /etc/group of the machine, read without NSS: a static program has none, and the files are hostile. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "spawn.h"

#define LINE_MAX_BYTES 4096

/* A FIFO or a device in the file's place must neither block us nor feed us for ever. */
FILE *open_database(const char *path)
{
	int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
	struct stat st;
	FILE *file = NULL;

	if (fd >= 0 && !fstat(fd, &st) && S_ISREG(st.st_mode))
		file = fdopen(fd, "r");
	if (!file && fd >= 0)
		close(fd);
	return file;
}

/* Split a line at colons into at most n fields; the number found. */
static size_t split(char *line, char **fields, size_t n)
{
	size_t count = 0;

	line[strcspn(line, "\n")] = 0;
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

/* Skip the rest of an over-long line. */
static int read_line(FILE *file, char *line)
{
	while (fgets(line, LINE_MAX_BYTES, file)) {
		if (strchr(line, '\n') || feof(file))
			return 1;
		int c;
		while ((c = getc(file)) != EOF && c != '\n')
			;
	}
	return 0;
}

/* Find a user by name, or by number when `number` is given. 1 found, 0 not. */
static int find_user(const char *name, const unsigned long *number, struct identity *id, char *found_name, size_t size)
{
	char line[LINE_MAX_BYTES], *f[7];
	FILE *file = open_database("/etc/passwd");
	int found = 0;

	if (!file)
		return 0;
	while (!found && read_line(file, line)) {
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
	fclose(file);
	return found;
}

static int find_group(const char *name, gid_t *out)
{
	char line[LINE_MAX_BYTES], *f[4];
	FILE *file = open_database("/etc/group");
	int found = 0;

	if (!file)
		return 0;
	while (!found && read_line(file, line)) {
		unsigned long gid;
		if (split(line, f, 4) >= 3 && !strcmp(f[0], name) && !parse_id(f[2], &gid)) {
			*out = (gid_t)gid;
			found = 1;
		}
	}
	fclose(file);
	return found;
}

/* Supplementary groups: every group whose member list has the user's name. */
static void find_memberships(const char *name, struct identity *id)
{
	char line[LINE_MAX_BYTES], *f[4];
	FILE *file = open_database("/etc/group");

	if (!file)
		return;
	while (id->group_count < sizeof id->groups / sizeof *id->groups && read_line(file, line)) {
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
	fclose(file);
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
