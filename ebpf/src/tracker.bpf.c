/* SPDX-License-Identifier: MIT OR GPL-2.0-only
 *
 * Marks every block of one disk whose write has completed.
 *
 * Two identical copies (a, b) of every program are attached: the kernel skips a program that is already running on
 * the same CPU, so a write is lost only if both copies were skipped, and then both say so in recursion_misses.
 *
 * What must never happen here: a completed write that is neither marked nor counted in `state`.
 */
#include <linux/types.h>
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_core_read.h>

typedef __u32 u32;
typedef __u64 u64;

#define KERNEL_TYPE __attribute__((preserve_access_index))

/* Only the fields that are used; CO-RE finds where they lie in the running kernel (5.15 and newer). */
struct gendisk {
	int major;
	int first_minor;
} KERNEL_TYPE;
struct request_queue {
	struct gendisk *disk;
} KERNEL_TYPE;
struct block_device {
	struct gendisk *bd_disk;
} KERNEL_TYPE;
struct bvec_iter { /* packed in the kernel; left natural here, which CO-RE relocates all the same */
	u64 bi_sector;
	u32 bi_size;
} KERNEL_TYPE;
struct bio {
	struct bio *bi_next;
	struct block_device *bi_bdev;
	u32 bi_opf;
	struct bvec_iter bi_iter;
} KERNEL_TYPE;
struct request {
	struct request_queue *q;
	u32 cmd_flags;
	u64 __sector;
	struct bio *bio;
} KERNEL_TYPE;

/* include/linux/blk_types.h: the low 8 bits are the operation, odd ones carry data to the device. */
#define OP_MASK 0xff
#define OP_TO_DEVICE 1
#define OP_DISCARD 3
#define OP_PASSTHROUGH 32
#define SECTOR_SHIFT 9
/* The longest request is 2^32 bytes: 2^23 blocks of 512 bytes, 2^11 groups, 2^5 words of the coarse bitmap. */
#define COARSE_WORDS_MAX 34
#define DISCARD_RANGES_MAX 256
#define EEXIST 17

const volatile u32 disk_major = 0;
const volatile u32 disk_minor = 0;
const volatile u32 block_shift = 12;
const volatile u64 disk_blocks = 0;

/* Slots of `state`: how often something happened that leaves a doubt. Numbered as in src/lib.rs. */
enum { PASSTHROUGH, TABLE_FULL, DISCARD_TOO_LONG, BEYOND_END, LOST_COMPLETION, STATE_SLOTS = 8 };

#define SHARED_ARRAY(name, value_type, entries)            \
	struct {                                           \
		__uint(type, BPF_MAP_TYPE_ARRAY);          \
		__uint(map_flags, BPF_F_MMAPABLE);         \
		__uint(max_entries, entries);              \
		__type(key, u32);                          \
		__type(value, value_type);                 \
	} name SEC(".maps")

/* One bit a block, set here and cleared by user space. */
SHARED_ARRAY(live, u64, 1);
/* One bit for 64 words of `live` (4096 blocks), for huge writes. */
SHARED_ARRAY(coarse, u64, 1);
/* Only user space uses these two; they live here so that they are as long-lived as the bitmaps. */
SHARED_ARRAY(pending, u64, 1);
SHARED_ARRAY(meta, u64, 96);
SHARED_ARRAY(state, u64, STATE_SLOTS);

/* One slot a CPU, a cache line each. Not atomic: copy a cannot run twice at once on one CPU. */
struct cpu_count {
	u64 written_sectors;
	u64 discarded_sectors;
	u64 queued_sectors;
	u64 request; /* that copy a is marking or has marked last */
	u64 unused[4];
};
SHARED_ARRAY(counts, struct cpu_count, 1);

/* Writes in flight on a bio-based disk, by the address of the bio. */
struct range {
	u64 sector;
	u64 bytes;
};
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1);
	__type(key, u64);
	__type(value, struct range);
} inflight SEC(".maps");

static __always_inline void doubt(u32 slot)
{
	u64 *p = bpf_map_lookup_elem(&state, &slot);
	if (p)
		__sync_fetch_and_add(p, 1);
}

static __always_inline struct cpu_count *count_of_this_cpu(void)
{
	u32 cpu = bpf_get_smp_processor_id();
	return bpf_map_lookup_elem(&counts, &cpu);
}

/* Apart as the kernel counts them (op_stat_group); not every driver counts its discards. */
static __always_inline void count_completed(struct cpu_count *count, u32 op, u64 bytes)
{
	if (!count)
		return;
	if (op == OP_DISCARD)
		count->discarded_sectors += bytes >> SECTOR_SHIFT;
	else
		count->written_sectors += bytes >> SECTOR_SHIFT;
}

/* Sets bits of a word, unless they are all set already.
 *
 * A bit found set is enough: user space clears a bit (atomically) only to read the block from the disk afterwards, so
 * whoever set the bit we see, it will be cleared later than now, and the read that follows comes later than this write,
 * which is complete. Nothing is lost by not setting it again, and a block that is written often costs no locked instruction.
 */
#define SET_BITS(map, word, bits)                                             \
	do {                                                                  \
		u32 key_ = (word);                                            \
		u64 bits_ = (bits), *p_ = bpf_map_lookup_elem(&map, &key_);   \
		if (p_ && (*(volatile u64 *)p_ & bits_) != bits_)             \
			__sync_fetch_and_or(p_, bits_);                       \
	} while (0)

/* The loops below are functions of their own, not static (the verifier then looks at each once) and without a branch on
 * the data: with one, the verifier's million instructions do not suffice.
 */
__noinline int mark_words(u32 word, u32 end) /* [word, end), at most 64 */
{
	for (int i = 0; i < 64; i++) {
		if (word >= end)
			break;
		u64 *p = bpf_map_lookup_elem(&live, &word);
		if (p)
			__sync_fetch_and_or(p, ~0ULL);
		word++;
	}
	return 0;
}

__noinline int mark_coarse_words(u32 word, u32 end) /* [word, end), at most COARSE_WORDS_MAX */
{
	/* Not behind the loop: clang would carry a flag through it, which Linux 6.1 follows in both ways each time round. */
	if (end - word > COARSE_WORDS_MAX)
		doubt(DISCARD_TOO_LONG);
	for (int i = 0; i < COARSE_WORDS_MAX; i++) {
		if (word >= end)
			break;
		u64 *p = bpf_map_lookup_elem(&coarse, &word);
		if (p)
			__sync_fetch_and_or(p, ~0ULL);
		word++;
	}
	return 0;
}

__noinline int mark_groups(u32 group, u32 end) /* [group, end), at least one */
{
	u32 first = group >> 6, last = (end - 1) >> 6;
	u64 from = ~0ULL << (group & 63), to = ~0ULL >> (63 - ((end - 1) & 63));

	if (first == last) {
		SET_BITS(coarse, first, from & to);
		return 0;
	}
	SET_BITS(coarse, first, from);
	SET_BITS(coarse, last, to);
	mark_coarse_words(first + 1, last);
	return 0;
}

__noinline int mark(u64 sector, u64 bytes)
{
	if (!bytes)
		return 0;
	u64 first = (sector << SECTOR_SHIFT) >> block_shift;
	u64 last = ((sector << SECTOR_SHIFT) + bytes - 1) >> block_shift;

	if (last >= disk_blocks) { /* the disk has grown since the bitmap was made */
		doubt(BEYOND_END);
		if (first >= disk_blocks)
			return 0;
		last = disk_blocks - 1;
	}
	u32 word = first >> 6, last_word = last >> 6;
	u64 from = ~0ULL << (first & 63), to = ~0ULL >> (63 - (last & 63));

	if (word == last_word) {
		SET_BITS(live, word, from & to);
		return 0;
	}
	SET_BITS(live, word, from);
	SET_BITS(live, last_word, to);
	word++;
	if (word >= last_word)
		return 0;

	/* [word, last_word) are whole words; those up to the next border of a group, whole groups, the rest. */
	u32 group = (word + 63) >> 6, group_end = last_word >> 6;
	if (group >= group_end) {
		u32 middle = group << 6;
		if (middle > last_word)
			middle = last_word;
		mark_words(word, middle);
		mark_words(middle, last_word);
		return 0;
	}
	mark_words(word, group << 6);
	mark_groups(group, group_end);
	mark_words(group_end << 6, last_word);
	return 0;
}

static __always_inline int is_ours(struct gendisk *disk)
{
	return disk && (u32)disk->first_minor == disk_minor && (u32)disk->major == disk_major;
}

/* ---- disks with a request queue: what is in the request at its completion is all there is to know ---- */

/* Copy b has nothing to do where copy a has run for this event. Copy a writes down which request it is at before it
 * marks it, and copy b, which runs next on this CPU, takes that back. Copy a is only ever skipped while it is at work for
 * another request, on this CPU: then that one's address is written down, and copy b marks. The address could only be
 * left over from an earlier event if copy b was skipped in that one; both counts of skipped runs have then risen.
 */
static __always_inline int complete_request(u64 *ctx, int is_first_copy)
{
	struct request *rq = (void *)ctx[0];
	u32 bytes = ctx[2];
	u32 op = rq->cmd_flags & OP_MASK;

	if (!(op & OP_TO_DEVICE))
		return 0;
	struct cpu_count *cpu = count_of_this_cpu();
	if (!is_first_copy && cpu && cpu->request == (u64)rq) {
		cpu->request = 0;
		return 0;
	}
	if (!is_ours(rq->q->disk))
		return 0;
	if (is_first_copy) {
		if (cpu)
			cpu->request = (u64)rq;
		count_completed(cpu, op, bytes);
	}
	if (op >= OP_PASSTHROUGH) { /* the sector is in the command, in a language of its own */
		doubt(PASSTHROUGH);
		return 0;
	}
	struct bio *bio = rq->bio;
	if (op == OP_DISCARD && bio && bio->bi_next) { /* merged: every bio may be a range of its own */
		for (int i = 0; i < DISCARD_RANGES_MAX; i++) {
			mark(bio->bi_iter.bi_sector, bio->bi_iter.bi_size);
			bio = bio->bi_next;
			if (!bio)
				return 0;
		}
		doubt(DISCARD_TOO_LONG);
		return 0;
	}
	mark(rq->__sector, bytes);
	return 0;
}

SEC("tp_btf/block_rq_complete") int rq_complete_a(u64 *ctx) { return complete_request(ctx, 1); }
SEC("tp_btf/block_rq_complete") int rq_complete_b(u64 *ctx) { return complete_request(ctx, 0); }

/* ---- disks without one: a completed bio has forgotten its range, so it is remembered from when it was queued ---- */

static __always_inline void remember(u64 key, struct range *range)
{
	long error = bpf_map_update_elem(&inflight, &key, range, BPF_NOEXIST);
	if (error == -EEXIST) {
		/* A bio is in flight only once, so the end of its last flight was not seen. */
		doubt(LOST_COMPLETION);
		error = bpf_map_update_elem(&inflight, &key, range, BPF_ANY);
	}
	if (error)
		doubt(TABLE_FULL);
}

static __always_inline int queue_bio(struct bio *bio, int is_first_copy)
{
	if (!(bio->bi_opf & OP_TO_DEVICE) || !bio->bi_bdev || !is_ours(bio->bi_bdev->bd_disk))
		return 0;
	u64 key = (u64)bio;
	/* Empty ones (flushes) too: a completion without an entry then means a part that was split off. */
	struct range range = { .sector = bio->bi_iter.bi_sector, .bytes = bio->bi_iter.bi_size };

	if (is_first_copy) {
		remember(key, &range);
		struct cpu_count *count = count_of_this_cpu();
		if (count)
			count->queued_sectors += range.bytes >> SECTOR_SHIFT;
		return 0;
	}
	struct range *known = bpf_map_lookup_elem(&inflight, &key);
	if (known && known->sector == range.sector && known->bytes == range.bytes)
		return 0;
	remember(key, &range);
	return 0;
}

static __always_inline int complete_bio(struct bio *bio, int counts_sectors)
{
	if (!(bio->bi_opf & OP_TO_DEVICE))
		return 0;
	u64 key = (u64)bio;
	struct range *known = bpf_map_lookup_elem(&inflight, &key);

	if (known) {
		mark(known->sector, known->bytes);
		if (counts_sectors)
			count_completed(count_of_this_cpu(), bio->bi_opf & OP_MASK, known->bytes);
		bpf_map_delete_elem(&inflight, &key);
		return 0;
	}
	/* A part split off a bio whose entry still waits (copy b: or copy a was here). The entry marks it all. */
	if (bio->bi_iter.bi_size && bio->bi_bdev && is_ours(bio->bi_bdev->bd_disk))
		mark(bio->bi_iter.bi_sector, bio->bi_iter.bi_size);
	return 0;
}

SEC("tp_btf/block_bio_queue") int bio_queue_a(u64 *ctx) { return queue_bio((void *)ctx[0], 1); }
SEC("tp_btf/block_bio_queue") int bio_queue_b(u64 *ctx) { return queue_bio((void *)ctx[0], 0); }
SEC("tp_btf/block_bio_complete") int bio_complete_a(u64 *ctx) { return complete_bio((void *)ctx[1], 1); }
SEC("tp_btf/block_bio_complete") int bio_complete_b(u64 *ctx) { return complete_bio((void *)ctx[1], 0); }

char LICENSE[] SEC("license") = "Dual MIT/GPL";
