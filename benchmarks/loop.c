// SPDX-License-Identifier: GPL-2.0-only
/* The measuring loop; loop.h describes it. */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#include "loop.h"

enum { STEPS_LOG2 = 5 };
_Static_assert(1 << STEPS_LOG2 == LOOP_STEPS, "LOOP_STEPS is a power of two");
_Static_assert((64 - STEPS_LOG2 + 1) * LOOP_STEPS == LOOP_BUCKETS, "every 64-bit number has a bucket");

struct toucher {
	struct loop *loop;
	pthread_t thread;
	uint64_t first, end;		/* pages */
	uint64_t began, ended;		/* nanoseconds */
	struct loop_result result;
};

struct loop {
	struct loop_work work;
	pthread_mutex_t gate;		/* held until all threads are there */
	bool cancelled;			/* not all could be started */
	uint32_t started;
	_Atomic uint32_t left;		/* threads that have not ended */
	int ended_fd;			/* eventfd: readable when all have */
	struct toucher touchers[];
};

static uint64_t now(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return ts.tv_sec * UINT64_C(1000000000) + ts.tv_nsec;
}

static uint32_t bucket_of(uint64_t latency)
{
	uint32_t shift;

	if (latency < LOOP_STEPS)
		return latency;
	shift = 63 - __builtin_clzll(latency) - STEPS_LOG2;
	return shift * LOOP_STEPS + (latency >> shift);
}

uint64_t loop_latency(uint32_t bucket)
{
	uint32_t shift;

	if (bucket < 2 * LOOP_STEPS)
		return bucket;
	shift = bucket / LOOP_STEPS - 1;
	return (uint64_t)(bucket - shift * LOOP_STEPS) << shift;
}

static void access_byte(uint64_t address, bool write)
{
	uint8_t zero = 0;

	/* Hide the zero, else the compiler may make a load and a fence of it. */
	__asm__ volatile("" : "+r"(zero));
	if (write)
		__atomic_fetch_or((uint8_t *)address, zero, __ATOMIC_RELAXED);
	else
		(void)*(volatile uint8_t *)address;
}

static void *touch(void *arg)
{
	struct toucher *t = arg;
	struct loop *loop = t->loop;
	const uint64_t one = 1;

	pthread_mutex_lock(&loop->gate);
	pthread_mutex_unlock(&loop->gate);
	if (loop->cancelled)
		return NULL;
	t->began = now();
	for (uint64_t page = t->first; page < t->end; page++) {
		uint64_t before = now(), latency;

		access_byte(loop->work.start + page * loop->work.page_size, loop->work.write);
		latency = now() - before;
		t->result.count[bucket_of(latency)]++;
		if (latency > t->result.slowest)
			t->result.slowest = latency;
	}
	t->ended = now();
	if (--loop->left == 0 && write(loop->ended_fd, &one, sizeof(one)) != sizeof(one))
		abort();	/* an eventfd of our own that was written once: cannot fail */
	return NULL;
}

/* Returns an error number. */
static int start_threads(struct loop *loop)
{
	const struct loop_work *work = &loop->work;
	int err = 0;

	for (; loop->started < work->threads && !err; loop->started += !err) {
		struct toucher *t = &loop->touchers[loop->started];

		t->loop = loop;
		t->first = work->nr_pages * loop->started / work->threads;
		t->end = work->nr_pages * (loop->started + 1) / work->threads;
		err = pthread_create(&t->thread, NULL, touch, t);
	}
	return err;
}

struct loop *loop_start(const struct loop_work *work)
{
	struct loop *loop = calloc(1, sizeof(*loop) + work->threads * sizeof(*loop->touchers));
	sigset_t all, old;
	int err;

	if (!loop)
		return NULL;
	loop->work = *work;
	loop->left = work->threads;
	loop->ended_fd = eventfd(0, EFD_CLOEXEC);
	if (loop->ended_fd < 0) {
		free(loop);
		return NULL;
	}
	pthread_mutex_init(&loop->gate, NULL);
	pthread_mutex_lock(&loop->gate);
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &old);
	err = start_threads(loop);
	pthread_sigmask(SIG_SETMASK, &old, NULL);
	loop->cancelled = err != 0;
	pthread_mutex_unlock(&loop->gate);
	if (err) {
		struct loop_result nothing;

		loop_finish(loop, &nothing);
		errno = err;
		return NULL;
	}
	return loop;
}

int loop_wait(struct loop *loop, int milliseconds)
{
	struct pollfd ended = { .fd = loop->ended_fd, .events = POLLIN };
	int ready = poll(&ended, 1, milliseconds);

	if (!ready)
		errno = ETIMEDOUT;
	return ready > 0 ? 0 : -1;
}

void loop_finish(struct loop *loop, struct loop_result *result)
{
	uint64_t began = UINT64_MAX, ended = 0;

	memset(result, 0, sizeof(*result));
	for (uint32_t i = 0; i < loop->started; i++) {
		const struct toucher *t = &loop->touchers[i];

		pthread_join(t->thread, NULL);
		began = t->began < began ? t->began : began;
		ended = t->ended > ended ? t->ended : ended;
		if (t->result.slowest > result->slowest)
			result->slowest = t->result.slowest;
		for (uint32_t b = 0; b < LOOP_BUCKETS; b++)
			result->count[b] += t->result.count[b];
	}
	result->elapsed = ended - began;
	pthread_mutex_destroy(&loop->gate);
	close(loop->ended_fd);
	free(loop);
}
