// mbarriers: one real 64-bit word each, in shared memory.
#include "machine.hpp"

namespace sim {

// The hardware's count of pending bytes has 20 bits and a sign.
constexpr int kMaxBytes = (1 << 20) - 1;

static int offset(uint32_t bar) { return static_cast<int>(bar - kSharedBase); }

static Mbarrier& word(Block& block, uint32_t bar, Where at) {
  if (bar % 8) fail(format("the mbarrier at shared memory +%d is not 8-byte aligned", offset(bar)), at);
  return *reinterpret_cast<Mbarrier*>(shared_bytes(block, bar, 8, "mbarrier", at));
}

Mbarrier& mbarrier(Block& block, uint32_t bar, Where at) {
  Mbarrier& m = word(block, bar, at);
  if (m.mark != 1) fail(format("the mbarrier at shared memory +%d is not initialised", offset(bar)), at);
  race::mbarrier_use(block, bar, at);
  return m;
}

void mbar_init(uint32_t bar, uint32_t count, Where at) {
  Block& block = *machine->block;
  Mbarrier& m = word(block, bar, at);
  if (m.mark == 1) fail(format("the mbarrier at shared memory +%d is initialised a second time", offset(bar)), at);
  if (!count || count >= 1u << 20) fail(format("mbarrier: the arrival count %u must be 1 to 2^20 - 1", count), at);
  race::shared_access(block, bar, 8, true, at);
  m = Mbarrier{count, count, 0, 1, 0};
  block.unfenced_mbarriers.emplace_back(bar, machine->current);
}

// ---- fences
static void fence_initialisations() {
  auto& list = machine->block->unfenced_mbarriers;
  std::erase_if(list, [](const auto& entry) { return entry.second == machine->current; });
}
void fence_mbar_init(Where) { fence_initialisations(); }
void fence_proxy_async(Where) {
  fence_initialisations();
  race::fence_proxy();
}
// The asynchronous units and other blocks see an mbarrier only after its initialisation was fenced.
void require_fenced(Block& block, uint32_t bar, const char* by, Where at) {
  for (const auto& [unfenced, thread] : block.unfenced_mbarriers)
    if (unfenced == bar)
      fail(format("%s uses the mbarrier at shared memory +%d, which thread %d initialised without fence_mbar_init", by,
                  offset(bar), thread->id),
           at);
}

// ---- phases
void settle(Block& block, uint32_t bar) {
  Mbarrier& m = *reinterpret_cast<Mbarrier*>(block.arena + bar);
  if (m.pending || m.bytes) return;
  m.phase ^= 1;
  m.pending = m.expected;
  race::MbarrierSync& sync = race::mbarrier_sync(block, bar);
  sync.done = sync.current;
  ++sync.phase;
  std::erase_if(block.mbarrier_waits, [&](const MbarrierWait& w) {
    if (w.bar != bar || w.parity == m.phase) return false;
    race::acquire(*w.thread, sync.done);
    wake(w.thread);
    return true;
  });
}

void complete_bytes(Block& block, uint32_t bar, uint32_t bytes, Where at) {
  Mbarrier& m = *reinterpret_cast<Mbarrier*>(block.arena + bar);
  if (m.bytes - static_cast<int>(bytes) < -kMaxBytes) fail("mbarrier: far more bytes arrive than were announced", at);
  race::bytes_arrive(block, bar);
  m.bytes = m.bytes - static_cast<int>(bytes);
  settle(block, bar);
}

void complete_arrival(Block& block, uint32_t bar, Where at) {
  Mbarrier& m = mbarrier(block, bar, at);
  if (!m.pending)
    fail(format("mbarrier at shared memory +%d: more arrivals in one phase than the %u expected", offset(bar),
                static_cast<unsigned>(m.expected)),
         at);
  m.pending = m.pending - 1;
  settle(block, bar);
}

// ---- instructions
void mbar_arrive(uint32_t bar, Where at) {
  race::release(race::mbarrier_sync(*machine->block, bar).current);
  complete_arrival(*machine->block, bar, at);
}

void mbar_expect_tx(uint32_t bar, uint32_t bytes, Where at) {
  Mbarrier& m = mbarrier(*machine->block, bar, at);
  if (bytes > kMaxBytes || m.bytes + static_cast<int>(bytes) > kMaxBytes)
    fail(format("mbarrier: %u announced bytes exceed its 20-bit count", bytes), at);
  m.bytes = m.bytes + static_cast<int>(bytes);
  mbar_arrive(bar, at);
}

void mbar_arrive_remote(uint32_t bar, uint32_t rank, Where at) {
  Block& own = *machine->block;
  if (rank >= static_cast<uint32_t>(own.cluster_size))
    fail(format("remote arrive at block %u of a cluster of %d", rank, own.cluster_size), at);
  Block& peer = own.cluster[rank];
  if (!peer.live) fail(format("remote arrive at block %u of the cluster, which has ended", rank), at);
  if (&peer != &own) require_fenced(peer, bar, "a remote arrive", at);
  race::release(race::mbarrier_sync(peer, bar).current);
  complete_arrival(peer, bar, at);
}

void mbar_wait(uint32_t bar, uint32_t parity, Where at) {
  Block& block = *machine->block;
  Thread* t = machine->current;
  if (parity > 1) fail(format("mbarrier: the parity %u must be 0 or 1", parity), at);
  if (mbarrier(block, bar, at).phase != parity) return race::acquire(*t, race::mbarrier_sync(block, bar).done);
  block.mbarrier_waits.push_back({bar, parity, t});
  block_current("mbarrier", bar, parity, at);
}

}  // namespace sim
