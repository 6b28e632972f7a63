// The race detector: vector clocks for threads and for the asynchronous units, checked at each access to shared and
// global memory. It exists in builds with ROUTEGRAD_SIM_RACE, whose kernels are compiled with -fsanitize=thread so that
// their loads and stores call the hooks in race_hooks.cpp; in other builds everything here is empty.
//
// Actors are the threads of a cluster, the wgmma unit of each warpgroup, TMA loads per mbarrier, TMA stores per thread,
// and cp.async per thread. An actor's clock counts its releases (threads), phases (mbarriers) or groups. `seen[a]` is
// how much of actor a happened before; `fenced[a]` is how much of a's ordinary writes happened before and passed a's own
// proxy fence, which is what an asynchronous unit may read.
#pragma once
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <source_location>
#include <unordered_map>
#include <vector>

namespace sim {
struct Block;
struct Thread;
struct TensorMap;

namespace race {

using Where = std::source_location;
using Actor = uint32_t;
inline constexpr Actor kNobody = ~0u;

#if defined(ROUTEGRAD_SIM_RACE)

inline constexpr bool kOn = true;
using Clock = std::vector<uint32_t>;

// Knowledge that a release leaves behind for those who acquire it.
struct Sync {
  Clock seen, fenced;
};
// What an asynchronous operation knows, taken when it is issued; `clock` is its own time.
struct Stamp {
  Clock seen, fenced;
  uint32_t clock = 0;
};
// One remembered access to some bytes of a 16-byte granule.
struct Access {
  uint64_t place = 0;  // a source line, or a code address
  Actor actor = kNobody;
  uint32_t clock = 0, domain = 0;
  uint16_t bytes = 0;  // mask
  bool used = false, write = false, async = false, atomic = false;
};
inline constexpr int kWrites = 4, kReads = 8;  // remembered per granule; a read never displaces a write
struct Granule {
  Access access[kWrites + kReads];
};
struct MbarrierSync {
  uint32_t bar = 0;
  Actor actor = kNobody;  // of the TMA loads that count here
  uint32_t phase = 1;
  Sync current, done;
};
struct BlockShadow {
  std::vector<Granule> granules;
  std::vector<MbarrierSync> mbarriers;
};
// What a launch did to global memory, which all its blocks share.
struct Global {
  std::mutex lock;
  std::unordered_map<uint64_t, Granule> granules;
  std::unordered_map<uint64_t, Sync> atomics;
};
// The clocks of one cluster's (or wave's) threads, indexed by actor; threads come first.
struct Domain {
  uint32_t id = 0;
  size_t capacity = 0;
  std::vector<Clock> seen, fenced;
  std::vector<Sync> at_fence, from_atomics;        // for __threadfence and relaxed atomics
  std::vector<Actor> store_actor, cp_async_actor;  // of each thread; kNobody until used
  std::vector<std::pair<const char*, uint32_t>> names;  // of actors
};

void begin_wave(Block* blocks, int count, uint32_t id);
void release(Sync& sync);                             // by the current thread
void release_of(const Thread& thread, Sync& sync);
void acquire(const Thread& thread, const Sync& sync);
void clear(Sync& sync);
void fence_proxy();                                   // by the current thread
// An ordinary access by the current thread.
void access(const void* p, size_t bytes, bool write, bool atomic, uint64_t place);
// An ordinary access inside an instruction.
void shared_access(Block& block, uint32_t address, uint32_t bytes, bool write, Where at);
// An access by an asynchronous unit (through the async proxy), or by cp.async (`generic`).
void async_access(Block& block, uint32_t address, uint32_t bytes, bool write, Actor actor, const Stamp& stamp, Where at);
void cp_async_access(Block& block, uint32_t address, const Stamp& stamp, const Thread& thread, Where at);
void issue(Stamp& stamp);                             // by the current thread, which ticks
void issue_together(Stamp& stamp, bool first);        // by each thread of a warpgroup: what all of them know
void learn(const Thread& thread, Actor actor, uint32_t clock);
Actor warpgroup_actor(const Thread& thread);
Actor store_actor(const Thread& thread);        // reads of shared memory by this thread's TMA stores
Actor store_write_actor(const Thread& thread);  // their writes of global memory
Actor cp_async_actor(const Thread& thread);
MbarrierSync& mbarrier_sync(Block& block, uint32_t bar);
void mbarrier_use(Block& block, uint32_t bar, Where at);   // its initialisation must have happened before
void bytes_arrive(Block& block, uint32_t bar);
// The box of a TMA copy in global memory.
void async_global_access(const TensorMap& map, const int* at_box, bool write, Actor actor, const Stamp& stamp, Where at);
// The arrival of cp.async group number `clock` of a thread at an mbarrier.
void cp_async_arrive(const Thread& thread, Block& block, uint32_t bar, uint32_t clock);
bool in_kernel();                                     // on a simulated thread, not in a launcher's host code
void thread_fence();
void atomic_access(const void* p);                    // a relaxed atomic: joins what fences make visible

#else

inline constexpr bool kOn = false;
struct Sync {};
struct Stamp {
  uint32_t clock = 0;
};
struct MbarrierSync {
  Actor actor = kNobody;
  uint32_t phase = 0;
  Sync current, done;
};
struct BlockShadow {};
struct Global {};
struct Domain {};
inline MbarrierSync& mbarrier_sync(Block&, uint32_t) {
  static MbarrierSync none;
  return none;
}
inline void begin_wave(Block*, int, uint32_t) {}
inline void release(Sync&) {}
inline void release_of(const Thread&, Sync&) {}
inline void acquire(const Thread&, const Sync&) {}
inline void clear(Sync&) {}
inline void fence_proxy() {}
inline void shared_access(Block&, uint32_t, uint32_t, bool, Where) {}
inline void async_access(Block&, uint32_t, uint32_t, bool, Actor, const Stamp&, Where) {}
inline void cp_async_access(Block&, uint32_t, const Stamp&, const Thread&, Where) {}
inline void issue(Stamp&) {}
inline void issue_together(Stamp&, bool) {}
inline void learn(const Thread&, Actor, uint32_t) {}
inline Actor warpgroup_actor(const Thread&) { return kNobody; }
inline Actor store_actor(const Thread&) { return kNobody; }
inline Actor store_write_actor(const Thread&) { return kNobody; }
inline void mbarrier_use(Block&, uint32_t, Where) {}
inline void bytes_arrive(Block&, uint32_t) {}
inline void async_global_access(const TensorMap&, const int*, bool, Actor, const Stamp&, Where) {}
inline void cp_async_arrive(const Thread&, Block&, uint32_t, uint32_t) {}
inline Actor cp_async_actor(const Thread&) { return kNobody; }

#endif

}  // namespace race
}  // namespace sim
