/* VM mode: the agent as the first program of a virtual machine, which sets up the machine's inside. */
#ifndef NAGAYA_VM_H
#define NAGAYA_VM_H

#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#include "proto.h"

/* What came of SETUP: for READY or SETUP_FAILED. */
struct vm_report {
	uint32_t error; /* errno */
	char text[512]; /* for a person */
	uint32_t warning_count;
	char warnings[4096]; /* lines */
};
extern struct vm_report vm_report;

/* vm.c. Mount what is needed to find the host, and find it: its descriptor, non-blocking. Ends the machine on failure. */
int vm_start(void);
/* Carry SETUP out. 0; -1 when it cannot be done (see vm_report); -2 when the payload is malformed. */
int vm_setup(const unsigned char *payload, size_t size);
/* Stop all programs, and the data disk between two of its states. 0, or the errno of what could not be done. */
int vm_freeze(void);
void vm_thaw(void);
/* Go on after vm_freeze(), maybe much later and as another machine: random numbers, clock, names and address first, then
 * the programs. 0, or -1 when the payload is malformed. What could not be done is a warning in vm_report. */
int vm_continue(const unsigned char *payload, size_t size);
/* The part of SETUP that is the same for all machines of an image, before this one is saved: 0, -1 or -2, likewise. */
int vm_prepare(const unsigned char *payload, size_t size);
/* Whether the kernel has killed a process for want of memory; answers yes once. */
int vm_ran_out_of_memory(void);
/* 0 or -1 with errno. */
int vm_set_clock(uint64_t time_ns);
/* With UF_OWN_PIDS: the stub that MAIN will replace, and the way to it (stub.h); else 0 and -1. */
extern pid_t vm_stub;
extern int vm_stub_fd;
/* Everything that could write is dead: get the disks to rest and end the machine. */
void vm_finish(void) __attribute__((noreturn));

/* vm_system.c. fork(2), into the programs' control group where there is one. */
pid_t vm_fork(void);
int vm_freeze_programs(int frozen); /* 0 or -1 with errno */
/* vm_disks.c. In a forked child: into the data disk's root, which has what overlay writes as it lies there. 0, -1 with errno. */
int vm_enter_data_disk(void);
/* What programs have written goes to the disk; then it, and the root, become read-only. */
void vm_flush(void);
void vm_rest_disks(void);
int vm_freeze_disk(int frozen); /* 0 or -1 with errno */

/* Note what failed; always -1. `error` is an errno, whose text is appended. */
int vm_fail(int error, const char *format, ...) __attribute__((format(printf, 2, 3)));
void vm_warn(const char *format, ...) __attribute__((format(printf, 1, 2)));
/* Until look(what) is not 0, which it may become with the kernel's next uevent; its value, 0 after `limit_ms`. */
int vm_await(int (*look)(void *what), void *what, int limit_ms);
/* The first line of a small file, or -1. */
ssize_t vm_read_line(const char *path, char *out, size_t size);
int vm_write_file(int directory, const char *path, const char *text);

/* Directories that paths start from: the initramfs, the machine's root, and a /proc that knows us. */
extern int vm_initramfs, vm_root, vm_proc;

/* All that follow: 0, or -1 after vm_fail. vm_disks.c */
int vm_mount_data_only(void);
int vm_mount_disks(void);
int vm_switch_root(void);
/* vm_system.c */
int vm_mount_system(uint32_t pids, int own_pids);
int vm_start_early_stub(uint64_t bound); /* who will be MAIN: forked ahead, while it costs nobody's time */
int vm_make_device(const char *node, const char *path);
int vm_protect_root(void);
int vm_mask(void);
/* vm_mounts.c */
int vm_mount_file(const char *path, const unsigned char *content, size_t size);
int vm_mount_user(const unsigned char *field);
int vm_rewrite_file(const char *path, const unsigned char *content, size_t size); /* 0 or -1 with errno */
int vm_drop_shares(void);
/* vm_net.c; where the parts of U_NETWORK are */
enum { UN_MAC = 0, UN_PREFIX = 6, UN_PREFIX6 = 7, UN_MTU = 8, UN_ADDRESS = 12, UN_GATEWAY = 16, UN_ADDRESS6 = 20,
       UN_GATEWAY6 = 36, UN_NAME = 52 };
int vm_bring_up_loopback(void);
int vm_prepare_link(const unsigned char *field);
int vm_configure_link(const unsigned char *field);
int vm_reconfigure_link(const unsigned char *field);
int vm_change_link(const unsigned char *field); /* of a machine that runs; one without addresses goes down */

/* vm_targets.c: these answer -1 with errno. An O_PATH descriptor of `path` in the machine's root, made when missing:
 * directories, or an empty file. Without `follow`, a link on the way is ELOOP. */
int vm_open_target(const char *path, int is_file, int follow);
/* Raise MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC of the mount that `fd` is the root of. */
int vm_set_mount_flags(int fd, unsigned long flags);
/* Mount a copy of what `fd` is open on, a directory or a file, over `target`. */
int vm_bind(int fd, int target, unsigned long flags);
/* mount(2) at a descriptor: its target is a path, and "." is the one that cannot be led astray. */
int vm_mount_at(int target, const char *source, const char *type, unsigned long flags, const char *options);

#endif
