/* VM mode: the loopback and the machine's one link, by netdevice(7)'s requests. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
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

#define INSIDE "eth0"
#define MAX_INDEX 64
#define LINK_PATIENCE_MS 3000

struct link {
	int sock;
	const unsigned char *mac;
	struct ifreq request; /* its name, once it is found */
};

static int find_link(void *what)
{
	struct link *link = what;

	for (int index = 1; index <= MAX_INDEX; index++) {
		struct ifreq request = {.ifr_ifindex = index};
		if (ioctl(link->sock, SIOCGIFNAME, &request))
			continue;
		memcpy(link->request.ifr_name, request.ifr_name, IFNAMSIZ);
		if (!ioctl(link->sock, SIOCGIFHWADDR, &request) && request.ifr_hwaddr.sa_family == ARPHRD_ETHER &&
		    !memcmp(request.ifr_hwaddr.sa_data, link->mac, 6))
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

static int configure(struct link *link, unsigned prefix, int mtu, uint32_t address, uint32_t gateway)
{
	struct ifreq *r = &link->request;

	if (strcmp(r->ifr_name, INSIDE)) {
		strcpy(r->ifr_newname, INSIDE);
		if (ioctl(link->sock, SIOCSIFNAME, r))
			return vm_fail(errno, "cannot rename the link %s to " INSIDE, r->ifr_name);
		strcpy(r->ifr_name, INSIDE);
	}
	r->ifr_mtu = mtu;
	if (mtu && ioctl(link->sock, SIOCSIFMTU, r))
		return vm_fail(errno, "cannot set the link's MTU to %d", mtu);
	set_address(&r->ifr_addr, address);
	if (ioctl(link->sock, SIOCSIFADDR, r))
		return vm_fail(errno, "cannot set the link's address");
	set_address(&r->ifr_netmask, htonl(prefix ? ~0u << (32 - prefix) : 0));
	if (ioctl(link->sock, SIOCSIFNETMASK, r))
		return vm_fail(errno, "cannot set the link's netmask");
	if (bring_up(link->sock, r))
		return vm_fail(errno, "cannot bring the link up");
	if (gateway && add_default_route(link->sock, gateway))
		return vm_fail(errno, "cannot add the default route");
	return 0;
}

int vm_configure_link(const unsigned char *field)
{
	struct link link = {.sock = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0), .mac = field};
	uint32_t address, gateway; /* in network order, as they stand there */
	int failed;

	memcpy(&address, field + 12, 4);
	memcpy(&gateway, field + 16, 4);
	if (link.sock < 0)
		return vm_fail(errno, "the guest kernel has no IPv4");
	if (vm_await(find_link, &link, LINK_PATIENCE_MS))
		failed = configure(&link, get16(field + 6), (int)get32(field + 8), address, gateway);
	else
		failed = vm_fail(ENODEV, "the machine has no network link with the address %02x:%02x:%02x:%02x:%02x:%02x",
				 field[0], field[1], field[2], field[3], field[4], field[5]);
	close(link.sock);
	return failed;
}
