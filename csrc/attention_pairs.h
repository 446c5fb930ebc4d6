// Rows of attention in BF16, for CPUs that multiply pairs of it faster. Neighbouring queries read mostly the same rows, so
// a thread keeps those of its last query rounded: of the next one it adds what is new.

struct KeptRows {
  int32_t* rows;                         // [slots, row_pairs]: pairs of neighbouring columns
  int32_t* columns;                      // [slots / 2, 2 row_pairs]: pairs of a column in two neighbouring rows
  const int32_t **row_at, **columns_at;  // of the slots that a query reads
  const void *layer = nullptr, *sequence = nullptr;  // whose they are
  int64_t position = 0;  // of the last query: slots [0, ring_slots) hold its window, token j in slot j % ring_slots,
                         // those behind them the entries that it read
};

// Slots of the window: even, and room for the neighbours in pairs of its ends.
static int64_t ring_slots(int64_t window) { return (window + 3) / 2 * 2; }

// Two neighbouring rows [n] (null: zeros) in pairs of their columns, one behind the other, and in pairs of both.
INLINE void round_two(const float* even, const float* odd, int64_t n, int32_t* rows, int32_t* columns) {
  const int64_t pairs = row_pairs(n);
  for (int64_t i = 0; i < n; i += 2 * kLanes) {
    auto at = [&](const float* row, int64_t first) { return row && first < n ? load_at(row, first, n) : zero(); };
    const Vec a = at(even, i), b = at(even, i + kLanes), c = at(odd, i), d = at(odd, i + kLanes);
    store(reinterpret_cast<float*>(rows + i / 2), reinterpret_cast<Vec>(round_neighbours(a, b)));
    store(reinterpret_cast<float*>(rows + pairs + i / 2), reinterpret_cast<Vec>(round_neighbours(c, d)));
    store(reinterpret_cast<float*>(columns + i), reinterpret_cast<Vec>(round_pairs(a, c)));
    store(reinterpret_cast<float*>(columns + i + kLanes), reinterpret_cast<Vec>(round_pairs(b, d)));
  }
}

// columns [2 n] of two rows in pairs [n].
INLINE void join_rows(const int32_t* even, const int32_t* odd, int64_t n, int32_t* columns) {
  for (int64_t i = 0; i < n; i += kLanes) {
    const VecI a = load(even + i), b = load(odd + i);
    const Vec first = reinterpret_cast<Vec>((a & 0xffff) | (b << 16));
    const Vec second = reinterpret_cast<Vec>((a >> 16 & 0xffff) | (b & int32_t(0xffff0000)));
    store(reinterpret_cast<float*>(columns + 2 * i), low_turns(first, second));
    store(reinterpret_cast<float*>(columns + 2 * i + kLanes), high_turns(first, second));
  }
}
