// Fibers: one stack per simulated thread, switched by a few instructions. x86-64.
#pragma once
#include <cstddef>

namespace sim {

#if defined(__SANITIZE_ADDRESS__)
inline constexpr bool kAddressSanitizer = true;
inline constexpr size_t kStackBytes = 256 << 10;
#else
inline constexpr bool kAddressSanitizer = false;
inline constexpr size_t kStackBytes = 64 << 10;
#endif

// A stack to run on, and where it stopped. The default one stands for the OS thread's own stack.
struct Fiber {
  void* stack_pointer = nullptr;
  const char* stack = nullptr;  // lowest byte
  size_t stack_bytes = 0;
  void* fake_stack = nullptr;   // address sanitizer's
};

// Stacks of equal size, each above a page that faults, in one mapping that grows and is reused.
class Stacks {
 public:
  Stacks() = default;
  Stacks(const Stacks&) = delete;
  ~Stacks();
  // Makes room for `count`; earlier stacks are invalid after growth. False when memory is refused.
  bool reserve(size_t count);
  // Prepares stack number `i` so that the first switch to `fiber` calls `entry`.
  void prepare(Fiber& fiber, size_t i, void (*entry)());

 private:
  char* base_ = nullptr;
  size_t count_ = 0;
};

// Stops `from` and goes on in `to`. `from_ends`: it never comes back.
void switch_fiber(Fiber& from, Fiber& to, bool from_ends);
// The first thing a new fiber calls; `caller` is the fiber that switched to it.
void fiber_started(Fiber& self, Fiber& caller);

}  // namespace sim
