// TMA: descriptors, and copies of boxes between global and shared memory in the asynchronous order that the options ask.
#include <cstring>

#include "machine.hpp"

namespace sim {

constexpr uint64_t kMapMagic = 0x726f757465677264;

static thread_local std::string map_failure;
const std::string& last_map_failure() { return map_failure; }

bool encode_tensor_map(TensorMap* map, const void* base, int rank, uint32_t element, const uint64_t* extent,
                       const uint64_t* stride_bytes, const uint32_t* box, uint32_t swizzle) {
  const auto refuse = [&](std::string why) {
    map_failure = "tensor map: " + why;
    return false;
  };
  if (!base || reinterpret_cast<uintptr_t>(base) % 16) return refuse("the base is null or not 16-byte aligned");
  if (rank < 1 || rank > 5) return refuse(format("rank %d is not 1 to 5", rank));
  TensorMap m{};
  m.magic = kMapMagic;
  m.base = static_cast<char*>(const_cast<void*>(base));
  m.rank = static_cast<uint8_t>(rank);
  m.element = static_cast<uint8_t>(element);
  m.swizzle = static_cast<uint16_t>(swizzle);
  for (int i = 0; i < rank; ++i) {
    m.extent[i] = extent[i];
    m.stride[i] = i ? stride_bytes[i - 1] : element;
    m.box[i] = static_cast<uint16_t>(box[i]);
    if (!extent[i] || extent[i] > 1ull << 32)
      return refuse(format("extent %llu of dimension %d is not 1 to 2^32", static_cast<unsigned long long>(extent[i]), i));
    if (i && (m.stride[i] % 16 || m.stride[i] >= 1ull << 40))
      return refuse(format("stride %llu of dimension %d is not a multiple of 16 below 2^40",
                           static_cast<unsigned long long>(m.stride[i]), i));
    if (!box[i] || box[i] > 256) return refuse(format("box extent %u of dimension %d is not 1 to 256", box[i], i));
  }
  const uint32_t inner = box[0] * element;
  if (inner % 16) return refuse(format("%u bytes of inner box are not a multiple of 16", inner));
  if (swizzle && inner != swizzle)
    return refuse(format("%u bytes of inner box must equal the swizzle span of %u", inner, swizzle));
  *map = m;
  return true;
}

uint32_t swizzled(uint32_t address, uint32_t span) {
  const uint32_t row_bits = span == 128 ? 7 : span == 64 ? 3 : span == 32 ? 1 : 0;
  return address ^ (address >> 7 & row_bits) << 4;
}

static uint32_t box_bytes(const TensorMap& map) {
  uint32_t bytes = map.element;
  for (int i = 0; i < map.rank; ++i) bytes *= map.box[i];
  return bytes;
}

// What an H200 refuses as an illegal instruction.
static void check_place(const TensorMap* map, bool load, Coordinates at_box, Where at) {
  const int x = *at_box.begin();
  if (x * static_cast<int>(map->element) % 16)
    fail(format("TMA: the box begins at element %d of a row, which is not a multiple of 16 bytes", x), at);
  for (int place : at_box)
    if (!load && place < 0) fail(format("TMA: a store to a box that begins at %d", place), at);
}

static void check_map(const TensorMap* map, uint32_t shared, int coordinates, Where at) {
  if (reinterpret_cast<uintptr_t>(map) % 64) fail("TMA: the tensor map is not 64-byte aligned", at);
  if (map->magic != kMapMagic) fail("TMA: not a tensor map", at);
  if (map->rank != coordinates) fail(format("TMA: %d coordinates for a tensor of rank %d", coordinates, map->rank), at);
  const uint32_t alignment = map->swizzle ? map->swizzle * 8 : 128;
  if (shared % alignment)
    fail(format("TMA: the shared address 0x%x is not aligned to %u, as a swizzle of %u needs", shared, alignment,
                map->swizzle),
         at);
}

enum class Move { Load, Store, Add };

static void move_bytes(Move move, char* shared, char* global, size_t bytes) {
  if (move == Move::Load) {
    memcpy(shared, global, bytes);
    machine->counters.bytes_read += bytes;
    return;
  }
  if (move == Move::Add) {  // in L2: it counts as a write
    for (size_t i = 0; i < bytes; i += sizeof(float)) {
      float old, more;
      memcpy(&old, global + i, sizeof old);
      memcpy(&more, shared + i, sizeof more);
      old += more;
      memcpy(global + i, &old, sizeof old);
    }
  } else {
    memcpy(global, shared, bytes);
  }
  machine->counters.bytes_written += bytes;
}

// One row of the box, in 16-byte chunks; elements outside the tensor are zero (load) or left alone. A swizzled row is one
// span, so all its chunks are XORed alike.
static void move_row(const TensorMap& map, int x, char* global_row, bool row_inside, char* shared_base, uint32_t shared_row,
                     Move move) {
  const uint32_t row_bytes = map.box[0] * map.element, flip = swizzled(shared_row, map.swizzle) ^ shared_row;
  const int64_t extent = static_cast<int64_t>(map.extent[0]);
  char* const global = global_row + static_cast<int64_t>(x) * map.element;
  if (row_inside && x >= 0 && static_cast<int64_t>(x) + map.box[0] <= extent && move != Move::Add) {
    const bool load = move == Move::Load;
    for (uint32_t chunk = 0; chunk < row_bytes; chunk += 16) {
      char* s = shared_base + ((shared_row + chunk) ^ flip);
      load ? memcpy(s, global + chunk, 16) : memcpy(global + chunk, s, 16);
    }
    (load ? machine->counters.bytes_read : machine->counters.bytes_written) += row_bytes;
    return;
  }
  for (uint32_t byte = 0; byte < row_bytes; byte += map.element) {
    char* s = shared_base + ((shared_row + byte) ^ flip);
    const int64_t column = static_cast<int64_t>(x) + byte / map.element;
    if (row_inside && 0 <= column && column < extent)
      move_bytes(move, s, global + byte, map.element);
    else if (move == Move::Load)
      memset(s, 0, map.element);
  }
}

// `shared_base` + a shared address is where that address lies on the host.
static void move_box(const TensorMap& map, const int* at, char* shared_base, uint32_t shared, Move move) {
  uint32_t index[5] = {};
  for (;;) {
    bool inside = true;
    char* row = map.base;
    for (int i = 1; i < map.rank; ++i) {
      const int64_t c = static_cast<int64_t>(at[i]) + index[i];
      inside &= 0 <= c && c < static_cast<int64_t>(map.extent[i]);
      row += c * static_cast<int64_t>(map.stride[i]);
    }
    move_row(map, at[0], row, inside, shared_base, shared, move);
    shared += map.box[0] * map.element;
    int d = 1;
    while (d < map.rank && ++index[d] == map.box[d]) index[d++] = 0;
    if (d >= map.rank) return;
  }
}

// ---- carrying out
using Copy = std::list<TmaCopy>::iterator;

static void run_load(TmaCopy& c) {
  Block& block = *c.target;
  const uint32_t bytes = box_bytes(c.map);
  if (!block.live) fail("TMA load into a block that has ended", c.where);
  race::MbarrierSync& sync = race::mbarrier_sync(block, c.bar);
  c.stamp.clock = sync.phase;
  race::async_access(block, c.shared, bytes, true, sync.actor, c.stamp, c.where);
  race::async_global_access(c.map, c.at, false, sync.actor, c.stamp, c.where);
  move_box(c.map, c.at, block.arena, c.shared, Move::Load);
  complete_bytes(block, c.bar, bytes, c.where);
}

static void read_store(TmaCopy& c) {
  const uint32_t bytes = box_bytes(c.map);
  race::async_access(*c.target, c.shared, bytes, false, race::store_actor(*c.thread), c.stamp, c.where);
  c.staged.assign(c.target->arena + c.shared, c.target->arena + c.shared + bytes);
  c.step = TmaCopy::Step::Read;
}

static void write_store(TmaCopy& c) {
  race::async_global_access(c.map, c.at, true, race::store_write_actor(*c.thread), c.stamp, c.where);
  move_box(c.map, c.at, c.staged.data() - c.shared, c.shared, c.add ? Move::Add : Move::Store);
  c.step = TmaCopy::Step::Written;
}

// A load wholly; a store by one step.
void run_copy(Copy c) {
  if (c->load) {
    TmaCopy copy = std::move(*c);
    machine->copies.erase(c);
    run_load(copy);
  } else if (c->step == TmaCopy::Step::Issued) {
    read_store(*c);
  } else {
    write_store(*c);
    machine->copies.erase(c);
  }
}

void run_some_copy() {
  auto& copies = machine->copies;
  const size_t count = copies.size() + machine->cp_queues.size();
  if (!count) return;
  size_t i = random_number() % count;
  if (i < copies.size()) return run_copy(std::next(copies.begin(), static_cast<long>(i)));
  Thread* t = machine->cp_queues[i - copies.size()];
  run_cp_async(t, 1 + random_number() % t->cp_async.size());
}

bool run_needed_copy(bool at_random) {
  Machine& m = *machine;
  std::vector<Copy> loads;
  for (Copy c = m.copies.begin(); c != m.copies.end(); ++c)
    if (c->load) {
      loads.push_back(c);
      if (!at_random) break;
    }
  if (!loads.empty()) {
    run_copy(loads[at_random ? random_number() % loads.size() : 0]);
    return true;
  }
  for (Thread* t : m.cp_queues)
    if (t->cp_arrivals) {
      run_cp_async(t, t->cp_async.size());
      return true;
    }
  return false;
}

void finish_stores() {
  while (!machine->copies.empty()) run_copy(machine->copies.begin());
}

void check_stores_read(Thread* t) {
  for (const TmaCopy& c : machine->copies)
    if (!c.load && c.thread == t && c.step == TmaCopy::Step::Issued)
      fail("the thread ends while its TMA store may still read shared memory; bulk_wait_read first", c.where);
}

// ---- instructions
static TmaCopy& submit(bool load, const TensorMap* map, uint32_t shared, Coordinates at_box, Where at) {
  check_map(map, shared, static_cast<int>(at_box.size()), at);
  check_place(map, load, at_box, at);
  TmaCopy& c = machine->copies.emplace_back();
  c.load = load;
  c.map = *map;
  c.shared = shared;
  int i = 0;
  for (int x : at_box) c.at[i++] = x;
  c.target = machine->block;
  c.thread = machine->current;
  c.where = at;
  race::issue(c.stamp);
  return c;
}

static void submit_load(Block& target, uint32_t dst, const TensorMap* map, uint32_t bar, Coordinates at_box, Where at) {
  mbarrier(target, bar, at);
  require_fenced(target, bar, "a TMA load", at);
  TmaCopy& c = submit(true, map, dst, at_box, at);
  shared_bytes(target, dst, box_bytes(*map), "TMA load", at);
  c.bar = bar;
  c.target = &target;
  if (machine->options.copies == ROUTEGRAD_SIM_EARLY) run_copy(std::prev(machine->copies.end()));
}

void tma_load(uint32_t dst, const TensorMap* map, uint32_t bar, Coordinates at_box, Where at) {
  submit_load(*machine->block, dst, map, bar, at_box, at);
}

void tma_load_multicast(uint32_t dst, const TensorMap* map, uint32_t bar, Coordinates at_box, uint16_t blocks, Where at) {
  Block& own = *machine->block;
  if (!blocks || blocks >> own.cluster_size)
    fail(format("TMA multicast to the blocks of mask 0x%x in a cluster of %d", blocks, own.cluster_size), at);
  for (int rank = 0; rank < own.cluster_size; ++rank)
    if (blocks >> rank & 1) submit_load(own.cluster[rank], dst, map, bar, at_box, at);
}

static void submit_store(const TensorMap* map, uint32_t src, Coordinates at_box, bool add, Where at) {
  TmaCopy& c = submit(false, map, src, at_box, at);
  shared_bytes(*machine->block, src, box_bytes(*map), "TMA store", at);
  c.add = add;
  c.group = machine->current->bulk_groups;
  c.stamp.clock = static_cast<uint32_t>(c.group) + 1;
  if (machine->options.copies == ROUTEGRAD_SIM_EARLY) {
    const Copy last = std::prev(machine->copies.end());
    run_copy(last);
    run_copy(last);
  }
}

void tma_store(const TensorMap* map, uint32_t src, Coordinates at_box, Where at) {
  submit_store(map, src, at_box, false, at);
}

void tma_reduce_add(const TensorMap* map, uint32_t src, Coordinates at_box, Where at) {
  if (map->element != sizeof(float)) fail("TMA reduce-add: the tensor map is not of f32", at);
  submit_store(map, src, at_box, true, at);
}

void bulk_commit() { ++machine->current->bulk_groups; }

void bulk_wait(int keep, bool read_only, Where) {
  Thread* t = machine->current;
  const int waited = t->bulk_groups - keep;  // groups below this number
  for (Copy c = machine->copies.begin(); c != machine->copies.end();) {
    const Copy copy = c++;
    if (copy->load || copy->thread != t || copy->group >= waited) continue;
    if (copy->step == TmaCopy::Step::Issued) run_copy(copy);
    if (!read_only) run_copy(copy);
  }
  if (waited <= 0) return;
  race::learn(*t, race::store_actor(*t), static_cast<uint32_t>(waited));
  if (!read_only) race::learn(*t, race::store_write_actor(*t), static_cast<uint32_t>(waited));
}

}  // namespace sim
