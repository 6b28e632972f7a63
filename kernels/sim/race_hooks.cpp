// The hooks that the compiler calls in kernels built with -fsanitize=thread. Its own library is not linked: these stand in
// its place. Only in builds with ROUTEGRAD_SIM_RACE.
#include "race.hpp"

#if defined(ROUTEGRAD_SIM_RACE)

#include <cstddef>
#include <cstdint>

using sim::race::access;
using sim::race::atomic_access;

#define PLACE reinterpret_cast<uint64_t>(__builtin_return_address(0))

extern "C" {

#define PLAIN(bytes)                                                                     \
  void __tsan_read##bytes(void* p) { access(p, bytes, false, false, PLACE); }            \
  void __tsan_write##bytes(void* p) { access(p, bytes, true, false, PLACE); }            \
  void __tsan_unaligned_read##bytes(void* p) { access(p, bytes, false, false, PLACE); }  \
  void __tsan_unaligned_write##bytes(void* p) { access(p, bytes, true, false, PLACE); }  \
  void __tsan_volatile_read##bytes(void* p) { access(p, bytes, false, false, PLACE); }   \
  void __tsan_volatile_write##bytes(void* p) { access(p, bytes, true, false, PLACE); }
PLAIN(1)
PLAIN(2)
PLAIN(4)
PLAIN(8)
PLAIN(16)

void __tsan_read_range(void* p, size_t bytes) { access(p, bytes, false, false, PLACE); }
void __tsan_write_range(void* p, size_t bytes) { access(p, bytes, true, false, PLACE); }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void*, void*) {}
void __tsan_vptr_read(void*) {}

// Atomics are relaxed, as CUDA's are: only __threadfence orders other memory by them.
#define BEGIN_ATOMIC(write)                             \
  access(const_cast<T*>(p), sizeof(T), write, true, PLACE); \
  atomic_access(const_cast<T*>(p))
#define FETCH(bits, name)                                                         \
  uint##bits##_t __tsan_atomic##bits##_fetch_##name(volatile uint##bits##_t* p, uint##bits##_t v, int) { \
    using T = uint##bits##_t;                                                     \
    BEGIN_ATOMIC(true);                                                           \
    return __atomic_fetch_##name(p, v, __ATOMIC_SEQ_CST);                         \
  }
#define ATOMIC(bits)                                                                                              \
  uint##bits##_t __tsan_atomic##bits##_load(const volatile uint##bits##_t* p, int) {                              \
    using T = uint##bits##_t;                                                                                     \
    BEGIN_ATOMIC(false);                                                                                          \
    return __atomic_load_n(p, __ATOMIC_SEQ_CST);                                                                  \
  }                                                                                                               \
  void __tsan_atomic##bits##_store(volatile uint##bits##_t* p, uint##bits##_t v, int) {                           \
    using T = uint##bits##_t;                                                                                     \
    BEGIN_ATOMIC(true);                                                                                           \
    __atomic_store_n(p, v, __ATOMIC_SEQ_CST);                                                                     \
  }                                                                                                               \
  uint##bits##_t __tsan_atomic##bits##_exchange(volatile uint##bits##_t* p, uint##bits##_t v, int) {              \
    using T = uint##bits##_t;                                                                                     \
    BEGIN_ATOMIC(true);                                                                                           \
    return __atomic_exchange_n(p, v, __ATOMIC_SEQ_CST);                                                           \
  }                                                                                                               \
  int __tsan_atomic##bits##_compare_exchange_strong(volatile uint##bits##_t* p, uint##bits##_t* expected,         \
                                                    uint##bits##_t v, int, int) {                                 \
    using T = uint##bits##_t;                                                                                     \
    BEGIN_ATOMIC(true);                                                                                           \
    return __atomic_compare_exchange_n(p, expected, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);                \
  }                                                                                                               \
  int __tsan_atomic##bits##_compare_exchange_weak(volatile uint##bits##_t* p, uint##bits##_t* expected,           \
                                                  uint##bits##_t v, int success, int failure) {                   \
    return __tsan_atomic##bits##_compare_exchange_strong(p, expected, v, success, failure);                       \
  }                                                                                                               \
  uint##bits##_t __tsan_atomic##bits##_compare_exchange_val(volatile uint##bits##_t* p, uint##bits##_t expected,  \
                                                            uint##bits##_t v, int success, int failure) {         \
    __tsan_atomic##bits##_compare_exchange_strong(p, &expected, v, success, failure);                             \
    return expected;                                                                                              \
  }                                                                                                               \
  FETCH(bits, add) FETCH(bits, sub) FETCH(bits, and) FETCH(bits, or) FETCH(bits, xor) FETCH(bits, nand)
ATOMIC(8)
ATOMIC(16)
ATOMIC(32)
ATOMIC(64)

void __tsan_atomic_thread_fence(int) {
  if (sim::race::in_kernel()) sim::race::thread_fence();
}
void __tsan_atomic_signal_fence(int) {}
}

#endif
