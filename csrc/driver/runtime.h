// What drivers are given: threads and scratch.
#pragma once

#include <atomic>
#include <cstdint>

#include "core/arena.h"
#include "dispatch/table.h"

namespace moelora {

struct Runtime {
  int64_t threads;
  // Calls body(context) `times` times, concurrently where it can; returns when all have returned.
  void (*run)(int64_t times, void (*body)(void* context), void* context);
  // Scratch of the calling thread.
  Arena& (*arena)();
};

// body(task, arena) for task in [0, tasks): threads take the next one from a counter.
template <class F>
void for_each_task(const Runtime& runtime, int64_t tasks, const F& body) {
  struct Shared {
    const Runtime& runtime;
    const F& body;
    const int64_t tasks;
    std::atomic<int64_t> next{0};
  } shared{runtime, body, tasks};
  struct Release {
    ~Release() { release_matrix_unit(); }
  };
  const auto work = [](void* context) {
    auto& s = *static_cast<Shared*>(context);
    const Release at_end;
    Arena& arena = s.runtime.arena();
    for (int64_t task; (task = s.next.fetch_add(1, std::memory_order_relaxed)) < s.tasks;) {
      Arena::Scope scope(arena);
      s.body(task, arena);
    }
  };
  const int64_t workers = tasks < runtime.threads ? tasks : runtime.threads;
  if (workers == 1) return work(&shared);
  if (workers > 1) runtime.run(workers, work, &shared);
}

}  // namespace moelora
