/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The traced process of the benches. Each line "WORK COUNT RATE" on stdin is one run; the answer is
 * "COUNT WALL_NS CPU_NS", of the work alone. RATE is per second and never exceeded, 0 as fast as it goes.
 *
 *   getppid  a system call that the bench's producer.bpf.c turns into one record
 *   wait     epoll_wait that returns at once: one event loop iteration
 *   call     traced_call(), for probes on a function
 *   connect  one connection to the program's own listener, whose port it prints first of all
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <signal.h>
#include <time.h>
#include <unistd.h>

#define SLOT_NS 1000000L
#define SECOND_NS 1000000000L

#define BACKLOG 511

static int epoll_fd;
static int listener;
static struct sockaddr_in address = {.sin_family = AF_INET};

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

static int checked(int result, const char *what)
{
	if (result < 0) {
		perror(what);
		exit(1);
	}
	return result;
}

/* ends with RST, or the ports would be used up by TIME_WAIT */
static void do_connect(long number)
{
	struct linger at_once = {1, 0};
	int client = checked(socket(AF_INET, SOCK_STREAM, 0), "socket");

	(void)number;
	checked(connect(client, (struct sockaddr *)&address, sizeof(address)), "connect");
	setsockopt(client, SOL_SOCKET, SO_LINGER, &at_once, sizeof(at_once));
	close(client);
}

static void *accept_all(void *unused)
{
	for (;;)
		close(checked(accept(listener, NULL, NULL), "accept"));
	return unused;
}

static void start_listener(void)
{
	socklen_t length = sizeof(address);
	pthread_t thread;

	address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
	listener = checked(socket(AF_INET, SOCK_STREAM, 0), "socket");
	checked(bind(listener, (struct sockaddr *)&address, length), "bind");
	checked(listen(listener, BACKLOG), "listen");
	checked(getsockname(listener, (struct sockaddr *)&address, &length), "getsockname");
	checked(-pthread_create(&thread, NULL, accept_all, NULL), "pthread_create");
	printf("%d\n", ntohs(address.sin_port));
	fflush(stdout);
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
	start_listener();
	while (scanf("%15s %ld %ld", name, &count, &rate) == 3) {
		void (*work)(long) = !strcmp(name, "getppid")	? do_getppid
				     : !strcmp(name, "wait")	? do_wait
				     : !strcmp(name, "connect") ? do_connect
								: do_call;
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
