/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * The measuring loop: threads that touch memory and time each access.
 *
 * It is linked into a library for faults.py, and into a program with upstream's fault handler.  cffi reads this file as
 * it is, so it holds declarations and nothing for the preprocessor.
 */

enum {
	/* The histogram has LOOP_STEPS buckets for each power of two of nanoseconds, and one for each of the first
	 * LOOP_STEPS nanoseconds: a latency is known to 3 %. */
	LOOP_STEPS = 32,
	LOOP_BUCKETS = 1920,
};

struct loop_work {
	uint64_t start, page_size, nr_pages;
	uint32_t threads;	/* each has its own pages, next to each other; at most nr_pages */
	uint32_t write;		/* an atomic or with zero; else a load */
};

struct loop_result {
	uint64_t elapsed;	/* nanoseconds from the first access of any thread to the end of the last one */
	uint64_t slowest;	/* nanoseconds of the slowest access */
	uint64_t count[LOOP_BUCKETS];	/* accesses by latency */
};

struct loop;

/* Start the threads, which touch every page once and block all signals.  NULL and errno on failure. */
struct loop *loop_start(const struct loop_work *work);

/* Wait until they have ended: 0, or -1 and errno, which is ETIMEDOUT after so many milliseconds and EINTR after a
 * signal. */
int loop_wait(struct loop *loop, int milliseconds);

/* Join the threads, say what they have measured, and free the loop. */
void loop_finish(struct loop *loop, struct loop_result *result);

/* The smallest latency that a bucket counts, in nanoseconds. */
uint64_t loop_latency(uint32_t bucket);
