// SPDX-License-Identifier: GPL-2.0-only
/* Threads that race; races.h describes them. */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "uffd.h"
#include "races.h"

enum {
	STACK_SIZE = 128 << 10,	/* thousands of threads must fit */
	FEW = 16,		/* up to so many threads wait for each other, else they would hardly meet */
	YIELD = 16,		/* steps after which such a thread lets others run that share its processor */
};

struct thread {
	pthread_t id;
	struct uffd_racer *racer;
	struct uffd_race *race;
};

struct uffd_race {
	pthread_mutex_t lock;
	pthread_cond_t changed;
	enum { WAIT, GO, QUIT } gate;
	bool finish;			/* nothing else is to happen during the race */
	atomic_uint ready;		/* threads behind the gate */
	atomic_bool over;		/* those without an end are to stop */
	uint64_t count;
	struct thread threads[];
};

/* Make one step; returns its outcome. */
static unsigned int step(struct uffd_racer *r, const uint64_t args[6])
{
	uint64_t words[6];
	struct uffd_trap trap;
	long ret;

	switch (r->kind) {
	case UFFD_RACE_TOUCH:
		uffd_touch(args[0], 1, 1, r->number, &trap);
		return trap.signo ? UFFD_RACE_SIGNALS + trap.signo : 0;
	case UFFD_RACE_SYSCALL:
		ret = syscall(r->number, args[0], args[1], args[2], args[3], args[4], args[5]);
		return ret == -1 ? errno : 0;
	case UFFD_RACE_IOCTL:
		memcpy(words, args, sizeof(words));
		ret = ioctl(r->fd, r->number, words) ? errno : 0;
		if (r->output >= 0 && ret != EBADF &&
		    (int64_t)words[r->output] != (ret ? -ret : (int64_t)args[r->output - 2]))
			r->wrong_outputs++;
		return ret;
	}
	return EINVAL;
}

static bool repeat(const struct uffd_racer *r, unsigned int outcome)
{
	return outcome && ((int)outcome == r->again[0] || (int)outcome == r->again[1]);
}

static void make_round(struct uffd_race *race, struct uffd_racer *r)
{
	uint64_t args[6];

	memcpy(args, r->args, sizeof(args));
	for (uint64_t i = 0; i < r->count && !(race->over && !r->rounds); i++) {
		unsigned int outcome;

		do {
			outcome = step(r, args);
			r->outcomes[outcome < UFFD_RACE_OUTCOMES ? outcome : EINVAL]++;
		} while (repeat(r, outcome) && !race->over);
		__atomic_store_n(&r->steps, r->steps + 1, __ATOMIC_RELAXED);
		if (race->count <= FEW && i % YIELD == YIELD - 1)
			sched_yield();
		for (int w = 0; w < 6; w++)
			args[w] += r->strides[w];
	}
}

/* Have neighbours run on different processors from the first step on: the scheduler would take longer than the race. */
static void move_to_cpu(unsigned int number)
{
	cpu_set_t allowed, one;
	int cpu = -1;

	if (sched_getaffinity(0, sizeof(allowed), &allowed))
		return;
	for (number %= CPU_COUNT(&allowed); cpu < CPU_SETSIZE - 1; ) {
		if (CPU_ISSET(++cpu, &allowed) && !number--)
			break;
	}
	CPU_ZERO(&one);
	CPU_SET(cpu, &one);
	sched_setaffinity(0, sizeof(one), &one);
}

static void *race_main(void *arg)
{
	struct thread *thread = arg;
	struct uffd_race *race = thread->race;
	struct uffd_racer *r = thread->racer;

	pthread_mutex_lock(&race->lock);
	while (race->gate == WAIT)
		pthread_cond_wait(&race->changed, &race->lock);
	pthread_mutex_unlock(&race->lock);
	if (race->gate == QUIT)
		return NULL;
	if (race->count <= FEW)
		move_to_cpu(thread - race->threads);
	race->ready++;
	while (race->count <= FEW && race->ready < race->count)
		sched_yield();
	for (uint64_t round = 0; r->rounds ? round < r->rounds : !race->over; round++)
		make_round(race, r);
	return NULL;
}

static void open_gate(struct uffd_race *race, int gate)
{
	pthread_mutex_lock(&race->lock);
	race->gate = gate;
	pthread_cond_broadcast(&race->changed);
	pthread_mutex_unlock(&race->lock);
}

static void destroy(struct uffd_race *race)
{
	pthread_cond_destroy(&race->changed);
	pthread_mutex_destroy(&race->lock);
	free(race);
}

struct uffd_race *uffd_race_start(struct uffd_racer *racers, uint64_t count)
{
	struct uffd_race *race = calloc(1, sizeof(*race) + count * sizeof(race->threads[0]));
	struct uffd_trap trap;
	pthread_attr_t attr;
	int err = 0;

	if (!race)
		return NULL;
	pthread_mutex_init(&race->lock, NULL);
	pthread_cond_init(&race->changed, NULL);
	/* Have the handlers of guarded accesses installed now: threads that did it at a time would disturb each other. */
	uffd_touch((uint64_t)(uintptr_t)&trap, 1, 1, UFFD_READ, &trap);
	pthread_attr_init(&attr);
	pthread_attr_setstacksize(&attr, STACK_SIZE);
	while (race->count < count) {
		struct thread *thread = &race->threads[race->count];

		*thread = (struct thread){ .racer = &racers[race->count], .race = race };
		err = pthread_create(&thread->id, &attr, race_main, thread);
		if (err)
			break;
		race->count++;
	}
	pthread_attr_destroy(&attr);
	open_gate(race, err ? QUIT : GO);
	if (!err)
		return race;
	for (uint64_t i = 0; i < race->count; i++)
		pthread_join(race->threads[i].id, NULL);
	destroy(race);
	errno = err;
	return NULL;
}

static void join(struct uffd_race *race, bool endless)
{
	for (uint64_t i = 0; i < race->count; i++)
		if (!race->threads[i].racer->rounds == endless)
			pthread_join(race->threads[i].id, NULL);
}

void uffd_race_finish(struct uffd_race *race)
{
	pthread_mutex_lock(&race->lock);
	race->finish = true;
	pthread_cond_broadcast(&race->changed);
	pthread_mutex_unlock(&race->lock);
}

void uffd_race_join(struct uffd_race *race)
{
	join(race, false);
	pthread_mutex_lock(&race->lock);
	while (!race->finish)
		pthread_cond_wait(&race->changed, &race->lock);
	pthread_mutex_unlock(&race->lock);
	race->over = true;
	join(race, true);
	destroy(race);
}
