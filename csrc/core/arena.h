// Scratch memory of one thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

namespace moelora {

// Stack-like scratch of one thread. Memory is kept between calls up to kKeep bytes; workers
// need a few MB, the calling thread holds what is shaped by rows and rank, and sums per token, besides.
class Arena {
 public:
  // Whether every piece is an allocation of its own, of exactly its size and full of NaN: a sanitizer sees nothing
  // inside a block.
#ifdef MOELORA_SANITIZED
  static constexpr bool kOneByOne = true;
#else
  static constexpr bool kOneByOne = false;
#endif

  // Uninitialised, 64-byte aligned, valid until the enclosing Scope ends.
  void* take(int64_t bytes);
  template <class T>
  T* take_array(int64_t n) {
    return static_cast<T*>(take(n * static_cast<int64_t>(sizeof(T))));
  }

  // Bytes.
  int64_t held() const;

  class Scope {
   public:
    explicit Scope(Arena& arena) : arena_(arena), block_(arena.block_), used_(arena.used_) { ++arena.depth_; }
    ~Scope() { arena_.release(block_, used_); }
    Scope(const Scope&) = delete;
    Scope& operator=(const Scope&) = delete;

   private:
    Arena& arena_;
    size_t block_;
    int64_t used_;
  };

 private:
  struct Free {
    void operator()(void* p) const;
  };
  struct Block {
    std::unique_ptr<char, Free> data;
    int64_t size;
  };
  void add_block(int64_t bytes);
  void release(size_t block, int64_t used);

  static constexpr int64_t kKeep = int64_t{64} << 20;
  static constexpr int64_t kBlock = int64_t{1} << 20;
  std::vector<Block> blocks_;
  size_t block_ = 0;  // blocks_[block_] is being filled, up to used_
  int64_t used_ = 0;
  int64_t wanted_ = 0;  // of the next block, at least
  int depth_ = 0;
};

}  // namespace moelora
