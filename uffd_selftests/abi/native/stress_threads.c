// SPDX-License-Identifier: GPL-2.0-only
/* The threads of a stress run: workers, copiers, handlers. */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "stress_parts.h"

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
	count(&c->touches[page]);
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

void *stress_worker_main(void *arg)
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

/* The pages up to there are filled.  What begins after the last protection must know that there will be none after it. */
static void rwprotect_share(struct thread *t, uint64_t start, uint64_t there, uint64_t end, bool last)
{
	const struct stress_config *c = t->bounce->c;
	struct protect arg = { { c->dst + start * c->page_size, (end - start) * c->page_size }, RWPROTECT_MODE_RWP };

	at(t, STRESS_PROTECTING, start);
	for (uint64_t page = start; page < there; page++) {
		c->unprotected_before[page] = now(&c->unprotected[page]);
		c->touched_before[page] = now(&c->touches[page]) + 1;
	}
	if (c->sabotage != STRESS_SKIP_PROTECT && ioctl(c->uffd, UFFDIO_RWPROTECT, &arg))
		fail_ioctl(t, start, UFFDIO_RWPROTECT, errno, 0, 0);
	if (last)
		t->bounce->protected[t->number] = true;
}

static void switch_mode(struct thread *t, bool async)
{
	struct set_mode mode = { async ? FEATURE_RWP_ASYNC : 0, async ? 0 : FEATURE_RWP_ASYNC };

	if (ioctl(t->bounce->c->uffd, UFFDIO_SET_MODE, &mode))
		fail_ioctl(t, 0, UFFDIO_SET_MODE, errno, 0, 0);
}

/* Protect the share if it is time to, before this page is filled. */
static void protect_in_time(struct thread *t, uint64_t start, uint64_t page, uint64_t end, uint64_t *state)
{
	const struct stress_config *c = t->bounce->c;
	uint64_t every = end - start > ROUNDS ? (end - start) / ROUNDS : 1;

	if (!c->rwp) {
		if (page == start + (end - start) / 2)
			protect_share(t, start, end);
		return;
	}
	if ((page - start) % every != every / 2)
		return;
	if (c->rwp == STRESS_RWP_SWITCHING)
		switch_mode(t, draw(state) % 2);
	rwprotect_share(t, start, page, end, page + every >= end);
}

void *stress_copier_main(void *arg)
{
	struct thread *t = arg;
	struct bounce *b = t->bounce;
	uint64_t start = share_start(b->c, t->number), end = share_start(b->c, t->number + 1);
	uint64_t state = b->c->draw - t->number;

	wait_until_open(b);
	for (uint64_t page = start; page < end && !b->failed; page++) {
		protect_in_time(t, start, page, end, &state);
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
	unsigned long request = c->rwp ? UFFDIO_RWPROTECT : UFFDIO_WRITEPROTECT;

	note(&t->stats->wp);
	count(&c->wp_faults[page]);
	if (c->sabotage == STRESS_DROP_WP_FAULT && strikes(t->bounce))
		return;
	count(&c->unprotecting[page]);
	if (ioctl(c->uffd, request, &arg)) {
		fail_ioctl(t, page, request, errno, 0, 0);
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
	else if ((c->rwp == STRESS_RWP_SYNC || c->rwp == STRESS_RWP_SWITCHING) && (flags & ~FLAG_WRITE) == FLAG_RWP)
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

void *stress_blocking_handler_main(void *arg)
{
	struct thread *t = arg;

	while (!t->bounce->ended)
		serve(t);
	return NULL;
}

void *stress_polling_handler_main(void *arg)
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
