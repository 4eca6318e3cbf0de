/* nagaya-agent: init of every machine. Serves the protocol of docs/agent-protocol.md on one descriptor. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "proto.h"
#include "spawn.h"
#include "stub.h"
#include "vm.h"

#ifndef TIOCGPTPEER
#define TIOCGPTPEER _IO('T', 0x41)
#endif
#ifndef SYS_close_range
#define SYS_close_range 436
#endif

#define MAX_CHANNELS 256
#define DROP_TURNS 4	 /* reads per wake-up of output that nobody wants: a flood of it must not starve the rest */
#define TTY_REST (1u << 20) /* more than a terminal ever buffers */
#define PORT_TURNS 16	 /* reads of the host's port per wake-up */
#define EXIT_LOST 100 /* the supervisor is gone, or broke the protocol */

/* Which descriptor of a channel an epoll event is about. */
enum part { P_HOST, P_SIGNALS, P_IN, P_OUT, P_ERR, P_REPORT };

struct channel {
	uint32_t id;	/* 0: the slot is free, or lingers (the program has ended, descendants still write) */
	int used;
	pid_t pid;	/* 0 once reaped */
	int in, out, err, report; /* -1 when closed; with a terminal, in == out */
	int tty, discard, started, exited, closing;
	uint32_t status;
	uint32_t window;      /* bytes that we may still send */
	uint32_t rest[2];     /* output and error bytes that still go out before EXITED; counts once `exited` is set */
	unsigned char *queue; /* input that the program has not taken yet */
	size_t queued;
	uint32_t watched[3]; /* epoll events that in, out and err are registered for, 0 = not registered */
};

static struct channel channels[MAX_CHANNELS];
static int host = -1, epoll = -1, program_fd = -1, sync_at_end, held;
static pid_t program_pid;
static sigset_t watched_signals;
static int is_prepared;
static enum { NO_VM, BARE, SET_UP, UNUSABLE } vm; /* a virtual machine's agent, and how far it has come with SETUP */

static void __attribute__((noreturn)) end(int status)
{
	if (held && vm)
		vm_thaw(); /* who waits for the disk could not die, nor the disk be brought to rest */
	if (getpid() == 1) {
		kill(-1, SIGKILL);
		if (vm)
			vm_flush(); /* now, for what hangs on a share whose host is gone would hold us up for ever */
		if (sync_at_end) { /* a VM's disks: only after everything that writes is gone */
			while (waitpid(-1, NULL, 0) > 0 || errno == EINTR)
				;
			if (vm)
				vm_finish();
			sync();
		}
	} else { /* somebody else's PID namespace: only what we started, and it ends with its own PID 1 */
		for (int i = 0; i < MAX_CHANNELS; i++)
			if (channels[i].used && channels[i].pid > 0)
				kill(channels[i].pid, SIGKILL);
		if (program_pid > 0)
			kill(program_pid, SIGKILL);
	}
	_exit(status);
}

/* -- frames out. Blocking: the supervisor never blocks on us, so this cannot lock up. */

static void write_all(const unsigned char *bytes, size_t size)
{
	while (size) {
		ssize_t n = write(host, bytes, size);
		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0 && errno == EAGAIN) { /* we were given a non-blocking stream */
			struct pollfd room = {.fd = host, .events = POLLOUT};
			if (poll(&room, 1, -1) > 0 && room.revents & (POLLHUP | POLLERR))
				end(EXIT_LOST); /* a port whose host has gone never has room again */
			continue;
		}
		if (n <= 0)
			end(EXIT_LOST);
		bytes += n;
		size -= (size_t)n;
	}
}

static void put_header(unsigned char *at, unsigned type, uint32_t channel, size_t size)
{
	put32(at, (uint32_t)size);
	put16(at + 4, (uint16_t)type);
	put16(at + 6, 0);
	put32(at + 8, channel);
}

static void send_u32(unsigned type, uint32_t channel, uint32_t value)
{
	unsigned char frame[HEADER_SIZE + 4];

	put_header(frame, type, channel, 4);
	put32(frame + HEADER_SIZE, value);
	write_all(frame, sizeof frame);
}

static void send_failed(uint32_t channel, uint32_t status, uint32_t error, const char *text)
{
	unsigned char frame[HEADER_SIZE + 8 + sizeof ((struct spawn_error *)0)->text];
	size_t length = strnlen(text, sizeof frame - HEADER_SIZE - 8);

	put_header(frame, F_SPAWN_FAILED, channel, 8 + length);
	put32(frame + HEADER_SIZE, status);
	put32(frame + HEADER_SIZE + 4, error);
	memcpy(frame + HEADER_SIZE + 8, text, length);
	write_all(frame, HEADER_SIZE + 8 + length);
}

/* -- epoll, with (channel index, part) packed into the event's data */

static void watch(int fd, uint32_t *watched, uint32_t events, int index, enum part part)
{
	struct epoll_event e = {.events = events, .data.u64 = (uint64_t)index << 8 | part};

	if (fd < 0 || *watched == events)
		return;
	epoll_ctl(epoll, !events ? EPOLL_CTL_DEL : *watched ? EPOLL_CTL_MOD : EPOLL_CTL_ADD, fd, &e);
	*watched = events;
}

static int index_of(const struct channel *c)
{
	return (int)(c - channels);
}

/* A terminal is one descriptor for both directions: one registration with the union of what is wanted. */
static void update_watches(struct channel *c)
{
	int i = index_of(c);
	uint32_t output = c->window > 0 || !c->id || c->discard ? EPOLLIN : 0;
	uint32_t input = c->queued ? EPOLLOUT : 0;

	/* Nothing wanted: out of the set altogether, since EPOLLHUP cannot be masked and would spin. */
	watch(c->out, &c->watched[1], c->tty ? output | input : output, i, P_OUT);
	watch(c->err, &c->watched[2], output, i, P_ERR);
	if (!c->tty)
		watch(c->in, &c->watched[0], input, i, P_IN);
}

/* A registration lives as long as the open file, which a child may share until it executes: take it out by hand. */
static void close_fd(int *fd, uint32_t *watched)
{
	if (*fd < 0)
		return;
	watch(*fd, watched, 0, 0, P_OUT);
	close(*fd);
	*fd = -1;
}

static void close_input(struct channel *c)
{
	if (!c->tty)
		close_fd(&c->in, &c->watched[0]);
}

static void close_output(struct channel *c, int k)
{
	if (c->tty)
		c->in = -1;
	close_fd(k ? &c->err : &c->out, &c->watched[1 + k]);
}

static void close_report(struct channel *c)
{
	uint32_t watched = EPOLLIN;

	close_fd(&c->report, &watched);
}

static void release(struct channel *c)
{
	close_input(c);
	close_output(c, 0);
	close_output(c, 1);
	close_report(c);
	free(c->queue);
	memset(c, 0, sizeof *c);
	c->in = c->out = c->err = c->report = -1;
}

static struct channel *find_channel(uint32_t id)
{
	for (int i = 0; id && i < MAX_CHANNELS; i++)
		if (channels[i].used && channels[i].id == id)
			return &channels[i];
	return NULL;
}

static struct channel *new_channel(void)
{
	struct channel *lingering = NULL;

	for (int i = 0; i < MAX_CHANNELS; i++) {
		if (!channels[i].used) {
			release(&channels[i]);
			return &channels[i];
		}
		if (!channels[i].id && !lingering)
			lingering = &channels[i];
	}
	if (lingering)
		release(lingering); /* its descendants get SIGPIPE: better than refusing new programs */
	return lingering;
}

/* -- a program's output */

static unsigned char data_frame[HEADER_SIZE + MAX_DATA];

/* Read what there is, as far as the window goes. 1 when the program's own output is all sent, as far as is known. */
static int pump_one(struct channel *c, int k)
{
	int *fd = k ? &c->err : &c->out;

	for (int turn = 0; *fd >= 0; turn++) {
		int drop = !c->id || c->discard;
		size_t room = MAX_DATA;
		if (c->id && c->exited && !c->rest[k])
			return 1; /* what comes now is by descendants: they do not hold EXITED back */
		if (drop && turn == DROP_TURNS)
			return 0;
		if (!drop && c->window < room)
			room = c->window;
		if (!drop && c->exited && c->rest[k] < room)
			room = c->rest[k];
		if (!room)
			return 0;
		ssize_t n = read(*fd, data_frame + HEADER_SIZE, room);
		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0 && errno == EAGAIN)
			return 1;
		if (n <= 0) { /* end of file, or EIO: a terminal whose other side is closed */
			close_output(c, k);
			return 1;
		}
		if (drop)
			continue;
		put_header(data_frame, k ? F_STDERR : F_STDOUT, c->id, (size_t)n);
		write_all(data_frame, HEADER_SIZE + (size_t)n);
		c->window -= (uint32_t)n;
		if (c->exited)
			c->rest[k] -= (uint32_t)n;
	}
	return 1;
}

/* What was readable when the program ended still goes out; a descendant that writes on and on must not move that goal. */
static void fix_rest(struct channel *c)
{
	for (int k = 0; k < 2; k++) {
		int readable = 0, fd = k ? c->err : c->out;
		if (c->discard)
			readable = 0;
		else if (c->tty)
			readable = TTY_REST; /* FIONREAD misses what the line discipline has not taken yet; a read does not */
		else if (fd >= 0)
			ioctl(fd, FIONREAD, &readable);
		c->rest[k] = (uint32_t)readable;
	}
}

static void pump_output(struct channel *c)
{
	int done = pump_one(c, 0);

	done &= pump_one(c, 1);
	if (c->id && c->exited && c->started && done) {
		send_u32(F_EXITED, c->id, c->status);
		c->id = 0; /* lingers until its descendants have closed, so that they do not die of SIGPIPE */
		close_input(c);
		free(c->queue);
		c->queue = NULL;
		c->queued = 0;
	}
	if (!c->id && c->out < 0 && c->err < 0)
		release(c);
	else
		update_watches(c);
}

/* -- a program's input */

static void pump_input(struct channel *c)
{
	uint32_t taken = 0;

	while (c->queued && c->in >= 0) {
		ssize_t n = write(c->in, c->queue, c->queued);
		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0 && errno == EAGAIN)
			break;
		if (n < 0) { /* EPIPE: the program reads no more; swallow, as a shell's pipe would */
			n = (ssize_t)c->queued;
			close_input(c);
		}
		memmove(c->queue, c->queue + n, c->queued - (size_t)n);
		c->queued -= (size_t)n;
		taken += (uint32_t)n;
	}
	if (c->queued && c->in < 0) {
		taken += (uint32_t)c->queued;
		c->queued = 0;
	}
	if (taken && c->id)
		send_u32(F_CREDIT, c->id, taken);
	if (!c->queued && c->closing)
		close_input(c);
	update_watches(c);
}

/* Nobody has the terminal open any more: input that waits for room would wait for ever, and spin on EPOLLHUP. */
static void drop_input(struct channel *c)
{
	if (c->queued && c->id)
		send_u32(F_CREDIT, c->id, (uint32_t)c->queued);
	c->queued = 0;
}

static void take_input(struct channel *c, const unsigned char *bytes, size_t size)
{
	if (size > WINDOW - c->queued)
		end(EXIT_LOST); /* more than the window: the peer is not what it should be */
	if (!c->queue && !(c->queue = malloc(WINDOW)))
		end(EXIT_LOST);
	memcpy(c->queue + c->queued, bytes, size);
	c->queued += size;
	pump_input(c);
}

/* -- starting programs */

static int open_terminal(const struct spawn *s, int *slave)
{
	struct winsize size = {s->rows, s->columns, 0, 0};
	int unlock = 0, master = open("/dev/ptmx", O_RDWR | O_NOCTTY | O_CLOEXEC);

	if (master < 0)
		return -1;
	if (ioctl(master, TIOCSPTLCK, &unlock) ||
	    (*slave = ioctl(master, TIOCGPTPEER, O_RDWR | O_NOCTTY | O_CLOEXEC)) < 0) {
		close(master);
		return -1;
	}
	if (s->rows && s->columns)
		ioctl(master, TIOCSWINSZ, &size);
	return master;
}

static int make_pipe(int ends[2])
{
	return pipe2(ends, O_CLOEXEC);
}

/* Open the channel's descriptors; child[] are the program's ends. 0 or -1. */
static int open_streams(struct channel *c, const struct spawn *s, int child[3])
{
	int pair[2];

	child[0] = child[1] = child[2] = -1;
	if (s->flags & SF_TTY) {
		c->out = open_terminal(s, &child[0]);
		if (c->out < 0)
			return -1;
		c->in = c->out;
		child[1] = child[2] = child[0];
		return 0;
	}
	if (s->flags & SF_STDIN) {
		if (make_pipe(pair))
			return -1;
		child[0] = pair[0];
		c->in = pair[1];
	} else if ((child[0] = open("/dev/null", O_RDONLY | O_CLOEXEC)) < 0)
		return -1;
	for (int i = 1; i < 3; i++) {
		if (s->flags & SF_DISCARD) {
			if ((child[i] = open("/dev/null", O_WRONLY | O_CLOEXEC)) < 0)
				return -1;
			continue;
		}
		if (make_pipe(pair))
			return -1;
		*(i == 1 ? &c->out : &c->err) = pair[0];
		child[i] = pair[1];
	}
	return 0;
}

static void close_child_ends(int child[3])
{
	for (int i = 0; i < 3; i++)
		if (child[i] >= 0 && (i == 0 || child[i] != child[0]))
			close(child[i]);
}

/* Of a pipe or a terminal that is new: no other flag is set that a call could. */
static void unblock(int fd)
{
	if (fd >= 0)
		fcntl(fd, F_SETFL, O_NONBLOCK);
}

static void spawn_failed(struct channel *c, uint32_t status, uint32_t error, const char *text)
{
	send_failed(c->id, status, error, text);
	release(c);
}

static void spawn(uint32_t id, const unsigned char *payload, size_t size)
{
	struct spawn s;
	int child[3], report[2];
	struct channel *c;

	if (!id || find_channel(id) || spawn_parse(&s, payload, size))
		end(EXIT_LOST);
	if ((s.flags & (SF_DATA_DISK | SF_APPLET)) == SF_DATA_DISK)
		end(EXIT_LOST); /* it is for the agent's own functions: a program would find nothing there */
	c = new_channel();
	if (!c) {
		send_failed(id, 125, EMFILE, "too many programs run in this machine");
		spawn_free(&s);
		return;
	}
	c->used = 1;
	c->id = id;
	c->window = WINDOW;
	c->tty = !!(s.flags & SF_TTY);
	c->discard = !!(s.flags & SF_DISCARD);
	if (open_streams(c, &s, child) || make_pipe(report)) {
		int error = errno;
		char text[128];
		close_child_ends(child);
		snprintf(text, sizeof text, "cannot open a %s for the program: %s", c->tty ? "terminal" : "pipe", strerror(error));
		spawn_failed(c, 125, (uint32_t)error, text);
		spawn_free(&s);
		return;
	}
	if ((s.flags & SF_MAIN) && program_fd >= 0) {
		c->pid = program_pid;
		if (stub_send(program_fd, payload, size, child, report[1]))
			c->pid = -1;
		close(program_fd);
		program_fd = -1;
	} else {
		c->pid = s.flags & SF_APPLET ? fork() : vm_fork();
		if (c->pid == 0 && s.flags & SF_DATA_DISK && vm_enter_data_disk())
			spawn_refuse(errno, report[1]);
		if (c->pid == 0)
			spawn_become(&s, child, report[1]);
	}
	int error = errno;
	spawn_free(&s);
	close_child_ends(child);
	close(report[1]);
	if (c->pid < 0) {
		close(report[0]);
		char text[128];
		snprintf(text, sizeof text, "cannot start a process in the machine: %s", strerror(error));
		spawn_failed(c, 125, (uint32_t)error, text);
		return;
	}
	c->report = report[0];
	unblock(c->in);
	unblock(c->out);
	unblock(c->err);
	unblock(c->report);
	watch(c->report, &(uint32_t){0}, EPOLLIN, index_of(c), P_REPORT);
	update_watches(c);
}

/* The report pipe: end of file says that execve succeeded, a record says why it did not. */
static void read_report(struct channel *c)
{
	struct spawn_error e;
	ssize_t n;

	do
		n = read(c->report, &e, sizeof e);
	while (n < 0 && errno == EINTR);
	if (n < 0)
		return;
	close_report(c);
	if (n == 0) {
		c->started = 1;
		send_u32(F_STARTED, c->id, (uint32_t)c->pid);
		if (c->exited)
			pump_output(c); /* EXITED has waited for this */
		return;
	}
	e.text[sizeof e.text - 1] = 0;
	spawn_failed(c, e.status, e.error, e.text);
}

static void reap(void)
{
	int status;
	pid_t pid;

	while ((pid = waitpid(-1, &status, WNOHANG)) > 0) {
		if (pid == program_pid)
			program_pid = 0;
		for (int i = 0; i < MAX_CHANNELS; i++) {
			struct channel *c = &channels[i];
			if (!c->used || c->pid != pid)
				continue;
			c->pid = 0;
			c->exited = 1;
			c->status = WIFSIGNALED(status) ? 128u + (unsigned)WTERMSIG(status) : (unsigned)WEXITSTATUS(status);
			fix_rest(c);
			if (vm == SET_UP && c->status && vm_ran_out_of_memory()) {
				unsigned char frame[HEADER_SIZE];
				put_header(frame, F_OUT_OF_MEMORY, 0, 0);
				write_all(frame, sizeof frame); /* before EXITED, which it explains */
			}
			if (c->report >= 0)
				read_report(c); /* before EXITED comes STARTED */
			else
				pump_output(c);
			break;
		}
	}
	if (program_pid == 0 && program_fd >= 0)
		end(EXIT_LOST); /* the stub was killed before it became the program */
}

/* -- frames in */

static void answer_setup(int failed, unsigned type)
{
	unsigned char frame[HEADER_SIZE + 4 + sizeof vm_report.warnings];
	const char *text = vm_report.warnings;

	if (failed == -2)
		end(EXIT_LOST);
	program_pid = vm_stub;
	program_fd = vm_stub_fd;
	put32(frame + HEADER_SIZE, failed ? vm_report.error : vm_report.warning_count);
	if (failed)
		text = vm_report.text;
	put_header(frame, failed ? F_SETUP_FAILED : type, 0, 4 + strlen(text));
	memcpy(frame + HEADER_SIZE + 4, text, strlen(text));
	write_all(frame, HEADER_SIZE + 4 + strlen(text));
}

/* -- a pause in which nothing is under way between the host and us: what the host saves then can go on from there */

static void hold(size_t size)
{
	if (held || size)
		end(EXIT_LOST);
	held = 1;
	send_u32(F_HELD, 0, vm == SET_UP ? (uint32_t)vm_freeze() : 0);
}

static void go_on(const unsigned char *payload, size_t size)
{
	unsigned char frame[HEADER_SIZE + 4 + sizeof vm_report.warnings];

	memset(&vm_report, 0, sizeof vm_report);
	if (vm == SET_UP && vm_continue(payload, size))
		end(EXIT_LOST); /* malformed */
	held = 0;
	size_t length = strlen(vm_report.warnings);
	put_header(frame, F_CONTINUED, 0, 4 + length);
	put32(frame + HEADER_SIZE, vm_report.warning_count);
	memcpy(frame + HEADER_SIZE + 4, vm_report.warnings, length);
	write_all(frame, HEADER_SIZE + 4 + length);
}

static void set_up(const unsigned char *payload, size_t size)
{
	int failed = vm_setup(payload, size);

	vm = failed ? UNUSABLE : SET_UP;
	answer_setup(failed, F_READY);
}

/* After the answer, this machine is saved: whoever goes on from there sends SETUP, and what comes next is theirs. */
static void prepare(const unsigned char *payload, size_t size)
{
	int failed = vm_prepare(payload, size);

	is_prepared = 1;
	if (failed)
		vm = UNUSABLE;
	answer_setup(failed, F_PREPARED);
}

/* A virtual machine's own frames. Whether that was one, or one that is to be ignored. */
static int handle_vm(unsigned type, uint32_t id, const unsigned char *payload, size_t size)
{
	if (type == F_PREPARE && vm == BARE && !is_prepared && !id) {
		prepare(payload, size);
		return 1;
	}
	if ((type == F_SETUP) != (vm == BARE) && type != F_SHUTDOWN && vm != UNUSABLE)
		end(EXIT_LOST); /* SETUP comes first, and once */
	if (type == F_SETUP && vm == BARE && !id) {
		set_up(payload, size);
		return 1;
	}
	if (type == F_CLOCK && size == 8 && !id) {
		vm_set_clock(get64(payload));
		return 1;
	}
	return vm == UNUSABLE && type != F_SHUTDOWN; /* what the host has sent before it could know */
}

static void handle(unsigned type, uint32_t id, const unsigned char *payload, size_t size)
{
	struct channel *c = find_channel(id);

	if (held && type != F_CONTINUE && type != F_SHUTDOWN)
		end(EXIT_LOST);
	if (vm && handle_vm(type, id, payload, size))
		return;
	switch (type) {
	case F_HOLD:
		hold(size);
		return;
	case F_CONTINUE:
		if (!held)
			end(EXIT_LOST);
		go_on(payload, size);
		return;
	case F_SPAWN:
		spawn(id, payload, size);
		return;
	case F_SHUTDOWN:
		end(0);
	case F_STDIN:
		if (c)
			take_input(c, payload, size);
		return;
	case F_STDIN_CLOSE:
		if (c) {
			c->closing = 1;
			pump_input(c);
		}
		return;
	case F_CREDIT:
		if (size != 4)
			end(EXIT_LOST);
		if (c) {
			uint32_t credit = get32(payload);
			if (credit > WINDOW - c->window)
				end(EXIT_LOST);
			c->window += credit;
			pump_output(c);
		}
		return;
	case F_SIGNAL:
		if (size != 4)
			end(EXIT_LOST);
		if (c && c->pid > 0 && get32(payload) < NSIG)
			kill(c->pid, (int)get32(payload));
		return;
	case F_RESIZE:
		if (size != 4)
			end(EXIT_LOST);
		if (c && c->tty && c->out >= 0) {
			struct winsize w = {get16(payload), get16(payload + 2), 0, 0};
			ioctl(c->out, TIOCSWINSZ, &w);
		}
		return;
	}
	end(EXIT_LOST);
}

static unsigned char *in_buffer;
static size_t in_size, in_room;

/* One read. 0 when there is nothing more to be had just now. */
static int fill(void)
{
	if (in_room - in_size < MAX_DATA + HEADER_SIZE) {
		in_room = in_size + 2 * (MAX_DATA + HEADER_SIZE);
		in_buffer = realloc(in_buffer, in_room);
		if (!in_buffer)
			end(EXIT_LOST);
	}
	ssize_t n = read(host, in_buffer + in_size, in_room - in_size);
	if (n < 0 && (errno == EINTR || errno == EAGAIN))
		return 0;
	if (n <= 0)
		end(EXIT_LOST);
	in_size += (size_t)n;
	return 1;
}

static void read_host(void)
{
	size_t at = 0;

	/* A port gives a page at a time: take several, for each round through epoll costs more than the page. */
	for (int turn = 0; fill() && vm && turn < PORT_TURNS; turn++)
		;
	while (in_size - at >= HEADER_SIZE) {
		const unsigned char *h = in_buffer + at;
		uint32_t size = get32(h), type = get16(h + 4);
		if (size > (type == F_SPAWN || (vm && (type == F_SETUP || type == F_CONTINUE || type == F_PREPARE)) ? MAX_PAYLOAD : MAX_DATA) ||
		    get16(h + 6))
			end(EXIT_LOST);
		if (in_size - at < HEADER_SIZE + size)
			break;
		handle(type, get32(h + 8), h + HEADER_SIZE, size);
		at += HEADER_SIZE + size;
	}
	memmove(in_buffer, in_buffer + at, in_size - at);
	in_size -= at;
}

static void read_signals(int fd)
{
	struct signalfd_siginfo info[8];

	if (read(fd, info, sizeof info) < 0) /* more than these come again: it is level-triggered */
		return;
	reap();
}

static void dispatch(const struct epoll_event *e, int signals)
{
	struct channel *c = &channels[e->data.u64 >> 8];

	switch ((enum part)(e->data.u64 & 0xff)) {
	case P_HOST:
		read_host();
		return;
	case P_SIGNALS:
		read_signals(signals);
		return;
	case P_REPORT:
		if (c->used && c->report >= 0)
			read_report(c);
		return;
	case P_IN:
		if (c->used)
			pump_input(c);
		return;
	case P_OUT:
		if (c->used && c->tty && (e->events & EPOLLOUT))
			pump_input(c);
		if (c->used && c->tty && (e->events & EPOLLHUP))
			drop_input(c);
		/* fall through */
	case P_ERR:
		if (c->used)
			pump_output(c);
		return;
	}
}

static void __attribute__((noreturn)) serve(void)
{
	unsigned char hello[HEADER_SIZE + 8];
	struct epoll_event events[16];
	int signals;

	sigemptyset(&watched_signals);
	sigaddset(&watched_signals, SIGCHLD);
	sigprocmask(SIG_BLOCK, &watched_signals, NULL);
	signal(SIGPIPE, SIG_IGN);
	signals = signalfd(-1, &watched_signals, SFD_CLOEXEC | SFD_NONBLOCK);
	epoll = epoll_create1(EPOLL_CLOEXEC);
	if (signals < 0 || epoll < 0)
		end(EXIT_LOST);
	for (int i = 0; i < MAX_CHANNELS; i++)
		channels[i].in = channels[i].out = channels[i].err = channels[i].report = -1;
	watch(host, &(uint32_t){0}, EPOLLIN, 0, P_HOST);
	watch(signals, &(uint32_t){0}, EPOLLIN, 0, P_SIGNALS);
	put_header(hello, F_HELLO, 0, 8);
	put32(hello + HEADER_SIZE, PROTOCOL_VERSION);
	put32(hello + HEADER_SIZE + 4, vm ? HELLO_NEEDS_SETUP : 0);
	write_all(hello, sizeof hello);
	reap(); /* a stub that died before SIGCHLD was blocked */
	for (;;) {
		int n = epoll_wait(epoll, events, 16, -1);
		for (int i = 0; i < n && !held; i++)
			dispatch(&events[i], signals); /* what is left of them comes again: all are level-triggered */
		while (held) {
			struct pollfd p = {.fd = host, .events = POLLIN};
			poll(&p, 1, -1);
			read_host();
		}
	}
}

static int number(const char *arg, const char *name, int *out)
{
	size_t length = strlen(name);
	char *rest;

	if (strncmp(arg, name, length))
		return 0;
	long value = strtol(arg + length, &rest, 10);
	if (*rest || rest == arg + length || value < 0 || value > INT_MAX)
		return 0;
	*out = (int)value;
	return 1;
}

static void keep_only(int first, int second)
{
	int low = first < second || second < 0 ? first : second, high = first < second ? second : first;

	if (second < 0)
		high = first;
	syscall(SYS_close_range, (unsigned)high + 1, ~0u, 0u);
	if (high > low + 1)
		syscall(SYS_close_range, (unsigned)low + 1, (unsigned)high - 1, 0u);
	if (low > 3)
		syscall(SYS_close_range, 3u, (unsigned)low - 1, 0u);
}

int main(int argc, char **argv)
{
	int serving = 0, stub = 0, pid = 0, null;

	if (argc >= 3 && !strcmp(argv[1], "--applet"))
		return applet_main(argc - 2, argv + 2);
	if (getpid() == 1 && argc > 0 && !strcmp(argv[0], "/init")) { /* the kernel's arguments follow, for who may want them */
		vm = BARE;
		spawn_is_first = 1;
		serving = sync_at_end = 1;
	}
	for (int i = 1; i < argc && !vm; i++) {
		if (!strcmp(argv[i], "--serve"))
			serving = 1;
		else if (!strcmp(argv[i], "--stub"))
			stub = 1;
		else if (!strcmp(argv[i], "--sync"))
			sync_at_end = 1;
		else if (!number(argv[i], "--fd=", &host) && !number(argv[i], "--program-fd=", &program_fd) &&
			 !number(argv[i], "--program-pid=", &pid)) {
			fprintf(stderr, "nagaya-agent: unknown argument '%s'\n", argv[i]);
			return 2;
		}
	}
	if (vm)
		host = vm_start();
	if (serving == stub || host < 0 || (program_fd >= 0) != (pid > 0)) {
		fprintf(stderr, "usage: nagaya-agent --serve --fd=N [--sync] [--program-fd=M --program-pid=P]\n"
				"       nagaya-agent --stub --fd=N\n"
				"       nagaya-agent --applet stat|ps|tar-out|tar-in|renew|bench ARG...\n");
		return 2;
	}
	while ((null = open("/dev/null", O_RDWR)) >= 0 && null < 3)
		; /* without the standard descriptors, a program's pipes would land on 0 to 2 */
	prctl(PR_SET_NAME, "nagaya-agent", 0, 0, 0);
	prctl(PR_SET_DUMPABLE, 0, 0, 0, 0); /* nobody inside looks into us, or at the file we run from */
	keep_only(host, program_fd);
	fcntl(host, F_SETFD, FD_CLOEXEC);
	if (stub)
		stub_become(host);
	program_pid = pid;
	if (program_fd >= 0)
		fcntl(program_fd, F_SETFD, FD_CLOEXEC);
	serve();
}
