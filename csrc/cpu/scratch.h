// Memory that a thread keeps from call to call: fresh pages would cost more than what is in them.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

namespace fd {
namespace {

class Kept {
 public:
  ~Kept() { std::free(data_); }

  void* at_least(size_t bytes) {
    if (bytes > bytes_) {
      std::free(data_);
      bytes_ = (bytes + 4095) / 4096 * 4096;
      data_ = std::aligned_alloc(4096, bytes_);
      if (!data_) bytes_ = 0, throw std::bad_alloc();
    }
    return data_;
  }

 private:
  void* data_ = nullptr;
  size_t bytes_ = 0;
};

// This thread's memory number `which`, of at least so many bytes; valid until its next call.
template <int which>
inline void* scratch(size_t bytes) {
  static thread_local Kept kept;
  return kept.at_least(bytes);
}

}  // namespace
}  // namespace fd
