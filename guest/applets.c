/* The agent's own functions: what `cp` and `top` need inside a machine that may have no programs at all. */
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "spawn.h"

static const char *type_name(mode_t mode)
{
	switch (mode & S_IFMT) {
	case S_IFREG:
		return "file";
	case S_IFDIR:
		return "dir";
	case S_IFLNK:
		return "link";
	case S_IFCHR:
		return "char";
	case S_IFBLK:
		return "block";
	case S_IFIFO:
		return "fifo";
	default:
		return "socket";
	}
}

/* stat PATH [--follow] */
int applet_stat(int argc, char **argv)
{
	int follow = argc == 3 && !strcmp(argv[2], "--follow");
	char target[4096];
	struct stat st;
	ssize_t n;

	if (argc != 2 + follow) {
		fprintf(stderr, "usage: stat PATH [--follow]\n");
		return 2;
	}
	if (follow ? stat(argv[1], &st) : lstat(argv[1], &st)) {
		fprintf(stderr, "%s: %s\n", argv[1], strerror(errno));
		return 1;
	}
	printf("{\"type\":\"%s\",\"mode\":%u,\"uid\":%u,\"gid\":%u,\"size\":%lld,\"mtime_ns\":%lld%09ld", type_name(st.st_mode),
	       (unsigned)(st.st_mode & 07777), (unsigned)st.st_uid, (unsigned)st.st_gid, (long long)st.st_size,
	       (long long)st.st_mtim.tv_sec, st.st_mtim.tv_nsec);
	if (S_ISLNK(st.st_mode) && (n = readlink(argv[1], target, sizeof target)) >= 0) {
		printf(",\"target\":");
		json_string(target, (size_t)n);
	}
	printf("}\n");
	return fflush(stdout) ? 1 : 0;
}

int applet_main(int argc, char **argv)
{
	static const struct {
		const char *name;
		int (*run)(int argc, char **argv);
	} applets[] = {
		{"stat", applet_stat},
		{"ps", applet_ps},
		{"tar-out", applet_tar_out},
		{"tar-in", applet_tar_in},
		{"fill", applet_fill},
		{"renew", applet_renew},
		{"bench", applet_bench},
	};

	for (size_t i = 0; i < sizeof applets / sizeof *applets; i++)
		if (argc > 0 && !strcmp(argv[0], applets[i].name))
			return applets[i].run(argc, argv);
	fprintf(stderr, "no such applet: %s\n", argc > 0 ? argv[0] : "");
	return 127;
}
