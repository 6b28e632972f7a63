// Race detector: the remembered accesses to shared and global memory, and the check of a new one against them.
// Only in builds with ROUTEGRAD_SIM_RACE.
#include "race.hpp"

#if defined(ROUTEGRAD_SIM_RACE)

#include <dlfcn.h>

#include <algorithm>

#include "machine.hpp"

namespace sim::race {

Actor thread_actor(const Thread& t);
uint32_t thread_clock(const Thread& t);
const Clock& thread_seen(const Thread& t);
void atomic_order(Sync& location);

static std::string actor_name(const Access& a) {
  if (a.domain != machine->race.id) return "another block";
  const auto& [kind, which] = machine->race.names[a.actor];
  return format("%s %u", kind, which);
}

// A line of the kernel, or a code address relative to its shared object, for addr2line.
static std::string place_name(uint64_t place) {
  if (place >> 20 == 0) return format("line %u", static_cast<unsigned>(place));
  Dl_info info{};
  dladdr(reinterpret_cast<void*>(place), &info);
  return format("code at 0x%llx", static_cast<unsigned long long>(place - reinterpret_cast<uint64_t>(info.dli_fbase)));
}

// What the accessor knows: `fenced` for asynchronous units only.
struct Knowledge {
  const Clock& seen;
  const Clock* fenced;
};

enum class Order { Before, NotFenced, None };

// Blocks of different clusters are ordered by nothing. (On the GPU atomics with fences can order them; a kernel that
// relies on that is reported here.)
static Order order(const Access& earlier, const Access& later, const Knowledge& k) {
  if (earlier.domain != later.domain) return Order::None;
  if (earlier.clock > k.seen[earlier.actor]) return Order::None;
  const bool needs_fence = later.async && !earlier.async && earlier.write;
  return needs_fence && earlier.clock > (*k.fenced)[earlier.actor] ? Order::NotFenced : Order::Before;
}

[[noreturn]] static void report(const Access& earlier, const Access& later, Order found, const std::string& address) {
  const char* verb = later.write ? "writes" : "reads";
  fail(format("race at %s: %s %s it (%s) after %s by %s (%s)%s", address.c_str(), actor_name(later).c_str(), verb,
              place_name(later.place).c_str(), earlier.write ? "a write" : "a read", actor_name(earlier).c_str(),
              place_name(earlier.place).c_str(),
              found == Order::NotFenced ? ", ordered but without the writer's fence_proxy_async" : ", with no order between"));
}

// Checks an access to some bytes of a granule and remembers it.
static void check(Granule& granule, const Access& now, const Knowledge& k, const std::string& (*address)(uint64_t),
                  uint64_t where) {
  Access* free = nullptr;
  Access* old = nullptr;
  const int first = now.write ? 0 : kWrites, last = now.write ? kWrites : kWrites + kReads;
  for (int i = 0; i < kWrites + kReads; ++i) {
    Access& a = granule.access[i];
    const bool own_kind = first <= i && i < last;
    if (!a.used) {
      if (own_kind && !free) free = &a;
      continue;
    }
    const bool same_actor = a.actor == now.actor && a.domain == now.domain;
    const bool conflict = (a.bytes & now.bytes) && (a.write || now.write) && !same_actor && !(a.atomic && now.atomic);
    const Order o = order(a, now, k);
    if (conflict && o != Order::Before) report(a, now, o, address(where));
    // What is covered by this access and ordered before it need not be remembered.
    if (own_kind && !(a.bytes & ~now.bytes) && a.async == now.async && a.atomic == now.atomic && a.domain == now.domain) {
      if (same_actor) free = &a;
      else if (o == Order::Before) old = &a;
    }
  }
  Access* slot = free ? free : old ? old : &granule.access[first + static_cast<int>(random_number() % (last - first))];
  *slot = now;
  slot->used = true;
}

template <class F>
static void for_granules(uint64_t start, size_t bytes, F f) {
  for (uint64_t a = start, end = start + bytes; a < end;) {
    const uint64_t low = a & 15, high = std::min<uint64_t>(16, low + (end - a));
    f(a / 16, static_cast<uint16_t>(((1u << high) - 1) & ~((1u << low) - 1)), a);
    a += high - low;
  }
}

static thread_local std::string address_text;
static const std::string& shared_address_text(uint64_t address) {
  return address_text = format("shared memory +%d", static_cast<int>(address) - static_cast<int>(kSharedBase));
}
static const std::string& global_address_text(uint64_t address) {
  return address_text = format("global memory 0x%llx", static_cast<unsigned long long>(address));
}

static void touch_shared(Block& block, uint32_t address, size_t bytes, Access now, const Knowledge& k) {
  now.domain = machine->race.id;
  for_granules(address, bytes, [&](uint64_t granule, uint16_t mask, uint64_t at) {
    now.bytes = mask;
    check(block.shadow.granules[granule], now, k, shared_address_text, at);
  });
}

static void touch_global(uint64_t address, size_t bytes, Access now, const Knowledge& k) {
  now.domain = machine->race.id;
  Global& global = *machine->race_global;
  const std::lock_guard guard(global.lock);
  for_granules(address, bytes, [&](uint64_t granule, uint16_t mask, uint64_t at) {
    now.bytes = mask;
    check(global.granules[granule], now, k, global_address_text, at);
  });
}

static Access by_thread(const Thread& t, bool write, uint64_t place) {
  Access a;
  a.place = place;
  a.actor = thread_actor(t);
  a.clock = thread_clock(t);
  a.write = write;
  return a;
}

// ---- accesses of threads
void access(const void* p, size_t bytes, bool write, bool atomic, uint64_t place) {
  if (!machine || !machine->current) return;  // host code of a launcher
  const Thread& t = *machine->current;
  const char* c = static_cast<const char*>(p);
  if (c >= t.fiber.stack && c < t.fiber.stack + t.fiber.stack_bytes) return;
  Access now = by_thread(t, write, place);
  now.atomic = atomic;
  const Knowledge k{thread_seen(t), nullptr};
  const uint64_t address = reinterpret_cast<uint64_t>(p);
  const uint64_t offset = address - reinterpret_cast<uint64_t>(t.block->arena);
  if (offset < kWindowBytes)
    touch_shared(*t.block, static_cast<uint32_t>(offset), bytes, now, k);
  else
    touch_global(address, bytes, now, k);
}

void atomic_access(const void* p) {
  if (!machine || !machine->current) return;
  Global& global = *machine->race_global;
  const std::lock_guard guard(global.lock);
  atomic_order(global.atomics[reinterpret_cast<uint64_t>(p) ^ static_cast<uint64_t>(machine->race.id) << 48]);
}

void shared_access(Block& block, uint32_t address, uint32_t bytes, bool write, Where at) {
  const Thread& t = *machine->current;
  touch_shared(block, address, bytes, by_thread(t, write, at.line()), {thread_seen(t), nullptr});
}

// The initialisation of an mbarrier must have happened before its use; uses themselves are atomic.
void mbarrier_use(Block& block, uint32_t bar, Where at) {
  if (!machine->current) return;
  Access now = by_thread(*machine->current, false, at.line());
  now.domain = machine->race.id;
  const Knowledge k{thread_seen(*machine->current), nullptr};
  for (const Access& a : block.shadow.granules[bar / 16].access) {
    const bool initialises = a.used && a.write && (a.bytes >> bar % 16 & 1) && a.actor != now.actor;
    if (initialises && order(a, now, k) != Order::Before) report(a, now, Order::None, shared_address_text(bar));
  }
}

// ---- accesses of asynchronous units
static Access by_unit(Actor actor, bool write, const Stamp& stamp, Where at) {
  Access a;
  a.place = at.line();
  a.actor = actor;
  a.clock = stamp.clock;
  a.write = write;
  a.async = true;
  return a;
}

void async_access(Block& block, uint32_t address, uint32_t bytes, bool write, Actor actor, const Stamp& stamp, Where at) {
  touch_shared(block, address, bytes, by_unit(actor, write, stamp, at), {stamp.seen, &stamp.fenced});
}

// cp.async writes as ordinary stores do, only later.
void cp_async_access(Block& block, uint32_t address, const Stamp& stamp, const Thread& t, Where at) {
  Access now = by_unit(cp_async_actor(t), true, stamp, at);
  now.async = false;
  touch_shared(block, address, 16, now, {stamp.seen, nullptr});
}

void async_global_access(const TensorMap& map, const int* at_box, bool write, Actor actor, const Stamp& stamp, Where at) {
  Access now = by_unit(actor, write, stamp, at);
  now.async = false;  // proxies of global memory are not followed
  const Knowledge k{stamp.seen, nullptr};
  const int64_t low = std::max<int64_t>(at_box[0], 0);
  const int64_t high = std::min<int64_t>(static_cast<int64_t>(at_box[0]) + map.box[0], static_cast<int64_t>(map.extent[0]));
  if (low >= high) return;
  uint32_t index[5] = {};
  for (;;) {
    bool inside = true;
    uint64_t row = reinterpret_cast<uint64_t>(map.base);
    for (int i = 1; i < map.rank; ++i) {
      const int64_t c = static_cast<int64_t>(at_box[i]) + index[i];
      inside &= 0 <= c && c < static_cast<int64_t>(map.extent[i]);
      row += static_cast<uint64_t>(c) * map.stride[i];
    }
    if (inside)
      touch_global(row + static_cast<uint64_t>(low) * map.element, static_cast<size_t>(high - low) * map.element, now, k);
    int d = 1;
    while (d < map.rank && ++index[d] == map.box[d]) index[d++] = 0;
    if (d >= map.rank) return;
  }
}

}  // namespace sim::race

#endif
