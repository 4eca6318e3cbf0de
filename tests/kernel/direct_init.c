/* The system of a whole machine without firmware, of one program: its console is the first serial port, by its registers, for
 * the kernel that it is tested with has no driver for that. Letters typed there: w writes to the disk, r reads it back,
 * b restarts. The power button switches the machine off. */
#include <fcntl.h>
#include <linux/input.h>
#include <stdio.h>
#include <string.h>
#include <sys/io.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <unistd.h>

#define COM1 0x3f8
#define DISK "/dev/vda"
#define PLACE (20L << 20)

static const char MARK[8] = "nagaya!";

static void say(const char *text)
{
	for (; *text; text++) {
		while (!(inb(COM1 + 5) & 0x20))
			;
		outb(*text, COM1);
	}
}

static const char *look(void)
{
	char found[sizeof MARK] = "";
	int fd = open(DISK, O_RDONLY);

	if (fd < 0 || pread(fd, found, sizeof found, PLACE) != sizeof found)
		return "unreadable\n";
	close(fd);
	return memcmp(found, MARK, sizeof found) ? "absent\n" : "found\n";
}

static const char *store(void)
{
	int fd = open(DISK, O_WRONLY);

	if (fd < 0 || pwrite(fd, MARK, sizeof MARK, PLACE) != sizeof MARK || fsync(fd) || close(fd))
		return "unwritable\n";
	return "stored\n";
}

int main(void)
{
	static char line[4096] = "with ";
	struct input_event event;
	int file, button;

	if (iopl(3))
		return 1;
	mount("dev", "/dev", "devtmpfs", 0, 0);
	mount("proc", "/proc", "proc", 0, 0);
	file = open("/proc/cmdline", O_RDONLY);
	if (read(file, line + 5, sizeof line - 6) < 0)
		say("no command line\n");
	say(line);
	button = open("/dev/input/event0", O_RDONLY | O_NONBLOCK);
	say(button < 0 ? "no button\n" : "READY\n");
	for (;;) {
		if (inb(COM1 + 5) & 1)
			switch (inb(COM1)) {
			case 'w':
				say(store());
				break;
			case 'r':
				say(look());
				break;
			case 'b':
				reboot(RB_AUTOBOOT);
			}
		while (read(button, &event, sizeof event) == sizeof event)
			if (event.type == EV_KEY && event.code == KEY_POWER && event.value) {
				say("BYE\n");
				reboot(RB_POWER_OFF);
			}
		usleep(20000);
	}
}
