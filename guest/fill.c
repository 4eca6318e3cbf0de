/* What stands in for a volume where the host cannot share it: its content, copied in before the machine's program starts. */
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>

#include "spawn.h"

#define MAX_PATH 4096

static int seal(const char *path)
{
	/* Flags of a new bind mount are ignored, but for MS_REC: read-only is a second step. */
	return mount(path, path, NULL, MS_BIND, NULL) ||
	       mount(NULL, path, NULL, MS_REMOUNT | MS_BIND | MS_RDONLY, NULL);
}

/* fill TARGET dir|file rw|ro: unpack standard input into the directory TARGET, or as the file TARGET, whose name its one
 * member has; "ro": nobody in the machine writes to it then. */
int applet_fill(int argc, char **argv)
{
	char path[MAX_PATH], directory[MAX_PATH], *slash;
	char *args[] = {"tar-in", directory, NULL};
	int status, is_file;

	if (argc != 4 || argv[1][0] != '/' || strlen(argv[1]) >= sizeof path) {
		fprintf(stderr, "usage: fill TARGET dir|file rw|ro\n");
		return 2;
	}
	is_file = !strcmp(argv[2], "file");
	strcpy(path, argv[1]);
	strcpy(directory, path);
	if (is_file) {
		slash = strrchr(directory, '/');
		slash[slash == directory] = 0;
	}
	if (make_path(directory)) {
		fprintf(stderr, "%s: %s\n", directory, strerror(errno));
		return 1;
	}
	status = applet_tar_in(2, args);
	if (!status && !strcmp(argv[3], "ro") && seal(path)) {
		fprintf(stderr, "%s: %s\n", path, strerror(errno));
		return 1;
	}
	return status;
}
