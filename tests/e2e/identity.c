/* What must not be the same in two machines of one template, one word and its value a line. Static, and placed at random. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/auxv.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define FROM 40001 /* one pair of ports, so that the first sequence number depends on the kernel's secret and the time alone */
#define TO 40002

static void print_bytes(const char *name, const unsigned char *bytes, size_t size)
{
	printf("%s ", name);
	for (size_t i = 0; i < size; i++)
		printf("%02x", bytes[i]);
	printf("\n");
}

static int bound(int port)
{
	struct sockaddr_in at = {.sin_family = AF_INET, .sin_port = htons(port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
	int fd = socket(AF_INET, SOCK_STREAM, 0), one = 1;

	setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
	if (bind(fd, (struct sockaddr *)&at, sizeof at))
		perror("bind");
	return fd;
}

static void print_sequence(void)
{
	struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons(TO), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
	int listener = bound(TO), fd = bound(FROM), on = 1, queue = 2 /* TCP_SEND_QUEUE */;
	unsigned sequence = 0;
	socklen_t size = sizeof sequence;

	if (listen(listener, 1) || connect(fd, (struct sockaddr *)&to, sizeof to))
		perror("connect");
	/* Needs CAP_NET_ADMIN. */
	if (setsockopt(fd, IPPROTO_TCP, TCP_REPAIR, &on, sizeof on) ||
	    setsockopt(fd, IPPROTO_TCP, TCP_REPAIR_QUEUE, &queue, sizeof queue) ||
	    getsockopt(fd, IPPROTO_TCP, TCP_QUEUE_SEQ, &sequence, &size))
		perror("TCP_REPAIR");
	printf("sequence %08x\n", sequence);
}

static void print_file(const char *name, const char *path)
{
	char text[256] = "";
	FILE *file = fopen(path, "r");

	if (file) {
		if (!fgets(text, sizeof text, file))
			text[0] = 0;
		fclose(file);
	}
	text[strcspn(text, "\n")] = 0;
	printf("%s %s\n", name, text);
}

int main(void)
{
	unsigned char bytes[16] = {0};
	struct timespec now;
	int local;

	if (getrandom(bytes, sizeof bytes, 0) != sizeof bytes)
		perror("getrandom");
	print_bytes("random", bytes, sizeof bytes);
	print_bytes("at_random", (const unsigned char *)getauxval(AT_RANDOM), 16); /* the stack protector's, and malloc's */
	print_file("uuid", "/proc/sys/kernel/random/uuid");
	print_file("boot_id", "/proc/sys/kernel/random/boot_id");
	print_file("mac", "/sys/class/net/eth0/address");
	print_file("hostname", "/etc/hostname");
	printf("text %p\nstack %p\nheap %p\n", (void *)main, (void *)&local, malloc(1));
	print_sequence();
	clock_gettime(CLOCK_REALTIME, &now);
	printf("time %lld\n", (long long)now.tv_sec);
	return 0;
}
