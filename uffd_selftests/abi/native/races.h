/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Threads that race: each makes one system call, or one access, over and over, and counts what became of it.
 *
 * Like uffd.h this is read by cffi as it is.
 */

enum uffd_race_kind {
	UFFD_RACE_TOUCH,	/* access the byte at args[0]: a load, or with number UFFD_WRITE a write of nothing */
	UFFD_RACE_SYSCALL,	/* the system call number, with args */
	UFFD_RACE_IOCTL,	/* ioctl(2) number on fd; args are the words of its argument */
};

enum { UFFD_RACE_OUTCOMES = 176, UFFD_RACE_SIGNALS = 140 };

struct uffd_racer {
	enum uffd_race_kind kind;
	int fd;
	uint64_t number;
	uint64_t args[6];		/* of step 0 */
	uint64_t strides[6];		/* what each step adds to them */
	uint64_t count;			/* steps in a round */
	uint64_t rounds;		/* 0: go round until the race ends */
	int output;			/* which word of the argument is the output field; -1: none */
	int again[2];			/* repeat a step for as long as it says one of these errnos; 0: never */
	/* What became of it; may be read while it runs. */
	uint64_t steps;				/* done so far, repetitions not counted */
	uint64_t outcomes[176];			/* by errno, 0 success, from UFFD_RACE_SIGNALS on by signal */
	uint64_t wrong_outputs;			/* neither the length (args[output - 2]) nor -errno */
};

struct uffd_race;

/* Start the threads, which begin at the same time.  NULL and errno on failure. */
struct uffd_race *uffd_race_start(struct uffd_racer *racers, uint64_t count);

/* Wait for uffd_race_finish() and for the racers that have an end; then stop the others, and free the race. */
void uffd_race_join(struct uffd_race *race);

/* Let uffd_race_join(), which another thread has called, come to its end. */
void uffd_race_finish(struct uffd_race *race);

