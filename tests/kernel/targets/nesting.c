/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A program whose every call is known: it does what the lines on stdin say and then prints its own truth.
 *
 * A line is a command, a count and perhaps a second number. The answer is one line per call,
 * "call FUNCTION TID BEFORE BEGIN END AFTER", then "done". BEGIN and END were taken inside the call, BEFORE
 * and AFTER around it by its caller, all CLOCK_MONOTONIC in ns; an END or AFTER of 0 was never reached.
 */
#define _GNU_SOURCE
#include <poll.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define PROBED	  __attribute__((noinline, noclone, used))
#define MAX_CALLS 20000

struct call {
	const char *function;
	int tid;
	uint64_t before, begin, end, after;
};

static struct call calls[MAX_CALLS];
static atomic_uint used;
static __thread struct call *current;
static volatile long sink;

static uint64_t now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return time.tv_sec * 1000000000ULL + time.tv_nsec;
}

static struct call *about_to_call(const char *function)
{
	unsigned int index = atomic_fetch_add(&used, 1);

	if (index >= MAX_CALLS)
		abort();
	calls[index] = (struct call){.function = function, .tid = syscall(SYS_gettid), .before = now()};
	return current = &calls[index];
}

/* The caller's measure around a call, and the function's own at its two ends. */
#define TIMED(function, ...)                                  \
	do {                                                  \
		struct call *call = about_to_call(#function); \
		function(__VA_ARGS__);                        \
		call->after = now();                          \
	} while (0)
#define BEGIN                        \
	struct call *self = current; \
	self->begin = now()
#define END self->end = now()

PROBED void leaf(long first, long second, long third)
{
	BEGIN;
	sink += first + second + third;
	END;
}

PROBED void inner(void)
{
	BEGIN;
	sink++;
	END;
}

PROBED void middle(void)
{
	BEGIN;
	for (int count = 0; count < 3; count++)
		TIMED(inner);
	END;
}

PROBED void outer(void)
{
	BEGIN;
	TIMED(middle);
	TIMED(middle);
	END;
}

PROBED void recurse(int depth)
{
	BEGIN;
	if (depth > 1)
		TIMED(recurse, depth - 1);
	END;
}

/* Built so that this ends in a jump: both calls return at the same moment, from the same frame. */
PROBED void tail_second(long value)
{
	BEGIN;
	sink += value;
	END;
}

PROBED void tail_first(long value)
{
	BEGIN;
	END;
	about_to_call("tail_second");
	tail_second(value + 1);
}

static jmp_buf landing;

PROBED void jumper(int depth)
{
	BEGIN;
	if (depth > 1)
		TIMED(jumper, depth - 1);
	else
		longjmp(landing, 1);
	END;
}

PROBED void jump_and_land(int depth)
{
	BEGIN;
	if (!setjmp(landing))
		TIMED(jumper, depth);
	END;
}

/* Does not come back before the next line on stdin. */
PROBED void hold(void)
{
	char line[16];

	BEGIN;
	puts("held");
	fflush(stdout);
	if (read(0, line, sizeof(line)) < 0)
		abort();
	END;
}

PROBED void leave_thread(void)
{
	BEGIN;
	self->end = 0;
	pthread_exit(NULL);
}

/* Every call has the same second argument: gcc makes a clone without it and keeps no original. */
static __attribute__((noinline)) void cloned(long first, long second)
{
	BEGIN;
	for (long count = 0; count < second; count++)
		sink += first;
	END;
}

/* Calls without a measure of their own, as many as possible in a short time. */
PROBED void flooded(long number)
{
	sink += number;
}

/* Calls it until there is another line on stdin. */
static void flood_on(void)
{
	struct pollfd input = {.fd = 0, .events = POLLIN};

	puts("flooding");
	fflush(stdout);
	while (poll(&input, 1, 0) == 0)
		for (long number = 0; number < 100; number++)
			flooded(number);
}

static void *call_leaf_often(void *count)
{
	for (long number = 0; number < (long)count; number++)
		TIMED(leaf, number, 0, 0);
	return NULL;
}

static void *leave(void *unused)
{
	TIMED(leave_thread);
	return unused;
}

static void in_threads(void *(*work)(void *), long count, long threads)
{
	pthread_t handles[64];

	for (long number = 0; number < threads; number++)
		if (pthread_create(&handles[number], NULL, work, (void *)count))
			abort();
	for (long number = 0; number < threads; number++)
		pthread_join(handles[number], NULL);
}

static void fork_and_call(long count)
{
	pid_t child = fork();

	if (child < 0)
		abort();
	if (child == 0) {
		call_leaf_often((void *)count);
		_exit(0);
	}
	waitpid(child, NULL, 0);
}

static void obey(const char *command, long count, long number)
{
	for (long turn = 0; turn < count; turn++) {
		if (!strcmp(command, "leaf"))
			TIMED(leaf, turn, -turn, turn << 40);
		else if (!strcmp(command, "nested"))
			TIMED(outer);
		else if (!strcmp(command, "recurse"))
			TIMED(recurse, number);
		else if (!strcmp(command, "tail"))
			TIMED(tail_first, turn);
		else if (!strcmp(command, "jump"))
			TIMED(jump_and_land, number);
		else if (!strcmp(command, "hold"))
			TIMED(hold);
		else if (!strcmp(command, "clone"))
			TIMED(cloned, turn, 42);
		else if (!strcmp(command, "libc"))
			sink += labs(turn);
		else if (!strcmp(command, "flood"))
			flooded(turn);
	}
	if (!strcmp(command, "threads"))
		in_threads(call_leaf_often, count, number);
	else if (!strcmp(command, "leave"))
		in_threads(leave, count, number);
	else if (!strcmp(command, "flood-on"))
		flood_on();
	else if (!strcmp(command, "fork"))
		fork_and_call(count);
}

static void tell(void)
{
	for (unsigned int index = 0; index < used; index++)
		printf("call %s %d %lu %lu %lu %lu\n", calls[index].function, calls[index].tid,
		       calls[index].before, calls[index].begin, calls[index].end, calls[index].after);
	puts("done");
	fflush(stdout);
	used = 0;
}

int main(void)
{
	char line[128], command[32];

	setvbuf(stdin, NULL, _IONBF, 0);
	while (fgets(line, sizeof(line), stdin)) {
		long count = 1, number = 0;

		if (sscanf(line, "%31s %ld %ld", command, &count, &number) < 1)
			continue;
		obey(command, count, number);
		tell();
	}
	return 0;
}
