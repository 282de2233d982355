#include "core/arena.h"

#include <cstdlib>
#include <new>

#include "core/pages.h"

namespace moelora {

void Arena::Free::operator()(void* p) const { std::free(p); }

void* Arena::take(int64_t bytes) {
  bytes = (bytes + 63) / 64 * 64;
  while (block_ < blocks_.size() && used_ + bytes > blocks_[block_].size) {
    ++block_;
    used_ = 0;
  }
  if (block_ == blocks_.size()) {
    const int64_t size = bytes > kBlock ? bytes : kBlock;
    void* data = std::aligned_alloc(64, static_cast<size_t>(size));
    if (data == nullptr) throw std::bad_alloc();
    prefer_large_pages(data, size);
    blocks_.push_back({std::unique_ptr<char, Free>(static_cast<char*>(data)), size});
    used_ = 0;
  }
  char* at = blocks_[block_].data.get() + used_;
  used_ += bytes;
  return at;
}

void Arena::release(size_t block, int64_t used) {
  block_ = block;
  used_ = used;
  if (--depth_ > 0) return;
  int64_t total = 0;
  for (const Block& b : blocks_) total += b.size;
  if (blocks_.size() == 1 && total <= kKeep) return;
  // Next time one block of the whole size serves, if that is little enough to keep.
  blocks_.clear();
  block_ = 0;
  used_ = 0;
  if (total > kKeep) return;
  if (void* data = std::aligned_alloc(64, static_cast<size_t>(total))) {
    prefer_large_pages(data, total);
    blocks_.push_back({std::unique_ptr<char, Free>(static_cast<char*>(data)), total});
  }
}

}  // namespace moelora
