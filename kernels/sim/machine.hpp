// The state of the simulated machine and the functions that its parts share. Kernels never include this.
#pragma once
#include <array>
#include <cstdint>
#include <deque>
#include <list>
#include <string>
#include <vector>

#include "fiber.hpp"
#include "race.hpp"
#include "sim.hpp"

namespace sim {

using language::uint3;

// Shared memory addresses have 18 bits in wgmma descriptors; a block's window is that large.
inline constexpr uint32_t kWindowBytes = 256 << 10;
// Dynamic shared memory starts here: 16-byte aligned and no more, so that a kernel that forgets to align fails.
inline constexpr uint32_t kSharedBase = 1040;
inline constexpr uint32_t kMaxShared = 227 << 10;
inline constexpr int kWarp = 32, kWarpgroup = 128;
inline constexpr int kMaxProductColumns = 256;

struct Block;

// What a blocked thread waits for; the deadlock report prints it.
struct Wait {
  const char* what = nullptr;
  uint32_t object = 0, detail = 0;
  Where where;
};

// One cp.async, or (bytes == 0 && bar) an arrival that follows those before it.
struct CpAsync {
  uint32_t dst = 0;
  const void* src = nullptr;
  uint32_t valid = 0;
  uint32_t bar = 0;
  bool arrive = false;
  int group = 0;
  Where where;
  race::Stamp stamp;
};

// First in, first out. Empty ones own no memory, unlike std::deque: every thread of every block has one.
template <class T>
class Queue {
 public:
  bool empty() const { return size() == 0; }
  size_t size() const { return items_.size() - first_; }
  T& front() { return items_[first_]; }
  T& operator[](size_t i) { return items_[first_ + i]; }
  void push_back(T item) { items_.push_back(std::move(item)); }
  void pop_front() {
    if (++first_ == items_.size()) items_.clear(), first_ = 0;
  }

 private:
  std::vector<T> items_;
  size_t first_ = 0;
};

struct Thread {
  enum class State { Ready, Blocked, Done };
  Fiber fiber;
  Block* block = nullptr;
  int id = 0;  // in the block
  uint3 index{};
  State state = State::Ready;
  Wait wait;
  uint64_t collective_result = 0;
  int registers = 0;
  bool cluster_arrived = false;  // and did not wait yet
  uint32_t cluster_phase = 0;    // of that arrival
  // wgmma
  int products_issued = 0, groups_committed = 0, groups_waited = 0;
  bool fenced = false;
  // TMA stores and cp.async: groups closed so far
  int bulk_groups = 0, cp_groups = 0;
  Queue<CpAsync> cp_async;
  uint32_t cp_issued = 0;              // operations
  std::vector<uint32_t> cp_group_end;  // cp_issued at each commit
  int cp_arrivals = 0;  // of those in cp_async that are arrivals
};

// A named barrier or the block's own.
struct Barrier {
  int need = 0;  // threads, of the phase under way; 0 when nobody has come
  int arrived = 0;
  int warps = 0;                     // of which a lane has come
  std::array<uint32_t, 32> lanes{};  // that have come, per warp
  std::vector<Thread*> waiters;
  race::Sync sync;
};

struct ClusterBarrier {
  int arrived = 0;
  uint32_t phase = 0;
  std::vector<Thread*> waiters;
  race::Sync sync, released;
};

// A warp collective under way. What lanes bring is left as it is until they do.
struct Gathering {
  Gathering(uint32_t all, Collective what) : mask(all), kind(what) {}
  uint32_t mask, arrived = 0;
  Collective kind;
  uint64_t value[kWarp];
  int source[kWarp];
  Thread* thread[kWarp];
};

struct MbarrierWait {
  uint32_t bar, parity;
  Thread* thread;
};

// Accumulators handed to products and not taken back yet.
struct Accumulator {
  int columns = 0;
  float* registers[kWarpgroup] = {};  // of each thread
  std::vector<float> storage;
  int unfinished = 0;  // products
  int last_group = 0;
  int taken = 0;       // threads that took the result
  float* values() {    // [columns][64], 64-byte aligned
    return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(storage.data()) + 63) & ~uintptr_t{63});
  }
};

// What the threads of a warpgroup must agree on.
struct ProductRequest {
  Operand a, b;
  bool a_in_registers = false, accumulate = false;
  int columns = 0, group = 0;
  Where where;
  bool same(const ProductRequest& o) const {
    return a == o.a && b == o.b && a_in_registers == o.a_in_registers && accumulate == o.accumulate &&
           columns == o.columns && group == o.group;
  }
};

struct Product : ProductRequest {
  bool done = false;
  int issued = 0, waited = 0;
  Accumulator* accumulator = nullptr;
  std::vector<uint32_t> a_registers;  // [128][4]
  race::Stamp stamp;
};

struct Warpgroup {
  std::deque<Product> products;
  int first = 0;  // number of products.front()
  std::list<Accumulator> accumulators;
  std::vector<Thread*> waiters;  // for the other threads to issue
  race::Actor actor = race::kNobody;
  uint32_t clock = 0;
};

// One TMA copy into or out of one block's shared memory.
struct TmaCopy {
  enum class Step { Issued, Read, Written };  // a store reads shared memory first, writes global memory later
  bool load = false, add = false;  // add: a store that adds f32
  Step step = Step::Issued;
  TensorMap map;
  uint32_t shared = 0, bar = 0;
  int at[5] = {};
  Block* target = nullptr;  // whose shared memory
  Thread* thread = nullptr;
  int group = 0;
  std::vector<char> staged;
  Where where;
  race::Stamp stamp;
};

struct Block {
  uint3 index{};
  Block* cluster = nullptr;  // first block of the cluster; the others follow it
  int rank = 0, cluster_size = 1;
  int slot = 0;              // of the cluster's first block in the wave
  std::vector<Thread> threads;
  int live = 0;
  char* arena = nullptr;
  uint32_t shared_end = 0;
  int register_pool = 0;
  Barrier barriers[16];
  ClusterBarrier cluster_barrier;  // used in the cluster's first block
  std::vector<std::vector<Gathering>> gatherings;  // per warp
  std::vector<MbarrierWait> mbarrier_waits;
  std::vector<std::pair<uint32_t, Thread*>> unfenced_mbarriers;
  std::vector<Thread*> register_waits;
  std::vector<Warpgroup> warpgroups;
  race::BlockShadow shadow;
};

// One OS thread's simulator: it runs a wave of blocks at a time.
struct Machine {
  // Operands of the product being computed; the accumulators of a warp's.
  alignas(64) float product_a[16 * 64], product_b[kMaxProductColumns * 16], product_d[kMaxProductColumns * 16];
  routegrad_sim_options options{};
  routegrad_sim_counters counters{};
  Stacks stacks;
  char* arenas = nullptr;
  void* arena_mapping = nullptr;
  size_t arena_count = 0;
  Fiber main;
  Thread* current = nullptr;
  Block* block = nullptr;
  bool failed = false;
  std::string failure;
  void (*body)(void*) = nullptr;
  void* captured = nullptr;
  uint64_t random_state = 1;
  std::vector<Thread*> ready, yielded;
  size_t ready_head = 0;
  int idle_rounds = 0;
  std::list<TmaCopy> copies;
  std::vector<Thread*> cp_queues;  // threads with cp.async under way
  race::Domain race;
  race::Global* race_global = nullptr;
  ~Machine();
};
extern constinit thread_local Machine* machine;

inline uint64_t random_number() {
  uint64_t& x = machine->random_state;
  x ^= x << 13, x ^= x >> 7, x ^= x << 17;
  return x;
}
std::string format(const char* pattern, ...) __attribute__((format(printf, 1, 2)));

// Thrown by fail() outside of simulated threads; the text is in Machine::failure.
struct Fault {};

// ---- scheduler.cpp
void run_threads();  // until none can run
void wake(Thread* t);
// Runs others until the thread is woken. What it waits for comes in registers: a Wait stored field by field and read whole at
// once would stall the processor.
void block_current(const char* what, uint32_t object, uint32_t detail, Where at);
[[noreturn]] void end_current();
std::string deadlock_report(Block& block);

// ---- barrier.cpp
void thread_left(Block& block);   // an ended thread no longer counts
void cluster_left(Block& block);

// ---- mbarrier.cpp
struct Mbarrier {
  uint64_t pending : 20, expected : 20;
  int64_t bytes : 21;
  uint64_t mark : 2, phase : 1;  // mark 1: initialised; poison reads as 3, zeros as 0
};
static_assert(sizeof(Mbarrier) == 8);
Mbarrier& mbarrier(Block& block, uint32_t bar, Where at);
void require_fenced(Block& block, uint32_t bar, const char* by, Where at);
void complete_bytes(Block& block, uint32_t bar, uint32_t bytes, Where at);
void complete_arrival(Block& block, uint32_t bar, Where at);
void settle(Block& block, uint32_t bar);

// ---- tma.cpp and cp_async.cpp: asynchronous work that the scheduler may carry out at any time
void run_copy(std::list<TmaCopy>::iterator copy);
bool run_needed_copy(bool at_random);  // a load, or an arrival after cp.async; false when there is none
void run_some_copy();                  // random: anything under way
void finish_stores();                  // at the wave's end: their global writes
void check_stores_read(Thread* t);     // at a thread's end
void run_cp_async(Thread* t, size_t count);  // the oldest ones
uint32_t swizzled(uint32_t address, uint32_t span);
const std::string& last_map_failure();  // why a tensor map was refused on this OS thread

// ---- wgmma
void check_products_waited(Block& block);
// acc[columns][rows] += a[16][rows] transposed · b[columns][16], for 64 rows (wgmma) or 16 (mma)
using ProductKernel = void (*)(float* acc, const float* a, const float* b, int columns);
ProductKernel product_kernel(int rows);

// Every lane of the warp calls it; the last to come runs work(what each lane gave) while the others wait.
using WarpWork = void (*)(const uint64_t* own_of_lane);
void warp_work(WarpWork work, void* own, Where at);

// Host address of `bytes` of a block's shared memory, checked against what the launch asked for.
char* shared_bytes(Block& block, uint32_t address, uint32_t bytes, const char* what, Where at);

}  // namespace sim
