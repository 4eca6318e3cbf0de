/* The agent protocol, version 2: docs/agent-protocol.md. Keep in step with src/nagaya/protocol/agent.py. */
#ifndef NAGAYA_PROTO_H
#define NAGAYA_PROTO_H

#include <stddef.h>
#include <stdint.h>

#define PROTOCOL_VERSION 2
#define HEADER_SIZE 12
#define MAX_PAYLOAD (1u << 20)
#define MAX_DATA (64u << 10)
#define WINDOW (256u << 10)
#define MAX_WARNINGS 64 /* of READY */

enum frame_type {
	F_HELLO = 1,
	F_SPAWN = 2,
	F_STARTED = 3,
	F_SPAWN_FAILED = 4,
	F_STDIN = 5,
	F_STDIN_CLOSE = 6,
	F_STDOUT = 7,
	F_STDERR = 8,
	F_CREDIT = 9,
	F_SIGNAL = 10,
	F_RESIZE = 11,
	F_EXITED = 12,
	F_SHUTDOWN = 13,
	F_SETUP = 14,
	F_READY = 15,
	F_SETUP_FAILED = 16,
	F_CLOCK = 17,
	F_OUT_OF_MEMORY = 18,
	F_HOLD = 19,
	F_HELD = 20,
	F_CONTINUE = 21,
	F_CONTINUED = 22,
	F_PREPARE = 23,
	F_PREPARED = 24,
};

enum spawn_tag {
	T_ARG = 1,
	T_ENV = 2,
	T_CWD = 3,
	T_USER = 4,
	T_FLAGS = 5,
	T_SIZE = 6,
	T_CAPS = 7,
	T_SECCOMP = 8,
	T_RLIMIT = 9,
};

enum spawn_flag {
	SF_TTY = 1,
	SF_STDIN = 2,
	SF_MAIN = 4,
	SF_APPLET = 8,
	SF_NO_NEW_PRIVS = 16,
	SF_DISCARD = 32,
	SF_DATA_DISK = 64,
};

/* SETUP's: strings end with a NUL, but for those that are a whole field. */
enum setup_tag {
	U_HOSTNAME = 1,
	U_FLAGS = 2,
	U_TIME = 3,	 /* u64 ns since the epoch; 0: leave the clock alone */
	U_ENTROPY = 4,
	U_FILE = 5,	 /* path, content */
	U_MOUNT = 6,	 /* u32 kind, u32 flags, u32 mode, u32 zero, u64 size, source, target */
	U_NETWORK = 7,	 /* MAC, u8 prefix, u8 IPv6 prefix, u32 MTU, 2 IPv4 addresses, 2 IPv6 addresses, name */
	U_SYSCTL = 8,	 /* key, value */
	U_POWER_OFF = 9, /* u32 */
	U_DEVICE = 10,	 /* node of the kernel's /dev, path */
	U_PIDS = 11,	 /* u32 */
	U_MACHINE_ID = 12, /* 32 hex digits; CONTINUE's alone */
	U_WARM = 13,	 /* path of a file whose pages are to be in memory; of PREPARE */
	U_BOUND = 14,	 /* u64 capabilities that MAIN will have at most; of PREPARE */
};

enum setup_flag {
	UF_READ_ONLY = 1,
	UF_UNMASK = 2,
	UF_DATA_ONLY = 4,
	UF_OWN_PIDS = 8,
};

enum mount_kind {
	UM_VIRTIOFS = 1,
	UM_TMPFS = 2,
};

enum power_off {
	UP_ACPI = 1,
	UP_REBOOT = 2,
	UP_PORT = 3,
};

/* The network card of a machine that is only there to be saved, and gone on from as many others. */
#define PLACEHOLDER_MAC "\x02nagay" /* of the first link; the next one's last byte is one more */

#define HELLO_NEEDS_SETUP 1 /* HELLO's features: the host's first frame is to be SETUP */

/* A field of SPAWN or SETUP: u16 tag, u16 zero, u32 length, bytes. */
struct field {
	unsigned tag;
	const unsigned char *bytes;
	size_t size;
};

/* parse.c. The next field at *at: 1, or 0 at the end, or -1 when malformed. */
int next_field(const unsigned char *payload, size_t size, size_t *at, struct field *f);

/* Little-endian whatever the CPU is. */
static inline uint32_t get32(const unsigned char *p)
{
	return p[0] | p[1] << 8 | p[2] << 16 | (uint32_t)p[3] << 24;
}

static inline uint16_t get16(const unsigned char *p)
{
	return (uint16_t)(p[0] | p[1] << 8);
}

static inline uint64_t get64(const unsigned char *p)
{
	return get32(p) | (uint64_t)get32(p + 4) << 32;
}

static inline void put32(unsigned char *p, uint32_t v)
{
	p[0] = (unsigned char)v;
	p[1] = (unsigned char)(v >> 8);
	p[2] = (unsigned char)(v >> 16);
	p[3] = (unsigned char)(v >> 24);
}

static inline void put16(unsigned char *p, uint16_t v)
{
	p[0] = (unsigned char)v;
	p[1] = (unsigned char)(v >> 8);
}

#endif
