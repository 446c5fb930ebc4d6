// Training's matrix products, FP32: C (+)= A B for operands with any strides. B is packed into panels of two vectors of
// columns, A into rows a fixed distance apart or, where its rows are columns in memory, into short rows of one step;
// then a register tile runs over both. What the products wait for else, rows far apart and outputs, is fetched ahead. Included in each instruction set's namespace.

constexpr int kPanel = 2 * kLanes;                  // columns of a panel
constexpr int kGemmRows = kLanes == 16 ? 12 : 4;    // rows of a tile: what the registers hold
constexpr int64_t kDepth = 256;                     // steps of a panel: it streams from L2, the rows stay in L1
constexpr int64_t kColumns = 512;                   // columns packed at a time
constexpr int64_t kPackColumns = 128;               // of them at once, row by row
constexpr int64_t kFetchRows = 8;                   // how far copies fetch ahead
constexpr int64_t kRowStride = kDepth + kTrainingLine;
constexpr int64_t kTurnedRows = 264;                // rows of a turned A that are copied at a time: whole tiles
constexpr int64_t kTurnedStride = 272;              // an odd number of lines
// Rows beyond the last are computed from what the workspace holds, and dropped.
constexpr int64_t kGemmFloats = kColumns * kDepth + kDepth * kTurnedStride;

struct Gemm {
  const float* a;  // A(i, k) at a[i * a_row + k * a_step]; one of the two is 1
  int64_t a_row, a_step;
  const float* b;  // B(k, j) at b[k * b_row + j * b_step]; one of the two is 1
  int64_t b_row, b_step;
  float* c;
  int64_t c_row, rows, columns, depth;
  bool add;
};

// Lane i after step S of a transposition of a pair of rows S apart; H: which of the two.
template <int S, int H>
constexpr int swapped(int i) {
  if (H == 0) return i & S ? kLanes + i - S : i;
  return i & S ? kLanes + i : i + S;
}
template <int S, int H>
INLINE Vec swap_blocks(Vec a, Vec b) {
#define UPWELL_LANE(i) swapped<S, H>(i)
#if VECTOR_BYTES == 64
  return __builtin_shufflevector(a, b, UPWELL_LANE(0), UPWELL_LANE(1), UPWELL_LANE(2), UPWELL_LANE(3), UPWELL_LANE(4),
                                 UPWELL_LANE(5), UPWELL_LANE(6), UPWELL_LANE(7), UPWELL_LANE(8), UPWELL_LANE(9),
                                 UPWELL_LANE(10), UPWELL_LANE(11), UPWELL_LANE(12), UPWELL_LANE(13), UPWELL_LANE(14),
                                 UPWELL_LANE(15));
#elif VECTOR_BYTES == 32
  return __builtin_shufflevector(a, b, UPWELL_LANE(0), UPWELL_LANE(1), UPWELL_LANE(2), UPWELL_LANE(3), UPWELL_LANE(4),
                                 UPWELL_LANE(5), UPWELL_LANE(6), UPWELL_LANE(7));
#else
  return __builtin_shufflevector(a, b, UPWELL_LANE(0), UPWELL_LANE(1), UPWELL_LANE(2), UPWELL_LANE(3));
#endif
#undef UPWELL_LANE
}
template <int S>
INLINE void transpose_step(Vec* v) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i)
    if ((i & S) == 0) {
      const Vec a = v[i], b = v[i + S];
      v[i] = swap_blocks<S, 0>(a, b);
      v[i + S] = swap_blocks<S, 1>(a, b);
    }
}
INLINE void transpose(Vec* v) {
  transpose_step<1>(v);
  transpose_step<2>(v);
#if VECTOR_BYTES >= 32
  transpose_step<4>(v);
#endif
#if VECTOR_BYTES == 64
  transpose_step<8>(v);
#endif
}

INLINE Vec load_some_of(const float* p, int64_t left) {  // zero beyond what is left
  if (left >= kLanes) return load(p);
  return left > 0 ? load_part(p, int(left)) : zero();
}

INLINE void copy_floats(const float* from, int64_t n, float* to) {
  map(to, from, n, [](Vec v, int64_t) { return v; });
}
// Copies of `count` rows of n floats, each fetched some rows ahead: far apart, they are not a stream to the hardware.
template <class F>
INLINE void each_row(const float* from, int64_t stride, int64_t count, int64_t n, F copy) {
  for (int64_t k = 0; k < count; ++k, from += stride) {
    if (k + kFetchRows < count)
      for (int64_t at = 0; at < n; at += kTrainingLine) __builtin_prefetch(from + kFetchRows * stride + at);
    copy(from, k);
  }
}

// Steps [0, depth) of columns [0, columns) of B, whole panels, zeros beyond the last column.
static void pack_rows(const float* b, int64_t b_row, int64_t columns, int64_t depth, float* packed) {
  for (int64_t j = 0; j < columns; j += kPackColumns) {
    const int64_t count = columns - j < kPackColumns ? columns - j : kPackColumns;
    each_row(b + j, b_row, depth, count, [&](const float* from, int64_t k) {
      for (int64_t at = 0; at < count; at += kPanel) {
        float* to = packed + (j + at) * depth + k * kPanel;
        store(to, load_some_of(from + at, count - at));
        store(to + kLanes, load_some_of(from + at + kLanes, count - at - kLanes));
      }
    });
  }
}
// The same where B's columns lie as rows, `b_step` apart.
static void pack_columns(const float* b, int64_t b_step, int64_t columns, int64_t depth, float* packed) {
  for (int64_t j = 0; j < columns; j += kPanel, packed += kPanel * depth)
    for (int half = 0; half < 2; ++half)
      for (int64_t k = 0; k < depth; k += kLanes) {
        Vec v[kLanes];
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) {
          const int64_t column = j + half * kLanes + i;
          v[i] = column < columns ? load_some_of(b + column * b_step + k, depth - k) : zero();
        }
        transpose(v);
        float* to = packed + k * kPanel + half * kLanes;
        const int steps = depth - k < kLanes ? int(depth - k) : kLanes;
        for (int i = 0; i < steps; ++i) store(to + i * kPanel, v[i]);
      }
}

// Lines of A's rows of the next tile, fetched one a step while this one is computed.
struct Ahead {
  const float* row;
  int64_t a_row, lines, rows;  // lines of a row; rows left to fetch
};

// C [rows <= M, columns <= kPanel] (+)= A B; A(m, k) at a[k * a_step + m] if Turned, else at a[m * kRowStride + k].
template <int M, bool Turned>
INLINE void gemm_tile(const float* a, int64_t a_step, const float* b, int64_t depth, float* c, int64_t c_row,
                      int64_t rows, int64_t columns, bool add, Ahead& ahead) {
  Vec low[M] = {}, high[M] = {};
  for (int m = 0; m < rows; ++m) {
    __builtin_prefetch(c + m * c_row, 1);
    __builtin_prefetch(c + m * c_row + kLanes, 1);
  }
  int64_t k = 0;
  auto steps = [&](int64_t to, const float* line) {
    for (; k < to; ++k, b += kPanel, line += kTrainingLine) {
      const Vec b0 = load(b), b1 = load(b + kLanes);
      if (!Turned) __builtin_prefetch(line);
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) {
        const Vec left = splat(Turned ? a[k * a_step + m] : a[m * kRowStride + k]);
        low[m] += left * b0;
        high[m] += left * b1;
      }
    }
  };
  if (!Turned)
    for (; ahead.rows > 0 && k + ahead.lines <= depth; --ahead.rows, ahead.row += ahead.a_row)
      steps(k + ahead.lines, ahead.row);
  steps(depth, a);
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
    if (m >= rows) return;
    float* to = c + m * c_row;
    if (columns == kPanel) {
      store(to, add ? load(to) + low[m] : low[m]);
      store(to + kLanes, add ? load(to + kLanes) + high[m] : high[m]);
      continue;
    }
    const int first = columns < kLanes ? int(columns) : kLanes, second = int(columns) - first;
    store_part(to, add ? load_part(to, first) + low[m] : low[m], first);
    if (second > 0) store_part(to + kLanes, add ? load_part(to + kLanes, second) + high[m] : high[m], second);
  }
}

template <bool Turned>
static void gemm_rows(const float* a, int64_t a_step, const float* panels, int64_t depth, float* c, int64_t c_row,
                      int64_t rows, int64_t columns, bool add, Ahead ahead) {
  for (int64_t j = 0; j < columns; j += kPanel, panels += kPanel * depth) {
    const int64_t width = columns - j < kPanel ? columns - j : kPanel;
    if (rows <= 4) gemm_tile<4, Turned>(a, a_step, panels, depth, c + j, c_row, rows, width, add, ahead);
    else if (rows <= 8) gemm_tile<8, Turned>(a, a_step, panels, depth, c + j, c_row, rows, width, add, ahead);
    else gemm_tile<kGemmRows, Turned>(a, a_step, panels, depth, c + j, c_row, rows, width, add, ahead);
  }
}

// A's rows lie as rows: a tile's worth is copied at a time. `a` is at the first step.
static void gemm_plain(const Gemm& g, const float* a, const float* packed, float* rows_at, float* c, int64_t depth,
                       int64_t columns, bool add) {
  for (int64_t i = 0; i < g.rows; i += kGemmRows, a += kGemmRows * g.a_row, c += kGemmRows * g.c_row) {
    const int64_t rows = g.rows - i < kGemmRows ? g.rows - i : kGemmRows, left = g.rows - i - kGemmRows;
    for (int64_t m = 0; m < rows; ++m) copy_floats(a + m * g.a_row, depth, rows_at + m * kRowStride);
    const Ahead ahead{a + kGemmRows * g.a_row, g.a_row, whole_lines(depth) / kTrainingLine,
                      left < kGemmRows ? left : kGemmRows};
    gemm_rows<false>(rows_at, 1, packed, depth, c, g.c_row, rows, columns, add, ahead);
  }
}
// A's rows lie as columns: a block of them is copied, step by step.
static void gemm_turned(const Gemm& g, const float* a, const float* packed, float* rows_at, float* c, int64_t depth,
                        int64_t columns, bool add) {
  for (int64_t first = 0; first < g.rows; first += kTurnedRows, a += kTurnedRows) {
    const int64_t count = g.rows - first < kTurnedRows ? g.rows - first : kTurnedRows;
    each_row(a, g.a_step, depth, count,
             [&](const float* from, int64_t k) { copy_floats(from, count, rows_at + k * kTurnedStride); });
    for (int64_t i = 0; i < count; i += kGemmRows, c += kGemmRows * g.c_row) {
      const int64_t rows = count - i < kGemmRows ? count - i : kGemmRows;
      gemm_rows<true>(rows_at + i, kTurnedStride, packed, depth, c, g.c_row, rows, columns, add, {});
    }
  }
}

static void gemm(const Gemm& g, float* workspace) {
  float *packed = workspace, *rows_at = workspace + kColumns * kDepth;
  for (int64_t j = 0; j < g.columns; j += kColumns) {
    const int64_t columns = g.columns - j < kColumns ? g.columns - j : kColumns;
    for (int64_t k = 0; k < g.depth; k += kDepth) {
      const int64_t depth = g.depth - k < kDepth ? g.depth - k : kDepth;
      const float* b = g.b + k * g.b_row + j * g.b_step;
      if (g.b_step == 1) pack_rows(b, g.b_row, columns, depth, packed);
      else pack_columns(b, g.b_step, columns, depth, packed);
      const auto rows = g.a_step == 1 ? gemm_plain : gemm_turned;
      rows(g, g.a + k * g.a_step, packed, rows_at, g.c + j, depth, columns, g.add || k > 0);
    }
  }
}
