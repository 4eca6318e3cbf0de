/* The child's side: from a forked copy of the agent to the program. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "proto.h"
#include "spawn.h"

#define DEFAULT_PATH "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
#ifndef SYS_close_range
#define SYS_close_range 436
#endif

static int report_fd;

static void __attribute__((noreturn, format(printf, 3, 4))) fail(uint32_t status, int error, const char *format, ...)
{
	struct spawn_error e = {status, (uint32_t)error, ""};
	va_list args;

	va_start(args, format);
	vsnprintf(e.text, sizeof e.text, format, args);
	va_end(args);
	if (write(report_fd, &e, sizeof e) < 0)
		_exit(125); /* nobody listens any more */
	_exit((int)status);
}

int spawn_is_first;

static void reset_signals(void)
{
	/* The kernel's struct sigaction, all zero: SIG_DFL. The C library's call refuses the signals that it keeps for
	 * itself (32 to 34), which somebody above us may have set to be ignored all the same. */
	const unsigned long standard[4] = {0};
	sigset_t none;

	for (int number = spawn_is_first ? SIGPIPE : 1; number < (spawn_is_first ? SIGPIPE + 1 : NSIG); number++)
		syscall(SYS_rt_sigaction, number, standard, NULL, 8); /* EINVAL for SIGKILL and SIGSTOP: harmless */
	sigemptyset(&none);
	sigprocmask(SIG_SETMASK, &none, NULL);
}

static void take_descriptors(const struct spawn *s, const int fds[3])
{
	for (int i = 0; i < 3; i++)
		if (dup2(fds[i], i) < 0)
			fail(125, errno, "cannot set up descriptor %d: %s", i, strerror(errno));
	if ((s->flags & SF_TTY) && ioctl(0, TIOCSCTTY, 0))
		fail(125, errno, "cannot take the terminal: %s", strerror(errno));
	/* All but the report pipe, which is close-on-exec, go now: an applet never executes anything. */
	if (report_fd > 3)
		syscall(SYS_close_range, 3u, (unsigned)report_fd - 1, 0u);
	syscall(SYS_close_range, (unsigned)report_fd + 1, ~0u, 0u);
}

/* mkdir -p, for a working directory or a volume that the image does not have. */
int make_path(const char *path)
{
	char part[4096];
	size_t length = strlen(path);

	if (length >= sizeof part) {
		errno = ENAMETOOLONG;
		return -1;
	}
	for (size_t i = 1; i <= length; i++)
		if (path[i] == '/' || !path[i]) {
			memcpy(part, path, i);
			part[i] = 0;
			if (mkdir(part, 0755) && errno != EEXIST)
				return -1;
		}
	return 0;
}

static const char *find_env(char **env, const char *name)
{
	size_t length = strlen(name);

	for (; *env; env++)
		if (!strncmp(*env, name, length) && (*env)[length] == '=')
			return *env + length + 1;
	return NULL;
}

/* Execute one candidate; returns errno, and whether there is such a file, which is looked at first: most directories of
 * PATH do not have it. A text file without "#!" is ENOEXEC, and stays one: no shell guesses. */
static int try_exec(const struct spawn *s, const char *path, int *is_there)
{
	struct stat st;

	*is_there = !stat(path, &st);
	if (!*is_there && (errno == ENOENT || errno == ENOTDIR))
		return errno;
	if (*is_there && S_ISDIR(st.st_mode))
		return EISDIR;
	execve(path, s->argv, s->env);
	return errno;
}

static void __attribute__((noreturn)) execute(const struct spawn *s)
{
	const char *name = s->argv[0], *path = find_env(s->env, "PATH");
	char candidate[4096];
	int worst = ENOENT, is_there;

	if (strchr(name, '/')) {
		worst = try_exec(s, name, &is_there);
		/* ENOENT for a file that exists: its interpreter or dynamic loader is what is missing. */
		if (worst == ENOENT && is_there)
			fail(127, worst, "%s: its interpreter or dynamic loader does not exist", name);
		fail(worst == ENOENT || worst == ENOTDIR ? 127 : 126, worst, "%s: %s", name, strerror(worst));
	}
	for (path = path ? path : DEFAULT_PATH;; path++) {
		size_t length = strcspn(path, ":");
		int n = snprintf(candidate, sizeof candidate, "%.*s%s%s", (int)length, path, length ? "/" : "./", name);
		if (*name && n > 0 && (size_t)n < sizeof candidate) {
			int error = try_exec(s, candidate, &is_there);
			if (error != ENOENT && error != ENOTDIR)
				worst = error;
			else if (error == ENOENT && is_there)
				fail(127, error, "%s: its interpreter or dynamic loader does not exist", candidate);
		}
		path += length;
		if (!*path)
			break;
	}
	if (worst == ENOENT)
		fail(127, worst, "%s: not found in the machine's PATH", name);
	fail(126, worst, "%s: %s", name, strerror(worst));
}

static int begun;

void spawn_begin(void)
{
	setsid(); /* fails when we lead a session already (the stub): no matter */
	umask(022);
	reset_signals();
	begun = 1;
}

void spawn_rehearse(void)
{
	static const char directories[] = DEFAULT_PATH;
	struct identity id;
	struct stat st;
	char path[sizeof directories + 16], why[300];

	for (const char *at = directories; *at; at += strcspn(at, ":"), at += *at == ':') {
		snprintf(path, sizeof path, "%.*s/sh", (int)strcspn(at, ":"), at);
		stat(path, &st);
	}
	identity_find("", &id, why, sizeof why);
}

void spawn_refuse(int error, int error_fd)
{
	report_fd = error_fd;
	fail(125, error, "cannot enter the data disk: %s", strerror(error));
}

void spawn_become(const struct spawn *s, const int fds[3], int error_fd)
{
	struct identity id;
	char why[300], home[300];
	int applet = !!(s->flags & SF_APPLET), entered;

	report_fd = error_fd;
	if (!begun)
		spawn_begin();
	take_descriptors(s, fds);
	if (identity_find(s->user, &id, why, sizeof why))
		fail(125, 0, "%s", why);
	if (s->flags & SF_TTY && fchown(0, id.uid, (gid_t)-1) && errno != EPERM && errno != EROFS)
		fail(125, errno, "cannot hand over the terminal: %s", strerror(errno));
	entered = !chdir(s->cwd); /* as root first, like runc: WORKDIR /root goes with any USER */
	if (!entered && make_path(s->cwd) && errno != EROFS && errno != EEXIST)
		fail(125, errno, "cannot make the working directory %s: %s", s->cwd, strerror(errno));
	entered = entered || !chdir(s->cwd);
	if (policy_apply_rlimits(s))
		fail(125, errno, "cannot set a resource limit: %s", strerror(errno));
	if (policy_apply_identity(&id, s->caps, applet))
		fail(125, errno, "cannot become user '%s': %s", s->user, strerror(errno));
	if (!entered && chdir(s->cwd)) /* or as the user: a network file system may let only its owner in */
		fail(126, errno, "cannot enter the working directory %s: %s", s->cwd, strerror(errno));
	if (!find_env(s->env, "HOME")) {
		snprintf(home, sizeof home, "HOME=%s", id.home);
		s->env[s->envc] = home;
	}
	if (applet) {
		close(report_fd); /* what execve does for the others: started */
		_exit(applet_main((int)s->argc, s->argv));
	}
	if (policy_apply_seccomp(s))
		fail(125, errno, "cannot install the system call filter: %s", strerror(errno));
	execute(s);
}
