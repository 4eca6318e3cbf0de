/* `bench`: what work costs inside these walls. The same code runs in every type of machine, and on the bare host as
 * `nagaya-agent --applet bench ...`, so that only the walls differ.
 *
 *   bench cpu|memory|syscall ROUNDS MS          one figure a line and round, each from at least MS milliseconds of work
 *   bench write|files ROUNDS MS DIRECTORY
 *   bench network ROUNDS MS ADDRESS PORT
 *   bench serve ADDRESS                         prints its port, then echoes; one peer at a time, until it is killed
 *
 * Units: cpu steps/s, memory bytes/s (read, added to, and written elsewhere), syscall ns/call, write bytes/s (with fsync), files files/s (made, 4 KiB
 * written, removed), network us/round trip (64 bytes, TCP).
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>
#include "spawn.h"

#define TABLE 4096		  /* 32 KiB: within the first cache of any CPU */
#define CPU_BATCH 100000
#define COPY_BYTES (16 << 20)	  /* beyond the second cache */
#define SYSCALL_BATCH 100
#define PIECE 65536
#define PASS_BYTES (1 << 20)	  /* where the kernel is emulated, each takes seconds */
#define FILE_BYTES 4096
#define MESSAGE 64
#define PATIENCE_S 5

/* One measurement: `step` does some work and answers how much, or a negative errno. */
struct work {
	int (*begin)(struct work *w);
	int64_t (*step)(struct work *w);
	int per_second; /* else nanoseconds (or microseconds) for one */
	double unit_ns;
	const char *place, *port;
	char path[4096];
	unsigned char *from, *to;
	uint64_t table[TABLE], state;
	int fd;
};

static uint64_t now_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* Integer arithmetic on a small table: loads, stores, multiplications, and branches that are hard to guess. */
static int64_t step_cpu(struct work *w)
{
	uint64_t x = w->state | 1;

	for (int i = 0; i < CPU_BATCH; i++) {
		x ^= x >> 12;
		x ^= x << 25;
		x ^= x >> 27;
		uint64_t value = x * 0x2545f4914f6cdd1du;
		uint64_t *slot = &w->table[value >> 52];
		if (*slot & 1)
			*slot += value;
		else
			*slot ^= value >> 7;
	}
	w->state = x;
	return CPU_BATCH;
}

static int begin_memory(struct work *w)
{
	w->from = mmap(NULL, 2 * COPY_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (w->from == MAP_FAILED)
		return -errno;
	w->to = w->from + COPY_BYTES;
	memset(w->from, 0x5a, 2 * COPY_BYTES); /* the first touch is not what is measured */
	return 0;
}

static int64_t step_memory(struct work *w)
{
	/* Not memcpy, which is another program in each C library; and with a sum, so that no compiler makes one of it. */
	const uint64_t *from = (const uint64_t *)w->from;
	uint64_t *to = (uint64_t *)w->to;

	for (size_t i = 0; i < COPY_BYTES / sizeof *to; i++)
		to[i] = from[i] + i;
	w->from[0] = w->to[COPY_BYTES - 1] + 1;
	return COPY_BYTES;
}

static int64_t step_syscall(struct work *w)
{
	(void)w;
	for (int i = 0; i < SYSCALL_BATCH; i++)
		syscall(SYS_getppid);
	return SYSCALL_BATCH;
}

static int begin_write(struct work *w)
{
	snprintf(w->path, sizeof w->path, "%s/.nagaya-bench-%d", w->place, (int)getpid());
	w->from = malloc(PIECE);
	if (!w->from)
		return -ENOMEM;
	for (size_t i = 0; i < PIECE; i++) /* not zeros: nobody below is to make a hole of them */
		w->from[i] = (unsigned char)(i * 167 + (i >> 8));
	w->fd = open(w->path, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
	if (w->fd < 0)
		return -errno;
	return unlink(w->path) ? -errno : 0; /* whatever happens, nothing stays */
}

static int64_t step_write(struct work *w)
{
	for (off_t at = 0; at < PASS_BYTES; at += PIECE)
		if (pwrite(w->fd, w->from, PIECE, at) != PIECE)
			return errno ? -errno : -EIO;
	return fsync(w->fd) ? -errno : PASS_BYTES;
}

static int begin_files(struct work *w)
{
	snprintf(w->path, sizeof w->path, "%s/.nagaya-bench-%d", w->place, (int)getpid());
	w->from = calloc(1, FILE_BYTES);
	return w->from ? 0 : -ENOMEM;
}

static int64_t step_files(struct work *w)
{
	int fd = open(w->path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
	int failed;

	if (fd < 0)
		return -errno;
	failed = write(fd, w->from, FILE_BYTES) == FILE_BYTES ? 0 : errno ? -errno : -EIO;
	close(fd);
	if (unlink(w->path) && !failed)
		failed = -errno;
	return failed ? failed : 1;
}

/* A TCP socket and the address it is to have or to call; a negative errno. */
static int open_tcp(const char *address, int port, struct sockaddr_in *name)
{
	int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0), yes = 1;

	if (fd < 0)
		return -errno;
	memset(name, 0, sizeof *name);
	name->sin_family = AF_INET;
	name->sin_port = htons((uint16_t)port);
	if (inet_pton(AF_INET, address, &name->sin_addr) != 1) {
		close(fd);
		return -EINVAL;
	}
	setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
	return fd;
}

static int begin_network(struct work *w)
{
	struct timeval patience = {PATIENCE_S, 0};
	struct sockaddr_in name;

	w->fd = open_tcp(w->place, atoi(w->port), &name);
	if (w->fd < 0)
		return w->fd;
	setsockopt(w->fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
	setsockopt(w->fd, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof patience);
	return connect(w->fd, (struct sockaddr *)&name, sizeof name) ? -errno : 0;
}

static int64_t step_network(struct work *w)
{
	char message[MESSAGE] = {1};
	size_t got = 0;

	if (send(w->fd, message, sizeof message, MSG_NOSIGNAL) != (ssize_t)sizeof message)
		return -errno;
	while (got < sizeof message) {
		ssize_t n = recv(w->fd, message + got, sizeof message - got, 0);
		if (n <= 0)
			return n == 0 ? -ECONNRESET : errno == EAGAIN ? -ETIMEDOUT : -errno;
		got += (size_t)n;
	}
	return 1;
}

static int serve(const char *address)
{
	struct sockaddr_in name;
	socklen_t length = sizeof name;
	char data[4096];
	int listener = open_tcp(address, 0, &name), yes = 1;

	prctl(PR_SET_PDEATHSIG, SIGKILL);
	if (listener < 0 || bind(listener, (struct sockaddr *)&name, sizeof name) || listen(listener, 8) ||
	    getsockname(listener, (struct sockaddr *)&name, &length)) {
		fprintf(stderr, "bench serve: %s: %s\n", address, strerror(listener < 0 ? -listener : errno));
		return 1;
	}
	printf("%d\n", ntohs(name.sin_port));
	fflush(stdout);
	for (;;) {
		int peer = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
		ssize_t n;
		if (peer < 0)
			continue;
		setsockopt(peer, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
		while ((n = recv(peer, data, sizeof data, 0)) > 0 && send(peer, data, (size_t)n, MSG_NOSIGNAL) == n)
			;
		close(peer);
	}
}

static int measure(struct work *w, int rounds, uint64_t least_ns)
{
	int64_t done = w->begin ? w->begin(w) : 0;

	if (done >= 0)
		done = w->step(w); /* the first one warms up */
	for (int round = 0; round < rounds && done >= 0; round++) {
		uint64_t began = now_ns(), spent, amount = 0;
		do {
			done = w->step(w);
			if (done < 0)
				break;
			amount += (uint64_t)done;
			spent = now_ns() - began;
		} while (spent < least_ns);
		if (done < 0)
			break;
		if (w->per_second)
			printf("%.6g\n", (double)amount * 1e9 / (double)spent);
		else
			printf("%.6g\n", (double)spent / (double)amount / w->unit_ns);
		fflush(stdout);
	}
	if (done < 0)
		fprintf(stderr, "%s\n", strerror((int)-done));
	return done < 0;
}

int applet_bench(int argc, char **argv)
{
	static struct work work; /* large, and all zeros: not part of the program's file */
	static const struct {
		const char *name;
		int argc;
		int (*begin)(struct work *w);
		int64_t (*step)(struct work *w);
		int per_second;
		double unit_ns;
	} kinds[] = {
		{"cpu", 4, NULL, step_cpu, .per_second = 1},
		{"memory", 4, begin_memory, step_memory, .per_second = 1},
		{"syscall", 4, NULL, step_syscall, .unit_ns = 1},
		{"write", 5, begin_write, step_write, .per_second = 1},
		{"files", 5, begin_files, step_files, .per_second = 1},
		{"network", 6, begin_network, step_network, .unit_ns = 1000},
	};

	if (argc == 3 && !strcmp(argv[1], "serve"))
		return serve(argv[2]);
	for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++) {
		if (argc < 4 || strcmp(argv[1], kinds[i].name) || argc != kinds[i].argc)
			continue;
		work.begin = kinds[i].begin;
		work.step = kinds[i].step;
		work.per_second = kinds[i].per_second;
		work.unit_ns = kinds[i].unit_ns;
		work.place = argc > 4 ? argv[4] : NULL;
		work.port = argc > 5 ? argv[5] : NULL;
		return measure(&work, atoi(argv[2]), strtoull(argv[3], NULL, 10) * 1000000u);
	}
	fprintf(stderr, "usage: bench cpu|memory|syscall ROUNDS MS | bench write|files ROUNDS MS DIRECTORY |"
			" bench network ROUNDS MS ADDRESS PORT | bench serve ADDRESS\n");
	return 2;
}
