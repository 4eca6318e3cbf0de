/* A machine's load that notices whether anything of it is lost: files with sums, a stream whose bytes are counted, timers,
   random numbers. Arguments: directory of files, directory of accounts, address and port of an echo; or "clock", to be told the time.

   Each part is a process, and writes ACCOUNTS/NAME anew now and then: "COUNT PROBLEMS ..." on a line. What it finds wrong is
   a line in ACCOUNTS/bad. Of timers the line goes on with the longest time between two ticks in ms. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <poll.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

#define FILES 16
#define WORDS 8192 /* of 8 bytes in a file; the first is the sum of the others */
#define TICK_NS 20000000L

static const char *files, *accounts;
static unsigned long problems;

static void bad(const char *format, ...)
{
	char path[256];
	va_list words;
	FILE *out;

	problems++;
	snprintf(path, sizeof path, "%s/bad", accounts);
	out = fopen(path, "a");
	va_start(words, format);
	vfprintf(out, format, words);
	va_end(words);
	fputc('\n', out);
	fclose(out);
}

static void account(const char *name, unsigned long count, unsigned long more)
{
	char path[256], next[256];
	FILE *out;

	snprintf(path, sizeof path, "%s/%s", accounts, name);
	snprintf(next, sizeof next, "%s/.%s", accounts, name);
	out = fopen(next, "w");
	fprintf(out, "%lu %lu %lu\n", count, problems, more);
	fclose(out);
	rename(next, path);
}

static void rest(long ns)
{
	struct timespec time = {.tv_nsec = ns};

	nanosleep(&time, NULL);
}

static int64_t now_ns(clockid_t clock)
{
	struct timespec now;

	clock_gettime(clock, &now);
	return now.tv_sec * 1000000000LL + now.tv_nsec;
}

static uint64_t sum_of(const uint64_t *words, size_t count)
{
	uint64_t sum = 14695981039346656037ULL;

	for (size_t i = 0; i < count; i++)
		sum = (sum ^ words[i]) * 1099511628211ULL;
	return sum;
}

static void check_file(int number)
{
	static uint64_t words[WORDS];
	char path[256];
	int fd;

	snprintf(path, sizeof path, "%s/f%d", files, number);
	fd = open(path, O_RDONLY);
	if (fd < 0)
		return;
	if (read(fd, words, sizeof words) != sizeof words)
		bad("file %d is short", number);
	else if (words[0] != sum_of(words + 1, WORDS - 1))
		bad("file %d has another sum", number);
	close(fd);
}

static void write_files(void)
{
	static uint64_t words[WORDS];
	char path[256], next[256];
	uint64_t state;

	getrandom(&state, sizeof state, 0);
	for (unsigned long count = 0;; count++) {
		int number = count % FILES, fd;

		for (int i = 1; i < WORDS; i++)
			words[i] = state = state * 6364136223846793005ULL + 1442695040888963407ULL;
		words[0] = sum_of(words + 1, WORDS - 1);
		snprintf(path, sizeof path, "%s/f%d", files, number);
		snprintf(next, sizeof next, "%s/new", files);
		fd = open(next, O_WRONLY | O_CREAT | O_TRUNC, 0600);
		if (fd < 0 || write(fd, words, sizeof words) != sizeof words)
			bad("cannot write: %s", strerror(errno));
		if (count % 8 == 0 && fsync(fd))
			bad("fsync: %s", strerror(errno));
		close(fd);
		rename(next, path);
		check_file((number + FILES / 2) % FILES);
		account("files", count, 0);
		rest(30000000);
	}
}

/* Numbers there and back: the echo of each must be the next. */
static void stream(const char *address, int port)
{
	static uint64_t out[512], in[512];
	struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons(port)};
	int fd = socket(AF_INET, SOCK_STREAM, 0);
	uint64_t sent = 0, back = 0;
	size_t part = 0;

	inet_pton(AF_INET, address, &to.sin_addr);
	if (connect(fd, (struct sockaddr *)&to, sizeof to)) {
		bad("connect: %s", strerror(errno));
		exit(1);
	}
	for (;;) {
		struct pollfd poll_ = {.fd = fd, .events = POLLIN};

		if (sent - back < 8 * 512) { /* a few blocks are on their way */
			for (int i = 0; i < 512; i++)
				out[i] = sent + i;
			for (size_t at = 0; at < sizeof out;) {
				ssize_t went = write(fd, (char *)out + at, sizeof out - at);
				if (went <= 0) {
					bad("stream: %s", strerror(errno));
					exit(1);
				}
				at += went;
			}
			sent += 512;
		}
		rest(5000000);
		while (poll(&poll_, 1, 0) > 0) {
			ssize_t got = read(fd, (char *)in + part, sizeof in - part);

			if (got <= 0) {
				bad("stream ends: %s", got ? strerror(errno) : "");
				exit(1);
			}
			part += got;
			for (size_t i = 0; i < part / 8; i++)
				if (in[i] != back++)
					bad("stream: %llu in place of %llu", (unsigned long long)in[i],
					    (unsigned long long)back - 1);
			memmove(in, (char *)in + part / 8 * 8, part % 8);
			part %= 8;
		}
		account("stream", back, 0);
	}
}

/* A timer of the kernel's must have ticked as often as its clock says that it should have, and no clock goes back. */
static void ticks(void)
{
	struct itimerspec every = {{0, TICK_NS}, {0, TICK_NS}};
	int fd = timerfd_create(CLOCK_MONOTONIC, 0);
	int64_t began = now_ns(CLOCK_MONOTONIC), last = began;
	unsigned long longest_ms = 0;
	uint64_t count = 0, more;

	timerfd_settime(fd, 0, &every, NULL);
	for (;;) {
		int64_t now, due;

		if (read(fd, &more, sizeof more) != sizeof more)
			bad("timerfd: %s", strerror(errno));
		count += more;
		now = now_ns(CLOCK_MONOTONIC);
		if (now < last)
			bad("the monotonic clock went back by %lld ns", (long long)(last - now));
		if ((unsigned long)((now - last) / 1000000) > longest_ms)
			longest_ms = (now - last) / 1000000;
		last = now;
		due = (now - began) / TICK_NS;
		if ((int64_t)count > due + 2 || due - (int64_t)count > 50) /* it may have been late with reading, for a second */
			bad("%llu ticks in place of %lld", (unsigned long long)count, (long long)due), count = due;
		if (count % 5 == 0)
			account("ticks", count, longest_ms);
	}
}

static void draw(void)
{
	char path[256];
	unsigned char number[16];
	int fd;

	snprintf(path, sizeof path, "%s/random", files);
	fd = open(path, O_WRONLY | O_CREAT | O_APPEND, 0600);
	for (unsigned long count = 0;; count++) {
		if (getrandom(number, sizeof number, 0) != sizeof number || write(fd, number, sizeof number) != sizeof number)
			bad("random: %s", strerror(errno));
		if (count % 10 == 0)
			account("random", count, 0);
		rest(10000000);
	}
}

int main(int argc, char **argv)
{
	if (argc == 2 && !strcmp(argv[1], "clock")) {
		printf("%.6f\n", now_ns(CLOCK_REALTIME) / 1e9);
		return 0;
	}
	if (argc != 5)
		return 2;
	files = argv[1];
	accounts = argv[2];
	if (!fork())
		write_files();
	if (!fork())
		stream(argv[3], atoi(argv[4]));
	if (!fork())
		ticks();
	draw();
}
