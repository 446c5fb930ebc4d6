// Training's matrix products, FP32: C (+)= A B for operands with any strides. B is packed into panels of two vectors of
// columns, A into rows a fixed distance apart or, where its rows are columns in memory, into short rows of one step;
// then a register tile runs over both. What the products wait for else, rows far apart and outputs, is fetched ahead. Included in each instruction set's namespace.

constexpr int kPanel = 2 * kLanes;                  // columns of a panel
constexpr int kGemmRows = kLanes == 16 ? 12 : 4;    // rows of a tile: what the registers hold
constexpr int64_t kDepth = 256;                     // steps of a panel: it streams from L2, the rows stay in L1
constexpr int64_t kColumns = 512;                   // columns packed at a time
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

INLINE void copy_floats(const float* from, int64_t n, float* to) {
  map(to, from, n, [](Vec v, int64_t) { return v; });
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
    for (int64_t k = 0; k < depth; ++k) copy_floats(a + k * g.a_step, count, rows_at + k * kTurnedStride);
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
      pack_panels(g.b + k * g.b_row + j * g.b_step, g.b_row, g.b_step, columns, depth, packed);
      const auto rows = g.a_step == 1 ? gemm_plain : gemm_turned;
      rows(g, g.a + k * g.a_step, packed, rows_at, g.c + j, depth, columns, g.add || k > 0);
    }
  }
}
