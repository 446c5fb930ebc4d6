// Training's matrix products, FP32: C (+)= A B for operands with any strides. B is packed into panels of two vectors of
// columns, A into rows a fixed distance apart or, where its rows are columns in memory, into short rows of one step;
// then a register tile runs over both. Included in each instruction set's namespace.

constexpr int kPanel = 2 * kLanes;                  // columns of a panel
constexpr int kGemmRows = kLanes == 16 ? 12 : 4;    // rows of a tile: what the registers hold
constexpr int64_t kDepth = 256;                     // steps of a panel: it streams from L2, the rows stay in L1
constexpr int64_t kColumns = 512;                   // columns packed at a time
constexpr int64_t kRowStride = kDepth + kTrainingLine;
constexpr int64_t kGemmFloats = kColumns * kDepth + kGemmRows * kRowStride;

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

// Steps [0, depth) of columns [0, columns) of B, whole panels, zeros beyond the last column.
static void pack_panels(const float* b, int64_t b_row, int64_t b_step, int64_t columns, int64_t depth, float* packed) {
  for (int64_t j = 0; j < columns; j += kPanel, packed += kPanel * depth) {
    const int64_t left = columns - j;
    if (b_step == 1) {
      const float* from = b + j;
      if (left >= kPanel)
        for (int64_t k = 0; k < depth; ++k, from += b_row) {
          store(packed + k * kPanel, load(from));
          store(packed + k * kPanel + kLanes, load(from + kLanes));
        }
      else
        for (int64_t k = 0; k < depth; ++k, from += b_row) {
          store(packed + k * kPanel, load_some_of(from, left));
          store(packed + k * kPanel + kLanes, load_some_of(from + kLanes, left - kLanes));
        }
      continue;
    }
    for (int half = 0; half < 2; ++half)
      for (int64_t k = 0; k < depth; k += kLanes) {
        Vec v[kLanes];
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) {
          const int64_t column = half * kLanes + i;
          v[i] = column < left ? load_some_of(b + (j + column) * b_step + k, depth - k) : zero();
        }
        transpose(v);
        float* to = packed + k * kPanel + half * kLanes;
        const int64_t steps = depth - k < kLanes ? depth - k : kLanes;
        if (steps == kLanes) {
#pragma GCC unroll 16
          for (int i = 0; i < kLanes; ++i) store(to + i * kPanel, v[i]);
        } else {
          for (int i = 0; i < steps; ++i) store(to + i * kPanel, v[i]);
        }
      }
  }
}

// C [rows <= M, columns <= kPanel] (+)= A B; A(m, k) at a[k * a_step + m] if Turned, else at a[m * kRowStride + k].
template <int M, bool Turned>
INLINE void gemm_tile(const float* a, int64_t a_step, const float* b, int64_t depth, float* c, int64_t c_row,
                      int64_t rows, int64_t columns, bool add) {
  Vec low[M] = {}, high[M] = {};
  for (int64_t k = 0; k < depth; ++k, b += kPanel) {
    const Vec b0 = load(b), b1 = load(b + kLanes);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      const Vec left = splat(Turned ? a[k * a_step + m] : a[m * kRowStride + k]);
      low[m] += left * b0;
      high[m] += left * b1;
    }
  }
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
                      int64_t rows, int64_t columns, bool add) {
  for (int64_t j = 0; j < columns; j += kPanel, panels += kPanel * depth) {
    const int64_t width = columns - j < kPanel ? columns - j : kPanel;
    if (rows <= 4) gemm_tile<4, Turned>(a, a_step, panels, depth, c + j, c_row, rows, width, add);
    else if (rows <= 8) gemm_tile<8, Turned>(a, a_step, panels, depth, c + j, c_row, rows, width, add);
    else gemm_tile<kGemmRows, Turned>(a, a_step, panels, depth, c + j, c_row, rows, width, add);
  }
}

static void gemm(const Gemm& g, float* workspace) {
  float *packed = workspace, *rows_at = workspace + kColumns * kDepth;
  for (int64_t j = 0; j < g.columns; j += kColumns) {
    const int64_t columns = g.columns - j < kColumns ? g.columns - j : kColumns;
    for (int64_t k = 0; k < g.depth; k += kDepth) {
      const int64_t depth = g.depth - k < kDepth ? g.depth - k : kDepth;
      pack_panels(g.b + k * g.b_row + j * g.b_step, g.b_row, g.b_step, columns, depth, packed);
      const bool add = g.add || k > 0;
      for (int64_t i = 0; i < g.rows; i += kGemmRows) {
        const int64_t rows = g.rows - i < kGemmRows ? g.rows - i : kGemmRows;
        const float* a = g.a + i * g.a_row + k * g.a_step;
        float* c = g.c + i * g.c_row + j;
        if (g.a_step == 1) {
          for (int64_t m = 0; m < kGemmRows; ++m) {
            const float* from = a + (m < rows ? m : 0) * g.a_row;  // rows beyond the last are computed and dropped
            float* to = rows_at + m * kRowStride;
            int64_t at = 0;
            for (; at + kLanes <= depth; at += kLanes) store(to + at, load(from + at));
            if (at < depth) store_part(to + at, load_part(from + at, int(depth - at)), int(depth - at));
          }
          gemm_rows<false>(rows_at, 1, packed, depth, c, g.c_row, rows, columns, add);
        } else if (rows == kGemmRows) {
          gemm_rows<true>(a, g.a_step, packed, depth, c, g.c_row, rows, columns, add);
        } else {
          for (int64_t step = 0; step < depth; ++step)
            for (int64_t m = 0; m < kGemmRows; ++m)
              rows_at[step * kGemmRows + m] = m < rows ? a[step * g.a_step + m] : 0.0f;
          gemm_rows<true>(rows_at, kGemmRows, packed, depth, c, g.c_row, rows, columns, add);
        }
      }
    }
  }
}
