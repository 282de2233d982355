#include "core/arena.h"

#include <cstdlib>
#include <cstring>
#include <new>

namespace moelora {

void Arena::Free::operator()(void* p) const { std::free(p); }

void Arena::add_block(int64_t bytes) {
  void* data = nullptr;
  if (posix_memalign(&data, 64, static_cast<size_t>(bytes)) != 0) throw std::bad_alloc();
  std::unique_ptr<char, Free> owner(static_cast<char*>(data));
  blocks_.push_back({std::move(owner), bytes});
}

void* Arena::take(int64_t bytes) {
  if constexpr (kOneByOne) {
    add_block(bytes);
    block_ = blocks_.size();
    return std::memset(blocks_.back().data.get(), 0xff, static_cast<size_t>(bytes));
  }
  bytes = (bytes + 63) / 64 * 64;
  while (block_ < blocks_.size() && used_ + bytes > blocks_[block_].size) {
    ++block_;
    used_ = 0;
  }
  if (block_ == blocks_.size()) {
    const int64_t least = wanted_ > kBlock ? wanted_ : kBlock;
    add_block(bytes > least ? bytes : least);
    wanted_ = used_ = 0;
  }
  char* at = blocks_[block_].data.get() + used_;
  used_ += bytes;
  return at;
}

void Arena::release(size_t block, int64_t used) {
  block_ = block;
  used_ = used;
  --depth_;
  if (kOneByOne) blocks_.erase(blocks_.begin() + static_cast<std::ptrdiff_t>(block), blocks_.end());
  if (kOneByOne || depth_ > 0) return;
  const int64_t total = held();
  if (blocks_.size() <= 1 && total <= kKeep) return;
  // Next time one block of the whole size serves, if that is little enough to keep. It is allocated then: this may be
  // called while an exception passes.
  wanted_ = total <= kKeep ? total : 0;
  blocks_.clear();
  block_ = 0;
  used_ = 0;
}

int64_t Arena::held() const {
  int64_t total = 0;
  for (const Block& b : blocks_) total += b.size;
  return total;
}

}  // namespace moelora
