/* The agent protocol, version 1: docs/agent-protocol.md. Keep in step with src/nagaya/protocol/agent.py. */
#ifndef NAGAYA_PROTO_H
#define NAGAYA_PROTO_H

#include <stddef.h>
#include <stdint.h>

#define PROTOCOL_VERSION 1
#define HEADER_SIZE 12
#define MAX_PAYLOAD (1u << 20)
#define MAX_DATA (64u << 10)
#define WINDOW (256u << 10)

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
};

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
