// SPDX-License-Identifier: GPL-2.0-only
/* System calls, access to memory, its contents; uffd.h describes them. */
#define _GNU_SOURCE
#include <errno.h>
#include <setjmp.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "uffd.h"

/* ---- system calls ----------------------------------------------------------------------------------------- */

int64_t uffd_syscall(long nr, long a0, long a1, long a2, long a3, long a4, long a5)
{
	long ret = syscall(nr, a0, a1, a2, a3, a4, a5);

	return ret == -1 ? -errno : ret;
}

#define NUMBER(name) { #name, SYS_##name }

long uffd_syscall_number(const char *name)
{
	static const struct {
		const char *name;
		long number;
	} numbers[] = {
		NUMBER(brk),
		NUMBER(capget),
		NUMBER(capset),
		NUMBER(clone),
		NUMBER(exit),
		NUMBER(fallocate),
		NUMBER(finit_module),
		NUMBER(futex),
		NUMBER(io_destroy),
		NUMBER(io_getevents),
		NUMBER(io_setup),
		NUMBER(io_submit),
		NUMBER(ioctl),
		NUMBER(madvise),
		NUMBER(mbind),
		NUMBER(mincore),
		NUMBER(mlock),
		NUMBER(mlock2),
		NUMBER(mlockall),
		NUMBER(move_pages),
		NUMBER(mremap),
		NUMBER(munlock),
		NUMBER(munlockall),
		NUMBER(pkey_alloc),
		NUMBER(pkey_free),
		NUMBER(pkey_mprotect),
		NUMBER(prctl),
		NUMBER(preadv2),
		NUMBER(process_vm_readv),
		NUMBER(process_vm_writev),
		NUMBER(ptrace),
		NUMBER(read),
		NUMBER(readv),
		NUMBER(rt_sigaction),
		NUMBER(rt_sigprocmask),
		NUMBER(rt_sigtimedwait),
		NUMBER(set_robust_list),
		NUMBER(set_tid_address),
		NUMBER(set_mempolicy),
		NUMBER(shmat),
		NUMBER(shmctl),
		NUMBER(shmdt),
		NUMBER(shmget),
		NUMBER(sigaltstack),
		NUMBER(tgkill),
		NUMBER(unshare),
		NUMBER(userfaultfd),
		NUMBER(vmsplice),
		NUMBER(write),
	};

	for (size_t i = 0; i < sizeof(numbers) / sizeof(*numbers); i++) {
		if (!strcmp(name, numbers[i].name))
			return numbers[i].number;
	}
	return -1;
}

int64_t uffd_ioctl(int fd, unsigned long request, uint64_t arg)
{
	int ret = ioctl(fd, request, arg);

	return ret == -1 ? -errno : ret;
}

int64_t uffd_mmap(uint64_t addr, size_t len, int prot, int flags, int fd, int64_t offset)
{
	void *p = mmap((void *)addr, len, prot, flags, fd, offset);

	return p == MAP_FAILED ? -errno : (int64_t)(intptr_t)p;
}

int64_t uffd_munmap(uint64_t addr, size_t len)
{
	return munmap((void *)addr, len) ? -errno : 0;
}

int64_t uffd_mremap(uint64_t addr, size_t old_len, size_t new_len, int flags, uint64_t new_addr)
{
	void *p = mremap((void *)addr, old_len, new_len, flags, new_addr);

	return p == MAP_FAILED ? -errno : (int64_t)(intptr_t)p;
}

int64_t uffd_madvise(uint64_t addr, size_t len, int advice)
{
	return madvise((void *)addr, len, advice) ? -errno : 0;
}

int64_t uffd_mprotect(uint64_t addr, size_t len, int prot)
{
	return mprotect((void *)addr, len, prot) ? -errno : 0;
}

int uffd_die_with_parent(int parent)
{
	if (prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0))
		return -errno;
	if (getppid() != parent)
		raise(SIGKILL);
	return 0;
}

/* ---- touching memory -------------------------------------------------------------------------------------- */

struct guard {
	sigjmp_buf env;
	struct uffd_trap *trap;
};

static _Thread_local struct guard *volatile guard;
static struct sigaction previous_bus, previous_segv;

static void guard_handler(int signo, siginfo_t *info, void *context)
{
	(void)context;
	if (!guard) {
		/* Not ours: the instruction runs again and meets whoever was installed before. */
		sigaction(signo, signo == SIGBUS ? &previous_bus : &previous_segv, NULL);
		return;
	}
	guard->trap->signo = signo;
	guard->trap->code = info->si_code;
	guard->trap->addr = (uint64_t)(uintptr_t)info->si_addr;
	guard->trap->addr_lsb = signo == SIGBUS && info->si_code != BUS_ADRERR ? info->si_addr_lsb : 0;
	siglongjmp(guard->env, 1);
}

static void guard_install(void)
{
	/* SA_NODEFER: the handler is left by a jump, after which the signal must not be blocked. */
	struct sigaction act = { .sa_sigaction = guard_handler, .sa_flags = SA_SIGINFO | SA_NODEFER }, now;

	/* Somebody (faulthandler, an earlier guard_handler) may have replaced it since. */
	if (!sigaction(SIGBUS, NULL, &now) && now.sa_sigaction != guard_handler)
		sigaction(SIGBUS, &act, &previous_bus);
	if (!sigaction(SIGSEGV, NULL, &now) && now.sa_sigaction != guard_handler)
		sigaction(SIGSEGV, &act, &previous_segv);
}

enum transfer { PEEK, POKE, TOUCH_READ, TOUCH_WRITE };

static void transfer(enum transfer what, volatile uint8_t *addr, uint8_t *buf, size_t len)
{
	uint8_t zero = 0;

	switch (what) {
	case PEEK:
		for (size_t i = 0; i < len; i++)
			buf[i] = addr[i];
		break;
	case POKE:
		for (size_t i = 0; i < len; i++)
			addr[i] = buf[i];
		break;
	case TOUCH_READ:
		(void)*addr;
		break;
	case TOUCH_WRITE:
		/* Hide the zero, else the compiler may make a load and a fence of it. */
		__asm__ volatile("" : "+r"(zero));
		__atomic_fetch_or(addr, zero, __ATOMIC_RELAXED);
		break;
	}
}

static int guarded(enum transfer what, uint64_t addr, uint8_t *buf, size_t len, struct uffd_trap *trap)
{
	struct guard here = { .trap = trap };

	memset(trap, 0, sizeof(*trap));
	/* Without the mask a loop over many pages costs no system calls. */
	if (sigsetjmp(here.env, 0) == 0) {
		guard = &here;
		transfer(what, (volatile uint8_t *)addr, buf, len);
	}
	guard = NULL;
	return trap->signo;
}

int uffd_peek(uint64_t addr, void *buf, size_t len, struct uffd_trap *trap)
{
	guard_install();
	return guarded(PEEK, addr, buf, len, trap);
}

int uffd_poke(uint64_t addr, const void *buf, size_t len, struct uffd_trap *trap)
{
	guard_install();
	return guarded(POKE, addr, (uint8_t *)buf, len, trap);
}

uint64_t uffd_touch(uint64_t addr, size_t step, uint64_t count, enum uffd_access access, struct uffd_trap *traps)
{
	enum transfer what = access == UFFD_WRITE ? TOUCH_WRITE : TOUCH_READ;
	uint64_t trapped = 0;

	if (traps)
		guard_install();
	for (uint64_t i = 0; i < count; i++, addr += step) {
		if (!traps)
			transfer(what, (volatile uint8_t *)addr, NULL, 1);
		else if (guarded(what, addr, NULL, 1, &traps[i]))
			trapped++;
	}
	return trapped;
}

uint64_t uffd_touch_alike(uint64_t addr, size_t step, uint64_t count, enum uffd_access access, int signo,
			  struct uffd_trap *trap)
{
	enum transfer what = access == UFFD_WRITE ? TOUCH_WRITE : TOUCH_READ;

	guard_install();
	for (uint64_t i = 0; i < count; i++, addr += step)
		if (guarded(what, addr, NULL, 1, trap) != signo || (signo && trap->addr != addr))
			return i;
	return count;
}

/* ---- whole areas ------------------------------------------------------------------------------------------ */

static uint64_t first_word(const struct uffd_pattern *p, uint64_t page)
{
	return (p->seed + page) * 0x9E3779B97F4A7C15ull;
}

void uffd_fill(uint64_t addr, const struct uffd_pattern *p, uint64_t first, uint64_t count)
{
	for (uint64_t page = first; page < first + count; page++) {
		uint64_t *words = (uint64_t *)(addr + page * p->page_size), base = first_word(p, page);

		for (uint64_t w = 0; w < p->page_size / 8; w++)
			words[w] = (base + w) ^ p->flip;
	}
}

/* Where the word at offset differs: the byte, in memory order. */
static int differ(uint64_t offset, uint64_t expected, uint64_t observed, struct uffd_mismatch *m)
{
	const uint8_t *e = (const uint8_t *)&expected, *o = (const uint8_t *)&observed;
	int i = 0;

	while (i < 7 && e[i] == o[i])
		i++;
	*m = (struct uffd_mismatch){ .offset = offset + i, .expected = e[i], .observed = o[i] };
	return 1;
}

int uffd_verify(uint64_t addr, const struct uffd_pattern *p, uint64_t first, uint64_t count, int flags,
		struct uffd_mismatch *mismatch)
{
	for (uint64_t page = first; page < first + count; page++) {
		volatile uint64_t *words = (volatile uint64_t *)(addr + page * p->page_size);
		const uint64_t *rest = (const uint64_t *)words;
		uint64_t base = first_word(p, page), word = words[0], wrong = 0;

		if (word != (base ^ p->flip))
			return differ(page * p->page_size, base ^ p->flip, word, mismatch);
		for (uint64_t w = 1; w < p->page_size / 8; w++)
			wrong |= rest[w] ^ (base + w) ^ p->flip;
		for (uint64_t w = 1; wrong && w < p->page_size / 8; w++) {
			word = words[w];
			if (word != ((base + w) ^ p->flip))
				return differ(page * p->page_size + 8 * w, (base + w) ^ p->flip, word, mismatch);
		}
		if (wrong)	/* it differed a moment ago: somebody still writes */
			return differ(page * p->page_size, 0, wrong, mismatch);
		if (flags & UFFD_WRITE_BACK)
			words[0] = base ^ p->flip;
	}
	return 0;
}

int uffd_verify_byte(uint64_t addr, size_t len, uint8_t value, struct uffd_mismatch *m)
{
	const uint8_t *p = (const uint8_t *)addr;

	/* Each byte equals the one before it, and the first one is right. */
	if (len && (p[0] != value || memcmp(p, p + 1, len - 1)))
		for (size_t i = 0; i < len; i++) {
			uint8_t byte = p[i];

			if (byte != value || i == len - 1) {
				*m = (struct uffd_mismatch){ .offset = i, .expected = value, .observed = byte };
				return 1;
			}
		}
	return 0;
}

int uffd_compare(uint64_t expected, uint64_t observed, size_t len, struct uffd_mismatch *m)
{
	const uint8_t *e = (const uint8_t *)expected, *o = (const uint8_t *)observed;

	if (memcmp(e, o, len))
		for (size_t i = 0; i < len; i++) {
			uint8_t left = e[i], right = o[i];

			if (left != right || i == len - 1) {
				*m = (struct uffd_mismatch){ .offset = i, .expected = left, .observed = right };
				return 1;
			}
		}
	return 0;
}
