/* SPDX-License-Identifier: Apache-2.0 */
/* bcc includes this file; nothing of it is used. */
#pragma once
