// What a cache's rings hold where drafted tokens will go, out and back (upwell/model/cache.py).
#include <cstddef>

#include "layout.h"

namespace {

// Rows between a ring and `saved` [layers, pairs, bytes]. In its first round a ring holds nothing yet where a token goes.
void copy(const upwell::Ring& ring, const int64_t* slots, const int64_t* positions, int64_t pairs, int64_t pair, char* saved,
          bool back) {
  if (positions[pair] < ring.places) return;
  const int64_t row = slots[pair] * ring.places + positions[pair] % ring.places;
  for (int64_t layer = 0; layer < ring.layers; ++layer) {
    char* here = ring.rows + (layer * ring.slots * ring.places + row) * ring.bytes;
    char* there = saved + (layer * pairs + pair) * ring.bytes;
    __builtin_memcpy(back ? here : there, back ? there : here, std::size_t(ring.bytes));
  }
}

}  // namespace

// The rows of `pairs` (slot, position) into `saved`, or those numbered `which` [count] back from there.
extern "C" void upwell_copy_rings(const upwell::Ring* rings, int64_t ring_count, const int64_t* slots,
                                  const int64_t* positions, int64_t pairs, const int64_t* which, int64_t count, char* saved) {
  for (int64_t r = 0; r < ring_count; ++r) {
    for (int64_t i = 0; i < (which ? count : pairs); ++i)
      copy(rings[r], slots, positions, pairs, which ? which[i] : i, saved, which != nullptr);
    saved += rings[r].layers * pairs * rings[r].bytes;
  }
}
