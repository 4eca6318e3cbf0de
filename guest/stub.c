/* The stub: PID 1 of a machine without an init of ours. The agent passes it a SPAWN payload and four descriptors. */
#define _GNU_SOURCE
#include <errno.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "proto.h"
#include "spawn.h"
#include "stub.h"

#define PASSED 4
#define FIRST_BYTES 8192 /* what most programs are told with */

int stub_send(int fd, const unsigned char *payload, size_t size, const int fds[3], int report)
{
	int passed[PASSED] = {fds[0], fds[1], fds[2], report};
	char control[CMSG_SPACE(sizeof passed)] = {0};
	unsigned char length[4];
	struct iovec parts[2] = {{length, sizeof length}, {(void *)(uintptr_t)payload, size}};
	struct msghdr message = {
		.msg_iov = parts, .msg_iovlen = 2, .msg_control = control, .msg_controllen = sizeof control};
	struct cmsghdr *head = CMSG_FIRSTHDR(&message);

	put32(length, (uint32_t)size);
	head->cmsg_level = SOL_SOCKET;
	head->cmsg_type = SCM_RIGHTS;
	head->cmsg_len = CMSG_LEN(sizeof passed);
	memcpy(CMSG_DATA(head), passed, sizeof passed);
	/* All of it at once, as a rule: each message would wake the stub, and have it wait for the next. */
	ssize_t sent = sendmsg(fd, &message, MSG_NOSIGNAL);
	if (sent < (ssize_t)sizeof length)
		return -1;
	payload += sent - (ssize_t)sizeof length;
	size -= (size_t)sent - sizeof length;
	while (size) {
		ssize_t n = send(fd, payload, size, MSG_NOSIGNAL);
		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
			return -1;
		payload += n;
		size -= (size_t)n;
	}
	return 0;
}

void stub_become(int fd)
{
	int passed[PASSED];
	char control[CMSG_SPACE(sizeof passed)];
	static unsigned char first[FIRST_BYTES];
	unsigned char length[4], *payload;
	struct iovec parts[2] = {{length, sizeof length}, {first, sizeof first}};
	struct msghdr message = {
		.msg_iov = parts, .msg_iovlen = 2, .msg_control = control, .msg_controllen = sizeof control};
	struct spawn s;
	ssize_t n;

	spawn_begin();
	memset(first, 0, sizeof first); /* while there is time: in memory from here on */
	do
		n = recvmsg(fd, &message, MSG_CMSG_CLOEXEC);
	while (n < 0 && errno == EINTR);
	struct cmsghdr *head = n >= (ssize_t)sizeof length ? CMSG_FIRSTHDR(&message) : NULL;
	if (!head || head->cmsg_type != SCM_RIGHTS || head->cmsg_len != CMSG_LEN(sizeof passed))
		_exit(125); /* the agent is gone */
	memcpy(passed, CMSG_DATA(head), sizeof passed);
	size_t size = get32(length), at = (size_t)n - sizeof length;
	payload = size < at || size > MAX_PAYLOAD ? NULL : size == at ? first : malloc(size + 1);
	if (payload && payload != first)
		memcpy(payload, first, at);
	while (payload && at < size) {
		n = read(fd, payload + at, size - at);
		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
			_exit(125);
		at += (size_t)n;
	}
	if (!payload || spawn_parse(&s, payload, size))
		_exit(125);
	spawn_become(&s, passed, passed[3]);
}
