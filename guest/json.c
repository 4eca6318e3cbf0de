/* JSON text on standard output. */
#include <stdio.h>

#include "spawn.h"

/* Length of a valid UTF-8 sequence at p, or 0. */
static size_t utf8_length(const unsigned char *p, size_t left)
{
	size_t n = p[0] < 0x80 ? 1 : p[0] >= 0xc2 && p[0] < 0xe0 ? 2 : p[0] >= 0xe0 && p[0] < 0xf0 ? 3
		 : p[0] >= 0xf0 && p[0] < 0xf5 ? 4 : 0;

	if (!n || n > left)
		return 0;
	for (size_t i = 1; i < n; i++)
		if ((p[i] & 0xc0) != 0x80)
			return 0;
	if (n == 3 && ((p[0] == 0xe0 && p[1] < 0xa0) || (p[0] == 0xed && p[1] >= 0xa0)))
		return 0;
	if (n == 4 && ((p[0] == 0xf0 && p[1] < 0x90) || (p[0] == 0xf4 && p[1] >= 0x90)))
		return 0;
	return n;
}

/* A quoted string. Bytes that are not UTF-8 become lone surrogates, as Python's surrogateescape reads them. */
void json_string(const char *bytes, size_t size)
{
	const unsigned char *p = (const unsigned char *)bytes;

	putchar('"');
	for (size_t i = 0; i < size;) {
		size_t n = utf8_length(p + i, size - i);
		if (!n) {
			printf("\\udc%02x", p[i++]);
			continue;
		}
		if (n == 1 && (p[i] < 0x20 || p[i] == '"' || p[i] == '\\' || p[i] == 0x7f))
			printf("\\u%04x", p[i]);
		else
			fwrite(p + i, 1, n, stdout);
		i += n;
	}
	putchar('"');
}
