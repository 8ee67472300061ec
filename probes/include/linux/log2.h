/* SPDX-License-Identifier: Apache-2.0 */
/* bcc's BPF_*_ARRAY macros name these in code that is never run. */
#pragma once
#define roundup_pow_of_two(n) (1UL << (64 - __builtin_clzl((n) - 1)))
