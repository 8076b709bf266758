// SPDX-License-Identifier: GPL-2.0-only
/*
 * Upstream's fault handler on the work of faults.py: this program is linked with the kernel's own uffd-common.c, whose
 * uffd_poll_thread() answers the faults as it does in uffd-stress, and with our measuring loop.
 *
 * upstream_faults KIND MEMORY BYTES THREADS HANDLERS; each line on the standard input is a pass over the area, which
 * is answered with a line: the nanoseconds that it took.
 */
#include "uffd-common.h"

#include "loop.h"

struct kind {
	const char *name;
	uint64_t features;
	bool miss, wp;
};

static const struct kind kinds[] = {
	{ .name = "missing", .miss = true },
	{ .name = "wp", .features = UFFD_FEATURE_PAGEFAULT_FLAG_WP, .wp = true },
};

static const struct memory {
	const char *name;
	int type;
	bool shared;
	uffd_test_ops_t *ops;
} memories[] = {
	{ "anon", TEST_ANON, false, &anon_uffd_test_ops },
	{ "shmem", TEST_SHMEM, true, &shmem_uffd_test_ops },
	{ "hugetlb", TEST_HUGETLB, true, &hugetlb_uffd_test_ops },
	{ "hugetlb-private", TEST_HUGETLB, false, &hugetlb_uffd_test_ops },
};

static const struct kind *find_kind(const char *name)
{
	for (size_t i = 0; i < sizeof(kinds) / sizeof(*kinds); i++)
		if (!strcmp(kinds[i].name, name))
			return &kinds[i];
	err("unknown kind %s", name);
}

static const struct memory *find_memory(const char *name)
{
	for (size_t i = 0; i < sizeof(memories) / sizeof(*memories); i++)
		if (!strcmp(memories[i].name, name))
			return &memories[i];
	err("unknown memory %s", name);
}

static uint64_t bytes(void)
{
	return nr_pages * page_size;
}

/* As faults.py has it: no transparent huge pages, every byte of the source written. */
static void set_up(const struct kind *kind, const struct memory *memory)
{
	uint64_t features = kind->features;
	const char *reason = "no reason";

	if (kind->wp && memory->type != TEST_ANON)
		features |= UFFD_FEATURE_WP_HUGETLBFS_SHMEM;
	if (uffd_test_ctx_init(features, &reason))
		err("context: %s", reason);
	madvise(area_src, bytes(), MADV_NOHUGEPAGE);
	madvise(area_dst, bytes(), MADV_NOHUGEPAGE);
	uffd_test_ops->release_pages(area_src);
	if (kind->miss)
		memset(area_src, 0x5a, bytes());
	else
		memset(area_dst, 0x5a, bytes());
	if (uffd_register(uffd, area_dst, bytes(), kind->miss, kind->wp, false))
		err("register");
}

static void reset(const struct kind *kind)
{
	if (kind->miss)
		uffd_test_ops->release_pages(area_dst);
	else
		wp_range(uffd, (uint64_t)area_dst, bytes(), true);
}

static uint64_t pass(const struct kind *kind, uint32_t threads)
{
	struct loop_work work = { (uint64_t)area_dst, page_size, nr_pages, threads, kind->wp };
	struct loop_result result;
	struct loop *loop;

	reset(kind);
	loop = loop_start(&work);
	if (!loop || loop_wait(loop, -1))
		err("loop");
	loop_finish(loop, &result);
	return result.elapsed;
}

static void start(struct uffd_args *args, pthread_t *handlers)
{
	for (unsigned long i = 0; i < nr_cpus; i++) {
		args[i].cpu = i;
		if (pthread_create(&handlers[i], NULL, uffd_poll_thread, &args[i]))
			err("pthread_create");
	}
}

/* Returns how many faults the handlers have answered. */
static uint64_t stop(const struct uffd_args *args, const pthread_t *handlers)
{
	uint64_t sum = 0;

	for (unsigned long i = 0; i < nr_cpus; i++) {
		if (write(pipefd[2 * i + 1], "", 1) != 1)
			err("write");
		pthread_join(handlers[i], NULL);
		sum += args[i].missing_faults + args[i].wp_faults;
	}
	return sum;
}

int main(int argc, char **argv)
{
	const struct memory *memory;
	const struct kind *kind;
	uint64_t passes = 0, answered;
	struct uffd_args *args;
	pthread_t *handlers;
	char line[80];

	if (argc != 6)
		err("upstream_faults KIND MEMORY BYTES THREADS HANDLERS");
	kind = find_kind(argv[1]);
	memory = find_memory(argv[2]);
	test_type = memory->type;
	map_shared = memory->shared;
	uffd_test_ops = memory->ops;
	page_size = test_type == TEST_HUGETLB ? default_huge_page_size() : (unsigned long)sysconf(_SC_PAGE_SIZE);
	nr_cpus = strtoul(argv[5], NULL, 10);	/* upstream has a pipe, and a handler, for each */
	nr_pages = nr_pages_per_cpu = strtoull(argv[3], NULL, 10) / page_size;
	test_uffdio_copy_eexist = false;
	set_up(kind, memory);
	args = calloc(nr_cpus, sizeof(*args));
	handlers = calloc(nr_cpus, sizeof(*handlers));
	start(args, handlers);
	for (; fgets(line, sizeof(line), stdin); passes++) {
		printf("%" PRIu64 "\n", pass(kind, strtoul(argv[4], NULL, 10)));
		fflush(stdout);
	}
	answered = stop(args, handlers);
	if (answered != passes * nr_pages)
		err("expected %" PRIu64 " faults, the handlers answered %" PRIu64, passes * nr_pages, answered);
	return 0;
}
