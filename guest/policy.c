/* What binds a program: limits, identity, capabilities, seccomp. Raw system calls: a static program needs no libcap. */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/capability.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "proto.h"
#include "spawn.h"

/* A limit that may not be raised so far is raised as far as it may be; the host has warned about that before. */
static int set_as_far_as_allowed(const struct rlimit_field *f)
{
	uint64_t now[2], wanted[2] = {f->soft, f->hard}; /* struct rlimit64: soft, hard */

	if (syscall(SYS_prlimit64, 0, f->resource, NULL, now))
		return -1;
	if (wanted[1] > now[1])
		wanted[1] = now[1];
	if (wanted[0] > wanted[1])
		wanted[0] = wanted[1];
	return (int)syscall(SYS_prlimit64, 0, f->resource, wanted, NULL);
}

int policy_apply_rlimits(const struct spawn *s)
{
	for (size_t i = 0; i < s->rlimit_count; i++) {
		const struct rlimit_field *f = &s->rlimits[i];
		uint64_t wanted[2] = {f->soft, f->hard};
		if (!syscall(SYS_prlimit64, 0, f->resource, wanted, NULL))
			continue;
		if (errno != EPERM || set_as_far_as_allowed(f))
			return -1;
	}
	return 0;
}

static int set_capabilities(uint64_t effective, uint64_t permitted)
{
	struct __user_cap_header_struct header = {_LINUX_CAPABILITY_VERSION_3, 0};
	struct __user_cap_data_struct data[2] = {
		{(uint32_t)effective, (uint32_t)permitted, 0},
		{(uint32_t)(effective >> 32), (uint32_t)(permitted >> 32), 0},
	};
	return (int)syscall(SYS_capset, &header, data);
}

static uint64_t permitted_now(void)
{
	struct __user_cap_header_struct header = {_LINUX_CAPABILITY_VERSION_3, 0};
	struct __user_cap_data_struct data[2] = {{0, 0, 0}, {0, 0, 0}};

	if (syscall(SYS_capget, &header, data))
		return 0;
	return data[0].permitted | (uint64_t)data[1].permitted << 32;
}

int policy_bound(uint64_t caps)
{
	static uint64_t dropped;
	static int known = 64;

	if (caps & dropped) { /* nobody gets them back */
		errno = EPERM;
		return -1;
	}
	for (int cap = 0; cap < known; cap++) {
		if ((caps | dropped) >> cap & 1)
			continue;
		if (!prctl(PR_CAPBSET_DROP, cap, 0, 0, 0))
			dropped |= (uint64_t)1 << cap;
		else if (errno == EINVAL && cap > CAP_SETPCAP)
			known = cap; /* the kernel knows no more of them */
		else
			return -1;
	}
	return 0;
}

int policy_apply_identity(const struct identity *id, uint64_t caps, int applet)
{
	/* An applet is the agent's own code: as the asked-for user, with all that the agent may do. */
	if (!applet && policy_bound(caps))
		return -1;
	/* Raw calls: the C library's own go round every thread, which a forked child does not have. */
	if (syscall(SYS_setgroups, id->group_count, id->groups) && !(errno == EPERM && id->group_count == 0))
		return -1;
	if (syscall(SYS_setresgid, id->gid, id->gid, id->gid))
		return -1;
	/* Leaving uid 0 clears permitted and effective by itself (capabilities(7)); execve as uid 0 regains the bounding set. */
	if (syscall(SYS_setresuid, id->uid, id->uid, id->uid))
		return -1;
	if (applet)
		return 0;
	/* Inheritable, and with it ambient, becomes empty whatever our own parent left in it. */
	caps = id->uid == 0 ? caps & permitted_now() : 0;
	return set_capabilities(caps, caps);
}

int policy_apply_seccomp(const struct spawn *s)
{
	if ((s->flags & SF_NO_NEW_PRIVS) && prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
		return -1;
	if (!s->seccomp_size)
		return 0;
	struct sock_fprog program = {(unsigned short)(s->seccomp_size / 8), (struct sock_filter *)(uintptr_t)s->seccomp};
	return (int)syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, &program);
}
