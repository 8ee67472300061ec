/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The traced process of the benches. Each line "WORK COUNT RATE" on stdin is one run; the answer is
 * "COUNT WALL_NS CPU_NS", of the work alone. RATE is per second and never exceeded, 0 as fast as it goes.
 *
 *   getppid  a system call that the bench's producer.bpf.c turns into one record
 *   wait     epoll_wait that returns at once: one event loop iteration
 *   call     traced_call(), for probes on a function
 */
#define _GNU_SOURCE
#include <stdio.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <signal.h>
#include <time.h>
#include <unistd.h>

#define SLOT_NS 1000000L
#define SECOND_NS 1000000000L

static int epoll_fd;

__attribute__((noinline)) long traced_call(long number)
{
	__asm__ volatile("" : "+r"(number));
	return number + 1;
}

static void do_getppid(long number)
{
	(void)number;
	syscall(SYS_getppid);
}

static void do_wait(long number)
{
	struct epoll_event event;

	(void)number;
	epoll_wait(epoll_fd, &event, 1, 0);
}

static void do_call(long number)
{
	traced_call(number);
}

static long now_ns(clockid_t clock)
{
	struct timespec time;

	clock_gettime(clock, &time);
	return time.tv_sec * SECOND_NS + time.tv_nsec;
}

static void run(void (*work)(long), long count, long rate)
{
	long start = now_ns(CLOCK_MONOTONIC);
	long per_slot = rate ? rate / (SECOND_NS / SLOT_NS) : count;
	long until = start;

	for (long done = 0; done < count;) {
		for (long slot = 0; slot < per_slot && done < count; slot++)
			work(done++);
		if (rate) {
			/* late (the machine was busy): go on from now, a burst would not be that rate */
			until = now_ns(CLOCK_MONOTONIC) > until + 2 * SLOT_NS ? now_ns(CLOCK_MONOTONIC) : until + SLOT_NS;
			struct timespec time = {until / SECOND_NS, until % SECOND_NS};
			clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &time, NULL);
		}
	}
}

int main(void)
{
	char name[16];
	long count, rate;

	prctl(PR_SET_PDEATHSIG, SIGKILL);
	epoll_fd = epoll_create1(0);
	while (scanf("%15s %ld %ld", name, &count, &rate) == 3) {
		void (*work)(long) = !strcmp(name, "getppid") ? do_getppid : !strcmp(name, "wait") ? do_wait : do_call;
		long wall = now_ns(CLOCK_MONOTONIC);
		long cpu = now_ns(CLOCK_THREAD_CPUTIME_ID);

		run(work, count, rate);
		cpu = now_ns(CLOCK_THREAD_CPUTIME_ID) - cpu;
		wall = now_ns(CLOCK_MONOTONIC) - wall;
		printf("%ld %ld %ld\n", count, wall, cpu);
		fflush(stdout);
	}
	return 0;
}
