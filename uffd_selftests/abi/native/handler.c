// SPDX-License-Identifier: GPL-2.0-only
/* The fault handler's thread; uffd.h describes it. */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <time.h>
#include <unistd.h>

#include "abi.h"
#include "uffd.h"

enum { MAX_UFFDS = 64, MAX_POSTPONED = 1024, MAX_GONE = 256 };

struct uffd_handler {
	struct uffd_handler_config config;
	pthread_t thread;
	int stop_fd;			/* eventfd: readable when the thread is to end */
	atomic_bool stop;

	int uffds[MAX_UFFDS];		/* [0] is the caller's, the rest came from FORK events */
	uint64_t dst[MAX_UFFDS];	/* where the area is for each of them, as REMAP events move it */
	atomic_uint nr_uffds;

	struct { struct msg msg; unsigned int source; } postponed[MAX_POSTPONED];
	unsigned int nr_postponed;
	struct { uint64_t start, end; unsigned int source; } gone[MAX_GONE];
	unsigned int nr_gone;

	struct uffd_stats stats;	/* only the thread counts; Python may ask meanwhile */
	pthread_mutex_t lock;		/* of the failure, for which it may ask, too */
	struct uffd_failure failure;
};

static void count(uint64_t *counter)
{
	__atomic_store_n(counter, *counter + 1, __ATOMIC_RELEASE);
}

static void release(struct uffd_handler *h, unsigned int source)
{
	struct range range = { .start = h->dst[source], .len = h->config.len };

	ioctl(h->uffds[source], UFFDIO_UNREGISTER, &range);
	ioctl(h->uffds[source], UFFDIO_WAKE, &range);
}

static void fail(struct uffd_handler *h, unsigned int source, struct uffd_failure failure)
{
	pthread_mutex_lock(&h->lock);
	if (h->failure.kind == UFFD_OK)
		h->failure = failure;
	pthread_mutex_unlock(&h->lock);
	release(h, source);
}

static void wake(struct uffd_handler *h, unsigned int source, struct range range)
{
	if (ioctl(h->uffds[source], UFFDIO_WAKE, &range))
		fail(h, source, (struct uffd_failure){ UFFD_IOCTL_FAILED, errno, UFFDIO_WAKE, range.start, 0 });
}

static void note_gone(struct uffd_handler *h, unsigned int source, uint64_t start, uint64_t end)
{
	if (h->nr_gone == MAX_GONE) {
		fail(h, source, (struct uffd_failure){ UFFD_TOO_MANY, 0, 0, start, MAX_GONE });
		return;
	}
	h->gone[h->nr_gone].start = start;
	h->gone[h->nr_gone].end = end;
	h->gone[h->nr_gone++].source = source;
}

/* May a fill of this unit legitimately find nothing there any more? */
static bool is_gone(const struct uffd_handler *h, unsigned int source, uint64_t address, int err)
{
	if (err == ESRCH)
		return source > 0;
	for (unsigned int i = 0; err == ENOENT && i < h->nr_gone; i++)
		if (h->gone[i].source == source && h->gone[i].start <= address && address < h->gone[i].end)
			return true;
	return false;
}

/* The argument of a fill ioctl; output points at its output field. */
struct request {
	unsigned long code;
	union {
		struct copy copy;
		struct fill fill;
		struct protect protect;
		struct range range;
	};
	int64_t *output;
};

static void prepare(const struct uffd_handler *h, enum uffd_action action, bool rwp, struct range at, uint64_t offset,
		    struct request *r)
{
	const struct uffd_handler_config *c = &h->config;

	switch (action) {
	case UFFD_COPY:
	case UFFD_MOVE:
		r->code = action == UFFD_COPY ? UFFDIO_COPY : UFFDIO_MOVE;
		r->copy = (struct copy){ at.start, c->src + offset, at.len,
					 action == UFFD_COPY ? c->copy_mode : c->move_mode, 0 };
		r->output = &r->copy.copy;
		break;
	case UFFD_ZEROPAGE:
	case UFFD_CONTINUE:
	case UFFD_POISON:
		r->code = action == UFFD_ZEROPAGE ? UFFDIO_ZEROPAGE :
			  action == UFFD_CONTINUE ? UFFDIO_CONTINUE : UFFDIO_POISON;
		r->fill = (struct fill){ at, action == UFFD_ZEROPAGE ? c->zeropage_mode :
					     action == UFFD_CONTINUE ? c->continue_mode : c->poison_mode, 0 };
		r->output = &r->fill.filled;
		break;
	case UFFD_UNPROTECT:
		r->code = rwp ? UFFDIO_RWPROTECT : UFFDIO_WRITEPROTECT;
		r->protect = (struct protect){ at, 0 };
		r->output = NULL;
		break;
	default:
		r->code = UFFDIO_WAKE;
		r->range = at;
		r->output = NULL;
	}
}

/* A unit that is filled already must be refused with EEXIST, and that refusal must do no harm. */
static void retry(struct uffd_handler *h, unsigned int source, struct request *r, uint64_t offset)
{
	int ret, err;

	if (h->config.retry_at) {
		if (r->code == UFFDIO_COPY)
			r->copy.dst = h->config.retry_at + offset;
		else
			r->fill.range.start = h->config.retry_at + offset;
	}
	*r->output = 0;
	ret = ioctl(h->uffds[source], r->code, &r->copy);
	err = ret ? errno : 0;
	if (err != EEXIST || *r->output != -EEXIST)
		fail(h, source, (struct uffd_failure){ UFFD_NO_EEXIST, err, r->code, h->dst[source] + offset,
						       *r->output });
}

static void flip(uint64_t addr, uint64_t len)
{
	uint64_t *words = (uint64_t *)addr;

	for (uint64_t w = 0; w < len / 8; w++)
		words[w] = ~words[w];
}

static enum uffd_action choose(const struct uffd_handler *h, uint64_t flags, uint64_t offset)
{
	if (flags & FLAG_RWP)
		return h->config.rwp;
	if (flags & FLAG_WP)
		return h->config.wp;
	if (flags & FLAG_MINOR)
		return h->config.minor;
	return h->config.plan ? h->config.plan[offset / h->config.unit] : h->config.missing;
}

/* Answer a page fault.  Returns false when the fill has to be repeated later: a layout change is under way. */
static bool resolve(struct uffd_handler *h, const struct msg *msg, unsigned int source)
{
	uint64_t flags = msg->arg.pagefault.flags, offset = msg->arg.pagefault.address - h->dst[source];
	struct range at = { .len = h->config.unit };
	enum uffd_action action;
	struct request r;
	int64_t output;
	int err;

	if (msg->arg.pagefault.address < h->dst[source] || offset >= h->config.len) {
		fail(h, source, (struct uffd_failure){ UFFD_OUTSIDE, 0, 0, msg->arg.pagefault.address, 0 });
		return true;
	}
	offset -= offset % h->config.unit;
	at.start = h->dst[source] + offset;
	action = choose(h, flags, offset);
	if (action == UFFD_RECORD)
		return true;
	if (action == UFFD_CONTINUE && h->config.flip)
		flip(h->config.flip + offset, h->config.unit);
	for (;;) {
		prepare(h, action, flags & FLAG_RWP, at, offset, &r);
		err = ioctl(h->uffds[source], r.code, &r.copy) ? errno : 0;
		output = r.output ? *r.output : 0;
		if (err != EAGAIN || output <= 0)
			break;
		at.start += output;	/* a part is done */
		at.len -= output;
		offset += output;
	}
	if (!err && r.output && output != (int64_t)at.len) {
		fail(h, source, (struct uffd_failure){ UFFD_SHORT_OUTPUT, 0, r.code, at.start, output });
	} else if (!err) {
		count(&h->stats.resolved);
		if (h->config.retry && (action == UFFD_COPY || action == UFFD_ZEROPAGE || action == UFFD_CONTINUE))
			retry(h, source, &r, offset);
	} else if (err == EEXIST) {
		/* Whoever was first has woken who slept then; this thread came later. */
		count(&h->stats.eexist);
		wake(h, source, at);
	} else if (err == EAGAIN) {
		if (action == UFFD_CONTINUE && h->config.flip)
			flip(h->config.flip + offset, h->config.unit);
		count(&h->stats.eagain);
		return false;
	} else if (is_gone(h, source, at.start, err)) {
		count(&h->stats.gone);
		wake(h, source, at);
	} else {
		fail(h, source, (struct uffd_failure){ UFFD_IOCTL_FAILED, err, r.code, at.start, output });
	}
	return true;
}

static void pagefault(struct uffd_handler *h, const struct msg *msg, unsigned int source)
{
	uint64_t flags = msg->arg.pagefault.flags;

	if (flags & FLAG_RWP)
		count(&h->stats.rwp);
	else if (flags & FLAG_WP)
		count(&h->stats.wp);
	else if (flags & FLAG_MINOR)
		count(&h->stats.minor);
	else
		count(&h->stats.missing);
	if (!(flags & (FLAG_RWP | FLAG_WP | FLAG_MINOR)) && flags & FLAG_WRITE)
		count(&h->stats.write);

	if (resolve(h, msg, source))
		return;
	if (h->nr_postponed == MAX_POSTPONED) {
		fail(h, source, (struct uffd_failure){ UFFD_TOO_MANY, 0, 0, msg->arg.pagefault.address, MAX_POSTPONED });
		return;
	}
	h->postponed[h->nr_postponed].msg = *msg;
	h->postponed[h->nr_postponed++].source = source;
}

static void resolve_postponed(struct uffd_handler *h)
{
	unsigned int left = 0;

	for (unsigned int i = 0; i < h->nr_postponed; i++)
		if (!resolve(h, &h->postponed[i].msg, h->postponed[i].source))
			h->postponed[left++] = h->postponed[i];
	h->nr_postponed = left;
}

static void handle(struct uffd_handler *h, const struct msg *msg, unsigned int source)
{
	unsigned int child = h->nr_uffds;

	if (h->stats.logged < h->config.log_size && !(h->config.log_events_only && msg->event == EVENT_PAGEFAULT)) {
		struct uffd_message *entry = &h->config.log[h->stats.logged];

		memcpy(entry->bytes, msg, sizeof(*msg));
		entry->source = source;
		count(&h->stats.logged);
	}
	count(&h->stats.messages);

	if (h->failure.kind != UFFD_OK) {
		release(h, source);
		return;
	}
	switch (msg->event) {
	case EVENT_PAGEFAULT:
		pagefault(h, msg, source);
		break;
	case EVENT_FORK:
		count(&h->stats.fork);
		if (child == MAX_UFFDS) {
			close(msg->arg.fork.ufd);
			fail(h, source, (struct uffd_failure){ UFFD_TOO_MANY, 0, 0, 0, MAX_UFFDS });
			break;
		}
		h->uffds[child] = msg->arg.fork.ufd;
		h->dst[child] = h->dst[source];
		h->nr_uffds = child + 1;
		break;
	case EVENT_REMAP:
		count(&h->stats.remap);
		if (msg->arg.remap.from == h->dst[source])
			h->dst[source] = msg->arg.remap.to;
		break;
	case EVENT_REMOVE:
		count(&h->stats.remove);
		if (h->config.unregister_removed) {
			struct range range = { msg->arg.remove.start, msg->arg.remove.end - msg->arg.remove.start };

			note_gone(h, source, msg->arg.remove.start, msg->arg.remove.end);
			if (ioctl(h->uffds[source], UFFDIO_UNREGISTER, &range))
				fail(h, source, (struct uffd_failure){ UFFD_IOCTL_FAILED, errno, UFFDIO_UNREGISTER,
								       range.start, 0 });
			/* With per-VMA locks a fault can slip in behind UNREGISTER's own wake and sleep for ever. */
			wake(h, source, range);
		}
		break;
	case EVENT_UNMAP:
		count(&h->stats.unmap);
		note_gone(h, source, msg->arg.remove.start, msg->arg.remove.end);
		break;
	default:
		fail(h, source, (struct uffd_failure){ UFFD_UNKNOWN_EVENT, 0, 0, 0, msg->event });
	}
}

/*
 * Read one message and handle it.  Not as many as there are: another handler of the same userfaultfd takes the next one.
 * Returns false when reading failed for good.
 */
static bool serve(struct uffd_handler *h, unsigned int source)
{
	struct msg msg;
	ssize_t n = read(h->uffds[source], &msg, sizeof(msg));

	if (n < 0 && (errno == EAGAIN || errno == EINTR))
		return true;
	if (n != sizeof(msg)) {
		fail(h, source, (struct uffd_failure){ UFFD_READ_FAILED, n < 0 ? errno : 0, 0, 0, n });
		return false;
	}
	handle(h, &msg, source);
	return true;
}

static void poll_loop(struct uffd_handler *h)
{
	struct pollfd fds[MAX_UFFDS + 1];

	for (;;) {
		unsigned int n = h->nr_uffds;
		bool idle = true;

		for (unsigned int i = 0; i < n; i++)
			fds[i] = (struct pollfd){ .fd = h->uffds[i], .events = POLLIN };
		fds[n] = (struct pollfd){ .fd = h->stop_fd, .events = POLLIN };
		if (poll(fds, n + 1, h->nr_postponed ? 1 : -1) < 0 && errno != EINTR) {
			fail(h, 0, (struct uffd_failure){ UFFD_READ_FAILED, errno, 0, 0, 0 });
			return;
		}
		for (unsigned int i = 0; i < n; i++) {
			if (fds[i].revents & POLLIN) {
				idle = false;
				if (!serve(h, i))
					return;
			} else if (fds[i].revents) {
				fail(h, i, (struct uffd_failure){ UFFD_READ_FAILED, EIO, 0, 0, fds[i].revents });
				return;
			}
		}
		resolve_postponed(h);
		if (idle && !h->nr_postponed && fds[n].revents)
			return;
	}
}

static void blocking_loop(struct uffd_handler *h)
{
	while (!h->stop && serve(h, 0))
		for (resolve_postponed(h); h->nr_postponed && !h->stop; resolve_postponed(h))
			nanosleep(&(struct timespec){ .tv_nsec = 1000000 }, NULL);
}

static void interrupted(int signo)
{
	(void)signo;	/* only to make a blocked read(2) return EINTR */
}

/* At once and for good: a case must leave its process as it was, and handlers may come and go side by side. */
__attribute__((constructor)) static void let_urg_interrupt(void)
{
	struct sigaction act = { .sa_handler = interrupted };

	sigaction(SIGURG, &act, NULL);
}

static void *handler_main(void *arg)
{
	struct uffd_handler *h = arg;

	if (h->config.blocking)
		blocking_loop(h);
	else
		poll_loop(h);
	return NULL;
}

struct uffd_handler *uffd_handler_start(const struct uffd_handler_config *config)
{
	struct uffd_handler *h = calloc(1, sizeof(*h));
	sigset_t all, old;
	int err;

	if (!h)
		return NULL;
	h->config = *config;
	h->uffds[0] = config->uffd;
	h->dst[0] = config->dst;
	h->nr_uffds = 1;
	pthread_mutex_init(&h->lock, NULL);
	h->stop_fd = eventfd(0, EFD_CLOEXEC);
	if (h->stop_fd < 0) {
		free(h);
		return NULL;
	}
	/* Signals are for Python's main thread; only the one that ends a blocking read comes through. */
	sigfillset(&all);
	sigdelset(&all, SIGURG);
	pthread_sigmask(SIG_SETMASK, &all, &old);
	err = pthread_create(&h->thread, NULL, handler_main, h);
	pthread_sigmask(SIG_SETMASK, &old, NULL);
	if (err) {
		close(h->stop_fd);
		free(h);
		errno = err;
		return NULL;
	}
	return h;
}

void uffd_handler_stop(struct uffd_handler *h)
{
	uint64_t one = 1;

	h->stop = true;
	if (write(h->stop_fd, &one, sizeof(one)) != sizeof(one))
		abort();	/* an eventfd of our own that was written once: cannot fail */
	if (h->config.blocking)
		/* A signal that comes before read(2) blocks is lost: repeat it. */
		while (pthread_tryjoin_np(h->thread, NULL) == EBUSY) {
			pthread_kill(h->thread, SIGURG);
			nanosleep(&(struct timespec){ .tv_nsec = 200000 }, NULL);
		}
	else
		pthread_join(h->thread, NULL);
}

void uffd_handler_stats(struct uffd_handler *h, struct uffd_stats *stats)
{
	const uint64_t *from = (const uint64_t *)&h->stats;
	uint64_t *to = (uint64_t *)stats;

	_Static_assert(sizeof(*stats) % sizeof(*to) == 0, "struct uffd_stats is counters and nothing else");
	for (size_t i = 0; i < sizeof(*stats) / sizeof(*to); i++)
		to[i] = __atomic_load_n(&from[i], __ATOMIC_ACQUIRE);
}

void uffd_handler_failure(struct uffd_handler *h, struct uffd_failure *failure)
{
	pthread_mutex_lock(&h->lock);
	*failure = h->failure;
	pthread_mutex_unlock(&h->lock);
}

uint64_t uffd_handler_children(struct uffd_handler *h, int *fds, uint64_t room)
{
	uint64_t n = h->nr_uffds - 1;

	for (uint64_t i = 0; i < n && i < room; i++)
		fds[i] = h->uffds[i + 1];
	return n;
}

void uffd_handler_free(struct uffd_handler *h)
{
	for (unsigned int i = 1; i < h->nr_uffds; i++)
		close(h->uffds[i]);
	close(h->stop_fd);
	pthread_mutex_destroy(&h->lock);
	free(h);
}
