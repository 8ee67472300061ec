/* SPDX-License-Identifier: Apache-2.0 */
/* Force-included by bcc before every program; the kernel's own defines its configuration here. */
#pragma once
#define CONFIG_BPF_SYSCALL 1
