/* SPDX-License-Identifier: Apache-2.0 */
#pragma once
#define PAGE_SIZE 4096
