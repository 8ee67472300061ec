// What test_unwind_steps.py runs one instruction at a time, from the SIGTRAP to the end.
#define _GNU_SOURCE
#include <alloca.h>
#include <setjmp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>
#define KEEP __attribute__((noinline, noclone, used))
static volatile long sink;
static jmp_buf home;

KEEP static long leaf(long a, long b) { long keep[4] = {a, b, a ^ b, a + b}; sink += keep[a & 3]; return sink * 3 + b; }
KEEP static long saves_all(long a, long b, long c, long d, long e, long f) {
    long one = leaf(a, b), two = leaf(c, d), three = leaf(e, f), four = leaf(one, two), five = leaf(three, four);
    return one + two * three - four * five + leaf(five, a) + leaf(b, c) + d + e + f;
}
KEEP static long recursive(int depth, long value) {
    return depth ? recursive(depth - 1, value + leaf(depth, value)) + value : leaf(value, 1);
}
/* A frame whose size is known only at run time: found through rbp. */
KEEP static long with_alloca(size_t size) {
    char *room = alloca(size);
    memset(room, 7, size);
    return leaf(room[size / 2], room[0]);
}
/* A realigned frame as well: its CFA is read from the stack by an expression. */
KEEP static long realigned(size_t size) {
    char aligned[64] __attribute__((aligned(64)));
    char *room = alloca(size);
    memset(aligned, 1, sizeof aligned);
    memset(room, 2, size);
    return leaf((intptr_t)aligned & 63, room[size - 1]) + leaf(aligned[5], 2);
}
KEEP static int ascending(const void *a, const void *b) { return leaf(*(const int *)a, 0) * 0 + *(const int *)a - *(const int *)b; }
KEEP static long sorted(void) {
    int numbers[7] = {5, 2, 7, 1, 6, 3, 4};
    qsort(numbers, 7, sizeof *numbers, ascending);
    return numbers[0];
}
KEEP static void on_signal(int number) { sink += leaf(number, recursive(2, 3)); if (number == SIGUSR1) raise(SIGUSR2); }
KEEP static long signalled(void) { sink += 1; raise(SIGUSR1); return leaf(sink, 2); }
/* The call is the last instruction: the return address lies behind the function. */
KEEP __attribute__((noreturn)) static void leaves(void) { leaf(1, 2); longjmp(home, 1); }
KEEP static long jumps(void) {
    if (!setjmp(home)) { sink += with_alloca(64); leaves(); }
    return leaf(sink, 9);
}
KEEP static long tail(long a) { return leaf(a, a + 1); }
KEEP static long rarely(long a) {
    if (__builtin_expect(a > 40, 0)) { char text[64]; snprintf(text, sizeof text, "%ld %.3f", a, a / 7.0); return leaf(strlen(text), recursive(1, a)); }
    return a;
}
KEEP static long clocks(void) { struct timespec now; clock_gettime(CLOCK_MONOTONIC, &now); return now.tv_nsec > 0; }
KEEP static long allocates(void) { char *block = malloc(5000); long result = leaf((long)block & 1, 0); free(block); return result; }

int main(void) {
    signal(SIGUSR1, on_signal);
    signal(SIGUSR2, on_signal);
    raise(SIGTRAP);
    sink += saves_all(1, 2, 3, 4, 5, 6) + recursive(5, 1) + with_alloca(200) + realigned(100) + sorted();
    sink += signalled() + jumps() + tail(4) + rarely(3) + rarely(50) + clocks() + allocates();
    _exit(0);
}
