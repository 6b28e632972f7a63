#include "fiber.hpp"

#include <sys/mman.h>

#include <cstdint>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if !defined(__x86_64__) || !defined(__linux__)
#error "the simulator's fiber switch is written for x86-64 Linux; another machine needs its own fiber.cpp"
#endif

// Saves the registers that a called function must preserve, then the stack pointer; loads those of the other side.
// MXCSR and the x87 control word stay as they are: kernels do not change them.
extern "C" void routegrad_sim_switch_stack(void** save, void* load);
asm(R"(
.text
.hidden routegrad_sim_switch_stack
.globl routegrad_sim_switch_stack
.type routegrad_sim_switch_stack,@function
routegrad_sim_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size routegrad_sim_switch_stack, .-routegrad_sim_switch_stack
)");

namespace sim {

constexpr size_t kPage = 4096;
constexpr size_t kSlot = kPage + kStackBytes;

Stacks::~Stacks() {
  if (base_) munmap(base_, count_ * kSlot);
}

bool Stacks::reserve(size_t count) {
  if (count > count_) {
    if (base_) munmap(base_, count_ * kSlot);
    void* p = mmap(nullptr, count * kSlot, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    base_ = p == MAP_FAILED ? nullptr : static_cast<char*>(p);
    count_ = base_ ? count : 0;
    for (size_t i = 0; i < count_; ++i) mprotect(base_ + i * kSlot, kPage, PROT_NONE);
  }
#if defined(__SANITIZE_ADDRESS__)
  // Fibers that ended in a failure left their frames poisoned.
  for (size_t i = 0; i < count_; ++i) __asan_unpoison_memory_region(base_ + i * kSlot + kPage, kStackBytes);
#endif
  return base_ != nullptr;
}

void Stacks::prepare(Fiber& fiber, size_t i, void (*entry)()) {
  char* stack = base_ + i * kSlot + kPage;
  fiber = Fiber{nullptr, stack, kStackBytes, nullptr};
  // Stacks start at different offsets, or the hot frames of all threads would share a few cache sets.
  void** top = reinterpret_cast<void**>(stack + kStackBytes - i * 7 % 64 * 64);
  *--top = nullptr;  // the return address of `entry`, which never returns
  *--top = reinterpret_cast<void*>(entry);
  for (int r = 0; r < 6; ++r) *--top = nullptr;
  fiber.stack_pointer = top;
}

void switch_fiber(Fiber& from, Fiber& to, [[maybe_unused]] bool from_ends) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(from_ends ? nullptr : &from.fake_stack, to.stack, to.stack_bytes);
#endif
  routegrad_sim_switch_stack(&from.stack_pointer, to.stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

void fiber_started([[maybe_unused]] Fiber& self, [[maybe_unused]] Fiber& caller) {
#if defined(__SANITIZE_ADDRESS__)
  const void* bottom = nullptr;
  size_t bytes = 0;
  __sanitizer_finish_switch_fiber(self.fake_stack, &bottom, &bytes);
  if (!caller.stack) {  // the OS thread's stack, whose bounds are known only now
    caller.stack = static_cast<const char*>(bottom);
    caller.stack_bytes = bytes;
  }
#endif
}

}  // namespace sim
