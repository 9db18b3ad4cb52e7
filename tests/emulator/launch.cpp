// A launch from its arguments to its results, and what traps on the way.

#include <csignal>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <string>
#include <sys/time.h>

#include <utility>

#include "state.h"

namespace emulator {

const Position* here = nullptr;
Machine machine;

namespace {

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
  run_fibers();
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

}  // namespace emulator
