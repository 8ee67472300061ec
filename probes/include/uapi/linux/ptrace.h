/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The registers of a probed thread. x86-64 order: Linux arch/x86/include/asm/ptrace.h, struct pt_regs;
 * it is what the hardware and the entry code push, unchanged since 2.6.
 */
#pragma once
#include <linux/types.h>

struct pt_regs {
	unsigned long r15;
	unsigned long r14;
	unsigned long r13;
	unsigned long r12;
	unsigned long bp;
	unsigned long bx;
	unsigned long r11;
	unsigned long r10;
	unsigned long r9;
	unsigned long r8;
	unsigned long ax;
	unsigned long cx;
	unsigned long dx;
	unsigned long si;
	unsigned long di;
	unsigned long orig_ax;
	unsigned long ip;
	unsigned long cs;
	unsigned long flags;
	unsigned long sp;
	unsigned long ss;
};
