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
// FloatRows beyond the last are computed from what the workspace holds, and dropped.
constexpr int64_t kGemmFloats = kColumns * kDepth + kDepth * kTurnedStride;

// FloatRows of memory: `stride` floats apart, or those of the index.
struct FloatRows {
  const float* base;
  int64_t stride;
  const int64_t* index;
  const float* operator[](int64_t i) const { return base + (index == nullptr ? i : index[i]) * stride; }
  FloatRows from(int64_t i, int64_t column) const {
    if (index != nullptr) return {base + column, stride, index + i};
    return {base + i * stride + column, stride, nullptr};
  }
};

struct Gemm {
  const float* a;  // A(i, k) at a[i * a_row + k * a_step]; one of the two is 1
  int64_t a_row, a_step;
  const float* b;  // B(k, j) at b[k * b_row + j * b_step]; one of the two is 1
  int64_t b_row, b_step;
  float* c;
  int64_t c_row, rows, columns, depth;
  bool add;
  // Which rows of memory A's (its steps, where a_row is 1) and B's steps (b_step is 1) are, if not one after another.
  const int64_t *a_index = nullptr, *b_index = nullptr;

  FloatRows a_rows() const { return {a, a_step == 1 ? a_row : a_step, a_index}; }
};

INLINE Vec load_some_of(const float* p, int64_t left) {  // zero beyond what is left
  if (left >= kLanes) return load(p);
  return left > 0 ? load_part(p, int(left)) : zero();
}

// Steps [0, depth) of columns [0, columns) of B, whole panels, zeros beyond the last column.
static void pack_panels(const float* b, int64_t b_row, int64_t b_step, const int64_t* index, int64_t columns,
                        int64_t depth, float* packed) {
  for (int64_t j = 0; j < columns; j += kPanel, packed += kPanel * depth) {
    const int64_t left = columns - j;
    if (b_step == 1) {
      const FloatRows rows{b + j, b_row, index};
      if (left >= kPanel)
        for (int64_t k = 0; k < depth; ++k) {
          store(packed + k * kPanel, load(rows[k]));
          store(packed + k * kPanel + kLanes, load(rows[k] + kLanes));
        }
      else
        for (int64_t k = 0; k < depth; ++k) {
          store(packed + k * kPanel, load_some_of(rows[k], left));
          store(packed + k * kPanel + kLanes, load_some_of(rows[k] + kLanes, left - kLanes));
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

// FloatRows that are needed next, fetched one line a step while a tile is computed: A's of the next tile, or what A and B
// need for the next steps.
struct Ahead {
  struct Part {
    FloatRows rows;
    int64_t lines, count, at;  // lines of a row; rows; rows fetched
  } parts[2];
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
      __builtin_prefetch(line, 0, Turned ? 2 : 3);
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) {
        const Vec left = splat(Turned ? a[k * a_step + m] : a[m * kRowStride + k]);
        low[m] += left * b0;
        high[m] += left * b1;
      }
    }
  };
  for (auto& next : ahead.parts)
    for (; next.at < next.count && k + next.lines <= depth; ++next.at) steps(k + next.lines, next.rows[next.at]);
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
                      int64_t rows, int64_t columns, bool add, Ahead& ahead) {
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
INLINE void add_floats(const float* from, int64_t n, float* to) {
  map(to, to, n, [&](Vec v, int64_t k) { return v + load_at(from, k, n); });
}

// A's rows lie as rows: a tile's worth is copied at a time. `a` begins with the first step.
static void gemm_plain(const Gemm& g, FloatRows a, const float* packed, float* rows_at, float* c, int64_t depth,
                       int64_t columns, bool add, Ahead& ahead) {
  for (int64_t i = 0; i < g.rows; i += kGemmRows, c += kGemmRows * g.c_row) {
    const int64_t rows = g.rows - i < kGemmRows ? g.rows - i : kGemmRows, next = i + rows;
    for (int64_t m = 0; m < rows; ++m) copy_floats(a[i + m], depth, rows_at + m * kRowStride);
    ahead.parts[0] = {a.from(next, 0), whole_lines(depth) / kTrainingLine,
                      g.rows - next < kGemmRows ? g.rows - next : kGemmRows, 0};
    gemm_rows<false>(rows_at, 1, packed, depth, c, g.c_row, rows, columns, add, ahead);
  }
}
// A's rows lie as columns: a block of them is copied, step by step. `a` begins with the first step.
static void gemm_turned(const Gemm& g, FloatRows a, const float* packed, float* rows_at, float* c, int64_t depth,
                        int64_t columns, bool add, Ahead& ahead) {
  for (int64_t first = 0; first < g.rows; first += kTurnedRows) {
    const int64_t count = g.rows - first < kTurnedRows ? g.rows - first : kTurnedRows;
    for (int64_t k = 0; k < depth; ++k) copy_floats(a[k] + first, count, rows_at + k * kTurnedStride);
    for (int64_t i = 0; i < count; i += kGemmRows, c += kGemmRows * g.c_row) {
      const int64_t rows = count - i < kGemmRows ? count - i : kGemmRows;
      gemm_rows<true>(rows_at + i, kTurnedStride, packed, depth, c, g.c_row, rows, columns, add, ahead);
    }
  }
}

static void gemm(const Gemm& g, float* workspace) {
  float *packed = workspace, *rows_at = workspace + kColumns * kDepth;
  for (int64_t j = 0; j < g.columns; j += kColumns) {
    const int64_t columns = g.columns - j < kColumns ? g.columns - j : kColumns;
    for (int64_t k = 0; k < g.depth; k += kDepth) {
      const int64_t left = g.depth - k, depth = left < kDepth ? left : kDepth;
      const FloatRows b{g.b + j, g.b_row, g.b_index}, a = g.a_step == 1 ? g.a_rows().from(0, k) : g.a_rows().from(k, 0);
      if (g.b_step == 1) pack_panels(b.from(k, 0).base, g.b_row, 1, b.from(k, 0).index, columns, depth, packed);
      else pack_panels(g.b + k + j * g.b_step, 1, g.b_step, nullptr, columns, depth, packed);
      Ahead ahead{};
      if (g.a_step != 1 && left > kDepth) {
        const int64_t next = left - kDepth < kDepth ? left - kDepth : kDepth;
        const int64_t count = g.rows < kTurnedRows ? g.rows : kTurnedRows;
        ahead.parts[0] = {a.from(kDepth, 0), count / kTrainingLine + 1, next, 0};
        if (g.b_step == 1) ahead.parts[1] = {b.from(k + kDepth, 0), whole_lines(columns) / kTrainingLine, next, 0};
      }
      const auto rows = g.a_step == 1 ? gemm_plain : gemm_turned;
      rows(g, a, packed, rows_at, g.c + j, depth, columns, g.add || k > 0, ahead);
    }
  }
}
