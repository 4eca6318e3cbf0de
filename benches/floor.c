/* The floor: namespaces, overlay, pivot_root and exec, with nothing around them. Usage: floor LOWER WORK COMMAND... */
#define _GNU_SOURCE
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

static void must(int result, const char *what)
{
	if (result < 0) {
		perror(what);
		_exit(125);
	}
}

int main(int argc, char **argv)
{
	char options[4096], upper[1024], work[1024], root[1024];
	int status;

	if (argc < 4)
		return 2;
	snprintf(upper, sizeof upper, "%s/upper", argv[2]);
	snprintf(work, sizeof work, "%s/work", argv[2]);
	snprintf(root, sizeof root, "%s/root", argv[2]);
	mkdir(argv[2], 0755), mkdir(upper, 0755), mkdir(work, 0755), mkdir(root, 0755);
	must(unshare(CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS | CLONE_NEWCGROUP), "unshare");
	pid_t pid = fork();
	must(pid, "fork");
	if (pid) {
		waitpid(pid, &status, 0);
		return WEXITSTATUS(status);
	}
	must(mount("", "/", "", MS_SLAVE | MS_REC, NULL), "propagation");
	snprintf(options, sizeof options, "lowerdir=%s,upperdir=%s,workdir=%s", argv[1], upper, work);
	must(mount("overlay", root, "overlay", 0, options), "overlay");
	must(chdir(root), "chdir");
	must(mount("proc", "proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL), "proc");
	must(mount("tmpfs", "dev", "tmpfs", MS_NOSUID, "mode=755"), "dev");
	must(mount("sysfs", "sys", "sysfs", MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL), "sys");
	must((int)syscall(SYS_pivot_root, ".", "."), "pivot_root");
	must(umount2(".", MNT_DETACH), "umount");
	must(chdir("/"), "chdir");
	execv(argv[3], argv + 3);
	must(-1, argv[3]);
}
