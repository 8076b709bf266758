// SPDX-License-Identifier: GPL-2.0-only
/* A stress run; stress.h describes it. */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "stress_parts.h"

/* ---- pages ------------------------------------------------------------------------------------------------ */

void stress_fill(const struct stress_config *c, uint64_t area)
{
	for (uint64_t page = 0; page < c->nr_pages; page++) {
		uint64_t *words = words_of(c, area, page), last = last_word(c);

		words[0] = 0;
		for (uint64_t w = 2; w < last; w++)
			words[w] = first_word(c, page) + w;
		words[1] = words[last] = 1;
	}
}

uint64_t stress_verify(const struct stress_config *c, uint64_t area, uint8_t *wrong, struct stress_failure *failure)
{
	uint64_t found = 0, last = last_word(c);

	for (uint64_t page = 0; page < c->nr_pages; page++) {
		const uint64_t *words = words_of(c, area, page);
		struct stress_failure f;

		if (check_contents(c, words, page, last - 1, 1, &f) &&
		    check_count(words, 1, page, c->ledger[page], &f) &&
		    check_count(words, last, page, c->ledger[page], &f))
			continue;
		wrong[page] = 1;
		if (!found++)
			*failure = f;
	}
	return found;
}

/* ---- the bounce ------------------------------------------------------------------------------------------- */

static struct thread *thread_of(struct bounce *b, enum stress_role role, uint64_t number)
{
	return &b->threads[role * b->c->units + number];
}

/* Say who sleeps: a reader first, for it may be the one whose lock another one waits for. */
static void fail_stuck(struct bounce *b)
{
	static const enum stress_place order[] = { STRESS_READING, STRESS_WRITING, STRESS_COPYING, STRESS_PROTECTING };

	for (size_t i = 0; i < sizeof(order) / sizeof(*order); i++)
		for (uint64_t n = 0; n < STRESS_ROLES * b->c->units; n++) {
			struct thread *t = &b->threads[n];

			if (t->place == (int)order[i]) {
				fail(t, (struct stress_failure){ .kind = STRESS_STUCK, .page = t->page,
								 .place = order[i] });
				return;
			}
		}
	fail(thread_of(b, STRESS_HANDLER, 0), (struct stress_failure){ .kind = STRESS_STUCK });
}

/* Wait until all units are counted, as long as something moves. */
static bool await(struct bounce *b, const uint64_t *counter)
{
	bool stuck = false;

	pthread_mutex_lock(&b->lock);
	while (*counter < b->c->units && !b->failed && !stuck) {
		uint64_t seen = b->steps;
		struct timespec until;

		clock_gettime(CLOCK_MONOTONIC, &until);
		until.tv_sec += (until.tv_nsec + b->c->patience) / 1000000000;
		until.tv_nsec = (until.tv_nsec + b->c->patience) % 1000000000;
		if (pthread_cond_timedwait(&b->changed, &b->lock, &until) == ETIMEDOUT)
			stuck = b->steps == seen;
	}
	pthread_mutex_unlock(&b->lock);
	if (stuck)
		fail_stuck(b);
	return !b->failed;
}

static void start(struct bounce *b, enum stress_role role, void *(*main)(void *))
{
	pthread_attr_t attr;

	pthread_attr_init(&attr);
	pthread_attr_setstacksize(&attr, STACK);
	for (uint64_t n = 0; n < b->c->units && !b->failed; n++) {
		struct thread *t = thread_of(b, role, n);
		int err = pthread_create(&t->pthread, &attr, main, t);

		if (err)
			fail(t, (struct stress_failure){ .kind = STRESS_THREAD, .err = err });
		else
			b->started++;
	}
	pthread_attr_destroy(&attr);
}

/* Threads are started role by role. */
static bool runs(const struct bounce *b, enum stress_role role, uint64_t number)
{
	static const enum stress_role order[] = { STRESS_HANDLER, STRESS_WORKER, STRESS_COPIER };
	uint64_t place = 0;

	while (order[place] != role)
		place++;
	return place * b->c->units + number < b->started;
}

static void join(struct bounce *b, enum stress_role role)
{
	for (uint64_t n = 0; n < b->c->units; n++)
		if (runs(b, role, n))
			pthread_join(thread_of(b, role, n)->pthread, NULL);
}

static void stop_handlers(struct bounce *b)
{
	uint64_t one = 1;

	b->ended = true;
	if (write(b->stop_fd, &one, sizeof(one)) != sizeof(one))
		abort();	/* an eventfd of our own that was written once: cannot fail */
	for (uint64_t n = 0; n < b->c->units; n++) {
		if (!b->c->blocking || !runs(b, STRESS_HANDLER, n))
			continue;
		/* A signal that comes before read(2) blocks is lost: repeat it. */
		while (pthread_tryjoin_np(thread_of(b, STRESS_HANDLER, n)->pthread, NULL) == EBUSY) {
			pthread_kill(thread_of(b, STRESS_HANDLER, n)->pthread, SIGURG);
			nanosleep(&(struct timespec){ .tv_nsec = 200000 }, NULL);
		}
	}
	if (!b->c->blocking)
		join(b, STRESS_HANDLER);
}

static void open_gate(struct bounce *b)
{
	pthread_mutex_lock(&b->lock);
	b->open = true;
	pthread_cond_broadcast(&b->changed);
	pthread_mutex_unlock(&b->lock);
}

/*
 * The order matters.  No copier starts before each worker has met a missing page, so that no bounce goes by without a
 * fault.  The source goes while workers and handlers still run: a handler that is late copies from what is empty now,
 * and must be told EEXIST.
 */
static void run(struct bounce *b)
{
	const struct stress_config *c = b->c;

	start(b, STRESS_HANDLER, c->blocking ? stress_blocking_handler_main : stress_polling_handler_main);
	start(b, STRESS_WORKER, stress_worker_main);
	start(b, STRESS_COPIER, stress_copier_main);
	if (await(b, &b->arrived))
		open_gate(b);
	if (await(b, &b->copied) && madvise((void *)c->src, c->nr_pages * c->page_size, c->drop))
		fail_ioctl(thread_of(b, STRESS_COPIER, 0), 0, 0, errno, 0, 0);
	b->finished = true;
	await(b, &b->left);
	join(b, STRESS_COPIER);
	join(b, STRESS_WORKER);
	stop_handlers(b);
}

static void init_sync(struct bounce *b)
{
	pthread_condattr_t attr;

	pthread_condattr_init(&attr);
	pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
	pthread_cond_init(&b->changed, &attr);
	pthread_condattr_destroy(&attr);
	pthread_mutex_init(&b->lock, NULL);
}

static bool init(struct bounce *b)
{
	const struct stress_config *c = b->c;

	b->stop_fd = eventfd(0, EFD_CLOEXEC);
	b->threads = calloc(STRESS_ROLES * c->units, sizeof(*b->threads));
	b->protecting = calloc(c->units, sizeof(*b->protecting));
	b->protected = calloc(c->units, sizeof(*b->protected));
	if (b->stop_fd < 0 || !b->threads || !b->protecting || !b->protected)
		return false;
	for (uint64_t n = 0; n < STRESS_ROLES * c->units; n++)
		b->threads[n] = (struct thread){ .bounce = b, .role = n / c->units, .number = n % c->units,
						 .stats = &c->threads[n] };
	return true;
}

int stress_bounce(const struct stress_config *config, struct stress_failure *failure)
{
	struct bounce b = { .c = config };
	sigset_t all, old;

	init_sync(&b);
	/* Signals are for Python's main thread; only the one that ends a blocking read comes through. */
	sigfillset(&all);
	sigdelset(&all, SIGURG);
	pthread_sigmask(SIG_SETMASK, &all, &old);
	if (init(&b))
		run(&b);
	else
		b.failure = (struct stress_failure){ .kind = STRESS_THREAD, .err = errno };
	pthread_sigmask(SIG_SETMASK, &old, NULL);
	if (b.stop_fd >= 0)
		close(b.stop_fd);
	free(b.threads);
	free(b.protecting);
	free(b.protected);
	pthread_cond_destroy(&b.changed);
	pthread_mutex_destroy(&b.lock);
	*failure = b.failure;
	return failure->kind != STRESS_OK;
}
