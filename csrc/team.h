// Threads: one team of torch's own OpenMP pool runs a whole call, phase by phase, with a barrier between phases.
#pragma once
#include <atomic>
#include <cstdint>

namespace upwell {

struct Team {
  int size = 1;
  std::atomic<int> arrived{0};
  std::atomic<int> generation{0};
  static constexpr int kCounters = 64;
  std::atomic<int64_t> counters[kCounters];

  Team() {
    for (auto& c : counters) c.store(0, std::memory_order_relaxed);
  }
};

// A thread's view of the team. All threads make the same sequence of barrier() and units() calls.
struct Worker {
  Team& team;
  int id;
  int phase = 0;

  void barrier();
  // Calls f(u) for each u < n, once in the team, first come first served. No barrier at the end.
  template <class F>
  void units(int64_t n, F f) {
    auto& counter = team.counters[phase % Team::kCounters];
    // The counter half the ring ahead is free: every thread has passed it (a barrier lies between).
    if (id == 0) team.counters[(phase + Team::kCounters / 2) % Team::kCounters].store(0, std::memory_order_relaxed);
    ++phase;
    if (team.size == 1) {
      for (int64_t u = 0; u < n; ++u) f(u);
      return;
    }
    for (int64_t u; (u = counter.fetch_add(1, std::memory_order_relaxed)) < n;) f(u);
  }
};

using Body = void (*)(Worker&, void*);
void run_team(Body body, void* argument);  // on as many threads as upwell_set_threads said

}  // namespace upwell
