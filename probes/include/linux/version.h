/* SPDX-License-Identifier: Apache-2.0 */
/* bcc passes the running kernel's version itself (kern_version); nothing here depends on it. */
#pragma once
#define KERNEL_VERSION(a, b, c) (((a) << 16) + ((b) << 8) + ((c) > 255 ? 255 : (c)))
#ifndef LINUX_VERSION_CODE
#define LINUX_VERSION_CODE KERNEL_VERSION(5, 8, 0)
#endif
