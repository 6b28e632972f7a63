// Which thread runs next, how one blocks, and what is reported when none can run.
#include <cstdarg>
#include <cstdio>
#include <cstring>

#include "machine.hpp"

namespace sim {

namespace language {
constinit thread_local uint3 threadIdx{}, blockIdx{};
constinit thread_local dim3 blockDim{}, gridDim{};
}  // namespace language

constinit thread_local Machine* machine = nullptr;

// A loop that polls memory gives up after so many rounds in which nothing else could run.
constexpr int kMaxIdleRounds = 100000;

std::string format(const char* pattern, ...) {
  char text[800];
  va_list arguments;
  va_start(arguments, pattern);
  vsnprintf(text, sizeof text, pattern, arguments);
  va_end(arguments);
  return text;
}

static const char* file_name(Where at) {
  const char* slash = strrchr(at.file_name(), '/');
  return slash ? slash + 1 : at.file_name();
}

// Runs `next`, or the machine's own stack when it is null.
static void jump(Thread* next, bool current_ends = false) {
  Machine& m = *machine;
  Fiber& from = m.current ? m.current->fiber : m.main;
  ++m.counters.fiber_switches;
  m.current = next;
  if (next) {
    language::threadIdx = next->index;
    if (next->block != m.block) {
      m.block = next->block;
      language::blockIdx = m.block->index;
    }
  }
  switch_fiber(from, next ? next->fiber : m.main, current_ends);
}

void fail(const std::string& what) {
  Machine& m = *machine;
  m.failed = true;
  m.failure = what;
  const uint3& b = language::blockIdx;
  if (m.current) m.failure += format(", in block (%u, %u, %u) thread %d", b.x, b.y, b.z, m.current->id);
  if (!m.current) throw Fault{};
  jump(nullptr, true);
  __builtin_unreachable();
}

void fail(const std::string& what, Where at) {
  fail(what + format(" at %s:%u", file_name(at), static_cast<unsigned>(at.line())));
}

void wake(Thread* t) {
  t->state = Thread::State::Ready;
  machine->ready.push_back(t);
  machine->idle_rounds = 0;
}

static bool random_effects() {
  const routegrad_sim_options& o = machine->options;
  return o.copies == ROUTEGRAD_SIM_RANDOM;
}

// The next thread to run; null when none can.
static Thread* pick() {
  Machine& m = *machine;
  for (;;) {
    if (random_effects() && random_number() % 32 == 0) run_some_copy();
    if (m.ready_head < m.ready.size()) {
      Thread*& head = m.ready[m.ready_head];
      if (m.options.order == ROUTEGRAD_SIM_SHUFFLED)
        std::swap(head, m.ready[m.ready_head + random_number() % (m.ready.size() - m.ready_head)]);
      if (m.options.order == ROUTEGRAD_SIM_LIFO) std::swap(head, m.ready.back());
      Thread* next = head;
      if (++m.ready_head == m.ready.size()) m.ready.clear(), m.ready_head = 0;
      return next;
    }
    if (run_needed_copy(random_effects())) continue;
    if (!m.yielded.empty() && ++m.idle_rounds < kMaxIdleRounds) {
      m.ready.swap(m.yielded);
      continue;
    }
    return nullptr;
  }
}

static void run_others() {
  Thread* next = pick();
  if (next != machine->current) jump(next);
}

void run_threads() {
  if (Thread* first = pick()) jump(first);
}

void block_current(const char* what, uint32_t object, uint32_t detail, Where at) {
  Thread* t = machine->current;
  t->state = Thread::State::Blocked;
  t->wait = Wait{what, object, detail, at};
  run_others();
}

void yield(Where at) {
  Thread* t = machine->current;
  t->wait = Wait{"polling memory", 0, 0, at};
  machine->yielded.push_back(t);
  run_others();
}

void end_current() {
  machine->current->state = Thread::State::Done;
  jump(pick(), true);
  __builtin_unreachable();
}

int lane() { return machine->current->id % kWarp; }

// ---- shared memory
char* shared_bytes(Block& block, uint32_t address, uint32_t bytes, const char* what, Where at) {
  if (address < kSharedBase || address + bytes > block.shared_end)
    fail(format("%s: %u bytes at shared memory +%d lie outside the %u bytes of the launch", what, bytes,
                static_cast<int>(address) - static_cast<int>(kSharedBase), block.shared_end - kSharedBase),
         at);
  return block.arena + address;
}

void* dynamic_shared(size_t alignment, size_t bytes) {
  Block& b = *machine->block;
  const uint32_t start = (kSharedBase + alignment - 1) & ~(alignment - 1);
  if (start + bytes > b.shared_end)
    fail(format("the kernel uses %zu bytes of dynamic shared memory aligned to %zu; the launch gave %u (ask for "
                "shared_bytes<T>)",
                bytes, alignment, b.shared_end - kSharedBase));
  return b.arena + start;
}

uint32_t shared_address(const void* p, Where at) {
  Block& b = *machine->block;
  const size_t offset = static_cast<size_t>(static_cast<const char*>(p) - b.arena);
  if (offset < kSharedBase || offset > b.shared_end) fail("the address is not in this block's shared memory", at);
  return static_cast<uint32_t>(offset);
}

// ---- deadlock
static std::string describe_wait(Block& block, const Thread& t) {
  const Wait& w = t.wait;
  std::string text = format("%s", w.what);
  if (!strcmp(w.what, "mbarrier")) {
    Mbarrier m;
    memcpy(&m, block.arena + w.object, sizeof m);
    text += format(" at shared memory +%u for the phase of parity %u to end; now in phase %u, %u of %u arrivals and %d "
                   "bytes missing",
                   w.object - kSharedBase, w.detail, static_cast<unsigned>(m.phase), static_cast<unsigned>(m.pending),
                   static_cast<unsigned>(m.expected), static_cast<int>(m.bytes));
  } else if (!strcmp(w.what, "barrier")) {
    text += format(" %u, %d of %d threads arrived", w.object, block.barriers[w.object].arrived,
                   w.detail ? static_cast<int>(w.detail) : block.live);
  } else if (!strcmp(w.what, "warp collective")) {
    text += format(" of mask %08x, lanes %08x arrived", w.object, w.detail);
  } else if (!strcmp(w.what, "registers")) {
    text += format(": needs %u more, the pool has %d", w.object, block.register_pool);
  } else if (!strcmp(w.what, "wgmma issue")) {
    text += format(": product %u was issued by %u of 128 threads", w.object, w.detail);
  }
  return text + format(" at %s:%u", file_name(w.where), static_cast<unsigned>(w.where.line()));
}

// Threads that wait at the same line for the same object stand together.
std::string deadlock_report(Block& block) {
  std::string text = format("deadlock in block (%u, %u, %u):", block.index.x, block.index.y, block.index.z);
  const auto same = [](const Thread& a, const Thread& b) {
    return a.state == b.state && a.wait.what == b.wait.what && a.wait.object == b.wait.object &&
           a.wait.where.line() == b.wait.where.line();
  };
  for (size_t i = 0; i < block.threads.size();) {
    size_t end = i + 1;
    while (end < block.threads.size() && same(block.threads[i], block.threads[end])) ++end;
    const Thread& t = block.threads[i];
    if (t.state != Thread::State::Done)
      text += format("\n  threads %zu to %zu: ", i, end - 1) + describe_wait(block, t);
    i = end;
  }
  return text;
}

}  // namespace sim
