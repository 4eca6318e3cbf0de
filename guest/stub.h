/* --init=false: a stub that is PID 1 and becomes the program in place. */
#ifndef NAGAYA_STUB_H
#define NAGAYA_STUB_H

#include <stddef.h>

/* Agent's side: hand the program over. 0 or -1 with errno. */
int stub_send(int fd, const unsigned char *payload, size_t size, const int fds[3], int report);
/* Stub's side: wait for it and become it. */
void stub_become(int fd) __attribute__((noreturn));

#endif
