// The machine of machine.h: blocks of one cluster at a time, all their threads as fibers.

#include <csignal>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <pthread.h>
#include <sys/time.h>

#include <algorithm>
#include <string>
#include <utility>

#include "fibers.h"

namespace emulator {

const Position* here = nullptr;

namespace {

struct Meeting {
  const char* name;
  Compute compute;
  u32 mask;
  std::vector<void*> slots;
  std::vector<Fiber*> arrived;
};

struct Machine {
  const Launch* launch = nullptr;
  Invoke invoke = nullptr;
  std::vector<u64> values;
  std::vector<Guarded> memories;
  std::vector<Guarded> shared;  // one a block of the cluster

  std::vector<Fiber*> pool;
  u32 warps = 0, blocks = 0, fibers = 0;  // warps a block, blocks a cluster, fibers in it
  std::vector<std::vector<Fiber*>> runnable;  // by warp
  std::vector<u32> busy, busy_place;           // warps with runnable fibers, and where each stands in that list
  std::vector<u32> priority;                   // of each warp
  std::vector<Fiber*> polling;
  std::vector<u32> alive;                      // threads left, by block
  std::vector<std::vector<Meeting>> meetings;  // by unit: warps, warpgroups, blocks, the cluster

  Fiber* current = nullptr;
  u32 last_warp = 0, policy = 0;
  u64 random = 0;
  pthread_t thread;
  jmp_buf scheduler;
  sigjmp_buf stopped;
};

Machine machine;

u64 next_random() {  // splitmix64
  u64 z = machine.random += 0x9e3779b97f4a7c15ull;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  return z ^ (z >> 31);
}

u32 below(u32 limit) { return (u32)((next_random() >> 32) * limit >> 32); }

u32 warp_of(const Fiber* f) { return f->rank * machine.warps + f->linear / 32; }

void make_runnable(Fiber* f) {
  const u32 warp = warp_of(f);
  if (machine.runnable[warp].empty()) {
    machine.busy_place[warp] = (u32)machine.busy.size();
    machine.busy.push_back(warp);
  }
  machine.runnable[warp].push_back(f);
}

// 0: any warp; 1: the last warp as long as it can; 2: warps by a fixed order of importance. Within a warp, any lane.
Fiber* choose() {
  if (machine.busy.empty()) return nullptr;
  u32 warp = machine.busy[below((u32)machine.busy.size())];
  if (machine.policy == 1 && !machine.runnable[machine.last_warp].empty()) warp = machine.last_warp;
  if (machine.policy == 2)
    for (u32 other : machine.busy)
      if (machine.priority[other] > machine.priority[warp]) warp = other;
  std::vector<Fiber*>& lanes = machine.runnable[warp];
  std::swap(lanes[below((u32)lanes.size())], lanes.back());
  Fiber* const chosen = lanes.back();
  lanes.pop_back();
  if (lanes.empty()) {
    const u32 place = machine.busy_place[warp], moved = machine.busy.back();
    machine.busy[place] = moved, machine.busy_place[moved] = place;
    machine.busy.pop_back();
  }
  machine.last_warp = warp;
  return chosen;
}

void leave() {
  if (!_setjmp(machine.current->place)) _longjmp(machine.scheduler, 1);
}

[[noreturn]] void stop() { siglongjmp(machine.stopped, 1); }

void complete(std::vector<Meeting>& open, size_t at) {
  Meeting done = std::move(open[at]);
  open.erase(open.begin() + (long)at);
  if (done.compute != nullptr) done.compute(done.slots.data(), done.mask);
  for (Fiber* f : done.arrived) {
    f->waits_for = nullptr;
    if (f != machine.current) make_runnable(f);
  }
}

u32 unit_of(Scope scope, const Fiber* f) {
  const u32 all_warps = machine.warps * machine.blocks, groups = (machine.warps + 3) / 4;
  if (scope == warp_scope) return warp_of(f);
  if (scope == warpgroup_scope) return all_warps + f->rank * groups + f->linear / 128;
  if (scope == block_scope) return all_warps + groups * machine.blocks + f->rank;
  return all_warps + (groups + 1) * machine.blocks;
}

u32 alive_in_cluster() {
  u32 sum = 0;
  for (u32 n : machine.alive) sum += n;
  return sum;
}

void exit_fiber() {
  Fiber* const f = machine.current;
  if (!f->copies.empty())
    fail("the thread ended with %zu background copies that it never waited for", f->copies.size());
  f->exited = true;
  machine.alive[f->rank]--;
  machine.fibers--;
  std::vector<Meeting>& block = machine.meetings[unit_of(block_scope, f)];
  if (!block.empty() && block[0].arrived.size() == machine.alive[f->rank]) complete(block, 0);
  std::vector<Meeting>& cluster = machine.meetings[unit_of(cluster_scope, f)];
  if (!cluster.empty() && cluster[0].arrived.size() == alive_in_cluster()) complete(cluster, 0);
}

void fiber_loop() {
  for (;;) {
    machine.invoke(machine.values.data());
    exit_fiber();
    leave();
  }
}

void resume(Fiber* f) {
  machine.current = f;
  here = &f->position;
  if (_setjmp(machine.scheduler)) return;
  if (f->made) _longjmp(f->place, 1);
  f->made = true;
  getcontext(&f->start);
  f->start.uc_stack.ss_sp = f->stack;
  f->start.uc_stack.ss_size = STACK_BYTES;
  f->start.uc_link = nullptr;
  makecontext(&f->start, fiber_loop, 0);
  setcontext(&f->start);
}

[[noreturn]] void report_deadlock() {
  std::vector<std::pair<std::string, std::pair<u32, const Fiber*>>> waits;
  u32 exited = 0;
  for (u32 i = 0; i < machine.blocks * machine.launch->threads; i++) {
    const Fiber* f = machine.pool[i];
    if (f->exited) {
      exited++;
      continue;
    }
    const std::string what = std::string(f->waits_for) + " at line " + std::to_string(f->line);
    auto found = std::find_if(waits.begin(), waits.end(), [&](const auto& w) { return w.first == what; });
    if (found == waits.end()) waits.push_back({what, {1, f}});
    else found->second.first++;
  }
  std::string text = "deadlock:";
  for (const auto& [what, who] : waits) {
    const Position& p = who.second->position;
    text += " " + std::to_string(who.first) + " threads wait in " + what + " (first: block (" +
            std::to_string(p.block.x) + ", " + std::to_string(p.block.y) + ", " + std::to_string(p.block.z) +
            "), thread " + std::to_string(p.thread.x) + ");";
  }
  text += " " + std::to_string(exited) + " have ended";
  snprintf(machine.launch->error, 1024, "%s", text.c_str());
  stop();
}

bool wake_polling() {
  bool any = false;
  for (size_t i = machine.polling.size(); i-- > 0;) {
    Fiber* const f = machine.polling[i];
    if (!f->ready(f->ready_context)) continue;
    machine.polling.erase(machine.polling.begin() + (long)i);
    f->waits_for = nullptr;
    make_runnable(f);
    any = true;
  }
  return any;
}

void prepare_cluster(Index first) {
  const Launch& launch = *machine.launch;
  const u32 threads = launch.threads;
  machine.fibers = machine.blocks * threads;
  machine.alive.assign(machine.blocks, threads);
  machine.runnable.assign(machine.warps * machine.blocks, {});
  machine.busy.clear();
  machine.busy_place.assign(machine.warps * machine.blocks, 0);
  machine.polling.clear();
  machine.meetings.assign(unit_of(cluster_scope, machine.pool[0]) + 1, {});
  machine.policy = below(3);
  machine.priority.resize(machine.warps * machine.blocks);
  for (u32& p : machine.priority) p = (u32)next_random();
  for (u32 rank = 0; rank < machine.blocks; rank++) {
    const Index c = launch.cluster;
    const Index block = {first.x + rank % c.x, first.y + rank / c.x % c.y, first.z + rank / (c.x * c.y)};
    memset(machine.shared[rank].start, 0xff, launch.shared_bytes);
    for (u32 t = 0; t < threads; t++) {
      Fiber* const f = machine.pool[rank * threads + t];
      f->position = {{t, 0, 0}, block, {threads, 1, 1}, launch.grid};
      f->linear = t, f->rank = rank, f->exited = false, f->waits_for = nullptr;
      f->copies.clear(), f->closed_groups = 0;
      make_runnable(f);
    }
  }
}

void check_edges() {
  for (u32 rank = 0; rank < machine.blocks; rank++)
    if (const u8* p = machine.shared[rank].changed_edge())
      fail("something wrote %ld bytes past the end of shared memory", (long)(p - machine.shared[rank].start - machine.shared[rank].bytes));
  for (u32 i = 0; i < machine.memories.size(); i++)
    if (const u8* p = machine.memories[i].changed_edge())
      fail("something wrote at byte %ld of a tensor of %zu bytes", (long)(p - machine.memories[i].start), machine.memories[i].bytes);
}

void run_cluster(Index first) {
  prepare_cluster(first);
  while (machine.fibers != 0) {
    if (!machine.polling.empty() && below(8) == 0) wake_polling();
    Fiber* f = choose();
    if (f == nullptr && !machine.polling.empty() && wake_polling()) f = choose();
    if (f == nullptr) report_deadlock();
    resume(f);
  }
  check_edges();
}

// ---- traps ----------------------------------------------------------------------------------------------------------

void describe(const u8* place, char* text, size_t size) {
  for (u32 rank = 0; rank < machine.shared.size(); rank++)
    if (machine.shared[rank].near(place)) {
      snprintf(text, size, "byte %ld of the %zu bytes of shared memory", (long)(place - machine.shared[rank].start), machine.shared[rank].bytes);
      return;
    }
  for (u32 i = 0; i < machine.launch->count; i++) {
    const u8* start = (const u8*)machine.values[i];
    for (const Guarded& memory : machine.memories)
      if (machine.launch->tensor[i] && memory.near(start) && memory.near(place)) {
        snprintf(text, size, "byte %ld of argument %u, a tensor of %llu bytes", (long)(place - start), i, machine.launch->extents[i]);
        return;
      }
  }
  snprintf(text, size, "address %p%s", (const void*)place, (size_t)place < 65536 ? " (a null argument, or a wrong cast)" : "");
}

void on_signal(int number, siginfo_t* info, void*) {
  if (!pthread_equal(pthread_self(), machine.thread)) {  // the clock is the process's: any thread may be told
    if (number == SIGVTALRM) pthread_kill(machine.thread, number);
    else signal(number, SIG_DFL);
    return;
  }
  if (number == SIGVTALRM) fail("the launch ran for 100 s of processor time: an endless loop?");
  if (number == SIGFPE) fail("an integer division by zero");
  char text[160];
  describe((const u8*)info->si_addr, text, sizeof text);
  fail("touches %s", text);
}

struct Traps {
  static constexpr int NUMBERS[4] = {SIGSEGV, SIGBUS, SIGFPE, SIGVTALRM};
  struct sigaction before[4];
  stack_t stack_before;
  u8* stack;
  Traps() {
    stack = new_stack();
    const stack_t own = {stack, 0, STACK_BYTES};
    sigaltstack(&own, &stack_before);
    struct sigaction action = {};
    action.sa_sigaction = on_signal;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    for (int i = 0; i < 4; i++) sigaction(NUMBERS[i], &action, &before[i]);
    alarm_in(100);
  }
  static void alarm_in(long seconds) {
    const itimerval timer = {{0, 0}, {seconds, 0}};
    setitimer(ITIMER_VIRTUAL, &timer, nullptr);
  }
  ~Traps() {
    alarm_in(0);
    for (int i = 0; i < 4; i++) sigaction(NUMBERS[i], &before[i], nullptr);
    sigaltstack(&stack_before, nullptr);
    munmap(stack - PAGE, STACK_BYTES + PAGE);
  }
};

// ---- a launch -------------------------------------------------------------------------------------------------------

void place_arguments(const int* kinds) {
  const Launch& launch = *machine.launch;
  machine.memories.assign(launch.memory_count, {});
  for (u32 i = 0; i < launch.memory_count; i++) {
    const Memory& given = launch.memories[i];
    machine.memories[i].make(given.bytes, (size_t)given.start % 16, 16);
    memcpy(machine.memories[i].start, given.start, given.bytes);
  }
  machine.values.assign(launch.values, launch.values + launch.count);
  for (u32 i = 0; i < launch.count; i++) {
    if (launch.tensor[i] == 0 || launch.values[i] == 0) continue;
    for (u32 m = 0; m < launch.memory_count; m++) {
      const u64 offset = launch.values[i] - (u64)launch.memories[m].start;
      if (offset >= launch.memories[m].bytes) continue;  // one that begins where this ends is the next
      machine.values[i] = (u64)(machine.memories[m].start + offset);
      if (kinds[i] == write_kind && launch.tensor[i] == 2) memset((void*)machine.values[i], 0xff, launch.extents[i]);
      break;
    }
  }
}

void run_all() {
  const Launch& launch = *machine.launch;
  const Index c = launch.cluster;
  std::vector<Index> firsts;
  for (u32 z = 0; z < launch.grid.z; z += c.z)
    for (u32 y = 0; y < launch.grid.y; y += c.y)
      for (u32 x = 0; x < launch.grid.x; x += c.x) firsts.push_back({x, y, z});
  if (launch.seed != 0)
    for (size_t i = firsts.size(); i > 1; i--) std::swap(firsts[i - 1], firsts[below((u32)i)]);
  for (const Index& first : firsts) run_cluster(first);
  for (u32 i = 0; i < launch.memory_count; i++)
    memcpy(launch.memories[i].start, machine.memories[i].start, launch.memories[i].bytes);
}

const char* misfit(const Launch& launch, const int* kinds, u32 count, char* text) {
  if (launch.count != count) {
    snprintf(text, 1024, "the function has %u parameters; found %u arguments", count, launch.count);
    return text;
  }
  for (u32 i = 0; i < count; i++) {
    const bool pointer = kinds[i] == read_kind || kinds[i] == write_kind;
    if (kinds[i] == unknown_kind || (pointer && launch.tensor[i] == 0) || (!pointer && launch.tensor[i] != 0)) {
      snprintf(text, 1024, "parameter %u takes %s; found %s", i,
               pointer ? "a pointer" : kinds[i] == number_kind ? "an int" : "a type that no argument has (int or a pointer)",
               launch.tensor[i] ? "a tensor or None" : "a number");
      return text;
    }
  }
  return nullptr;
}

}  // namespace

int run(const Launch& launch, Invoke invoke, const int* kinds, u32 count) {
  if (misfit(launch, kinds, count, launch.error)) return 1;
  machine.launch = &launch, machine.invoke = invoke, machine.random = launch.seed;
  machine.blocks = launch.cluster.x * launch.cluster.y * launch.cluster.z;
  machine.warps = (launch.threads + 31) / 32;
  while (machine.pool.size() < machine.blocks * launch.threads) {
    Fiber* const f = new Fiber();
    f->stack = new_stack();
    machine.pool.push_back(f);
  }
  machine.current = nullptr, machine.thread = pthread_self();
  place_arguments(kinds);
  machine.shared.assign(machine.blocks, {});
  for (Guarded& shared : machine.shared) shared.make(launch.shared_bytes, 0, 1024);
  int result = 0;
  {
    Traps traps;
    if (sigsetjmp(machine.stopped, 1) == 0) {
      run_all();
    } else {
      result = 1;
      for (Fiber* f : machine.pool) f->made = false;  // they stand in the middle of the kernel
    }
  }
  for (Guarded& memory : machine.memories) memory.free();
  for (Guarded& shared : machine.shared) shared.free();
  return result;
}

void fail(const char* format, ...) {
  char text[700];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  const Fiber* f = machine.current;
  const Position p = f == nullptr ? Position{} : f->position;
  snprintf(machine.launch->error, 1024, "block (%u, %u, %u), thread %u%s%s: %s", p.block.x, p.block.y, p.block.z, p.thread.x,
           f && f->line ? ", after line " : "", f && f->line ? std::to_string(f->line).c_str() : "", text);
  stop();
}

void meet(Scope scope, u32 mask, const char* name, int line, Compute compute, void* slot) {
  Fiber* const own = machine.current;
  own->line = line;
  const u32 threads = machine.launch->threads;
  u32 member = own->linear % 32, members = 32, needed = (u32)__builtin_popcount(mask);
  if (scope == warpgroup_scope) member = own->linear % 128, members = needed = 128;
  if (scope == block_scope) member = own->linear, members = threads, needed = machine.alive[own->rank];
  if (scope == cluster_scope) {
    if (machine.blocks == 1) fail("%s, but the kernel names no cluster of more than one block", name);
    member = own->rank * threads + own->linear, members = threads * machine.blocks, needed = alive_in_cluster();
  }
  if (scope == warp_scope && !((mask >> member) & 1)) fail("%s: lane %u is not in its own mask %08x", name, member, mask);
  std::vector<Meeting>& open = machine.meetings[unit_of(scope, own)];
  size_t at = 0;
  for (; at < open.size(); at++) {
    const Meeting& m = open[at];
    if (m.mask != mask || m.compute != compute || strcmp(m.name, name) != 0 || m.slots.size() != members) continue;
    const Fiber* other = nullptr;
    for (const Fiber* f : m.arrived)
      if (f->linear / 32 == own->linear / 32 && f->rank == own->rank) other = f;
    if (other != nullptr && other->line != line)
      fail("%s at line %d, while thread %u of the same warp waits in it at line %d: diverged", name, line, other->linear, other->line);
    break;
  }
  if (at == open.size()) open.push_back({name, compute, mask, std::vector<void*>(members, nullptr), {}});
  if (scope == warp_scope)
    for (u32 lane = 0; lane < 32; lane++) {
      const u32 linear = own->linear - member + lane;
      if (!((mask >> lane) & 1)) continue;
      if (linear >= threads) fail("%s: lane %u of its mask %08x is not in the block", name, lane, mask);
      if (machine.pool[own->rank * threads + linear]->exited)
        fail("%s at line %d: lane %u of its mask %08x has ended", name, line, lane, mask);
    }
  open[at].slots[member] = slot;
  open[at].arrived.push_back(own);
  own->waits_for = name;
  if (open[at].arrived.size() == needed) {
    complete(open, at);
    make_runnable(own);
  }
  leave();
}

void wait_until(const char* name, int line, bool (*ready)(void*), void* context) {
  Fiber* const own = machine.current;
  own->line = line, own->waits_for = name, own->ready = ready, own->ready_context = context;
  machine.polling.push_back(own);
  leave();
}

u8* shared_base() { return machine.shared[machine.current->rank].start; }

constexpr u32 FIRST_ADDRESS = 1024;  // so that an offset is never taken for an address

u32 shared_to_address(const void* place) {
  const Guarded& own = machine.shared[machine.current->rank];
  if (!own.holds((const u8*)place)) fail("shared_address of a place that is not in this block's shared memory");
  return FIRST_ADDRESS + (u32)((const u8*)place - own.start);
}

u8* cluster_place(u32 address, u32 bytes, u32 alignment, u32 rank, const char* who) {
  if (rank >= machine.blocks) fail("%s: block %u of a cluster of %u", who, rank, machine.blocks);
  if (rank != machine.current->rank && machine.alive[rank] == 0)
    fail("%s: block %u of the cluster has ended; wait_cluster before it does", who, rank);
  const Guarded& memory = machine.shared[rank];
  const long offset = (long)address - FIRST_ADDRESS;
  if (offset < 0 || offset + (long)bytes > (long)memory.bytes)
    fail("%s: bytes %ld to %ld of the %zu bytes of shared memory", who, offset, offset + (long)bytes, memory.bytes);
  if (offset % alignment != 0) fail("%s: byte %ld of shared memory is not aligned to %u", who, offset, alignment);
  return memory.start + offset;
}

u8* shared_place(u32 address, u32 bytes, u32 alignment, const char* who) {
  return cluster_place(address, bytes, alignment, machine.current->rank, who);
}

void check_aligned(const void* place, u32 alignment, const char* who) {
  if ((size_t)place % alignment != 0) fail("%s: the address is not a multiple of %u", who, alignment);
}

void copy_later(u32 shared, const void* global, int valid, const char* who) {
  u8* const to = shared_place(shared, 16, 16, who);
  if (valid < 0 || valid > 16) fail("%s: %d valid bytes of 16", who, valid);
  check_aligned(global, 16, who);
  const u8* const from = (const u8*)global;
  for (int i = 0; i < valid; i += 15) (void)*(const volatile u8*)(from + i);  // traps here, at the copy at fault
  memset(to, 0xff, 16);
  machine.current->copies.push_back({to, from, (u32)valid, machine.current->closed_groups});
}

void close_copies() { machine.current->closed_groups++; }

void finish_copies(int pending) {
  Fiber* const own = machine.current;
  size_t done = 0;
  for (; done < own->copies.size(); done++) {
    const Copy& copy = own->copies[done];
    if ((long)copy.group >= (long)own->closed_groups - pending) break;
    memcpy(copy.to, copy.from, copy.valid);
    memset(copy.to + copy.valid, 0, 16 - copy.valid);
  }
  own->copies.erase(own->copies.begin(), own->copies.begin() + (long)done);
}

}  // namespace emulator

// What -fsanitize calls: the place in the source comes first in every record.
struct SourcePlace {
  const char* file;
  u32 line, column;
};
#define UNDEFINED(name, what)                                                                      \
  extern "C" [[noreturn]] void __ubsan_handle_##name(SourcePlace* place, u64, u64) {               \
    emulator::fail("%s at %s:%u", what, place->file, place->line);                                 \
  }
UNDEFINED(type_mismatch_v1, "a misaligned or null address")
UNDEFINED(out_of_bounds, "an index outside a local array")
UNDEFINED(shift_out_of_bounds, "a shift by a negative count or by the whole width")
UNDEFINED(add_overflow, "a signed sum that overflows")
UNDEFINED(sub_overflow, "a signed difference that overflows")
UNDEFINED(mul_overflow, "a signed product that overflows")
UNDEFINED(negate_overflow, "a signed negation that overflows")
UNDEFINED(divrem_overflow, "a division by zero")
