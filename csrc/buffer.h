#pragma once

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

namespace fastbert {

// Zeros at first, aligned to lines of the cache; what is large, in large pages where the system has them for the asking.
template <typename T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(std::size_t size) : size_(size) {
    constexpr std::size_t kLine = 64, kPage = std::size_t{2} << 20;
    const std::size_t unit = size * sizeof(T) < 2 * kPage ? kLine : kPage;
    const std::size_t bytes = (size * sizeof(T) + unit - 1) / unit * unit;
    if (bytes == 0) return;
    data_.reset(static_cast<T*>(std::aligned_alloc(unit, bytes)));
    if (data_ == nullptr) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
    if (unit == kPage) madvise(data_.get(), bytes, MADV_HUGEPAGE);  // may be refused: pages are small then
#endif
    std::memset(static_cast<void*>(data_.get()), 0, bytes);
  }
  T* data() { return data_.get(); }
  const T* data() const { return data_.get(); }
  std::size_t size() const { return size_; }

  // Room for as many; what was there is lost if there was less.
  void reserve(std::size_t size) {
    if (size > size_) *this = Buffer(size);
  }

 private:
  struct Free {
    void operator()(T* data) const { std::free(data); }
  };
  std::unique_ptr<T, Free> data_;
  std::size_t size_ = 0;
};

}  // namespace fastbert
