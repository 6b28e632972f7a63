// wgmma: a product runs once all 128 threads have issued it, at the time the options ask; until its accumulators are
// taken back they read as NaN.
#include <algorithm>
#include <cstring>

#include "machine.hpp"

namespace sim {

constexpr int kRows = 64, kDepth = 16;

static Warpgroup& warpgroup(const Thread& t) { return t.block->warpgroups[static_cast<size_t>(t.id / kWarpgroup)]; }

// ---- operands in shared memory
// A descriptor's fields, in bytes.
struct Layout {
  uint32_t start, leading, stride, span, row_bits;
  explicit Layout(uint64_t d)
      : start((d & 0x3fff) << 4), leading((d >> 16 & 0x3fff) << 4), stride((d >> 32 & 0x3fff) << 4) {
    constexpr uint32_t spans[] = {0, 128, 64, 32}, rows[] = {0, 7, 3, 1};
    span = spans[d >> 62];
    row_bits = rows[d >> 62];
  }
  // Address of the 16-byte chunk that holds element (mn, k); the contiguous one of both is a multiple of 8.
  uint32_t chunk(bool mn_major, uint32_t mn, uint32_t k) const {
    uint32_t offset;
    if (!mn_major) {
      offset = span ? mn % 8 * span + mn / 8 * stride + k / 8 * 16 : mn % 8 * 16 + mn / 8 * stride + k / 8 * leading;
    } else if (span) {
      const uint32_t byte = mn * 2;  // the span is a power of two
      offset = byte % span + byte / span * leading + k % 8 * span + k / 8 * stride;
    } else {
      offset = mn / 8 * stride + k % 8 * 16 + k / 8 * leading;
    }
    const uint32_t address = start + offset;
    return address ^ (address >> 7 & row_bits) << 4;
  }
};

static void check_operand(const Operand& o, Where at) {
  const uint64_t d = o.descriptor;
  const uint32_t start = (d & 0x3fff) << 4, mode = d >> 62;
  if (d & ~0xC00E3FFF3FFF3FFFull) fail("wgmma descriptor: reserved bits are set", at);
  if (d >> 49 & 7) fail("wgmma descriptor: a base offset is not supported", at);
  if (mode && start >> 7 & (mode == 1 ? 7 : mode == 2 ? 3 : 1))
    fail(format("wgmma descriptor: the start 0x%x is not at a boundary of the swizzle pattern", start), at);
}

static float widen(uint16_t bits) { return __builtin_bit_cast(float, static_cast<uint32_t>(bits) << 16); }

// out[mn · mn_step + k · k_step], for mn < rows, k < 16.
static void load_operand(const Operand& o, int rows, float* out, int mn_step, int k_step, const Product& p, Block& block,
                         race::Actor actor) {
  const Layout layout(o.descriptor);
  for (int mn = 0; mn < rows; mn += o.mn_major ? 8 : 1)
    for (int k = 0; k < kDepth; k += o.mn_major ? 1 : 8) {
      const uint32_t address = layout.chunk(o.mn_major, static_cast<uint32_t>(mn), static_cast<uint32_t>(k));
      uint16_t chunk[8];
      memcpy(chunk, shared_bytes(block, address, 16, "wgmma operand", p.where), 16);
      race::async_access(block, address, 16, false, actor, p.stamp, p.where);
      float* to = out + mn * mn_step + k * k_step;
      const int step = o.mn_major ? mn_step : k_step;
      if (step == 1)
        for (int e = 0; e < 8; ++e) to[e] = widen(chunk[e]);
      else
        for (int e = 0; e < 8; ++e) to[e * step] = widen(chunk[e]);
    }
}

// The fragment of A that thread t holds: register 2 kh + h is row r + 8 h, columns c + 8 kh and the next.
static void load_register_operand(const Product& p, float* out) {  // out[k][64]
  for (int t = 0; t < kWarpgroup; ++t) {
    const int r = t / 32 * 16 + t % 32 / 4, c = t % 4 * 2;
    for (int i = 0; i < 4; ++i) {
      const uint32_t pair = p.a_registers[static_cast<size_t>(t * 4 + i)];
      float* to = out + (c + 8 * (i / 2)) * kRows + r + 8 * (i % 2);
      to[0] = widen(static_cast<uint16_t>(pair));
      to[kRows] = widen(static_cast<uint16_t>(pair >> 16));
    }
  }
}

// Calls f(register, index into values) for the accumulators of thread t.
template <class F>
static void for_fragment(int t, int columns, F f) {
  const int row = t / 32 * 16 + t % 32 / 4, column = t % 4 * 2;
  for (int j = 0; j < columns / 8; ++j)
    for (int h = 0; h < 2; ++h)
      for (int e = 0; e < 2; ++e) f(4 * j + 2 * h + e, (8 * j + column + e) * kRows + row + 8 * h);
}

static void run_product(Warpgroup& w, Product& p, Block& block) {
  float* const a = machine->product_a;
  float* const b = machine->product_b;
  if (p.a_in_registers)
    load_register_operand(p, a);
  else
    load_operand(p.a, kRows, a, 1, kRows, p, block, w.actor);
  load_operand(p.b, p.columns, b, kDepth, 1, p, block, w.actor);
  float* values = p.accumulator->values();
  if (!p.accumulate) memset(values, 0, sizeof(float) * kRows * static_cast<size_t>(p.columns));
  static const ProductKernel multiply = product_kernel(kRows);
  multiply(values, a, b, p.columns);
  machine->counters.tensor_flops += 2ull * kRows * static_cast<uint64_t>(p.columns) * kDepth;
  p.done = true;
  --p.accumulator->unfinished;
}

// ---- issue
static Accumulator* find_accumulator(Warpgroup& w, int t, const float* d) {
  for (Accumulator& a : w.accumulators)
    if (a.registers[t] == d) return &a;
  return nullptr;
}

static Product& open_product(Warpgroup& w, Thread* t, float* d, const ProductRequest& request) {
  Accumulator* acc = find_accumulator(w, t->id % kWarpgroup, d);
  if (!acc) {
    acc = &w.accumulators.emplace_back();
    acc->columns = request.columns;
    acc->storage.resize(static_cast<size_t>(request.columns) * kRows + 16);
  }
  if (acc->columns != request.columns) fail("wgmma: accumulators under way are used with another N", request.where);
  ++acc->unfinished;
  acc->last_group = request.group;
  Product& p = w.products.emplace_back();
  static_cast<ProductRequest&>(p) = request;
  p.accumulator = acc;
  if (p.a_in_registers) p.a_registers.resize(kWarpgroup * 4);
  p.stamp.clock = ++w.clock;
  if (w.actor == race::kNobody) w.actor = race::warpgroup_actor(*t);
  return p;
}

// Thread t hands its accumulators over at its first product on them.
static void hand_over(Thread* t, float* d, Product& p) {
  const int i = t->id % kWarpgroup;
  float*& owned = p.accumulator->registers[i];
  if (owned == d) return;
  if (owned) fail("wgmma: a thread's accumulators differ from those it gave before", p.where);
  if (!t->fenced) fail("wgmma: the accumulators were touched since the last wgmma_fence", p.where);
  owned = d;
  float* values = p.accumulator->values();
  if (p.accumulate) for_fragment(i, p.columns, [&](int r, int v) { values[v] = d[r]; });
  if (machine->options.poison) memset(d, 0xff, sizeof(float) * static_cast<size_t>(p.columns) / 2);
}

static void run_issued(Warpgroup& w, Block& block) {
  for (Product& p : w.products) {
    if (p.issued < kWarpgroup) break;
    if (!p.done) run_product(w, p, block);
  }
}

static void issue(float* d, const uint32_t* a_registers, const ProductRequest& request) {
  Thread* t = machine->current;
  Block& block = *machine->block;
  Warpgroup& w = warpgroup(*t);
  const Where at = request.where;
  if (request.columns % 8 || request.columns < 8 || request.columns > 256)
    fail(format("wgmma: N = %d is not a multiple of 8 up to 256", request.columns), at);
  const int number = t->products_issued++;
  const bool first = number == w.first + static_cast<int>(w.products.size());
  Product& p = first ? open_product(w, t, d, request) : w.products[static_cast<size_t>(number - w.first)];
  if (!p.same(request))
    fail("wgmma: threads of one warpgroup disagree on the operation", at);
  if (a_registers) {
    if (!t->fenced) fail("wgmma: registers of A are used without a wgmma_fence since the last wait", at);
    std::copy(a_registers, a_registers + 4, p.a_registers.begin() + t->id % kWarpgroup * 4);
  }
  hand_over(t, d, p);
  race::issue_together(p.stamp, first);
  if (++p.issued < kWarpgroup) return;
  const int when = machine->options.products;
  if (when == ROUTEGRAD_SIM_EARLY || (when == ROUTEGRAD_SIM_RANDOM && random_number() % 2)) run_issued(w, block);
  for (Thread* waiting : w.waiters) wake(waiting);
  w.waiters.clear();
}

void wgmma(float* d, int columns, Operand a, Operand b, bool accumulate, Where at) {
  check_operand(a, at);
  check_operand(b, at);
  issue(d, nullptr, {a, b, false, accumulate, columns, machine->current->groups_committed, at});
}

void wgmma_a_registers(float* d, int columns, const uint32_t* a, Operand b, bool accumulate, Where at) {
  check_operand(b, at);
  issue(d, a, {Operand{}, b, true, accumulate, columns, machine->current->groups_committed, at});
}

void wgmma_fence(Where) { machine->current->fenced = true; }
void wgmma_commit(Where) { ++machine->current->groups_committed; }

// ---- completion
void wgmma_wait(int keep, Where at) {
  Thread* t = machine->current;
  Warpgroup& w = warpgroup(*t);
  const int waited = t->groups_committed - keep;  // groups below this number
  for (size_t i = 0; i < w.products.size() && w.products[i].group < waited;) {
    Product& p = w.products[i];
    if (p.issued < kWarpgroup) {
      w.waiters.push_back(t);
      block_current("wgmma issue", static_cast<uint32_t>(w.first) + static_cast<uint32_t>(i),
                    static_cast<uint32_t>(p.issued), at);
      i = 0;
      continue;
    }
    if (!p.done) run_product(w, p, *t->block);
    if (p.group >= t->groups_waited) {
      ++p.waited;
      race::learn(*t, w.actor, p.stamp.clock);
    }
    ++i;
  }
  t->groups_waited = std::max(t->groups_waited, waited);
  t->fenced = false;
  while (!w.products.empty() && w.products.front().waited == kWarpgroup) w.products.pop_front(), ++w.first;
}

void wgmma_take(float* d, int, Where at) {
  Thread* t = machine->current;
  Warpgroup& w = warpgroup(*t);
  const int i = t->id % kWarpgroup;
  Accumulator* acc = find_accumulator(w, i, d);
  if (!acc) return;  // no product used them
  if (acc->last_group >= t->groups_waited || acc->unfinished)
    fail("wgmma_wait: accumulators are taken back while a product on them is under way", at);
  const float* values = acc->values();
  for_fragment(i, acc->columns, [&](int r, int v) { d[r] = values[v]; });
  acc->registers[i] = nullptr;
  if (++acc->taken == kWarpgroup) w.accumulators.remove_if([&](const Accumulator& a) { return &a == acc; });
}

void check_products_waited(Block& block) {
  for (const Warpgroup& w : block.warpgroups)
    for (const Product& p : w.products)
      if (p.waited < kWarpgroup)
        fail(format("the block ends with a wgmma that %d of 128 threads did not wait for", kWarpgroup - p.waited), p.where);
}

}  // namespace sim
