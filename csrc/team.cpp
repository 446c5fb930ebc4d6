#include "team.h"

#include <sched.h>

namespace upwell {
namespace {

using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
using OmpInt = int (*)();
GompParallel gomp_parallel = nullptr;
OmpInt omp_thread = nullptr, omp_threads = nullptr;
int wanted_threads = 1;

struct Start {
  Body body;
  void* argument;
  Team* team;
};

void enter(void* raw) {
  auto* start = static_cast<Start*>(raw);
  // The pool may give fewer threads than asked; every member writes the same size.
  Worker worker{*start->team, omp_thread()};
  start->body(worker, start->argument);
}

void pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

}  // namespace

void Worker::barrier() {
  if (team.size == 1) return;
  const int generation = team.generation.load(std::memory_order_acquire);
  if (team.arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == team.size) {
    team.arrived.store(0, std::memory_order_relaxed);
    team.generation.store(generation + 1, std::memory_order_release);
    return;
  }
  for (int spins = 0; team.generation.load(std::memory_order_acquire) == generation; ++spins) {
    if (spins < 4000) pause();
    else sched_yield();  // another process has the core
  }
}

namespace {
struct Sized {
  Start start;
  std::atomic<int> ready{0};
};
void enter_sized(void* raw) {
  auto* sized = static_cast<Sized*>(raw);
  if (omp_thread() == 0) {
    sized->start.team->size = omp_threads();
    sized->ready.store(1, std::memory_order_release);
  }
  for (int spins = 0; !sized->ready.load(std::memory_order_acquire); ++spins) {
    if (spins < 4000) pause();
    else sched_yield();
  }
  enter(&sized->start);
}
}  // namespace

void run_team(Body body, void* argument) {
  Team team;
  if (gomp_parallel == nullptr || wanted_threads <= 1) {
    Worker worker{team, 0};
    body(worker, argument);
    return;
  }
  Sized sized;
  sized.start = {body, argument, &team};
  gomp_parallel(enter_sized, &sized, static_cast<unsigned>(wanted_threads), 0);
}

}  // namespace upwell

extern "C" {

// Function pointers of the OpenMP runtime that torch has loaded (GOMP_parallel, omp_get_thread_num,
// omp_get_num_threads), so that there is one pool of threads in the process. Null: single-threaded.
void upwell_set_openmp(void* parallel, void* thread, void* threads) {
  upwell::gomp_parallel = reinterpret_cast<upwell::GompParallel>(parallel);
  upwell::omp_thread = reinterpret_cast<upwell::OmpInt>(thread);
  upwell::omp_threads = reinterpret_cast<upwell::OmpInt>(threads);
}

void upwell_set_threads(int threads) { upwell::wanted_threads = threads; }
}
