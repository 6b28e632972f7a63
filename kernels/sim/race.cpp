// Race detector: clocks of actors, and what releases and acquires do to them. The memory of accesses is in
// race_shadow.cpp. Only in builds with ROUTEGRAD_SIM_RACE.
#include "race.hpp"

#if defined(ROUTEGRAD_SIM_RACE)

#include <algorithm>

#include "machine.hpp"

namespace sim::race {

static Domain& domain() { return machine->race; }

// Threads of all blocks of the wave come first, then actors in the order of their first use.
static size_t number(const Thread& t) {
  const size_t per_block = t.block->threads.size();
  return static_cast<size_t>(t.block - t.block->cluster + t.block->slot) * per_block + static_cast<size_t>(t.id);
}

static void join(Clock& to, const Clock& from) {
  const size_t n = std::min(to.size(), from.size());
  uint32_t* __restrict a = to.data();
  const uint32_t* b = from.data();
  for (size_t i = 0; i < n; ++i) a[i] = std::max(a[i], b[i]);
}

static void join(Sync& to, const Clock& seen, const Clock& fenced) {
  to.seen.resize(seen.size());
  to.fenced.resize(fenced.size());
  join(to.seen, seen);
  join(to.fenced, fenced);
}

void begin_wave(Block* blocks, int count, uint32_t id) {
  Domain& d = domain();
  const size_t threads = static_cast<size_t>(count) * blocks->threads.size();
  d = Domain{};
  d.id = id;
  // Room for the units of every thread: stores (two), cp.async; and mbarriers and warpgroups of every block.
  d.capacity = threads * 4 + static_cast<size_t>(count) * 128;
  d.seen.assign(threads, Clock(d.capacity));
  d.fenced.assign(threads, Clock(d.capacity));
  d.at_fence.resize(threads);
  d.from_atomics.resize(threads);
  d.store_actor.assign(threads, kNobody);
  d.cp_async_actor.assign(threads, kNobody);
  for (size_t i = 0; i < threads; ++i) {
    d.seen[i][i] = 1;
    d.names.emplace_back("thread", static_cast<uint32_t>(i % blocks->threads.size()));
  }
  for (int i = 0; i < count; ++i) {
    blocks[i].slot = i - blocks[i].rank;
    blocks[i].shadow.granules.assign(kWindowBytes / 16, Granule{});
  }
}

static Actor new_actor(const char* kind, uint32_t which) {
  Domain& d = domain();
  if (d.names.size() == d.capacity) fail("race detector: too many asynchronous units");
  d.names.emplace_back(kind, which);
  return static_cast<Actor>(d.names.size() - 1);
}

Actor thread_actor(const Thread& t) { return static_cast<Actor>(number(t)); }
uint32_t thread_clock(const Thread& t) { return domain().seen[number(t)][number(t)]; }
const Clock& thread_seen(const Thread& t) { return domain().seen[number(t)]; }

// ---- threads
bool in_kernel() { return machine && machine->current; }

void release_of(const Thread& t, Sync& sync) {
  Domain& d = domain();
  const size_t i = number(t);
  join(sync, d.seen[i], d.fenced[i]);
  ++d.seen[i][i];
}
void release(Sync& sync) { release_of(*machine->current, sync); }

void acquire(const Thread& t, const Sync& sync) {
  join(domain().seen[number(t)], sync.seen);
  join(domain().fenced[number(t)], sync.fenced);
}

void clear(Sync& sync) { sync = Sync{}; }

// The fence covers the thread's own writes, among them those of its finished cp.async.
void fence_proxy() {
  Domain& d = domain();
  const size_t i = number(*machine->current);
  d.fenced[i][i] = d.seen[i][i];
  if (const Actor a = d.cp_async_actor[i]; a != kNobody) d.fenced[i][a] = d.seen[i][a];
}

// A fence makes what relaxed atomics read before it an acquire, and what they write after it a release.
void thread_fence() {
  Domain& d = domain();
  const size_t i = number(*machine->current);
  acquire(*machine->current, d.from_atomics[i]);
  d.from_atomics[i] = Sync{};
  d.at_fence[i] = Sync{d.seen[i], d.fenced[i]};
  ++d.seen[i][i];
}

void atomic_order(Sync& location) {
  Domain& d = domain();
  const size_t i = number(*machine->current);
  if (!location.seen.empty()) join(d.from_atomics[i], location.seen, location.fenced);
  if (!d.at_fence[i].seen.empty()) join(location, d.at_fence[i].seen, d.at_fence[i].fenced);
}

// ---- asynchronous units
void issue(Stamp& stamp) {
  Domain& d = domain();
  const size_t i = number(*machine->current);
  stamp.seen = d.seen[i];
  stamp.fenced = d.fenced[i];
  ++d.seen[i][i];
}

// A product knows only what every thread of its warpgroup knew when issuing it.
void issue_together(Stamp& stamp, bool first) {
  Domain& d = domain();
  const size_t i = number(*machine->current);
  if (first) {
    stamp.seen = d.seen[i];
    stamp.fenced = d.fenced[i];
  }
  for (size_t a = 0; !first && a < d.capacity; ++a) {
    stamp.seen[a] = std::min(stamp.seen[a], d.seen[i][a]);
    stamp.fenced[a] = std::min(stamp.fenced[a], d.fenced[i][a]);
  }
}

void learn(const Thread& t, Actor actor, uint32_t clock) {
  uint32_t& known = domain().seen[number(t)][actor];
  known = std::max(known, clock);
}

Actor warpgroup_actor(const Thread& t) {
  return new_actor("wgmma of warpgroup", static_cast<uint32_t>(t.id / kWarpgroup));
}

Actor store_actor(const Thread& t) {
  Actor& a = domain().store_actor[number(t)];
  if (a == kNobody) {
    a = new_actor("TMA store of thread", static_cast<uint32_t>(t.id));
    new_actor("TMA store of thread", static_cast<uint32_t>(t.id));  // a + 1: its global writes
  }
  return a;
}
Actor store_write_actor(const Thread& t) { return store_actor(t) + 1; }

Actor cp_async_actor(const Thread& t) {
  Actor& a = domain().cp_async_actor[number(t)];
  if (a == kNobody) a = new_actor("cp.async of thread", static_cast<uint32_t>(t.id));
  return a;
}

// ---- mbarriers
MbarrierSync& mbarrier_sync(Block& block, uint32_t bar) {
  for (MbarrierSync& m : block.shadow.mbarriers)
    if (m.bar == bar) return m;
  MbarrierSync& m = block.shadow.mbarriers.emplace_back();
  m.bar = bar;
  m.actor = new_actor("TMA load counted at shared memory +", bar - kSharedBase);
  return m;
}

void bytes_arrive(Block& block, uint32_t bar) {
  MbarrierSync& m = mbarrier_sync(block, bar);
  m.current.seen.resize(domain().capacity);
  m.current.fenced.resize(domain().capacity);
  m.current.seen[m.actor] = m.phase;
}

void cp_async_arrive(const Thread& t, Block& block, uint32_t bar, uint32_t clock) {
  Sync& sync = mbarrier_sync(block, bar).current;
  sync.seen.resize(domain().capacity);
  sync.fenced.resize(domain().capacity);
  uint32_t& known = sync.seen[cp_async_actor(t)];
  known = std::max(known, clock);
}

}  // namespace sim::race

#endif
