// The functions of runtime/cuda/wgmma.cuh in plain C++: see there for what each one does.
//
// A product reads a, places and b when its batch is waited for, as late as the hardware may; its sums are NaN until no
// batch that adds to them is left. So a slot or a register used again too early, a missing wait or a missing
// begin_products shows. A run of bytes is copied when a thread waits for its barrier.
#pragma once

#ifndef CLUSTER
#define CLUSTER SPLIT  // blocks of a cluster along x, and none along y
#endif

namespace emulator {
inline u32 cluster_rank() { return here->block.x % CLUSTER + here->block.y * CLUSTER; }
}  // namespace emulator

namespace emulator {

struct Product {
  float* d;
  const uint4* a;
  const u32* places;
  u64 b;
  int tokens, selector, batch;
};

struct Sums {
  float* d;
  int count, unfinished;
  float value[128];
};

struct Products {  // of one thread
  bool begun;
  Index block;
  int open, count;  // the number of the open batch, products not yet done
  Product waiting[64];
  Sums sums[8];
};

static Products* products() {  // static: each kernel has its own
  static Products all[8][512];
  if (here->thread.x >= 512) fail("wgmma.cuh emulates at most 512 threads a block");
  Products* own = &all[cluster_rank()][here->thread.x];
  const Index block = here->block;
  const bool same = own->block.x == block.x && own->block.y == block.y && own->block.z == block.z;
  if (!same) *own = Products(), own->block = block;
  return own;
}

struct Begin {
  const Product* product;
};

inline void check_begin(void** slots, u32) {
  const Product* first = ((const Begin*)slots[0])->product;
  for (int t = 1; t < 128; t++) {
    const Product* own = ((const Begin*)slots[t])->product;
    if (own->b != first->b) fail("a sparse product: threads 0 and %d of a warpgroup describe different tiles of b", t);
  }
}

inline void begin(float* d, int tokens, int selector, const uint4* a, const u32* places, u64 b, int line) {
  Products* own = products();
  if (!own->begun) fail("a sparse product without begin_products after the last commit_products");
  if (own->count == 64) fail("more than 64 products unfinished");
  Sums* sums = nullptr;
  for (Sums& s : own->sums)
    if (s.unfinished != 0 && s.d == d) sums = &s;
  if (sums == nullptr) {
    for (Sums& s : own->sums)
      if (s.unfinished == 0) sums = &s;
    if (sums == nullptr || sums->unfinished != 0) fail("more than 8 sets of sums unfinished");
    sums->d = d, sums->count = tokens / 2;
    for (int i = 0; i < tokens / 2; i++) sums->value[i] = d[i], d[i] = __uint_as_float(0xffffffffu);
  }
  sums->unfinished++;
  own->waiting[own->count++] = {d, a, places, b, tokens, selector, own->open};
  Begin slot = {&own->waiting[own->count - 1]};
  meet(warpgroup_scope, ~0u, "a sparse product", line, check_begin, &slot);
}

// b[k][token]: element k of a token's row, through the swizzle of 128 bytes on whole addresses.
inline void read_tile(float* b, u64 description, int tokens) {
  const u32 start = (u32)(description & 0x3fff) << 4, stride = (u32)((description >> 32) & 0x3fff) << 4;
  if ((description >> 62) != 1) fail("a sparse product: b is described without the swizzle of 128 bytes");
  if ((description >> 49) & 7) fail("a sparse product: b has a base offset; its tile must start at a multiple of 1024");
  for (int token = 0; token < tokens; token++)
    for (int k = 0; k < 32; k += 8) {
      u32 address = start + token / 8 * stride + token % 8 * 128 + k * 2;
      address ^= ((address >> 7) & 7) << 4;
      const u16* piece = (const u16*)shared_place(address, 16, 16, "a sparse product");
      for (int i = 0; i < 8; i++) b[(k + i) * 256 + token] = to_float(piece[i]);
    }
}

inline void do_product(Products** threads, int number) {
  static float b[32 * 256];
  const Product& first = threads[0]->waiting[number];
  read_tile(b, first.b, first.tokens);
  for (int row = 0; row < 64; row++) {
    const int warp = row / 16, q = row % 8, low = row / 8 % 2;
    Products* const quad[4] = {threads[warp * 32 + 4 * q], threads[warp * 32 + 4 * q + 1],
                               threads[warp * 32 + 4 * q + 2], threads[warp * 32 + 4 * q + 3]};
    double sums[256] = {};
    for (int group = 0; group < 8; group++) {
      const Product& holder = quad[group % 4]->waiting[number];
      const u32 words[4] = {holder.a->x, holder.a->y, holder.a->z, holder.a->w};
      const u32 pair = words[2 * (group / 4) + low];
      const u32 word = *quad[2 * holder.selector + group / 4]->waiting[number].places;
      const u32 bits = (word >> (16 * low + 4 * (group % 4))) & 15u, one = bits & 3u, two = bits >> 2;
      if (one >= two) fail("a sparse product: row %d, group %d: places %u, %u do not ascend", row, group, one, two);
      const double first_value = to_float((u16)(pair & 0xffffu)), second_value = to_float((u16)(pair >> 16));
      const float *x = b + (4 * group + one) * 256, *z = b + (4 * group + two) * 256;
      for (int token = 0; token < first.tokens; token++)
        sums[token] += first_value * (double)x[token] + second_value * (double)z[token];
    }
    for (int c = 0; c < 4; c++)
      for (Sums& s : quad[c]->sums)
        if (s.unfinished != 0 && s.d == quad[c]->waiting[number].d)
          for (int j = 0; j < first.tokens / 8; j++)
            for (int i = 0; i < 2; i++) s.value[4 * j + 2 * low + i] += (float)sums[8 * j + 2 * c + i];
  }
}

struct Wait {
  Products* own;
  int pending;
};

inline void finish_products(void** slots, u32) {
  Products* threads[128];
  for (int t = 0; t < 128; t++) threads[t] = ((Wait*)slots[t])->own;
  const int until = threads[0]->open - ((Wait*)slots[0])->pending;
  for (int t = 0; t < 128; t++)
    if (threads[t]->count != threads[0]->count || threads[t]->open != threads[0]->open)
      fail("wait_products: threads 0 and %d of a warpgroup began different products", t);
  int done = 0;
  for (; done < threads[0]->count && threads[0]->waiting[done].batch < until; done++) do_product(threads, done);
  for (Products* own : threads) {
    for (int i = 0; i < done; i++)
      for (Sums& s : own->sums) {
        if (s.unfinished == 0 || s.d != own->waiting[i].d) continue;
        if (--s.unfinished == 0) __builtin_memcpy(s.d, s.value, s.count * sizeof(float));
      }
    own->count -= done;
    __builtin_memmove(own->waiting, own->waiting + done, own->count * sizeof(Product));
  }
}

}  // namespace emulator

template <int Pending>
inline void wait_copies_for_products() {
  emulator::finish_copies(Pending);
}
inline void begin_products() { emulator::products()->begun = true; }
inline void commit_products() { emulator::products()->begun = false, emulator::products()->open++; }
template <int Pending>
inline void wait_products(int line = __builtin_LINE()) {
  emulator::Wait slot = {emulator::products(), Pending};
  emulator::meet(emulator::warpgroup_scope, ~0u, "wait_products", line, emulator::finish_products, &slot);
}
template <int Count>
inline void take_sums(float (&)[Count]) {
  if (emulator::products()->count != 0) emulator::fail("take_sums before all products are done");
}

inline u64 describe(u32 shared) {
  return (1ull << 62) | ((1024ull >> 4) << 32) | (1ull << 16) | ((shared & 0x3ffffu) >> 4);
}

template <int Selector, int N>
struct SparseProduct {
  static_assert(Selector == 0 || Selector == 1, "lanes 0, 1 or 2, 3 of each four hold the places");
  static_assert(N % 8 == 0 && N >= 8 && N <= 256, "8 to 256 tokens");
  static void begin(float (&d)[N / 2], const uint4& a, const u32& places, u64 b, int line = __builtin_LINE()) {
    emulator::begin(d, N, Selector, &a, &places, b, line);
  }
};

template <int Count>
inline void give_registers() {}
template <int Count>
inline void take_registers() {}

// ---- barriers and runs of bytes -------------------------------------------------------------------------------------

namespace emulator {

struct Barrier {  // its 8 bytes of shared memory
  int bytes;      // expected and not yet copied; negative where copies came first
  u16 phase;      // phases that have ended
  u8 left, arrivals;
};

struct Run {  // a copy under way: done when a thread waits for its barrier, as late as the hardware may
  u8* to;
  const u8* from;
  int bytes;
  Barrier* barrier;
};

struct Runs {
  int count;
  Run under_way[4096];
};

static Runs* runs() {
  static Runs all;
  return &all;
}

inline void advance(Barrier* barrier) {
  if (barrier->left == 0 && barrier->bytes == 0) barrier->phase++, barrier->left = barrier->arrivals;
}

inline void arrive(Barrier* barrier, int bytes) {
  if (barrier->left == 0) fail("a barrier of %d arrivals has one more in a phase", barrier->arrivals);
  barrier->left--, barrier->bytes += bytes;
  advance(barrier);
}

inline void land(Barrier* barrier) {
  Runs* all = runs();
  int kept = 0;
  for (int i = 0; i < all->count; i++) {
    const Run run = all->under_way[i];
    if (run.barrier != barrier) {
      all->under_way[kept++] = run;
      continue;
    }
    __builtin_memcpy(run.to, run.from, run.bytes);
    barrier->bytes -= run.bytes;
  }
  all->count = kept;
  advance(barrier);
}

struct BarrierWait {
  Barrier* barrier;
  int phase;
};

inline bool phase_ended(void* context) {
  const BarrierWait* wait = (const BarrierWait*)context;
  land(wait->barrier);
  const int ended = wait->barrier->phase - wait->phase;
  if (ended < 0 || ended > 1)
    fail("wait_barrier: phase %d, but %d have ended: parity cannot tell", wait->phase, wait->barrier->phase);
  return ended == 1;
}

inline Barrier* barrier_at(u32 address, u32 rank, const char* who) {
  return (Barrier*)cluster_place(address, sizeof(Barrier), 8, rank, who);
}

inline void copy_run(u32 shared, const void* global, int bytes, u32 barrier, u32 rank) {
  u8* const to = cluster_place(shared, (u32)bytes, 16, rank, "copy_run");
  const u8* const from = (const u8*)global;
  check_aligned(global, 16, "copy_run");
  if (bytes <= 0 || bytes % 16 != 0) fail("copy_run: %d bytes", bytes);
  for (int i = 0; i < bytes; i += 15) (void)*(const volatile u8*)(from + i);  // traps here, at the copy at fault
  __builtin_memset(to, 0xff, (size_t)bytes);
  if (runs()->count == 4096) fail("copy_run: more than 4096 copies under way");
  runs()->under_way[runs()->count++] = {to, from, bytes, barrier_at(barrier, rank, "copy_run")};
}

}  // namespace emulator

inline void start_barrier(u32 barrier, int arrivals) {
  emulator::Barrier* own = (emulator::Barrier*)emulator::shared_place(barrier, 8, 8, "start_barrier");
  *own = {0, 0, (u8)arrivals, (u8)arrivals};
  emulator::Runs* all = emulator::runs();
  for (int i = all->count; i-- > 0;)  // left by a launch that failed
    if (all->under_way[i].barrier == own) all->under_way[i] = all->under_way[--all->count];
}
inline void expect_bytes(u32 barrier, int bytes) {
  emulator::arrive((emulator::Barrier*)emulator::shared_place(barrier, 8, 8, "expect_bytes"), bytes);
}
inline void arrive_at(u32 barrier, u32 rank) { emulator::arrive(emulator::barrier_at(barrier, rank, "arrive_at"), 0); }
inline void wait_barrier(u32 barrier, int phase, int line = __builtin_LINE()) {
  emulator::BarrierWait wait = {(emulator::Barrier*)emulator::shared_place(barrier, 8, 8, "wait_barrier"), phase};
  emulator::wait_until("wait_barrier", line, emulator::phase_ended, &wait);
}
inline void copy_run(u32 shared, const void* global, int bytes, u32 barrier) {
  emulator::copy_run(shared, global, bytes, barrier, emulator::cluster_rank());
}
inline void copy_run_to_all(u32 shared, const void* global, int bytes, u32 barrier, u32 blocks) {
  for (u32 rank = 0; rank < 8; rank++)
    if ((blocks >> rank) & 1) emulator::copy_run(shared, global, bytes, barrier, rank);
}
