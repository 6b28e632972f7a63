// A launch: its blocks in waves, divided among OS threads; the result does not depend on how many.
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <mutex>
#include <thread>

#include "control.hpp"
#include "machine.hpp"
#include "options.hpp"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(p, n)
#define ASAN_UNPOISON_MEMORY_REGION(p, n)
#endif

namespace sim {

constexpr int kRegistersPerMultiprocessor = 64 << 10;

// ---- machines are kept for the next launch, with their stacks and arenas
static std::mutex pool_lock;
static std::vector<std::unique_ptr<Machine>> pool;

static std::unique_ptr<Machine> take_machine() {
  const std::lock_guard guard(pool_lock);
  if (pool.empty()) return std::make_unique<Machine>();
  std::unique_ptr<Machine> m = std::move(pool.back());
  pool.pop_back();
  return m;
}
static void keep_machine(std::unique_ptr<Machine> m) {
  const std::lock_guard guard(pool_lock);
  pool.push_back(std::move(m));
}

static void release_arenas(Machine& m) {
  if (m.arena_mapping) munmap(m.arena_mapping, (m.arena_count + 1) * kWindowBytes);
  m.arena_mapping = nullptr;
}
Machine::~Machine() { release_arenas(*this); }

// Windows start at multiples of their size, so that a shared address is the low bits of a host address.
static bool reserve_arenas(Machine& m, size_t count) {
  if (count <= m.arena_count) return true;
  release_arenas(m);
  m.arena_count = 0;
  void* p = mmap(nullptr, (count + 1) * kWindowBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (p == MAP_FAILED) return false;
  m.arena_mapping = p;
  m.arenas = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(p) + kWindowBytes - 1) & ~uintptr_t{kWindowBytes - 1});
  m.arena_count = count;
  return true;
}

// ---- one wave
static void thread_entry() {
  Machine& m = *machine;
  fiber_started(m.current->fiber, m.main);
  m.body(m.captured);
  Thread* t = m.current;
  check_stores_read(t);
  if (!t->cp_async.empty()) fail("the thread ends with cp.async under way that it did not wait for", t->cp_async.front().where);
  Block& block = *t->block;
  --block.live;
  thread_left(block);
  cluster_left(block);
  end_current();
}

static void prepare_block(Machine& m, Block& block, const LaunchShape& shape, uint64_t number, size_t slot) {
  const dim3& grid = shape.grid;
  block.index = {static_cast<unsigned>(number % grid.x), static_cast<unsigned>(number / grid.x % grid.y),
                 static_cast<unsigned>(number / grid.x / grid.y)};
  block.rank = static_cast<int>(slot % shape.cluster);
  block.cluster = &block - block.rank;
  block.cluster_size = static_cast<int>(shape.cluster);
  block.live = static_cast<int>(shape.threads);
  block.arena = m.arenas + slot * kWindowBytes;
  block.shared_end = kSharedBase + static_cast<uint32_t>(shape.shared);
  block.threads.resize(shape.threads);
  block.warpgroups.resize((shape.threads + kWarpgroup - 1) / kWarpgroup);
  block.gatherings.resize((shape.threads + kWarp - 1) / kWarp);
  ASAN_UNPOISON_MEMORY_REGION(block.arena, kWindowBytes);
  if (m.options.poison) memset(block.arena + kSharedBase, 0xff, shape.shared);
  ASAN_POISON_MEMORY_REGION(block.arena, kSharedBase);
  ASAN_POISON_MEMORY_REGION(block.arena + block.shared_end, kWindowBytes - block.shared_end);
  // As ptxas allots them to a kernel bounded to one block per multiprocessor.
  const int registers = std::min<int>(256, kRegistersPerMultiprocessor / static_cast<int>(shape.threads) / 8 * 8);
  block.register_pool = 0;
  for (uint32_t i = 0; i < shape.threads; ++i) {
    Thread& t = block.threads[i];
    t.block = &block;
    t.id = static_cast<int>(i);
    t.index = {i, 0, 0};
    t.registers = registers;
    m.stacks.prepare(t.fiber, slot * shape.threads + i, thread_entry);
    m.ready.push_back(&t);
  }
}

// setmaxnreg changes whole warpgroups.
static void check_registers(const Block& block) {
  for (const Thread& t : block.threads)
    if (t.registers != block.threads[static_cast<size_t>(t.id / kWarpgroup * kWarpgroup)].registers)
      fail("setmaxnreg was executed by a part of a warpgroup only");
}

static void run_wave(Machine& m, const LaunchShape& shape, uint64_t first, size_t count) {
  if (!m.stacks.reserve(count * shape.threads) || !reserve_arenas(m, count))
    fail("the simulator cannot get memory for the wave's stacks and shared memory");
  m.random_state = ((m.options.seed * 0x9E3779B97F4A7C15ull) ^ ((first + 1) * 0xD1B54A32D192ED03ull)) | 1;
  m.ready.clear(), m.yielded.clear(), m.copies.clear(), m.cp_queues.clear();
  m.ready_head = 0, m.idle_rounds = 0;
  m.main = Fiber{};
  m.block = nullptr;
  std::vector<Block> blocks(count);
  for (size_t i = 0; i < count; ++i) prepare_block(m, blocks[i], shape, first + i, i);
  race::begin_wave(blocks.data(), static_cast<int>(count), static_cast<uint32_t>(first));
  run_threads();
  if (m.failed) throw Fault{};
  std::string stuck;
  for (Block& b : blocks)
    if (b.live) stuck += (stuck.empty() ? "" : "\n") + deadlock_report(b);
  if (!stuck.empty()) {
    m.failure = stuck;
    throw Fault{};
  }
  for (const TmaCopy& c : m.copies)
    if (c.load) fail("the block ends with a TMA load under way", c.where);
  finish_stores();
  for (Block& b : blocks) check_products_waited(b), check_registers(b);
  m.counters.blocks += count;
}

// ---- the whole launch
static void add(routegrad_sim_counters& to, const routegrad_sim_counters& c) {
  to.blocks += c.blocks;
  to.fiber_switches += c.fiber_switches;
  to.tensor_flops += c.tensor_flops;
  to.bytes_read += c.bytes_read;
  to.bytes_written += c.bytes_written;
  to.bank_conflicts += c.bank_conflicts;
}

static std::string refuse_shape(const LaunchShape& s) {
  if (!s.grid.x || !s.grid.y || !s.grid.z || s.grid.x > 0x7fffffff || s.grid.y > 65535 || s.grid.z > 65535)
    return format("launch: a grid of %u x %u x %u", s.grid.x, s.grid.y, s.grid.z);
  if (!s.threads || s.threads > 1024) return format("launch: %u threads per block, not 1 to 1024", s.threads);
  if (s.shared > max_shared())
    return format("launch: %zu bytes of dynamic shared memory exceed the %u KiB of sm_%d", s.shared, max_shared() >> 10,
                  architecture());
  if (!s.cluster || s.cluster > 8 || s.grid.x % s.cluster)
    return format("launch: clusters of %u in a grid of %u along x", s.cluster, s.grid.x);
  return {};
}

struct Launch {
  Launch(const LaunchShape& s, void (*b)(void*), void* c, const routegrad_sim_options& o, uint64_t n, uint64_t w)
      : shape(s), body(b), captured(c), options(o), blocks(n), wave(w) {}
  const LaunchShape& shape;
  void (*body)(void*);
  void* captured;
  routegrad_sim_options options;
  uint64_t blocks, wave;
  std::atomic<uint64_t> next{0};
  std::mutex lock;
  uint64_t failed_wave = ~0ull;  // the first one in order, so that the report is the same for any thread count
  std::string failure;
  routegrad_sim_counters counters{};
  race::Global global;

  void work() {
    std::unique_ptr<Machine> m = take_machine();
    Machine* outer = machine;
    machine = m.get();
    m->options = options;
    m->counters = {};
    m->body = body;
    m->captured = captured;
    m->race_global = &global;
    language::blockDim = dim3(shape.threads);
    language::gridDim = shape.grid;
    for (uint64_t i; (i = next.fetch_add(wave)) < blocks && i < failed();) {
      m->failed = false;
      m->current = nullptr;
      try {
        run_wave(*m, shape, i, static_cast<size_t>(std::min(wave, blocks - i)));
      } catch (const Fault&) {
        const std::lock_guard guard(lock);
        if (i < failed_wave) failed_wave = i, failure = m->failure;
      }
    }
    machine = outer;
    {
      const std::lock_guard guard(lock);
      add(counters, m->counters);
    }
    keep_machine(std::move(m));
  }
  uint64_t failed() {
    const std::lock_guard guard(lock);
    return failed_wave;
  }
};

static thread_local std::string failure;
static thread_local routegrad_sim_counters totals{};

const std::string& last_failure() { return failure; }

routegrad_sim_counters take_counters() {
  const routegrad_sim_counters taken = totals;
  totals = {};
  return taken;
}

// No exception may leave: the caller may be Rust.
routegrad_status launch(const LaunchShape& shape, void (*body)(void*), void* captured) try {
  const routegrad_sim_options& o = options();
  failure = options_fault();
  if (failure.empty()) failure = refuse_shape(shape);
  if (!failure.empty()) return ROUTEGRAD_SIM_FAILED;
  const uint64_t blocks = static_cast<uint64_t>(shape.grid.x) * shape.grid.y * shape.grid.z;
  const uint64_t wave = std::max<uint64_t>(static_cast<uint64_t>(o.resident) / shape.cluster, 1) * shape.cluster;
  Launch l(shape, body, captured, o, blocks, wave);
  const uint64_t threads = std::min<uint64_t>(static_cast<uint64_t>(o.threads), (blocks + wave - 1) / wave);
  std::vector<std::thread> helpers;
  for (uint64_t i = 1; i < threads; ++i) helpers.emplace_back([&] { l.work(); });
  l.work();
  for (std::thread& t : helpers) t.join();
  add(totals, l.counters);
  ++totals.launches;
  failure = l.failure;
  return failure.empty() ? ROUTEGRAD_OK : ROUTEGRAD_SIM_FAILED;
} catch (const std::exception& e) {
  failure = std::string("the simulator failed: ") + e.what();
  return ROUTEGRAD_SIM_FAILED;
}

int multiprocessors() { return options().multiprocessors; }
int architecture() { return options().arch; }
uint32_t max_shared() { return max_shared_of(options().arch); }
void count_read(size_t bytes) { machine->counters.bytes_read += bytes; }
void count_written(size_t bytes) { machine->counters.bytes_written += bytes; }

}  // namespace sim
