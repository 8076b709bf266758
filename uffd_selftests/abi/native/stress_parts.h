/* SPDX-License-Identifier: GPL-2.0-only */
/* What the parts of a stress run have in common: the bounce, its threads, pages, and what all threads do. */
#ifndef STRESS_PARTS_H
#define STRESS_PARTS_H

#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/ioctl.h>

#include "abi.h"
#include "stress.h"

enum {
	BATCH = 4,		/* messages that a handler reads at once */
	ROUNDS = 8,		/* a copier protects its share as often, with rwp */
	REPEAT = 16,		/* a copier repeats one copy of so many, for its EEXIST */
	WORDS_CHECKED = 512,	/* at most, at each access */
	STACK = 256 << 10,
};

struct thread {
	struct bounce *bounce;
	enum stress_role role;
	uint64_t number;
	struct stress_thread *stats;
	pthread_t pthread;
	_Atomic uint64_t page;		/* of its place */
	_Atomic int place;
};

struct bounce {
	const struct stress_config *c;
	struct thread *threads;
	uint64_t started;		/* how many of them run */
	atomic_bool *protecting;	/* by copier: its share is about to get its last protection */
	atomic_bool *protected;		/* by copier: it has got it */
	int stop_fd;			/* eventfd: readable when the handlers are to end */

	atomic_bool failed;		/* everybody is to end */
	atomic_bool finished;		/* the workers are to end */
	atomic_bool ended;		/* the handlers are to end */
	_Atomic uint64_t faults;	/* that could be sabotaged */
	_Atomic uint64_t steps;		/* changes as long as the bounce gets on */

	pthread_mutex_t lock;		/* of what follows, and of the ledger */
	pthread_cond_t changed;
	uint64_t arrived;		/* workers that have had their first access */
	bool open;			/* everybody goes on after it */
	uint64_t copied;		/* copiers that have ended */
	uint64_t left;			/* workers that have ended */
	struct stress_failure failure;
};

/* The threads, by role. */
void *stress_worker_main(void *arg);
void *stress_copier_main(void *arg);
void *stress_blocking_handler_main(void *arg);
void *stress_polling_handler_main(void *arg);

/* ---- pages ------------------------------------------------------------------------------------------------ */

static inline uint64_t first_word(const struct stress_config *c, uint64_t page)
{
	return (c->seed + page) * 0x9E3779B97F4A7C15ull;
}

static inline uint64_t last_word(const struct stress_config *c)
{
	return c->page_size / 8 - 1;
}

static inline uint64_t *words_of(const struct stress_config *c, uint64_t area, uint64_t page)
{
	return (uint64_t *)(area + page * c->page_size);
}

/* The first word from the end on that is not what it must be, in steps; 0 (the lock) when all are right. */
static inline uint64_t wrong_word(const struct stress_config *c, const uint64_t *words, uint64_t page, uint64_t from,
			   uint64_t step)
{
	uint64_t base = first_word(c, page);

	for (uint64_t w = from; w >= 2 && w <= from; w -= step)
		if (words[w] != base + w)
			return w;
	return 0;
}

static inline bool check_count(const uint64_t *words, uint64_t place, uint64_t page, uint64_t count, struct stress_failure *f)
{
	uint64_t observed = words[place];

	if (observed == count)
		return true;
	*f = (struct stress_failure){ .kind = STRESS_WORD, .page = page, .place = place, .expected = count,
				      .observed = observed };
	return false;
}

static inline bool check_contents(const struct stress_config *c, const uint64_t *words, uint64_t page, uint64_t from,
			   uint64_t step, struct stress_failure *f)
{
	uint64_t wrong = wrong_word(c, words, page, from, step);

	if (!wrong)
		return true;
	*f = (struct stress_failure){ .kind = STRESS_WORD, .page = page, .place = wrong,
				      .expected = first_word(c, page) + wrong, .observed = words[wrong] };
	return false;
}

/* ---- what all threads do ---------------------------------------------------------------------------------- */

/* Let go whoever sleeps in dst, for good. */
static inline void release(const struct stress_config *c)
{
	struct range range = { c->dst, c->nr_pages * c->page_size };

	ioctl(c->uffd, UFFDIO_UNREGISTER, &range);
	ioctl(c->uffd, UFFDIO_WAKE, &range);
}

static inline void fail(struct thread *t, struct stress_failure f)
{
	struct bounce *b = t->bounce;

	f.role = t->role;
	f.thread = t->number;
	pthread_mutex_lock(&b->lock);
	if (b->failure.kind == STRESS_OK)
		b->failure = f;
	b->failed = true;
	pthread_cond_broadcast(&b->changed);
	pthread_mutex_unlock(&b->lock);
	release(b->c);
}

static inline void fail_ioctl(struct thread *t, uint64_t page, unsigned long request, int err, int64_t output,
		       int64_t expected)
{
	fail(t, (struct stress_failure){ .kind = STRESS_IOCTL, .page = page, .request = request, .err = err,
					 .output = output, .expected = expected });
}

static inline void at(struct thread *t, enum stress_place place, uint64_t page)
{
	atomic_store_explicit(&t->page, page, memory_order_relaxed);
	atomic_store_explicit(&t->place, place, memory_order_relaxed);
}

/* Only its own thread writes a counter of struct stress_thread. */
static inline void note(uint64_t *own)
{
	++*own;
}

static inline void count(uint32_t *by_page)
{
	__atomic_fetch_add(by_page, 1, __ATOMIC_SEQ_CST);
}

static inline void step(struct bounce *b)
{
	atomic_fetch_add_explicit(&b->steps, 1, memory_order_relaxed);
}

/* Add one to a counter for which await waits. */
static inline void report(struct bounce *b, uint64_t *counter)
{
	step(b);
	pthread_mutex_lock(&b->lock);
	++*counter;
	pthread_cond_broadcast(&b->changed);
	pthread_mutex_unlock(&b->lock);
}

static inline void wait_until_open(struct bounce *b)
{
	pthread_mutex_lock(&b->lock);
	while (!b->open && !b->failed)
		pthread_cond_wait(&b->changed, &b->lock);
	pthread_mutex_unlock(&b->lock);
}

static inline struct copy copy_of(const struct stress_config *c, uint64_t page)
{
	uint64_t offset = page * c->page_size;

	return (struct copy){ c->dst + offset, c->src + offset, c->page_size, c->wp ? COPY_MODE_WP : 0, 0 };
}

/* Fill a page.  Nobody is woken when another one has filled it: that one has woken who waited. */
static inline bool fill(struct thread *t, uint64_t page, struct copy copy)
{
	const struct stress_config *c = t->bounce->c;
	int err = ioctl(c->uffd, UFFDIO_COPY, &copy) ? errno : 0;

	if (!err && copy.copy == (int64_t)c->page_size) {
		count(&c->filled[page]);
		note(&t->stats->filled);
		return true;
	}
	if (err == EEXIST && copy.copy == -EEXIST)
		note(&t->stats->eexist);
	else
		fail_ioctl(t, page, UFFDIO_COPY, err, copy.copy, c->page_size);
	return false;
}

#endif
