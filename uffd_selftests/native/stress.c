// SPDX-License-Identifier: GPL-2.0-only
/* The threads of a stress run; stress.h describes it. */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "abi.h"
#include "stress.h"

enum {
	BATCH = 4,		/* messages that a handler reads at once */
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

/* ---- pages ------------------------------------------------------------------------------------------------ */

static uint64_t first_word(const struct stress_config *c, uint64_t page)
{
	return (c->seed + page) * 0x9E3779B97F4A7C15ull;
}

static uint64_t last_word(const struct stress_config *c)
{
	return c->page_size / 8 - 1;
}

static uint64_t *words_of(const struct stress_config *c, uint64_t area, uint64_t page)
{
	return (uint64_t *)(area + page * c->page_size);
}

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

/* The first word from the end on that is not what it must be, in steps; 0 (the lock) when all are right. */
static uint64_t wrong_word(const struct stress_config *c, const uint64_t *words, uint64_t page, uint64_t from,
			   uint64_t step)
{
	uint64_t base = first_word(c, page);

	for (uint64_t w = from; w >= 2 && w <= from; w -= step)
		if (words[w] != base + w)
			return w;
	return 0;
}

static bool check_count(const uint64_t *words, uint64_t place, uint64_t page, uint64_t count, struct stress_failure *f)
{
	uint64_t observed = words[place];

	if (observed == count)
		return true;
	*f = (struct stress_failure){ .kind = STRESS_WORD, .page = page, .place = place, .expected = count,
				      .observed = observed };
	return false;
}

static bool check_contents(const struct stress_config *c, const uint64_t *words, uint64_t page, uint64_t from,
			   uint64_t step, struct stress_failure *f)
{
	uint64_t wrong = wrong_word(c, words, page, from, step);

	if (!wrong)
		return true;
	*f = (struct stress_failure){ .kind = STRESS_WORD, .page = page, .place = wrong,
				      .expected = first_word(c, page) + wrong, .observed = words[wrong] };
	return false;
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

/* ---- what all threads do ---------------------------------------------------------------------------------- */

/* Let go whoever sleeps in dst, for good. */
static void release(const struct stress_config *c)
{
	struct range range = { c->dst, c->nr_pages * c->page_size };

	ioctl(c->uffd, UFFDIO_UNREGISTER, &range);
	ioctl(c->uffd, UFFDIO_WAKE, &range);
}

static void fail(struct thread *t, struct stress_failure f)
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

static void fail_ioctl(struct thread *t, uint64_t page, unsigned long request, int err, int64_t output,
		       int64_t expected)
{
	fail(t, (struct stress_failure){ .kind = STRESS_IOCTL, .page = page, .request = request, .err = err,
					 .output = output, .expected = expected });
}

static void at(struct thread *t, enum stress_place place, uint64_t page)
{
	atomic_store_explicit(&t->page, page, memory_order_relaxed);
	atomic_store_explicit(&t->place, place, memory_order_relaxed);
}

/* Only its own thread writes a counter of struct stress_thread. */
static void note(uint64_t *own)
{
	++*own;
}

static void count(uint32_t *by_page)
{
	__atomic_fetch_add(by_page, 1, __ATOMIC_SEQ_CST);
}

static void step(struct bounce *b)
{
	atomic_fetch_add_explicit(&b->steps, 1, memory_order_relaxed);
}

/* Add one to a counter for which await waits. */
static void report(struct bounce *b, uint64_t *counter)
{
	step(b);
	pthread_mutex_lock(&b->lock);
	++*counter;
	pthread_cond_broadcast(&b->changed);
	pthread_mutex_unlock(&b->lock);
}

static void wait_until_open(struct bounce *b)
{
	pthread_mutex_lock(&b->lock);
	while (!b->open && !b->failed)
		pthread_cond_wait(&b->changed, &b->lock);
	pthread_mutex_unlock(&b->lock);
}

static struct copy copy_of(const struct stress_config *c, uint64_t page)
{
	uint64_t offset = page * c->page_size;

	return (struct copy){ c->dst + offset, c->src + offset, c->page_size, c->wp ? COPY_MODE_WP : 0, 0 };
}

/* Fill a page.  Nobody is woken when another one has filled it: that one has woken who waited. */
static bool fill(struct thread *t, uint64_t page, struct copy copy)
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

/* ---- workers ---------------------------------------------------------------------------------------------- */

static uint64_t share_start(const struct stress_config *c, uint64_t number)
{
	return number * c->nr_pages / c->units;
}

static uint64_t share_of(const struct stress_config *c, uint64_t page)
{
	uint64_t number = page * c->units / c->nr_pages;

	while (number + 1 < c->units && share_start(c, number + 1) <= page)
		number++;
	return number;
}

/* splitmix64 */
static uint64_t draw(uint64_t *state)
{
	uint64_t z = *state += 0x9E3779B97F4A7C15ull;

	z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
	z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
	return z ^ (z >> 31);
}

/* Where there are fewer processors than threads: let others in between two pages, now and then, so that they meet. */
static void give_way(uint64_t *state)
{
	if (draw(state) % 4)
		sched_yield();
}

static bool lock_page(struct thread *t, uint64_t *lock)
{
	for (uint64_t free = 0; !__atomic_compare_exchange_n(lock, &free, 1, false, __ATOMIC_ACQUIRE, __ATOMIC_RELAXED);
	     free = 0) {
		if (t->bounce->failed)
			return false;
		sched_yield();
	}
	return true;
}

static uint32_t now(const uint32_t *by_page)
{
	return __atomic_load_n(by_page, __ATOMIC_SEQ_CST);
}

/*
 * Called with the page's lock held, after a write; late tells that it began after the last protection of the share.
 *
 * A page is protected when it is filled, so one un-protection at least came before the write.  If there was a write
 * before the last protection, and no un-protection under way then, a late write needs one more than there were.
 */
static bool check_protection(struct bounce *b, uint64_t page, bool late, struct stress_failure *f)
{
	const struct stress_config *c = b->c;
	uint32_t needed = late && c->settled[page] ? c->settled[page] : 1;
	uint32_t done = now(&c->unprotected[page]), begun = now(&c->unprotecting[page]);

	if (begun < needed) {
		*f = (struct stress_failure){ .kind = STRESS_UNSEEN, .page = page, .expected = needed,
					      .observed = begun };
		return false;
	}
	if (done == begun && !b->protecting[share_of(c, page)])
		c->settled[page] = begun + 1;
	return true;
}

/* The first access to the page is a read, from its end on, where a copy that is under way comes last. */
static bool access_page(struct thread *t, uint64_t page)
{
	struct bounce *b = t->bounce;
	const struct stress_config *c = b->c;
	uint64_t *words = words_of(c, c->dst, page), last = last_word(c);
	uint64_t stride = last > WORDS_CHECKED ? last / WORDS_CHECKED : 1;
	struct stress_failure f;
	bool late;

	at(t, STRESS_READING, page);
	(void)*(volatile uint64_t *)&words[last - 1];
	if (!check_contents(c, words, page, last - 1 - t->stats->accesses % stride, stride, &f)) {
		fail(t, f);
		return false;
	}
	late = b->protected[share_of(c, page)];
	at(t, STRESS_WRITING, page);
	if (!lock_page(t, &words[0]))
		return false;
	if (!check_count(words, 1, page, c->live[page], &f) || !check_count(words, last, page, c->live[page], &f)) {
		fail(t, f);
		return false;
	}
	words[1] = words[last] = ++c->live[page];
	if (c->wp && !check_protection(b, page, late, &f)) {
		fail(t, f);
		return false;
	}
	__atomic_store_n(&words[0], 0, __ATOMIC_RELEASE);
	at(t, STRESS_ELSEWHERE, page);
	if (late)
		count(&c->written_late[page]);
	note(&t->stats->accesses);
	return true;
}

static void work(struct thread *t, uint32_t *tally)
{
	struct bounce *b = t->bounce;
	const struct stress_config *c = b->c;
	uint64_t state = c->draw + (c->racing ? 0 : t->number), ways = ~c->draw + t->number;
	uint64_t page = c->racing ? c->draw % c->nr_pages : share_start(c, t->number);

	for (bool first = true; first || !(b->finished || b->failed); first = false) {
		page = (c->random ? draw(&state) : first ? page : page + 1) % c->nr_pages;
		if (!access_page(t, page))
			return;
		tally[page]++;
		give_way(&ways);
		if (first) {
			report(b, &b->arrived);
			wait_until_open(b);
		}
	}
}

static void *worker_main(void *arg)
{
	struct thread *t = arg;
	struct bounce *b = t->bounce;
	uint32_t *tally = calloc(b->c->nr_pages, sizeof(*tally));

	if (tally)
		work(t, tally);
	else
		fail(t, (struct stress_failure){ .kind = STRESS_THREAD, .err = ENOMEM });
	pthread_mutex_lock(&b->lock);
	for (uint64_t page = 0; tally && page < b->c->nr_pages; page++)
		b->c->ledger[page] += tally[page];
	pthread_mutex_unlock(&b->lock);
	free(tally);
	report(b, &b->left);
	return NULL;
}

/* ---- copiers ---------------------------------------------------------------------------------------------- */

/* A page that is there must be refused, through whichever mapping, and that must do no harm. */
static void repeat(struct thread *t, uint64_t page)
{
	const struct stress_config *c = t->bounce->c;
	struct copy copy = copy_of(c, page);
	int err;

	if (c->alias && page / REPEAT % 2)
		copy.dst = c->alias + page * c->page_size;
	err = ioctl(c->uffd, UFFDIO_COPY, &copy) ? errno : 0;
	if (err == EEXIST && copy.copy == -EEXIST)
		note(&t->stats->repeated);
	else
		fail_ioctl(t, page, UFFDIO_COPY, err, copy.copy, -EEXIST);
}

static void protect_share(struct thread *t, uint64_t start, uint64_t end)
{
	const struct stress_config *c = t->bounce->c;
	struct protect arg = { { c->dst + start * c->page_size, (end - start) * c->page_size }, WRITEPROTECT_MODE_WP };

	at(t, STRESS_PROTECTING, start);
	t->bounce->protecting[t->number] = true;
	if (c->wp && c->sabotage != STRESS_SKIP_PROTECT && ioctl(c->uffd, UFFDIO_WRITEPROTECT, &arg))
		fail_ioctl(t, start, UFFDIO_WRITEPROTECT, errno, 0, 0);
	t->bounce->protected[t->number] = true;
}

static void *copier_main(void *arg)
{
	struct thread *t = arg;
	struct bounce *b = t->bounce;
	uint64_t start = share_start(b->c, t->number), end = share_start(b->c, t->number + 1);
	uint64_t state = b->c->draw - t->number;

	wait_until_open(b);
	for (uint64_t page = start; page < end && !b->failed; page++) {
		if (page == start + (end - start) / 2)
			protect_share(t, start, end);
		at(t, STRESS_COPYING, page);
		if (fill(t, page, copy_of(b->c, page)) && page % REPEAT == 0)
			repeat(t, page);
		at(t, STRESS_ELSEWHERE, page);
		step(b);
		give_way(&state);
	}
	report(b, &b->copied);
	return NULL;
}

/* ---- handlers --------------------------------------------------------------------------------------------- */

/* Whether this fault, of the kind that is to be sabotaged, is the one. */
static bool strikes(struct bounce *b)
{
	return atomic_fetch_add(&b->faults, 1) == b->c->sabotage_at;
}

/* A copy whose source has been tampered with.  The copy is small harm: a broken handler is nothing but a test. */
static void fill_from(struct thread *t, uint64_t page, void (*tamper)(const struct stress_config *, uint64_t *))
{
	const struct stress_config *c = t->bounce->c;
	struct copy copy = copy_of(c, page);
	uint64_t *words = malloc(c->page_size);

	if (!words)
		abort();
	memcpy(words, (void *)copy.src, c->page_size);
	tamper(c, words);
	copy.src = (uint64_t)(uintptr_t)words;
	fill(t, page, copy);
	free(words);
}

static void tear(const struct stress_config *c, uint64_t *words)
{
	memset((uint8_t *)words + c->page_size / 2, 0, c->page_size / 2);
}

static void age(const struct stress_config *c, uint64_t *words)
{
	words[1]--;
	words[last_word(c)]--;
}

static void fill_broken(struct thread *t, uint64_t page)
{
	const struct stress_config *c = t->bounce->c;
	struct copy copy = copy_of(c, page);

	switch (c->sabotage) {
	case STRESS_FILL_TWICE:
		copy.mode |= MODE_DONTWAKE;
		fill(t, page, copy);
		madvise((void *)copy.dst, c->page_size, c->drop);
		fill(t, page, copy_of(c, page));
		break;
	case STRESS_SKIP_WAKE:
		copy.mode |= MODE_DONTWAKE;
		fill(t, page, copy);
		break;
	case STRESS_WRONG_PAGE:
		copy.src = copy_of(c, (page + 1) % c->nr_pages).src;
		fill(t, page, copy);
		break;
	case STRESS_TORN_PAGE:
		fill_from(t, page, tear);
		break;
	case STRESS_OLD_PAGE:
		fill_from(t, page, age);
		break;
	case STRESS_UNPROTECTED:
		copy.mode = 0;
		fill(t, page, copy);
		break;
	default:	/* STRESS_FILL_UNSEEN */
		ioctl(c->uffd, UFFDIO_COPY, &copy);
	}
}

static bool breaks_fills(enum stress_sabotage kind)
{
	return kind != STRESS_SOUND && kind != STRESS_DROP_WP_FAULT && kind != STRESS_SKIP_PROTECT;
}

static void answer_missing(struct thread *t, uint64_t page)
{
	const struct stress_config *c = t->bounce->c;

	note(&t->stats->missing);
	count(&c->missing[page]);
	if (!breaks_fills(c->sabotage) || !strikes(t->bounce))
		fill(t, page, copy_of(c, page));
	else if (c->sabotage == STRESS_DROP_FAULT)
		return;
	else
		fill_broken(t, page);
	count(&c->answered[page]);
}

/*
 * A write to a page that is there is reported as if it were missing: in private memory of a file, do_fault() looks at
 * the page table without its lock, and whoever changes a protection or copies on write clears the entry for a moment.
 * The kernel notices before the thread sleeps, but the message may have been read by then.
 */
static void answer_mistaken(struct thread *t, uint64_t page)
{
	const struct stress_config *c = t->bounce->c;

	note(&t->stats->missing);
	count(&c->missing[page]);
	if (fill(t, page, copy_of(c, page)))
		fail(t, (struct stress_failure){ .kind = STRESS_FLAGS, .page = page, .observed = FLAG_WRITE });
	count(&c->answered[page]);
}

static void answer_wp(struct thread *t, uint64_t page)
{
	const struct stress_config *c = t->bounce->c;
	struct protect arg = { { c->dst + page * c->page_size, c->page_size }, 0 };

	note(&t->stats->wp);
	count(&c->wp_faults[page]);
	if (c->sabotage == STRESS_DROP_WP_FAULT && strikes(t->bounce))
		return;
	count(&c->unprotecting[page]);
	if (ioctl(c->uffd, UFFDIO_WRITEPROTECT, &arg)) {
		fail_ioctl(t, page, UFFDIO_WRITEPROTECT, errno, 0, 0);
		return;
	}
	note(&t->stats->unprotected);
	count(&c->unprotected[page]);
}

static void answer(struct thread *t, const struct msg *msg)
{
	const struct stress_config *c = t->bounce->c;
	uint64_t address = msg->arg.pagefault.address, flags = msg->arg.pagefault.flags;
	uint64_t page = (address - c->dst) / c->page_size;

	if (t->bounce->failed)
		release(c);
	else if (msg->event != EVENT_PAGEFAULT)
		fail(t, (struct stress_failure){ .kind = STRESS_EVENT, .observed = msg->event });
	else if (address < c->dst || page >= c->nr_pages)
		fail(t, (struct stress_failure){ .kind = STRESS_OUTSIDE, .observed = address });
	else if (!flags)
		answer_missing(t, page);
	else if (c->private_file && flags == FLAG_WRITE)
		answer_mistaken(t, page);
	else if (c->wp && flags == (FLAG_WP | FLAG_WRITE))
		answer_wp(t, page);
	else
		fail(t, (struct stress_failure){ .kind = STRESS_FLAGS, .page = page, .observed = flags });
}

/* Read and answer what there is. */
static void serve(struct thread *t)
{
	struct msg msgs[BATCH];
	ssize_t n = read(t->bounce->c->uffd, msgs, sizeof(msgs));

	if (n < 0 && (errno == EAGAIN || errno == EINTR))
		return;
	if (n <= 0 || n % sizeof(struct msg)) {
		fail(t, (struct stress_failure){ .kind = STRESS_READ, .err = n < 0 ? errno : 0, .observed = n });
		return;
	}
	for (size_t i = 0; i < n / sizeof(struct msg); i++)
		answer(t, &msgs[i]);
}

static void *blocking_handler_main(void *arg)
{
	struct thread *t = arg;

	while (!t->bounce->ended)
		serve(t);
	return NULL;
}

static void *polling_handler_main(void *arg)
{
	struct thread *t = arg;
	struct pollfd fds[] = {
		{ .fd = t->bounce->c->uffd, .events = POLLIN },
		{ .fd = t->bounce->stop_fd, .events = POLLIN },
	};

	while (!t->bounce->ended) {
		if (poll(fds, 2, -1) < 0 && errno != EINTR)
			fail(t, (struct stress_failure){ .kind = STRESS_READ, .err = errno });
		else if (fds[0].revents & ~POLLIN)
			fail(t, (struct stress_failure){ .kind = STRESS_READ, .observed = fds[0].revents });
		else if (fds[0].revents)
			serve(t);
	}
	return NULL;
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

	start(b, STRESS_HANDLER, c->blocking ? blocking_handler_main : polling_handler_main);
	start(b, STRESS_WORKER, worker_main);
	start(b, STRESS_COPIER, copier_main);
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
