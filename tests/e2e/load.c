/*
 * A machine's load, and what it has to say of it. Static.
 *
 *   load run    files with their sums, a server that answers for each block what it was, timers of all kinds; for ever
 *   load look   ask the running one, read all files again: one word and its value a line
 *
 * What must not be is counted: `wrong` is 0 where nothing was lost, and no clock has gone back.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/timerfd.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#define PORT 4000
#define FILES 8
#define FILE_BYTES (64 << 10)
#define BLOCK_BYTES 4096
#define TALK "\0load"

struct sums {
	uint64_t number, sum;
};

enum { SLEEP, TIMERFD, POLL, CONDITION, KINDS };
static const char *const kinds[] = {"sleep", "timerfd", "poll", "condition"};
static atomic_long fired[KINDS], late_ns[KINDS], written, blocks, wrong;
static char what[128] = "nothing";

static void complain(const char *text)
{
	atomic_fetch_add(&wrong, 1);
	snprintf(what, sizeof what, "%s: %s", text, strerror(errno));
}

static int64_t now_ns(clockid_t clock)
{
	struct timespec now;

	clock_gettime(clock, &now);
	return now.tv_sec * 1000000000LL + now.tv_nsec;
}

static uint64_t sum_of(const void *data, size_t size)
{
	const unsigned char *bytes = data;
	uint64_t sum = 0xcbf29ce484222325; /* FNV-1a */

	for (size_t i = 0; i < size; i++)
		sum = (sum ^ bytes[i]) * 0x100000001b3;
	return sum;
}

static int read_all(int fd, void *data, size_t size)
{
	for (size_t done = 0; done < size;) {
		ssize_t got = read(fd, (char *)data + done, size - done);

		if (got <= 0)
			return -1;
		done += got;
	}
	return 0;
}

/* -- files: one has its name when it is whole and on the disk */

static void *write_files(void *unused)
{
	static char data[FILE_BYTES];
	char path[32];

	(void)unused;
	mkdir("/w", 0755);
	for (uint64_t number = 0;; number++) {
		getrandom(data, sizeof data, 0);
		struct sums head = {number, sum_of(data, sizeof data)};
		int fd = open("/w/new", O_WRONLY | O_CREAT | O_TRUNC, 0644);

		if (fd < 0 || write(fd, &head, sizeof head) != sizeof head || write(fd, data, sizeof data) != sizeof data ||
		    (number % 4 == 0 && fsync(fd)))
			complain("writing a file");
		close(fd);
		snprintf(path, sizeof path, "/w/%d", (int)(number % FILES));
		if (rename("/w/new", path))
			complain("renaming a file");
		atomic_store(&written, number + 1);
		usleep(20000);
	}
	return NULL;
}

static int check_files(uint64_t *newest)
{
	static char data[FILE_BYTES];
	char path[32];
	int bad = 0;

	for (int i = 0; i < FILES; i++) {
		struct sums head;

		snprintf(path, sizeof path, "/w/%d", i);
		int fd = open(path, O_RDONLY);

		if (fd < 0)
			continue; /* not yet */
		if (read_all(fd, &head, sizeof head) || read_all(fd, data, sizeof data) || head.sum != sum_of(data, sizeof data) ||
		    head.number % FILES != (uint64_t)i)
			bad++;
		else if (head.number > *newest)
			*newest = head.number;
		close(fd);
	}
	return bad;
}

/* -- the network: a block's number, sum and bytes; the answer is the number, and the sum as it is here */

static void *answer(void *arg)
{
	int fd = (intptr_t)arg;
	char data[BLOCK_BYTES];
	struct sums head;

	while (!read_all(fd, &head, sizeof head) && !read_all(fd, data, sizeof data)) {
		uint64_t sum = sum_of(data, sizeof data);

		if (sum != head.sum) {
			errno = EBADMSG;
			complain("receiving a block");
		}
		head.sum = sum;
		if (send(fd, &head, sizeof head, MSG_NOSIGNAL) != sizeof head)
			break;
		atomic_fetch_add(&blocks, 1);
	}
	close(fd);
	return NULL;
}

static void start(void *(*run)(void *), void *arg)
{
	pthread_t thread;
	pthread_attr_t attr;

	pthread_attr_init(&attr);
	pthread_attr_setdetachstate(&attr, PTHREAD_CREATE_DETACHED);
	if (pthread_create(&thread, &attr, run, arg))
		complain("starting a thread");
}

static void *serve(void *unused)
{
	struct sockaddr_in at = {.sin_family = AF_INET, .sin_port = htons(PORT)};
	int fd = socket(AF_INET, SOCK_STREAM, 0), one = 1;

	(void)unused;
	setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
	if (bind(fd, (struct sockaddr *)&at, sizeof at) || listen(fd, 16))
		complain("listening");
	for (;;) {
		int client = accept(fd, NULL, NULL), user_ms = 10000;

		if (client < 0)
			continue;
		/* Of a restored machine's, the other end has gone on: it does not answer, and nobody would close it. */
		setsockopt(client, IPPROTO_TCP, 18 /* TCP_USER_TIMEOUT */, &user_ms, sizeof user_ms);
		setsockopt(client, SOL_SOCKET, SO_KEEPALIVE, &one, sizeof one);
		start(answer, (void *)(intptr_t)client);
	}
	return NULL;
}

/* -- timers: each waits in its own way, again and again, and says by how much it was late at most */

static void *wait_again(void *arg)
{
	int kind = (intptr_t)arg, timer = timerfd_create(CLOCK_MONOTONIC, 0);
	pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
	pthread_cond_t condition;
	pthread_condattr_t attr;
	int64_t before = now_ns(CLOCK_MONOTONIC);

	pthread_condattr_init(&attr);
	pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
	pthread_cond_init(&condition, &attr);
	for (unsigned round = 0;; round++) {
		int64_t span = (5 + round * 7 % 90) * 1000000LL, due = before + span;
		struct timespec until = {due / 1000000000, due % 1000000000};

		if (kind == SLEEP)
			clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &until, NULL);
		if (kind == TIMERFD) {
			struct itimerspec spec = {.it_value = until};
			uint64_t count;

			if (timerfd_settime(timer, TFD_TIMER_ABSTIME, &spec, NULL) || read(timer, &count, sizeof count) != sizeof count)
				complain("a timerfd");
		}
		if (kind == POLL)
			poll(NULL, 0, span / 1000000 + 1);
		if (kind == CONDITION) {
			pthread_mutex_lock(&mutex);
			pthread_cond_timedwait(&condition, &mutex, &until);
			pthread_mutex_unlock(&mutex);
		}
		int64_t now = now_ns(CLOCK_MONOTONIC);

		if (now < due) {
			errno = ETIME;
			complain(now < before ? "the monotonic clock went back" : "a timer was early");
		}
		if (now - due > atomic_load(&late_ns[kind]))
			atomic_store(&late_ns[kind], now - due);
		atomic_fetch_add(&fired[kind], 1);
		before = now;
	}
	return NULL;
}

/* -- asking */

static void *tell(void *unused)
{
	struct sockaddr_un at = {.sun_family = AF_UNIX, .sun_path = TALK};
	int fd = socket(AF_UNIX, SOCK_STREAM, 0);

	(void)unused;
	if (bind(fd, (struct sockaddr *)&at, sizeof at) || listen(fd, 4))
		complain("listening for questions");
	for (;;) {
		int client = accept(fd, NULL, NULL);

		if (client < 0)
			continue;
		dprintf(client, "written %ld\nblocks %ld\nwrong %ld\nwhat %s\n", written, blocks, wrong, what);
		for (int kind = 0; kind < KINDS; kind++)
			dprintf(client, "%s_fired %ld\n%s_late_ns %ld\n", kinds[kind], fired[kind], kinds[kind],
				atomic_exchange(&late_ns[kind], 0));
		close(client);
	}
	return NULL;
}

static void print_bytes(const char *name, const unsigned char *bytes)
{
	printf("%s ", name);
	for (int i = 0; i < 16; i++)
		printf("%02x", bytes[i]);
	printf("\n");
}

static int look(void)
{
	struct sockaddr_un at = {.sun_family = AF_UNIX, .sun_path = TALK};
	int fd = socket(AF_UNIX, SOCK_STREAM, 0), device = open("/dev/urandom", O_RDONLY);
	unsigned char bytes[16];
	char text[1024];
	uint64_t newest = 0;
	ssize_t got;

	getrandom(bytes, sizeof bytes, 0);
	print_bytes("random", bytes);
	if (read_all(device, bytes, sizeof bytes))
		return 1;
	print_bytes("urandom", bytes);
	FILE *file = fopen("/proc/sys/kernel/random/uuid", "r");

	if (!file || !fgets(text, sizeof text, file))
		return 1;
	printf("uuid %s", text);
	fflush(stdout);
	if (connect(fd, (struct sockaddr *)&at, sizeof at))
		return 1;
	while ((got = read(fd, text, sizeof text)) > 0)
		if (write(1, text, got) != got)
			return 1;
	int bad = check_files(&newest);

	printf("bad_files %d\nnewest %llu\n", bad, (unsigned long long)newest);
	printf("monotonic_ns %lld\n", (long long)now_ns(CLOCK_MONOTONIC));
	printf("real_ns %lld\n", (long long)now_ns(CLOCK_REALTIME));
	return 0;
}

int main(int argc, char **argv)
{
	if (argc == 2 && !strcmp(argv[1], "look"))
		return look();
	signal(SIGPIPE, SIG_IGN);
	start(write_files, NULL);
	start(serve, NULL);
	start(tell, NULL);
	for (intptr_t kind = 0; kind < KINDS; kind++)
		start(wait_again, (void *)kind);
	/* Lines with the time at which each was written, and little else going on between two of them. */
	for (unsigned number = 0;; number++) {
		printf("line %u %lld\n", number, (long long)now_ns(CLOCK_REALTIME));
		fflush(stdout);
		usleep((100 + number * 37 % 700) * 1000);
	}
}
