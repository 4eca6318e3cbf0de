/* VM mode: the loopback and the machine's links, by netdevice(7)'s requests, and ipv6(7)'s. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <net/if.h>
#include <net/if_arp.h>
#include <net/route.h>
#include <netinet/in.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

#include "vm.h"

#define MAX_INDEX 64
#define LINK_PATIENCE_MS 3000
#define LINK_IPV6 "sys/net/ipv6/conf/%s/"

static int is_prepared, ipv6_switch = -1;

struct link {
	int sock;
	const unsigned char *mac;
	int number; /* among the machine's links */
	int has_placeholder; /* its address is not the machine's own yet */
	struct ifreq request; /* its name, once it is found */
};

static int is_placeholder(const char *mac, int number)
{
	return !memcmp(mac, PLACEHOLDER_MAC, 5) && mac[5] == PLACEHOLDER_MAC[5] + number;
}

static int find_link(void *what)
{
	struct link *link = what;

	for (int index = 1; index <= MAX_INDEX; index++) {
		struct ifreq request = {.ifr_ifindex = index};
		if (ioctl(link->sock, SIOCGIFNAME, &request))
			continue;
		memcpy(link->request.ifr_name, request.ifr_name, IFNAMSIZ);
		if (ioctl(link->sock, SIOCGIFHWADDR, &request) || request.ifr_hwaddr.sa_family != ARPHRD_ETHER)
			continue;
		if (is_placeholder(request.ifr_hwaddr.sa_data, link->number))
			link->has_placeholder = 1;
		else if (memcmp(request.ifr_hwaddr.sa_data, link->mac, 6))
			continue;
		return 1;
	}
	return 0;
}

static int bring_up(int sock, struct ifreq *request)
{
	if (ioctl(sock, SIOCGIFFLAGS, request))
		return -1;
	request->ifr_flags |= IFF_UP;
	return ioctl(sock, SIOCSIFFLAGS, request);
}

int vm_bring_up_loopback(void)
{
	int sock = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0), failed;
	struct ifreq request = {.ifr_name = "lo"};

	failed = sock < 0 || bring_up(sock, &request) ? errno : 0;
	if (sock >= 0)
		close(sock);
	return failed ? vm_fail(failed, "cannot bring the loopback interface up") : 0;
}

static void set_address(struct sockaddr *address, uint32_t ipv4)
{
	struct sockaddr_in in = {.sin_family = AF_INET, .sin_addr.s_addr = ipv4};

	memcpy(address, &in, sizeof in);
}

static int add_default_route(int sock, uint32_t gateway)
{
	struct rtentry route = {.rt_flags = RTF_UP | RTF_GATEWAY};

	set_address(&route.rt_dst, INADDR_ANY);
	set_address(&route.rt_genmask, INADDR_ANY);
	set_address(&route.rt_gateway, gateway);
	return ioctl(sock, SIOCADDRT, &route);
}

/* struct in6_ifreq and in6_rtmsg of linux/ipv6.h and ipv6_route.h, which do not go together with netinet/in.h. */
struct address6 {
	struct in6_addr address;
	uint32_t prefix;
	int index;
};

struct route6 {
	struct in6_addr destination, source, gateway;
	uint32_t type;
	uint16_t destination_prefix, source_prefix;
	uint32_t metric;
	unsigned long info;
	uint32_t flags;
	int index;
};

#define METRIC_OF_USERS 1024 /* IP6_RT_PRIO_USER */

static int is_zero(const unsigned char *bytes, size_t size)
{
	while (size--)
		if (bytes[size])
			return 0;
	return 1;
}

static int set_name(struct link *link, const char *name)
{
	struct ifreq *r = &link->request, other = {0};

	if (!strcmp(r->ifr_name, name))
		return 0;
	/* Another of our links may have the name so far: the kernel counted them in an order of its own. */
	snprintf(other.ifr_name, IFNAMSIZ, "%s", name);
	if (!ioctl(link->sock, SIOCGIFINDEX, &other)) {
		snprintf(other.ifr_newname, IFNAMSIZ, "link%d", other.ifr_ifindex);
		memset(other.ifr_name, 0, IFNAMSIZ);
		snprintf(other.ifr_name, IFNAMSIZ, "%s", name);
		if (ioctl(link->sock, SIOCSIFNAME, &other))
			return vm_fail(errno, "cannot rename the link %s", name);
	}
	snprintf(r->ifr_newname, IFNAMSIZ, "%s", name);
	if (ioctl(link->sock, SIOCSIFNAME, r))
		return vm_fail(errno, "cannot rename the link %s to %s", r->ifr_name, name);
	memset(r->ifr_name, 0, IFNAMSIZ);
	snprintf(r->ifr_name, IFNAMSIZ, "%s", name);
	return 0;
}

static int configure4(struct link *link, const unsigned char *field)
{
	struct ifreq *r = &link->request;
	unsigned prefix = field[UN_PREFIX];
	uint32_t address, gateway; /* in network order, as they stand there */

	memcpy(&address, field + UN_ADDRESS, 4);
	memcpy(&gateway, field + UN_GATEWAY, 4);
	if (address) {
		set_address(&r->ifr_addr, address);
		if (ioctl(link->sock, SIOCSIFADDR, r))
			return vm_fail(errno, "cannot set the link's address");
		set_address(&r->ifr_netmask, htonl(prefix ? ~0u << (32 - prefix) : 0));
		if (ioctl(link->sock, SIOCSIFNETMASK, r))
			return vm_fail(errno, "cannot set the link's netmask");
	}
	if (!is_prepared && bring_up(link->sock, r))
		return vm_fail(errno, "cannot bring the link up");
	if (gateway && add_default_route(link->sock, gateway))
		return vm_fail(errno, "cannot add the default route");
	return 0;
}

/* A kernel without IPv6 is no failure: the machine has the other family. */
static int configure6(struct link *link, const unsigned char *field)
{
	struct address6 address = {.prefix = field[UN_PREFIX6]};
	struct route6 route = {.metric = METRIC_OF_USERS, .flags = RTF_UP | RTF_GATEWAY};
	struct ifreq index = {0};
	char path[80];
	int sock, failed = 0;

	if (is_zero(field + UN_ADDRESS6, 16))
		return 0;
	sock = socket(AF_INET6, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	if (sock < 0) {
		vm_warn("the machine's kernel has no IPv6");
		return 0;
	}
	memcpy(&address.address, field + UN_ADDRESS6, 16);
	memcpy(&route.gateway, field + UN_GATEWAY6, 16);
	memcpy(index.ifr_name, link->request.ifr_name, IFNAMSIZ);
	/* The host has chosen the address, so nobody else has it: asking around would take a second or two. */
	snprintf(path, sizeof path, "/proc/sys/net/ipv6/conf/%s/accept_dad", link->request.ifr_name);
	vm_write_file(AT_FDCWD, path, "0");
	if (ioctl(sock, SIOCGIFINDEX, &index))
		failed = vm_fail(errno, "cannot look at the link");
	address.index = route.index = index.ifr_ifindex;
	if (!failed && ioctl(sock, SIOCSIFADDR, &address) && errno != EEXIST)
		failed = vm_fail(errno, "cannot set the link's IPv6 address");
	if (!failed && !is_zero(field + UN_GATEWAY6, 16) && ioctl(sock, SIOCADDRT, &route) && errno != EEXIST)
		failed = vm_fail(errno, "cannot add the IPv6 default route");
	close(sock);
	return failed;
}

static int name_link(struct link *link, const unsigned char *field)
{
	struct ifreq *r = &link->request;
	int mtu = (int)get32(field + UN_MTU);

	if (set_name(link, (const char *)field + UN_NAME))
		return -1;
	r->ifr_mtu = mtu;
	if (mtu && ioctl(link->sock, SIOCSIFMTU, r))
		return vm_fail(errno, "cannot set the link's MTU to %d", mtu);
	return 0;
}

static int set_mac(struct link *link)
{
	struct ifreq *r = &link->request;

	r->ifr_hwaddr.sa_family = ARPHRD_ETHER;
	memcpy(r->ifr_hwaddr.sa_data, link->mac, 6);
	return ioctl(link->sock, SIOCSIFHWADDR, r) ? vm_fail(errno, "cannot set the link's hardware address") : 0;
}

static int become_own(struct link *link)
{
	if (link->has_placeholder && set_mac(link))
		return -1;
	if (ipv6_switch >= 0 && pwrite(ipv6_switch, "0", 1, 0) != 1)
		return vm_fail(errno, "cannot turn the link's IPv6 on");
	return 0;
}

static int configure_prepared(struct link *link, const unsigned char *field)
{
	int failed = become_own(link) || configure4(link, field) || configure6(link, field);

	is_prepared = 0; /* whoever renews the link takes it down first */
	return failed ? -1 : 0;
}

static int configure(struct link *link, const unsigned char *field)
{
	if (is_prepared) /* its name and its MTU are right, and it is up */
		return configure_prepared(link, field);
	if (link->has_placeholder && set_mac(link))
		return -1;
	return name_link(link, field) || configure4(link, field) || configure6(link, field) ? -1 : 0;
}

/* Up, but silent: IPv6 would take an address of its own, made of the placeholder. */
int vm_prepare_link(const unsigned char *field)
{
	struct link link = {.sock = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0), .mac = (const unsigned char *)PLACEHOLDER_MAC};
	char path[80];
	int failed;

	if (link.sock < 0 || !vm_await(find_link, &link, LINK_PATIENCE_MS))
		return vm_fail(ENODEV, "the machine has no network link");
	failed = name_link(&link, field);
	snprintf(path, sizeof path, LINK_IPV6 "accept_dad", link.request.ifr_name); /* see configure6() */
	vm_write_file(vm_proc, path, "0");
	snprintf(path, sizeof path, LINK_IPV6 "disable_ipv6", link.request.ifr_name);
	ipv6_switch = failed ? -1 : openat(vm_proc, path, O_WRONLY | O_CLOEXEC); /* it will be read-only */
	if (ipv6_switch >= 0 && pwrite(ipv6_switch, "1", 1, 0) != 1)
		failed = vm_fail(errno, "cannot turn the link's IPv6 off");
	if (!failed && bring_up(link.sock, &link.request))
		failed = vm_fail(errno, "cannot bring the link up");
	close(link.sock);
	is_prepared = !failed;
	return failed;
}

int vm_configure_link(const unsigned char *field)
{
	static int count; /* SETUP names the links in their order */
	struct link link = {.sock = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0), .mac = field, .number = count++};
	int failed;

	if (link.sock < 0)
		return vm_fail(errno, "the guest kernel has no IPv4");
	if (vm_await(find_link, &link, LINK_PATIENCE_MS))
		failed = configure(&link, field);
	else
		failed = vm_fail(ENODEV, "the machine has no network link with the address %02x:%02x:%02x:%02x:%02x:%02x",
				 field[0], field[1], field[2], field[3], field[4], field[5]);
	close(link.sock);
	return failed;
}

/* -- a machine that has become another one, or has come to another network */

static int has_address6(const char *name, const unsigned char *address)
{
	char digits[33], found[33], device[32];
	FILE *list = fopen("/proc/net/if_inet6", "re");
	int has = 0;

	for (int i = 0; i < 16; i++)
		snprintf(digits + 2 * i, 3, "%02x", address[i]);
	while (list && !has && fscanf(list, "%32s %*s %*s %*s %*s %31s", found, device) == 2)
		has = !strcmp(found, digits) && !strcmp(device, name);
	if (list)
		fclose(list);
	return has;
}

static int is_as_told(struct link *link, const unsigned char *field)
{
	struct ifreq r = link->request;
	struct sockaddr_in now;
	uint32_t wanted;

	memcpy(&wanted, field + UN_ADDRESS, 4);
	if (ioctl(link->sock, SIOCGIFHWADDR, &r) || memcmp(r.ifr_hwaddr.sa_data, field + UN_MAC, 6))
		return 0;
	if (wanted) {
		if (ioctl(link->sock, SIOCGIFADDR, &r))
			return 0;
		memcpy(&now, &r.ifr_addr, sizeof now);
		if (now.sin_addr.s_addr != wanted)
			return 0;
	}
	return is_zero(field + UN_ADDRESS6, 16) || has_address6(link->request.ifr_name, field + UN_ADDRESS6);
}

static int take_down(struct link *link)
{
	struct ifreq r = link->request;

	if (ioctl(link->sock, SIOCGIFFLAGS, &r))
		return vm_fail(errno, "the machine has no link %s any more", r.ifr_name);
	r.ifr_flags &= (short)~IFF_UP;
	return ioctl(link->sock, SIOCSIFFLAGS, &r) ? vm_fail(errno, "cannot bring the link %s down", r.ifr_name) : 0;
}

/* Down, which takes what the kernel made of the old MAC and addresses, and up again with the new ones. */
static int renew_link(struct link *link, const unsigned char *field)
{
	struct ifreq r = link->request;

	if (take_down(link))
		return -1;
	if (ioctl(link->sock, SIOCGIFHWADDR, &r))
		return vm_fail(errno, "cannot look at the link %s", r.ifr_name);
	memcpy(r.ifr_hwaddr.sa_data, field + UN_MAC, 6);
	if (ioctl(link->sock, SIOCSIFHWADDR, &r))
		return vm_fail(errno, "cannot give the link %s another MAC address", r.ifr_name);
	return configure(link, field);
}

/* The one that a NETWORK field names; its socket is the caller's to close. */
static int open_link(struct link *link, const unsigned char *field)
{
	*link = (struct link){.sock = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0), .mac = field};
	if (link->sock < 0)
		return vm_fail(errno, "the guest kernel has no IPv4");
	snprintf(link->request.ifr_name, IFNAMSIZ, "%s", (const char *)field + UN_NAME);
	return 0;
}

int vm_reconfigure_link(const unsigned char *field)
{
	struct link link;
	int failed;

	if (open_link(&link, field))
		return -1;
	failed = is_as_told(&link, field) ? 0 : renew_link(&link, field);
	close(link.sock);
	return failed;
}

/* The default routes of a link that has all else already, where the machine has no others. */
static int add_routes(struct link *link, const unsigned char *field)
{
	uint32_t gateway;

	memcpy(&gateway, field + UN_GATEWAY, 4);
	if (gateway && add_default_route(link->sock, gateway) && errno != EEXIST)
		return vm_fail(errno, "cannot add the default route");
	return configure6(link, field);
}

static int is_up(struct link *link)
{
	struct ifreq r = link->request;

	return !ioctl(link->sock, SIOCGIFFLAGS, &r) && r.ifr_flags & IFF_UP;
}

int vm_change_link(const unsigned char *field)
{
	struct link link;
	int failed;

	if (open_link(&link, field))
		return -1;
	if (is_zero(field + UN_ADDRESS, 4) && is_zero(field + UN_ADDRESS6, 16))
		failed = take_down(&link);
	else if (is_up(&link) && is_as_told(&link, field))
		failed = add_routes(&link, field);
	else
		failed = renew_link(&link, field);
	close(link.sock);
	return failed;
}
