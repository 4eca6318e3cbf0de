/* Fields, and SPAWN's payload, which is made of them. */
#include <stdlib.h>
#include <string.h>

#include "proto.h"
#include "spawn.h"

#define FIELD_HEADER 8

int next_field(const unsigned char *payload, size_t size, size_t *at, struct field *f)
{
	if (*at == size)
		return 0;
	if (size - *at < FIELD_HEADER)
		return -1;
	const unsigned char *p = payload + *at;
	f->tag = get16(p);
	f->size = get32(p + 4);
	f->bytes = p + FIELD_HEADER;
	if (get16(p + 2) != 0 || f->size > size - *at - FIELD_HEADER)
		return -1;
	*at += FIELD_HEADER + f->size;
	return 1;
}

static int take_text(struct spawn *s, const struct field *f, size_t *used, char **out)
{
	if (memchr(f->bytes, 0, f->size))
		return -1;
	*out = s->text + *used;
	memcpy(*out, f->bytes, f->size);
	(*out)[f->size] = 0;
	*used += f->size + 1;
	return 0;
}

static int take_field(struct spawn *s, const struct field *f, size_t *used)
{
	char *text;

	switch (f->tag) {
	case T_ARG:
		if (take_text(s, f, used, &text))
			return -1;
		s->argv[s->argc++] = text;
		return 0;
	case T_ENV:
		if (take_text(s, f, used, &text) || !strchr(text, '='))
			return -1;
		s->env[s->envc++] = text;
		return 0;
	case T_CWD:
		if (take_text(s, f, used, &text) || text[0] != '/')
			return -1;
		s->cwd = text;
		return 0;
	case T_USER:
		if (take_text(s, f, used, &text))
			return -1;
		s->user = text;
		return 0;
	case T_FLAGS:
		if (f->size != 4)
			return -1;
		s->flags = get32(f->bytes);
		return 0;
	case T_SIZE:
		if (f->size != 4)
			return -1;
		s->rows = get16(f->bytes);
		s->columns = get16(f->bytes + 2);
		return 0;
	case T_CAPS:
		if (f->size != 8)
			return -1;
		s->caps = get64(f->bytes);
		return 0;
	case T_SECCOMP:
		if (f->size % 8 || f->size / 8 > 4096) /* BPF_MAXINSNS */
			return -1;
		s->seccomp = (const unsigned char *)s->text + *used;
		memcpy(s->text + *used, f->bytes, f->size);
		s->seccomp_size = f->size;
		*used += f->size;
		return 0;
	case T_RLIMIT:
		if (f->size != 24 || s->rlimit_count == MAX_RLIMITS)
			return -1;
		s->rlimits[s->rlimit_count++] =
			(struct rlimit_field){get32(f->bytes), get64(f->bytes + 8), get64(f->bytes + 16)};
		return 0;
	}
	return -1;
}

int spawn_parse(struct spawn *s, const unsigned char *payload, size_t size)
{
	struct field f;
	size_t at = 0, args = 0, envs = 0, used = 0;
	int more;

	memset(s, 0, sizeof *s);
	while ((more = next_field(payload, size, &at, &f)) > 0) {
		args += f.tag == T_ARG;
		envs += f.tag == T_ENV;
	}
	if (more < 0 || !args)
		return -1;
	/* Every text needs one byte more than its field, and every field has a header of eight: size is enough. */
	s->text = malloc(size + 1);
	s->argv = calloc(args + 2, sizeof *s->argv); /* one spare: a script may be handed to /bin/sh */
	s->env = calloc(envs + 2, sizeof *s->env);   /* one spare: HOME */
	if (!s->text || !s->argv || !s->env)
		goto bad;
	s->cwd = "/";
	s->user = "";
	for (at = 0; next_field(payload, size, &at, &f) > 0;)
		if (take_field(s, &f, &used))
			goto bad;
	return 0;
bad:
	spawn_free(s);
	return -1;
}

void spawn_free(struct spawn *s)
{
	free(s->text);
	free(s->argv);
	free(s->env);
	memset(s, 0, sizeof *s);
}
