// How fibers wait for each other and in which order they go on: scheduler, collectives, barriers.

#include <cstring>

#include <algorithm>
#include <cstdio>
#include <string>
#include <utility>

#include "state.h"

namespace emulator {

namespace {

u32 warp_of(const Fiber* f) { return f->rank * machine.warps + f->linear / 32; }

}  // namespace

u64 next_random() {  // splitmix64
  u64 z = machine.random += 0x9e3779b97f4a7c15ull;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  return z ^ (z >> 31);
}

u32 below(u32 limit) { return (u32)((next_random() >> 32) * limit >> 32); }

void make_runnable(Fiber* f) {
  const u32 warp = warp_of(f);
  if (machine.runnable[warp].empty()) {
    machine.busy_place[warp] = (u32)machine.busy.size();
    machine.busy.push_back(warp);
  }
  machine.runnable[warp].push_back(f);
}

u32 unit_of(Scope scope, const Fiber* f) {
  const u32 all_warps = machine.warps * machine.blocks, groups = (machine.warps + 3) / 4;
  if (scope == warp_scope) return warp_of(f);
  if (scope == warpgroup_scope) return all_warps + f->rank * groups + f->linear / 128;
  if (scope == block_scope) return all_warps + groups * machine.blocks + f->rank;
  return all_warps + (groups + 1) * machine.blocks;
}

[[noreturn]] void stop() { siglongjmp(machine.stopped, 1); }

namespace {

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

void complete(std::vector<Meeting>& open, size_t at) {
  Meeting done = std::move(open[at]);
  open.erase(open.begin() + (long)at);
  if (done.compute != nullptr) done.compute(done.slots.data(), done.mask);
  for (Fiber* f : done.arrived) {
    f->waits_for = nullptr;
    if (f != machine.current) make_runnable(f);
  }
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

}  // namespace

void run_fibers() {
  while (machine.fibers != 0) {
    if (!machine.polling.empty() && below(8) == 0) wake_polling();
    Fiber* f = choose();
    if (f == nullptr && !machine.polling.empty() && wake_polling()) f = choose();
    if (f == nullptr) report_deadlock();
    resume(f);
  }
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

}  // namespace emulator
