// Rows of attention in INT8, each in steps of its own (amax / 127): a KV cache of a quarter the bytes, whose products are
// exact sums of bytes where a CPU has dot products of them. Queries are rounded to INT8 by head, numerators of a softmax
// to steps of the largest among kRowBlock rows.

// A row: its head, then n bytes, padded with zeros.
INLINE int64_t byte_columns(int64_t n) { return (n + 15) / 16 * 16; }
INLINE int64_t byte_row(int64_t n) { return int64_t(sizeof(RoundedRow)) + byte_columns(n); }
INLINE const uint32_t* bytes_of(const char* row) { return reinterpret_cast<const uint32_t*>(row + sizeof(RoundedRow)); }
INLINE const RoundedRow& head_of(const uint32_t* bytes) { return reinterpret_cast<const RoundedRow*>(bytes)[-1]; }
INLINE void round_to_row(const float* x, int64_t n, char* row) {
  *reinterpret_cast<RoundedRow*>(row) = round_bytes(x, n, byte_columns(n), reinterpret_cast<int8_t*>(row + sizeof(RoundedRow)));
}

// Four rows of n bytes (a multiple of 16) as columns [n]: a byte of each.
INLINE void join_four(const uint32_t* const* rows, int64_t n, uint32_t* columns) {
  typedef uint8_t Row __attribute__((vector_size(16)));
  typedef uint16_t Two __attribute__((vector_size(16)));
  for (int64_t i = 0; i < n; i += 16) {
    Row r[4];
    for (int k = 0; k < 4; ++k) __builtin_memcpy(&r[k], reinterpret_cast<const char*>(rows[k]) + i, 16);
    auto low = [](Row a, Row b) { return reinterpret_cast<Two>(__builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23)); };
    auto high = [](Row a, Row b) { return reinterpret_cast<Two>(__builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31)); };
    const Two two[2][2] = {{low(r[0], r[1]), low(r[2], r[3])}, {high(r[0], r[1]), high(r[2], r[3])}};
    for (int k = 0; k < 2; ++k) {
      const Two first = __builtin_shufflevector(two[k][0], two[k][1], 0, 8, 1, 9, 2, 10, 3, 11);
      const Two then = __builtin_shufflevector(two[k][0], two[k][1], 4, 12, 5, 13, 6, 14, 7, 15);
      __builtin_memcpy(columns + i + 8 * k, &first, 16), __builtin_memcpy(columns + i + 8 * k + 4, &then, 16);
    }
  }
}

// qt [dim, kLanes] in place to [n, kLanes], four columns in one, kAdded added, n a multiple of `multiple`: returns n. A
// head's are worth its step.
static int64_t round_lanes(float* qt, int64_t dim, int64_t multiple, Vec& step) {
  VecI most{};
  for (int64_t k = 0; k < dim; ++k) {  // as in steps_of
    const VecI bits = reinterpret_cast<VecI>(load(qt + k * kLanes)) & 0x7fffffff;
    most = bits > most ? bits : most;
  }
  const VecI finite = most < 0x7f800000;
  const Vec amax = larger(reinterpret_cast<Vec>(most), splat(1e-30f)), up = select(finite, 127.0f / amax, zero());
  step = select(finite, amax / 127.0f, splat(__builtin_nanf("")));
  int64_t n = 0;
  for (int64_t k = 0; k < dim || n % multiple; k += 4, ++n) {
    VecI four{};
    for (int64_t i = 0; i < 4 && k + i < dim; ++i) four |= (round_to_int(load(qt + (k + i) * kLanes) * up) & 0xff) << 8 * i;
    store(reinterpret_cast<uint32_t*>(qt) + n * kLanes, weights_of(reinterpret_cast<VecQ>(four)));
  }
  return n;
}

// A row's f in all lanes, or those of two rows in turn.
template <bool kTwo, class F>
INLINE auto of_rows(const uint32_t* const* rows, F f) {
  if constexpr (kTwo) return take_turns(f(head_of(rows[0])), f(head_of(rows[1])));
  else return f(head_of(rows[0]));
}
template <bool kTwo>
INLINE Vec steps_of_rows(const uint32_t* const* rows) {
  return of_rows<kTwo>(rows, [](const RoundedRow& row) { return splat(row.step); });
}

// What score_rows' sums of integers are worth.
template <bool kTwo>
INLINE Vec worth(VecI sums, Vec factor, const uint32_t* const* rows) {
  if (kAdded) sums -= of_rows<kTwo>(rows, [](const RoundedRow& row) { return VecI{} + int32_t(kAdded) * row.sum; });
  return whole(sums) * (factor * steps_of_rows<kTwo>(rows));
}

typedef uint8_t LaneBytes __attribute__((vector_size(VECTOR_BYTES)));
// Of two vectors, whose lanes are two rows in turn, each lane's lowest byte: a head's four rows in a word.
#if VECTOR_BYTES == 64
#define UPWELL_LOWEST_BYTES \
  0, 4, 64, 68, 8, 12, 72, 76, 16, 20, 80, 84, 24, 28, 88, 92, \
  32, 36, 96, 100, 40, 44, 104, 108, 48, 52, 112, 116, 56, 60, 120, 124
#elif VECTOR_BYTES == 32
#define UPWELL_LOWEST_BYTES 0, 4, 32, 36, 8, 12, 40, 44, 16, 20, 48, 52, 24, 28, 56, 60
#else
#define UPWELL_LOWEST_BYTES 0, 4, 16, 20, 8, 12, 24, 28
#endif

// Vectors of numerators p that have their rows' steps in them, `most` at most, in place as bytes of four rows. scale: what
// a head's are worth.
template <bool kTwo>
INLINE void round_numerators(float* p, int64_t vectors, Vec most, float* scale) {
  constexpr float kMost = kAdded ? 255 : 127;  // where bytes are signed, on both sides
  if (kTwo) most = larger(swap_pairs(most), most);
  const Vec up = kMost / most, magic = splat(kRounding);
  auto rounded = [&](int64_t i) { return load(p + i * kLanes) * up + magic; };  // in the lowest byte
  auto* out = reinterpret_cast<uint32_t*>(p);
  for (int64_t i = 0; i < vectors; i += kTwo ? 2 : 4, out += kTwo ? kLanes / 2 : kLanes) {
    if constexpr (kTwo) {
      const auto a = reinterpret_cast<LaneBytes>(rounded(i)), b = reinterpret_cast<LaneBytes>(rounded(i + 1));
      const auto fours = __builtin_shufflevector(a, b, UPWELL_LOWEST_BYTES);
      __builtin_memcpy(out, &fours, sizeof fours);
    } else {
      auto byte = [&](int64_t k) { return reinterpret_cast<VecI>(rounded(i + k)) & 0xff; };
      store(out, reinterpret_cast<VecQ>(byte(0) | byte(1) << 8 | byte(2) << 16 | byte(3) << 24));
    }
  }
  most *= 1.0f / kMost;
  store(scale, kTwo ? every_second(most) : most);
}
#undef UPWELL_LOWEST_BYTES

// What a thread keeps of its last query's rows: their columns. Neighbouring queries read mostly the same.
struct KeptColumns {
  uint32_t* columns;                      // [slots / 4, byte_columns]: a byte of each of four neighbouring slots
  const uint32_t **row_at, **columns_at;  // of the slots that a query reads
  const void *layer = nullptr, *sequence = nullptr;  // whose they are
  int64_t position = 0;  // of the last query: slots [0, byte_slots) hold its window, token j in slot j % byte_slots, those
                         // behind them the entries that it read
};
static int64_t byte_slots(int64_t window) { return (window + 3) / 4 * 4; }
