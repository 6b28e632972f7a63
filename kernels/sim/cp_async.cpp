// cp.async: 16 bytes per thread, in groups of its own.
#include <cstring>

#include "machine.hpp"

namespace sim {

// ---- cp.async: a queue per thread, carried out from its front
static void copy_16(Thread* t, const CpAsync& c) {
  Block& block = *t->block;
  char* dst = block.arena + c.dst;
  race::cp_async_access(block, c.dst, c.stamp, *t, c.where);
  memcpy(dst, c.src, c.valid);
  memset(dst + c.valid, 0, 16 - c.valid);
  machine->counters.bytes_read += c.valid;
}

void run_cp_async(Thread* t, size_t count) {
  while (count-- && !t->cp_async.empty()) {
    const CpAsync c = t->cp_async.front();
    t->cp_async.pop_front();
    if (c.arrive) {
      --t->cp_arrivals;
      race::cp_async_arrive(*t, *t->block, c.bar, c.stamp.clock);
      complete_arrival(*t->block, c.bar, c.where);
    } else {
      copy_16(t, c);
    }
  }
  if (t->cp_async.empty()) std::erase(machine->cp_queues, t);
}

static void submit(CpAsync c) {
  Thread* t = machine->current;
  if (t->cp_async.empty()) machine->cp_queues.push_back(t);
  c.group = t->cp_groups;
  race::issue(c.stamp);
  c.stamp.clock = ++t->cp_issued;
  t->cp_async.push_back(std::move(c));
  if (machine->options.copies == ROUTEGRAD_SIM_EARLY) run_cp_async(t, t->cp_async.size());
}

void cp_async_16(uint32_t dst, const void* src, uint32_t valid, Where at) {
  if (dst % 16) fail("cp.async: the shared address is not 16-byte aligned", at);
  if (valid > 16) fail(format("cp.async: %u valid bytes of 16", valid), at);
  if (valid && reinterpret_cast<uintptr_t>(src) % 16) fail("cp.async: the global address is not 16-byte aligned", at);
  shared_bytes(*machine->block, dst, 16, "cp.async", at);
  CpAsync c;
  c.dst = dst;
  c.src = src;
  c.valid = valid;
  c.where = at;
  submit(std::move(c));
}

void cp_async_commit() {
  Thread* t = machine->current;
  ++t->cp_groups;
  t->cp_group_end.push_back(t->cp_issued);
}

void cp_async_wait(int keep, Where) {
  Thread* t = machine->current;
  const int waited = t->cp_groups - keep;  // groups below this number
  size_t count = 0;
  while (count < t->cp_async.size() && t->cp_async[count].group < waited) ++count;
  if (count) run_cp_async(t, count);
  if (waited > 0) race::learn(*t, race::cp_async_actor(*t), t->cp_group_end[static_cast<size_t>(waited) - 1]);
}

void cp_async_mbar_arrive_noinc(uint32_t bar, Where at) {
  mbarrier(*machine->block, bar, at);
  Thread* t = machine->current;
  CpAsync c;
  c.bar = bar;
  c.arrive = true;
  c.where = at;
  ++t->cp_arrivals;
  submit(std::move(c));
}

}  // namespace sim
