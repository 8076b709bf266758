/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * The kernel's ABI, as far as the native threads speak it.
 *
 * linux/userfaultfd.h is not included: the installed one may be older than the kernel under test.
 */
#ifndef UFFD_ABI_H
#define UFFD_ABI_H

#include <stdint.h>
#include <sys/ioctl.h>

enum { EVENT_PAGEFAULT = 0x12, EVENT_FORK, EVENT_REMAP, EVENT_REMOVE, EVENT_UNMAP };
enum { FLAG_WRITE = 1, FLAG_WP = 2, FLAG_MINOR = 4, FLAG_RWP = 8 };

struct msg {
	uint8_t event;
	uint8_t reserved[7];
	union {
		struct { uint64_t flags, address; uint32_t ptid; } pagefault;
		struct { uint32_t ufd; } fork;
		struct { uint64_t from, to, len; } remap;
		struct { uint64_t start, end; } remove;
	} arg;
} __attribute__((packed));
_Static_assert(sizeof(struct msg) == 32, "struct uffd_msg is 32 bytes");

struct range { uint64_t start, len; };
struct copy { uint64_t dst, src, len, mode; int64_t copy; };		/* also uffdio_move */
struct fill { struct range range; uint64_t mode; int64_t filled; };	/* zeropage, continue, poison */
struct protect { struct range range; uint64_t mode; };			/* writeprotect, rwprotect */

struct set_mode { uint64_t enable, disable; };				/* features */

enum { MODE_DONTWAKE = 1, COPY_MODE_WP = 2, WRITEPROTECT_MODE_WP = 1, RWPROTECT_MODE_RWP = 1 };
enum { FEATURE_RWP_ASYNC = 1 << 18 };

#define UFFDIO_UNREGISTER	_IOR(0xAA, 0x01, struct range)
#define UFFDIO_WAKE		_IOR(0xAA, 0x02, struct range)
#define UFFDIO_COPY		_IOWR(0xAA, 0x03, struct copy)
#define UFFDIO_ZEROPAGE		_IOWR(0xAA, 0x04, struct fill)
#define UFFDIO_MOVE		_IOWR(0xAA, 0x05, struct copy)
#define UFFDIO_WRITEPROTECT	_IOWR(0xAA, 0x06, struct protect)
#define UFFDIO_CONTINUE		_IOWR(0xAA, 0x07, struct fill)
#define UFFDIO_POISON		_IOWR(0xAA, 0x08, struct fill)
#define UFFDIO_RWPROTECT	_IOWR(0xAA, 0x09, struct protect)
#define UFFDIO_SET_MODE		_IOW(0xAA, 0x0A, struct set_mode)

#endif
