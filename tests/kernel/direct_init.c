/* The system of a whole machine without firmware, of one program. What it says goes out with the kernel's messages. Where its
 * mark is not on the disk it writes it there, and restarts; then it counts its starts in a file of its root file system, and
 * waits for the power button, which switches the machine off. */
#include <fcntl.h>
#include <linux/input.h>
#include <stdio.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <unistd.h>

#define DISK "/dev/vda"
#define ROOT "/dev/vda1"
#define PLACE (48L << 20)

static const char MARK[8] = "nagaya!";
static int messages;

static void say(const char *text)
{
	char line[600]; /* dprintf() would seek, which /dev/kmsg cannot */
	int size = snprintf(line, sizeof line, "<1>%s", text); /* an alert: those are all that is not quiet */

	if (write(messages, line, size) != size)
		_exit(1);
}

static int is_marked(void)
{
	char found[sizeof MARK] = "";
	int fd = open(DISK, O_RDONLY);

	if (fd < 0 || pread(fd, found, sizeof found, PLACE) != sizeof found)
		say("unreadable");
	close(fd);
	return !memcmp(found, MARK, sizeof found);
}

static void mark(void)
{
	int fd = open(DISK, O_WRONLY);

	if (fd < 0 || pwrite(fd, MARK, sizeof MARK, PLACE) != sizeof MARK || fsync(fd) || close(fd))
		say("unwritable");
}

static void count(void)
{
	char line[32] = "";
	int fd, number = 0, size;

	mount(ROOT, "/data", "ext4", 0, 0);
	fd = open("/data/count", O_RDONLY);
	if (fd >= 0 && read(fd, line, sizeof line - 1) > 0)
		sscanf(line, "kept %d", &number);
	size = snprintf(line, sizeof line, "kept %d times", number + 1);
	fd = open("/data/new", O_WRONLY | O_CREAT | O_TRUNC, 0600);
	if (fd < 0 || write(fd, line, size) != size || fsync(fd) || close(fd) || rename("/data/new", "/data/count"))
		say("unwritable");
	fd = open("/data", O_RDONLY);
	fsync(fd);
	close(fd);
	say(line);
}

int main(void)
{
	static char line[512];
	struct input_event event;
	int button;

	mount("dev", "/dev", "devtmpfs", 0, 0);
	mount("proc", "/proc", "proc", 0, 0);
	messages = open("/dev/kmsg", O_WRONLY);
	if (read(open("/proc/cmdline", O_RDONLY), line, sizeof line - 1) > 0)
		say(line);
	if (!is_marked()) {
		mark();
		say("restarting");
		reboot(RB_AUTOBOOT);
	}
	count();
	button = open("/dev/input/event0", O_RDONLY);
	say(button < 0 ? "no button" : "READY");
	usleep(200000);
	say("waiting"); /* what came just before may not be on the wire until something else is said */
	while (read(button, &event, sizeof event) == sizeof event)
		if (event.type == EV_KEY && event.code == KEY_POWER && event.value) {
			umount("/data");
			say("BYE");
			reboot(RB_POWER_OFF);
		}
	return 1;
}
