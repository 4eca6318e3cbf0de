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

int stub_send(int fd, const unsigned char *payload, size_t size, const int fds[3], int report)
{
	int passed[PASSED] = {fds[0], fds[1], fds[2], report};
	char control[CMSG_SPACE(sizeof passed)] = {0};
	unsigned char length[4];
	struct iovec part = {length, sizeof length};
	struct msghdr message = {
		.msg_iov = &part, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};
	struct cmsghdr *head = CMSG_FIRSTHDR(&message);

	put32(length, (uint32_t)size);
	head->cmsg_level = SOL_SOCKET;
	head->cmsg_type = SCM_RIGHTS;
	head->cmsg_len = CMSG_LEN(sizeof passed);
	memcpy(CMSG_DATA(head), passed, sizeof passed);
	if (sendmsg(fd, &message, MSG_NOSIGNAL) != sizeof length)
		return -1;
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
	unsigned char length[4], *payload;
	struct iovec part = {length, sizeof length};
	struct msghdr message = {
		.msg_iov = &part, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};
	struct spawn s;
	ssize_t n;

	do
		n = recvmsg(fd, &message, MSG_CMSG_CLOEXEC);
	while (n < 0 && errno == EINTR);
	struct cmsghdr *head = n == sizeof length ? CMSG_FIRSTHDR(&message) : NULL;
	if (!head || head->cmsg_type != SCM_RIGHTS || head->cmsg_len != CMSG_LEN(sizeof passed))
		_exit(125); /* the agent is gone */
	memcpy(passed, CMSG_DATA(head), sizeof passed);
	size_t size = get32(length), at = 0;
	payload = size <= MAX_PAYLOAD ? malloc(size + 1) : NULL;
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
