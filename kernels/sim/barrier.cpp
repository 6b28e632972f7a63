// Barriers of a block and a cluster, warp collectives, and the register pool of setmaxnreg.
#include "machine.hpp"

namespace sim {

// ---- named barriers, __syncthreads
static void open_barrier(Barrier& barrier) {
  for (Thread* t : barrier.waiters) {
    race::acquire(*t, barrier.sync);
    if (t != machine->current) wake(t);
  }
  barrier.waiters.clear();
  barrier.arrived = 0;
  barrier.need = 0;
  barrier.warps = 0;
  barrier.lanes.fill(0);
  race::clear(barrier.sync);
}

// The hardware counts whole warps: all lanes of a warp must come before any of them comes again.
static void arrive_lane(Barrier& barrier, int id, Where at) {
  Thread* t = machine->current;
  uint32_t& lanes = barrier.lanes[t->id / kWarp];
  if (lanes >> t->id % kWarp & 1)
    fail(format("barrier %d: a lane arrives a second time before the phase is complete", id), at);
  if (!lanes) ++barrier.warps;
  lanes |= 1u << t->id % kWarp;
  ++barrier.arrived;
  if (barrier.need && barrier.warps * kWarp > barrier.need)
    fail(format("barrier %d for %d threads: lanes of %d warps arrived; all lanes of a warp must take part", id,
                barrier.need, barrier.warps),
         at);
}

void named_barrier(int id, int threads, bool wait, Where at) {
  Block& block = *machine->block;
  if (id < 0 || id > 15) fail(format("barrier %d: the number must be 0 to 15", id), at);
  if (threads % kWarp || threads < 0 || threads > 1024)
    fail(format("barrier %d: %d threads is not a multiple of 32 up to 1024", id, threads), at);
  Barrier& barrier = block.barriers[id];
  if (barrier.arrived && barrier.need != threads)
    fail(format("barrier %d is used with %d threads while %d are expected", id, threads, barrier.need), at);
  barrier.need = threads;
  arrive_lane(barrier, id, at);
  race::release(barrier.sync);
  if (wait) barrier.waiters.push_back(machine->current);
  if (barrier.arrived == (threads ? threads : block.live)) return open_barrier(barrier);
  if (wait) block_current("barrier", static_cast<uint32_t>(id), static_cast<uint32_t>(threads), at);
}

// An ended thread no longer counts at __syncthreads.
void thread_left(Block& block) {
  Barrier& barrier = block.barriers[0];
  if (barrier.arrived && barrier.need == 0 && barrier.arrived == block.live) open_barrier(barrier);
}

// ---- clusters
uint32_t cluster_rank() { return static_cast<uint32_t>(machine->block->rank); }

static int cluster_live(Block* first) {
  int live = 0;
  for (int i = 0; i < first->cluster_size; ++i) live += first[i].live;
  return live;
}

void cluster_left(Block& block) {
  ClusterBarrier& barrier = block.cluster->cluster_barrier;
  if (!barrier.arrived || barrier.arrived != cluster_live(block.cluster)) return;
  ++barrier.phase;
  barrier.arrived = 0;
  barrier.released = barrier.sync;
  race::clear(barrier.sync);
  for (Thread* t : barrier.waiters) {
    race::acquire(*t, barrier.released);
    wake(t);
  }
  barrier.waiters.clear();
}

void cluster_arrive(Where at) {
  Thread* t = machine->current;
  Block& block = *machine->block;
  ClusterBarrier& barrier = block.cluster->cluster_barrier;
  if (t->cluster_arrived) fail("cluster barrier: a thread arrives twice without waiting", at);
  t->cluster_arrived = true;
  t->cluster_phase = barrier.phase;
  race::release(barrier.sync);
  ++barrier.arrived;
  cluster_left(block);
}

void cluster_wait(Where at) {
  Thread* t = machine->current;
  ClusterBarrier& barrier = machine->block->cluster->cluster_barrier;
  if (!t->cluster_arrived) fail("cluster barrier: a thread waits without having arrived", at);
  t->cluster_arrived = false;
  if (barrier.phase != t->cluster_phase) return race::acquire(*t, barrier.released);
  barrier.waiters.push_back(t);
  block_current("cluster barrier", barrier.phase, 0, at);
}

// ---- warp collectives
static Gathering& gather(std::vector<Gathering>& gatherings, Collective kind, uint32_t mask, Where at) {
  for (Gathering& g : gatherings) {
    if (g.mask == mask) {
      if (g.kind != kind) fail(format("warp collective of mask %08x: its lanes execute different operations", mask), at);
      return g;
    }
    if (g.mask & mask) fail(format("warp collective: the masks %08x and %08x overlap", g.mask, mask), at);
  }
  return gatherings.emplace_back(mask, kind);
}

// Runs `work`, where there is one, on what the lanes brought, before any of them goes on.
static uint64_t meet(Collective kind, uint32_t mask, uint64_t value, int source, WarpWork work, Where at) {
  Thread* t = machine->current;
  const int l = t->id % kWarp;
  std::vector<Gathering>& gatherings = machine->block->gatherings[t->id / kWarp];
  if (!(mask >> l & 1)) fail(format("warp collective: lane %d is not in its own mask %08x", l, mask), at);
  Gathering& g = gather(gatherings, kind, mask, at);
  g.value[l] = value;
  g.source[l] = source & (kWarp - 1);
  g.thread[l] = t;
  g.arrived |= 1u << l;
  if (g.arrived != mask) {
    block_current("warp collective", mask, g.arrived, at);
    return t->collective_result;
  }
  uint64_t votes = 0;
  for (int i = 0; i < kWarp; ++i)
    if (mask >> i & 1) votes |= (g.value[i] & 1) << i;
  if (work) work(g.value);
  race::Sync sync;
  if (kind == Collective::Sync)  // the others order no memory
    for (int i = 0; i < kWarp; ++i)
      if (mask >> i & 1) race::release_of(*g.thread[i], sync);
  for (int i = 0; i < kWarp; ++i) {
    if (!(mask >> i & 1)) continue;
    Thread* other = g.thread[i];
    const bool given = mask >> g.source[i] & 1;  // reading a lane outside the mask is undefined: all ones
    other->collective_result = kind == Collective::Shuffle ? (given ? g.value[g.source[i]] : ~0ull) : votes;
    if (kind == Collective::Sync) race::acquire(*other, sync);
    if (other != t) wake(other);
  }
  gatherings.erase(gatherings.begin() + (&g - gatherings.data()));
  return t->collective_result;
}

uint64_t warp_collective(Collective kind, uint32_t mask, uint64_t value, int source, Where at) {
  return meet(kind, mask, value, source, nullptr, at);
}

void warp_work(WarpWork work, void* own, Where at) {
  meet(Collective::Work, ~0u, reinterpret_cast<uint64_t>(own), 0, work, at);
}

// ---- registers. The pool holds what the launch allotted and no thread owns; inc waits for it.
void setmaxnreg(int registers, bool increase, Where at) {
  Thread* t = machine->current;
  Block& block = *machine->block;
  warp_collective(Collective::Ballot, ~0u, 0, 0, at);  // .sync.aligned: all lanes together
  const int change = registers - t->registers;
  if (increase ? change < 0 : change > 0)
    fail(format("setmaxnreg.%s to %d: the thread has %d registers", increase ? "inc" : "dec", registers, t->registers), at);
  while (increase && change > block.register_pool) {
    block.register_waits.push_back(t);
    block_current("registers", static_cast<uint32_t>(change), 0, at);
  }
  block.register_pool -= change;
  t->registers = registers;
  if (change < 0) {
    for (Thread* waiting : block.register_waits) wake(waiting);
    block.register_waits.clear();
  }
}

}  // namespace sim
