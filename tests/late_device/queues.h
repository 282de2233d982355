// Streams whose work waits until somebody waits for it: as late as a device may be, and the same in every run.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

namespace late {

using Ticket = uint64_t;

// One for the whole device; work never needs Python, so whoever holds it never waits for the interpreter.
inline std::recursive_mutex& lock() {
  static std::recursive_mutex mutex;
  return mutex;
}

using Guard = std::lock_guard<std::recursive_mutex>;

struct Queue {
  std::deque<std::function<void()>> work;
  Ticket submitted = 0, done = 0;
};

struct Event {
  int64_t stream;
  Ticket ticket;
};

struct Counts {
  int64_t device_synchronisations = 0, stream_synchronisations = 0, event_synchronisations = 0;
  int64_t bytes = 0, peak = 0, pinned = 0, device_to_host = 0, host_to_device = 0;
};

class Streams {
 public:
  static Streams& all() {
    static Streams* streams = new Streams();
    return *streams;
  }

  int64_t add() {
    Guard guard(lock());
    queues_.push_back(std::make_unique<Queue>());
    return static_cast<int64_t>(queues_.size()) - 1;
  }

  // Waits for nothing, unless streams beside the first are to run at once.
  void submit(int64_t stream, std::function<void()> work) {
    Guard guard(lock());
    Queue& queue = *queues_[stream];
    queue.work.push_back(std::move(work));
    ++queue.submitted;
    if (eager == 2 || (eager == 1 && stream != 0)) reach(stream, queue.submitted);
  }

  Ticket submitted(int64_t stream) {
    Guard guard(lock());
    return queues_[stream]->submitted;
  }

  bool reached(int64_t stream, Ticket ticket) {
    Guard guard(lock());
    return queues_[stream]->done >= ticket;
  }

  // Runs what was submitted up to `ticket`, and what that waits for.
  void reach(int64_t stream, Ticket ticket) {
    Guard guard(lock());
    Queue& queue = *queues_[stream];
    while (queue.done < ticket && !queue.work.empty()) {
      auto work = std::move(queue.work.front());
      queue.work.pop_front();
      ++queue.done;
      work();
    }
  }

  void reach_all() {
    Guard guard(lock());
    for (size_t i = 0; i < queues_.size(); ++i) {
      reach(static_cast<int64_t>(i), queues_[i]->submitted);
    }
  }

  // 0: all streams are late; 1: all but the first run at once; 2: all run at once.
  std::atomic<int> eager{0};
  Counts counts;

 private:
  Streams() { queues_.push_back(std::make_unique<Queue>()); }

  std::vector<std::unique_ptr<Queue>> queues_;
};

inline thread_local int64_t current_stream = 0;

// Memory that goes back to the stream it came from, at once: a late reader on another stream finds it changed.
class Blocks {
 public:
  static Blocks& all() {
    static Blocks* blocks = new Blocks();
    return *blocks;
  }

  void* take(size_t size) {
    Guard guard(lock());
    const size_t rounded = (size + 511) / 512 * 512 + 512;
    auto& free = free_[{current_stream, rounded}];
    void* found = nullptr;
    for (size_t i = free.size(); i-- > 0 && !found;) {
      if (usable(free[i])) {
        found = free[i].data;
        free.erase(free.begin() + static_cast<std::ptrdiff_t>(i));
      }
    }
    if (!found) found = ::aligned_alloc(64, rounded);
    live_[found] = {current_stream, rounded, {}};
    Counts& counts = Streams::all().counts;
    counts.bytes += static_cast<int64_t>(rounded);
    counts.peak = std::max(counts.peak, counts.bytes);
    // Not a number, in the order of the stream: whoever reads before it is written, or after it went, sees.
    Streams::all().submit(current_stream, [found, rounded] { std::memset(found, 0xff, rounded); });
    return found;
  }

  void give(void* data) {
    Guard guard(lock());
    auto node = live_.extract(data);
    Live& live = node.mapped();
    Streams::all().counts.bytes -= static_cast<int64_t>(live.size);
    free_[{live.stream, live.size}].push_back({data, std::move(live.users)});
  }

  void record(const void* data, int64_t stream) {
    Guard guard(lock());
    auto found = live_.find(const_cast<void*>(data));
    if (found != live_.end()) found->second.users.push_back(stream);
  }

 private:
  struct Live {
    int64_t stream;
    size_t size;
    std::vector<int64_t> users;
  };
  struct Free {
    void* data;
    std::vector<int64_t> users;
    std::vector<Ticket> until;

    Free(void* d, std::vector<int64_t> u) : data(d), users(std::move(u)) {
      for (int64_t user : users) until.push_back(Streams::all().submitted(user));
    }
  };

  static bool usable(const Free& block) {
    for (size_t i = 0; i < block.users.size(); ++i) {
      if (!Streams::all().reached(block.users[i], block.until[i])) return false;
    }
    return true;
  }

  std::map<void*, Live> live_;
  std::map<std::pair<int64_t, size_t>, std::vector<Free>> free_;
};

}  // namespace late
