/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * The threads of a stress run.  Like uffd.h it is read by cffi as it is.
 *
 * A bounce brings the pages of one area, src, to another one, dst, where every page is missing.  Three kinds of threads
 * take part, `units` of each: workers touch pages of dst and count up what they hold, handlers answer the faults that
 * come of it, copiers fill dst on their own.  Whoever fills a page is the only one to wake those who wait for it.
 *
 * A page: word 0 is a lock, word 1 and the last word count the accesses, every word between tells page and place:
 * (seed + page) * odd constant + word.
 */

enum stress_role {
	STRESS_WORKER,
	STRESS_HANDLER,
	STRESS_COPIER,
	STRESS_ROLES,
};

/* What a handler breaks on purpose, once in a bounce: the proof that it would be noticed. */
enum stress_sabotage {
	STRESS_SOUND,
	STRESS_FILL_TWICE,	/* drop the page that was just filled, and fill it again */
	STRESS_DROP_FAULT,	/* never answer a missing fault */
	STRESS_DROP_WP_FAULT,	/* never answer a write-protect fault */
	STRESS_SKIP_WAKE,	/* fill a page and leave its threads asleep */
	STRESS_WRONG_PAGE,	/* fill a page with the contents of the next one */
	STRESS_TORN_PAGE,	/* leave the second half of a page zero */
	STRESS_OLD_PAGE,	/* fill a page with an earlier count */
	STRESS_UNPROTECTED,	/* leave away the protection of a page */
	STRESS_FILL_UNSEEN,	/* keep quiet about having filled a page */
	STRESS_SKIP_PROTECT,	/* copiers: leave away the protection half-way, of every share */
};

/* Whether copiers protect their shares against all accesses, round after round, and what comes of an access then. */
enum stress_rwp {
	STRESS_NO_RWP,
	STRESS_RWP_SYNC,	/* a message, which a handler answers */
	STRESS_RWP_ASYNC,	/* nothing but that the page is accessible again */
	STRESS_RWP_SWITCHING,	/* now this, now that: copiers switch */
};

/* What a thread has done in this bounce. */
struct stress_thread {
	uint64_t accesses;	/* workers: locked, checked and counted up */
	uint64_t missing, wp;	/* handlers: faults read; wp: of any protection */
	uint64_t filled, eexist;	/* handlers, copiers: UFFDIO_COPY that succeeded, and that came second */
	uint64_t unprotected;	/* handlers: UFFDIO_WRITEPROTECT or UFFDIO_RWPROTECT with mode 0 */
	uint64_t repeated;	/* copiers: UFFDIO_COPY of a page they had just filled, all refused with EEXIST */
};

enum stress_failure_kind {
	STRESS_OK,
	STRESS_WORD,		/* word `place` of the page: expected, observed */
	STRESS_IOCTL,		/* request (0: madvise): err (0: none), output; expected: the output there should be */
	STRESS_UNSEEN,		/* a write went through: there should be `expected` un-protections, there are `observed` */
	STRESS_FLAGS,		/* a page fault with the flags `observed` */
	STRESS_EVENT,		/* a message of the kind `observed` */
	STRESS_OUTSIDE,		/* a page fault at the address `observed` */
	STRESS_READ,		/* poll or read of the uffd: err, or `observed` bytes or events */
	STRESS_STUCK,		/* nothing moves: the thread sleeps in what `place` says (enum stress_place) */
	STRESS_THREAD,		/* it could not be started: err */
};

/* Where a thread is. */
enum stress_place {
	STRESS_ELSEWHERE,
	STRESS_READING,		/* the first access to a page */
	STRESS_WRITING,		/* taking the page's lock, counting up, giving it back */
	STRESS_COPYING,
	STRESS_PROTECTING,	/* a copier, from this page on */
};

struct stress_failure {
	enum stress_failure_kind kind;
	enum stress_role role;
	uint64_t thread;	/* its number among those of its role */
	uint64_t page;
	uint64_t place;
	uint64_t expected, observed;
	int err;
	unsigned long request;
	int64_t output;
};

struct stress_config {
	int uffd;
	int blocking;		/* handlers block in read(2); else they poll(2), and the uffd has O_NONBLOCK */
	int wp;			/* pages are filled protected, and each copier protects its share again half-way */
	enum stress_rwp rwp;	/* not together with wp */
	int random;		/* workers draw their pages; else they go through them in order */
	int racing;		/* all workers take the same pages at the same time; else each has its own */
	int private_file;	/* dst is private memory of a file */
	int drop;		/* advice for madvise(2) that frees pages of src or dst */
	uint64_t src, dst;
	uint64_t alias;		/* another mapping of dst, where a copy can be repeated; 0: none */
	uint64_t page_size, nr_pages;
	uint64_t units;		/* threads of each role, at most nr_pages */
	uint64_t seed;		/* of the contents */
	uint64_t draw;		/* of this bounce's random order */
	uint64_t patience;	/* nanoseconds without any progress after which the bounce is given up */
	enum stress_sabotage sabotage;
	uint64_t sabotage_at;	/* the fault of the bounce, missing or write-protect, that it strikes; the first is 0 */

	/* Kept from bounce to bounce, by page. */
	uint64_t *live;		/* what the page counts, kept beside it by whoever holds the page's lock */
	uint64_t *ledger;	/* the same, from what each worker has noted for itself */
	/* Of this bounce, zero before it, by page. */
	uint32_t *missing, *answered;	/* missing faults read; of these, answered with a fill or EEXIST */
	uint32_t *filled;		/* UFFDIO_COPY that succeeded */
	uint32_t *wp_faults;		/* faults of a protection read */
	uint32_t *unprotecting, *unprotected;	/* UFFDIO_WRITEPROTECT or UFFDIO_RWPROTECT with mode 0, begun and done */
	uint32_t *settled;		/* un-protections that a write after the protection half-way needs; 0: not known */
	uint32_t *written_late;		/* accesses of workers that began after the last protection of the page */
	/* With rwp. A page that was there at the last protection, and that nobody has accessed since, is protected still. */
	uint32_t *touches;		/* accesses of workers, counted when they are over */
	uint32_t *touched_before;	/* the same, before the last protection, and one more; 0: the page was not there */
	uint32_t *unprotected_before;	/* un-protections before the last protection */
	/* By role, then by thread: STRESS_ROLES * units. */
	struct stress_thread *threads;
};

/* Write every page of an area, counting 1. */
void stress_fill(const struct stress_config *config, uint64_t area);

/* Compare every word but the lock of every page with the ledger; wrong[page] is set where one differs.  Returns how many
 * pages do, and describes the first. */
uint64_t stress_verify(const struct stress_config *config, uint64_t area, uint8_t *wrong, struct stress_failure *failure);

/* Bounce once; dst is empty and registered.  Returns when all threads have ended: 0, or 1 and the first failure, after
 * which dst is not registered any more. */
int stress_bounce(const struct stress_config *config, struct stress_failure *failure);
