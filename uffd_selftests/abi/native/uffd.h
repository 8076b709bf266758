/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * The native layer: whatever may block in a userfault, or be killed by one, without the interpreter's lock.
 *
 * Python decides what a case does; these functions only do it.  cffi reads this file as it is, so it holds
 * declarations and nothing for the preprocessor.  Addresses are uint64_t, sizes are in bytes.
 */

/* ---- system calls -------------------------------------------------------------------------------------- */

/* The result of the system call nr, or -errno. */
int64_t uffd_syscall(long nr, long a0, long a1, long a2, long a3, long a4, long a5);

/* The number that the system call of this name has in programs like this one, by the headers that this was compiled with;
 * -1 when they have none.  It differs between architectures, and between a kernel's own programs and those of 32 bits. */
long uffd_syscall_number(const char *name);

/* The result of ioctl(2), or -errno. */
int64_t uffd_ioctl(int fd, unsigned long request, uint64_t arg);

/* mmap(2), munmap(2), mremap(2), madvise(2), mprotect(2): their result, or -errno.  They have names of their own because
 * their numbers and arguments differ between architectures, and because each may wait for an event to be read. */
int64_t uffd_mmap(uint64_t addr, size_t len, int prot, int flags, int fd, int64_t offset);
int64_t uffd_munmap(uint64_t addr, size_t len);
int64_t uffd_mremap(uint64_t addr, size_t old_len, size_t new_len, int flags, uint64_t new_addr);
int64_t uffd_madvise(uint64_t addr, size_t len, int advice);
int64_t uffd_mprotect(uint64_t addr, size_t len, int prot);

/* Have the kernel kill this process when the thread that forked it ends; call it in the child.  Kills at once when the
 * parent is not `parent` any more.  0, or -errno. */
int uffd_die_with_parent(int parent);

/* ---- touching memory ----------------------------------------------------------------------------------- */

/* The signal that stopped an access; signo 0 when none did. */
struct uffd_trap {
	int32_t signo;		/* SIGBUS or SIGSEGV */
	int32_t code;		/* si_code: BUS_ADRERR, BUS_MCEERR_AR, SEGV_ACCERR ... */
	uint64_t addr;		/* si_addr */
	int32_t addr_lsb;	/* si_addr_lsb, 0 where si_code has none */
	int32_t pad;
};

enum uffd_access {
	UFFD_READ,		/* load */
	UFFD_WRITE,		/* atomic or with zero: a write access that changes nothing */
};

/* Copy out of or into memory that may fault.  Returns 0, or the signal that ended it (described in *trap). */
int uffd_peek(uint64_t addr, void *buf, size_t len, struct uffd_trap *trap);
int uffd_poke(uint64_t addr, const void *buf, size_t len, struct uffd_trap *trap);

/* Access one byte every step bytes, count times.  Each access that a signal ended is described in
 * traps[i], and the next one goes on; with traps NULL a signal has its usual effect.  Returns how many were ended. */
uint64_t uffd_touch(uint64_t addr, size_t step, uint64_t count, enum uffd_access access, struct uffd_trap *traps);

/* The same, as long as each access is ended by the signal signo at its own address, or, if that is 0, by none.  Returns
 * how many were; with fewer than count the next one is described in *trap. */
uint64_t uffd_touch_alike(uint64_t addr, size_t step, uint64_t count, enum uffd_access access, int signo,
			  struct uffd_trap *trap);

/* ---- whole areas --------------------------------------------------------------------------------------- */

/*
 * The test pattern: 64-bit word w of page i is ((seed + i) * odd constant + w) ^ flip, so that no two
 * pages and no two words of a page are alike, and a page that was bit flipped is known by flip == ~0.
 */
struct uffd_pattern {
	uint64_t page_size;
	uint64_t seed;
	uint64_t flip;
};

struct uffd_mismatch {
	uint64_t offset;	/* of the first byte that differs, from the start of the area */
	int32_t expected;
	int32_t observed;
};

enum uffd_verify_flags {
	UFFD_WRITE_BACK = 1,	/* after the check write the first word of each page back as it is */
};

/* Write, or check to the last byte, pages first .. first + count - 1 of an area whose page 0 is at addr.
 * uffd_verify returns 0, or 1 and the place. */
void uffd_fill(uint64_t addr, const struct uffd_pattern *pattern, uint64_t first, uint64_t count);
int uffd_verify(uint64_t addr, const struct uffd_pattern *pattern, uint64_t first, uint64_t count, int flags,
		struct uffd_mismatch *mismatch);

/* All bytes equal to value; the same bytes in two places.  0, or 1 and the place. */
int uffd_verify_byte(uint64_t addr, size_t len, uint8_t value, struct uffd_mismatch *mismatch);
int uffd_compare(uint64_t expected, uint64_t observed, size_t len, struct uffd_mismatch *mismatch);

/* ---- the fault-handler thread -------------------------------------------------------------------------- */

enum uffd_action {
	UFFD_RECORD,		/* note the message and leave the thread blocked */
	UFFD_COPY,
	UFFD_ZEROPAGE,
	UFFD_MOVE,
	UFFD_POISON,
	UFFD_CONTINUE,
	UFFD_UNPROTECT,		/* WRITEPROTECT, or RWPROTECT for a read-write-protect fault, with mode 0 */
	UFFD_WAKE,
};

struct uffd_handler_config {
	int uffd;
	int blocking;			/* block in read(2) instead of poll(2); needs a uffd without O_NONBLOCK */
	uint64_t dst;			/* the registered area; a fault outside it is a failure */
	uint64_t src;			/* where COPY and MOVE take the data of dst from */
	uint64_t len;
	uint64_t unit;			/* bytes resolved per fault, and their alignment from dst */
	uint64_t flip;			/* another mapping of dst: a minor fault's unit is bit flipped there first; 0: not */
	enum uffd_action missing, minor, wp, rwp;
	const uint8_t *plan;		/* if not NULL, the action for a missing fault by unit; overrules missing */
	uint64_t copy_mode, zeropage_mode, move_mode, continue_mode, poison_mode;
	int retry;			/* repeat each successful COPY, ZEROPAGE and CONTINUE: EEXIST, or it is a failure */
	uint64_t retry_at;		/* where to repeat it: another mapping of dst; 0 stands for dst itself */
	int unregister_removed;		/* unregister, then wake, each range that a REMOVE event names */
	struct uffd_message *log;	/* room for the first log_size messages */
	uint64_t log_size;
	int log_events_only;		/* leave page faults out of the log */
};

/* A message as it was read, and from which uffd of the handler (0: its own, 1...: from FORK events). */
struct uffd_message {
	uint8_t bytes[32];
	uint64_t source;
};

struct uffd_stats {
	uint64_t messages, logged;
	uint64_t missing, minor, wp, rwp;	/* page faults by kind */
	uint64_t write;				/* missing faults with UFFD_PAGEFAULT_FLAG_WRITE */
	uint64_t fork, remap, remove, unmap;
	uint64_t resolved;			/* faults answered with success */
	uint64_t eexist;			/* ... that another thread had answered already */
	uint64_t eagain;			/* fills repeated because of a layout change */
	uint64_t gone;				/* ... whose range or process had gone */
};

enum uffd_failure_kind {
	UFFD_OK,
	UFFD_IOCTL_FAILED,	/* request, address, err, output */
	UFFD_SHORT_OUTPUT,	/* success, but the output field is not the length */
	UFFD_NO_EEXIST,		/* the repeated fill did not say EEXIST (err 0: it succeeded) */
	UFFD_OUTSIDE,		/* a fault at address, outside the area */
	UFFD_UNKNOWN_EVENT,	/* output is the event number */
	UFFD_READ_FAILED,	/* read or poll of the uffd: err */
	UFFD_TOO_MANY,		/* more forks or postponed faults than the handler has room for */
};

struct uffd_failure {
	enum uffd_failure_kind kind;
	int err;		/* errno, positive */
	unsigned long request;
	uint64_t address;
	int64_t output;		/* the ioctl's output field */
};

struct uffd_handler;

/* Start the thread; returns when it runs.  NULL and errno on failure. */
struct uffd_handler *uffd_handler_start(const struct uffd_handler_config *config);

/* Let it answer what is queued, end and join it. */
void uffd_handler_stop(struct uffd_handler *handler);

/* May be asked while it runs; the failure is the first one.  After a failure the thread unregisters and wakes the
 * area of every message it gets, so that nobody stays blocked. */
void uffd_handler_stats(struct uffd_handler *handler, struct uffd_stats *stats);
void uffd_handler_failure(struct uffd_handler *handler, struct uffd_failure *failure);

/* Descriptors received in FORK events; returns how many, writes at most room of them. */
uint64_t uffd_handler_children(struct uffd_handler *handler, int *fds, uint64_t room);

/* Close the children's descriptors and free the handler, once stopped. */
void uffd_handler_free(struct uffd_handler *handler);
