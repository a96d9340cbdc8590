#pragma once

#include <cstddef>
#include <cstdint>

#include "csb/integer.h"

namespace csb::cpu {

constexpr int64_t kScratchAlignment = 64;

// This thread's buffer of at least `bytes` bytes, 64-byte aligned, contents undefined. It grows and is kept until the
// thread ends, so that a small call allocates nothing. The next call may move it.
std::byte* scratch(int64_t bytes);

// Cuts one scratch buffer into aligned arrays.
class ScratchCutter {
 public:
  template <typename T>
  static int64_t bytes(int64_t count) {
    return round_up<int64_t>(count * static_cast<int64_t>(sizeof(T)), kScratchAlignment);
  }

  explicit ScratchCutter(int64_t total_bytes) : next_(scratch(total_bytes)) {}

  template <typename T>
  T* take(int64_t count) {
    T* array = reinterpret_cast<T*>(next_);
    next_ += bytes<T>(count);
    return array;
  }

 private:
  std::byte* next_;
};

}  // namespace csb::cpu
