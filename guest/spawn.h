/* What to execute, and how: SPAWN's fields as a checked structure. */
#ifndef NAGAYA_SPAWN_H
#define NAGAYA_SPAWN_H

#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <sys/types.h>

#define MAX_RLIMITS 32

struct rlimit_field {
	uint32_t resource;
	uint64_t soft, hard;
};

struct spawn {
	char *text;	   /* owns the bytes that argv and env point into */
	char **argv, **env; /* NULL-terminated; env has one spare slot for HOME */
	size_t argc, envc;
	const char *cwd, *user;
	uint32_t flags;
	uint16_t rows, columns;
	uint64_t caps;
	const unsigned char *seccomp;
	size_t seccomp_size;
	struct rlimit_field rlimits[MAX_RLIMITS];
	size_t rlimit_count;
};

/* Parse a SPAWN payload. 0, or -1 when it is malformed (spawn_free is then not needed). */
int spawn_parse(struct spawn *s, const unsigned char *payload, size_t size);
void spawn_free(struct spawn *s);

/* A failure on the way to execve, as it crosses the close-on-exec pipe. */
struct spawn_error {
	uint32_t status; /* 125, 126 or 127 */
	uint32_t error;	 /* errno */
	char text[512];
};

/* In the child: become the program. Returns only by reporting on error_fd and _exit.
 * fds[0..2] become standard input, output and error; with SF_TTY, fds[0] is the terminal. */
void spawn_become(const struct spawn *s, const int fds[3], int error_fd) __attribute__((noreturn));

/* Of that, what is the same for every program: for a child that waits until it is told which, and has the time now. */
void spawn_begin(void);
/* Go a part of the way, and come back: what is looked at on it is known then to the kernel, of a machine about to be saved. */
void spawn_rehearse(void);

/* mkdir -p: 0, or -1 with errno. */
int make_path(const char *path);

/* In the child: report that it cannot even begin. */
void spawn_refuse(int error, int error_fd) __attribute__((noreturn));

/* users.c */
struct identity {
	uid_t uid;
	gid_t gid;
	gid_t groups[64];
	size_t group_count;
	char home[256];
};
/* Look "user[:group]" up in /etc/passwd and /etc/group; "" is root. 0, or -1 with a text for a person. */
int identity_find(const char *user, struct identity *id, char *why, size_t why_size);
/* Open one of these files for reading; NULL when it is not there, or not a regular file. */
FILE *open_database(const char *path);

/* policy.c: what binds the program. Each answers 0 or -1 with errno. */
int policy_apply_rlimits(const struct spawn *s);
/* Let nothing that this process executes have more than `caps`; may be called ahead, and again for as many or fewer. */
int policy_bound(uint64_t caps);
int policy_apply_identity(const struct identity *id, uint64_t caps, int applet);
int policy_apply_seccomp(const struct spawn *s);

/* applets.c: the agent's own functions; answers an exit status. */
int applet_main(int argc, char **argv);
int applet_stat(int argc, char **argv);
int applet_ps(int argc, char **argv);
int applet_tar_out(int argc, char **argv);
int applet_tar_in(int argc, char **argv);
int applet_fill(int argc, char **argv);
int applet_renew(int argc, char **argv);
int applet_bench(int argc, char **argv);

/* json.c */
void json_string(const char *bytes, size_t size);

/* Nobody above us has changed what signals do: we have ourselves, to SIGPIPE. */
extern int spawn_is_first;

#endif
