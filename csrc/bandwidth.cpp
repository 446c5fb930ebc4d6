// A plain read of memory with the kernels' threads: what decoding's speed is measured against.
#include "team.h"

namespace upwell {
namespace {

struct Span {
  const uint64_t* data;
  int64_t words;
};

struct Read {
  const Span* spans;
  int64_t count;
  std::atomic<uint64_t> sum{0};
};

// Each thread reads its share of every span; the sum keeps the compiler from dropping the reads.
void read_body(Worker& w, void* argument) {
  auto& read = *static_cast<Read*>(argument);
  uint64_t total = 0;
  for (int64_t s = 0; s < read.count; ++s) {
    const Span& span = read.spans[s];
    const int64_t end = span.words * (w.id + 1) / w.team.size;
    for (int64_t i = span.words * w.id / w.team.size; i < end; ++i) total += span.data[i];
  }
  read.sum += total;
}

}  // namespace
}  // namespace upwell

extern "C" uint64_t upwell_read(const upwell::Span* spans, int64_t count) {
  upwell::Read read{spans, count};
  upwell::run_team(upwell::read_body, &read);
  return read.sum;
}
