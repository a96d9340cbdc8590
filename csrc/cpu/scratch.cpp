#include "cpu/scratch.h"

#include <new>

namespace csb::cpu {
namespace {

struct Buffer {
  std::byte* data = nullptr;
  int64_t size = 0;

  ~Buffer() { release(); }

  void release() {
    if (data != nullptr) ::operator delete(data, std::align_val_t(kScratchAlignment));
    data = nullptr;
    size = 0;
  }
};

thread_local Buffer buffer;

}  // namespace

std::byte* scratch(int64_t bytes) {
  if (bytes > buffer.size) {
    buffer.release();
    buffer.data =
        static_cast<std::byte*>(::operator new(static_cast<size_t>(bytes), std::align_val_t(kScratchAlignment)));
    buffer.size = bytes;
  }
  return buffer.data;
}

}  // namespace csb::cpu
