// Products with a weight in any format. FP32 weights come as panels, packed once when a model is loaded: 2 vectors of
// weight rows by column, over which a register tile of input rows runs. Packed formats are decoded on
// the way (packed.h); what those kernels don't serve becomes panels made on the way.

constexpr int kTile = 2 * kLanes;  // weight rows a packed tile holds
constexpr int kFewRows = 8;
constexpr int kAhead = 2048;  // floats: rows are short, and the hardware's prefetcher starts anew with each
// Of panels, into L2: a core waits for few lines of L1 at a time, too few to fill memory's bandwidth.
constexpr int kPanelAhead = 8192;

INLINE float ue8m0(uint8_t code) {
  uint32_t bits = code == 0 ? 1u << 22 : code == 255 ? 0x7fc00000u : uint32_t(code) << 23;
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}
INLINE Vec widen_bf16(const uint16_t* p) {
  return reinterpret_cast<Vec>(__builtin_convertvector(*reinterpret_cast<const Half16*>(p), VecI) << 16);
}
INLINE Vec widen_fp8(VecI byte) {
  VecI magnitude = byte & 0x7f;
  // The exponent and mantissa fields land in FP32's; 2^120 moves the bias, subnormals included.
  Vec value = reinterpret_cast<Vec>(magnitude << 20) * 0x1p120f;
  value = reinterpret_cast<Vec>(reinterpret_cast<VecI>(value) | ((byte & 0x80) << 24));
  return select(magnitude == 0x7f, splat(__builtin_nanf("")), value);
}
INLINE Vec widen_fp4(VecI code) {  // 0, .5, 1, 1.5, 2, 3, 4, 6: an FP8-like field, exponent 2 bits, mantissa 1
  Vec value = reinterpret_cast<Vec>((code & 7) << 22) * 0x1p126f;
  return reinterpret_cast<Vec>(reinterpret_cast<VecI>(value) | ((code & 8) << 28));
}

// One weight row as FP32: the row itself, or decoded into `buffer` [cols].
static const float* weight_row(const Matrix& m, int64_t row, float* buffer) {
  const int64_t n = m.cols;
  if (m.format == kF32) return static_cast<const float*>(m.data) + row * n;
  if (m.format == kBF16) {
    const auto* p = static_cast<const uint16_t*>(m.data) + row * n;
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) store(buffer + i, widen_bf16(p + i));
    for (; i < n; ++i) {
      uint32_t bits = uint32_t(p[i]) << 16;
      __builtin_memcpy(buffer + i, &bits, 4);
    }
  } else if (m.format == kFP8) {
    const auto* p = static_cast<const uint8_t*>(m.data) + row * n;
    const uint8_t* scales = m.scale + (row / 128) * ((n + 127) / 128);
    for (int64_t i = 0; i < n; i += kLanes) {
      Bytes raw{};
      const int64_t count = n - i < kLanes ? n - i : kLanes;
      __builtin_memcpy(&raw, p + i, size_t(count));
      Vec v = widen_fp8(__builtin_convertvector(raw, VecI)) * ue8m0(scales[i / 128]);
      if (count == kLanes) store(buffer + i, v);
      else store_part(buffer + i, v, int(count));
    }
  } else {
    const auto* p = static_cast<const uint8_t*>(m.data) + row * (n / 2);
    const uint8_t* scales = m.scale + row * (n / 32);
    for (int64_t group = 0; group < n / 32; ++group) {
      const float factor = ue8m0(scales[group]);
      const uint8_t* bytes = p + group * 16;
      for (int i = 0; i < 32; i += kLanes) {
        VecI code;
        for (int lane = 0; lane < kLanes; ++lane) code[lane] = bytes[(i + lane) / 2] >> (4 * (lane & 1));
        store(buffer + group * 32 + i, widen_fp4(code & 15) * factor);
      }
    }
  }
  return buffer;
}

#include "packed.h"

// R weight rows times C input rows, all lanes along the columns.
template <int R, int C>
INLINE void dot_tile(const float* const* w, const float* x, int64_t ldx, int64_t n, float* out, int64_t ldo) {
  Vec acc[R][C] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    Vec xs[C];
    for (int c = 0; c < C; ++c) xs[c] = load(x + c * ldx + i);
    for (int r = 0; r < R; ++r) {
      __builtin_prefetch(w[r] + i + kAhead, 0, 2);
      Vec v = load(w[r] + i);
      for (int c = 0; c < C; ++c) acc[r][c] += v * xs[c];
    }
  }
  if (i < n)
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      Vec v = load_part(w[r] + i, int(n - i));
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) acc[r][c] += v * load_part(x + c * ldx + i, int(n - i));
    }
#pragma GCC unroll 4
  for (int c = 0; c < C; ++c) {
    if constexpr (R == 4) sum_four(acc[0][c], acc[1][c], acc[2][c], acc[3][c], out + c * ldo);
    else
      for (int r = 0; r < R; ++r) out[c * ldo + r] = sum_lanes(acc[r][c]);
  }
}

template <int R>
static void dot_rows(const float* const* w, const float* x, int64_t ldx, int64_t t, int64_t n, float* out,
                     int64_t ldo) {
  constexpr int C = kLanes == 8 ? 2 : 4;  // AVX2 has half the registers
  int64_t c = 0;
  for (; c + C <= t; c += C) dot_tile<R, C>(w, x + c * ldx, ldx, n, out + c * ldo, ldo);
  for (; c + 2 <= t; c += 2) dot_tile<R, 2>(w, x + c * ldx, ldx, n, out + c * ldo, ldo);
  if (c < t) dot_tile<R, 1>(w, x + c * ldx, ldx, n, out + c * ldo, ldo);
}

// What is fetched while a panel is multiplied: for so many steps from `first` on, then from `then` on, `stride` bytes a step.
struct Fetch {
  const char* first;
  int64_t steps;
  const char* then;
  int64_t stride;
};

// Weights as multiply_add takes them.
INLINE Vec weights_of(Vec panel) { return panel; }
INLINE VecI weights_of(VecI panel) { return panel; }
INLINE VecQ weights_of(VecQ panel) { return panel ^ kAdded * 0x01010101; }

// MR input rows times kTile weight rows, b [n, LDB]: lanes along the weight rows. U steps at once where MR alone leaves
// the multipliers waiting for their own results. T: float, int32_t for pairs of BF16 (pairs.h), or uint32_t for four
// integers (integers.h).
template <int MR, int LDB, int U, class T>
INLINE void tile_steps(const T* x, int64_t ldx, const T* b, int64_t n, const Fetch& fetch, Sums<T> (&out0)[MR],
                       Sums<T> (&out1)[MR]) {
  Sums<T> acc0[U][MR] = {}, acc1[U][MR] = {};
  const T *x0 = x, *x4 = x + 4 * ldx, *x8 = x + 8 * ldx;
  const int64_t l1 = ldx, l2 = 2 * ldx, l3 = 3 * ldx;
#define UPWELL_STEP(row, value)                                       \
  if (MR > (row)) {                                                   \
    const Lanes<T> v = (value) - Lanes<T>{};                          \
    acc0[u][(row) % MR] = multiply_add(acc0[u][(row) % MR], v, b0);   \
    acc1[u][(row) % MR] = multiply_add(acc1[u][(row) % MR], v, b1);   \
  }
#define UPWELL_STEPS                                                                                              \
  UPWELL_STEP(0, x0[u]) UPWELL_STEP(1, x0[l1 + u]) UPWELL_STEP(2, x0[l2 + u]) UPWELL_STEP(3, x0[l3 + u])          \
  UPWELL_STEP(4, x4[u]) UPWELL_STEP(5, x4[l1 + u]) UPWELL_STEP(6, x4[l2 + u]) UPWELL_STEP(7, x4[l3 + u])          \
  UPWELL_STEP(8, x8[u]) UPWELL_STEP(9, x8[l1 + u]) UPWELL_STEP(10, x8[l2 + u]) UPWELL_STEP(11, x8[l3 + u])
  int64_t k = 0, end = fetch.steps < n ? fetch.steps : n;
  const char* at = fetch.first;
  for (int part = 0; part < 2; ++part, end = n, at = fetch.then)
    for (; k + U <= end; k += U, b += U * LDB, x0 += U, x4 += U, x8 += U, at += U * fetch.stride)
#pragma GCC unroll 8
      for (int u = 0; u < U; ++u) {
        __builtin_prefetch(at + u * fetch.stride, 0, 2), __builtin_prefetch(at + u * fetch.stride + 64, 0, 2);
        const Lanes<T> b0 = weights_of(load(b + u * LDB)), b1 = weights_of(load(b + u * LDB + kLanes));
        UPWELL_STEPS
      }
  if (U > 1)
    for (; k < n; ++k, b += LDB, ++x0, ++x4, ++x8) {
      constexpr int u = 0;
      const Lanes<T> b0 = weights_of(load(b)), b1 = weights_of(load(b + kLanes));
      UPWELL_STEPS
    }
#undef UPWELL_STEPS
#undef UPWELL_STEP
#pragma GCC unroll 12
  for (int r = 0; r < MR; ++r) {
#pragma GCC unroll 8
    for (int u = 1; u < U; ++u) acc0[0][r] += acc0[u][r], acc1[0][r] += acc1[u][r];
    out0[r] = acc0[0][r], out1[r] = acc1[0][r];
  }
}

struct AsSummed {  // what becomes of the sums of an input row and a tile
  Vec operator()(int64_t, int, Vec sums) const { return sums; }
};

template <int MR, int LDB, class T, class Finish>
static void tile_rows(const T* x, int64_t ldx, const T* b, int64_t n, const Fetch& fetch, float* out, int64_t ldo, int width,
                      int64_t row, const Finish& finish) {
  Sums<T> sums0[MR], sums1[MR];
  tile_steps<MR, LDB, MR == 1 ? 4 : MR < 4 ? 2 : 1>(x, ldx, b, n, fetch, sums0, sums1);
#pragma GCC unroll 12  // or the sums go by way of memory
  for (int r = 0; r < MR; ++r) {
    const Vec v0 = finish(row + r, 0, sums0[r]), v1 = finish(row + r, 1, sums1[r]);
    float* o = out + r * ldo;
    if (width == kTile) {
      store(o, v0);
      store(o + kLanes, v1);
    } else if (width >= kLanes) {
      store(o, v0);
      store_part(o + kLanes, v1, width - kLanes);
    } else {
      store_part(o, v0, width);
    }
  }
}

#if defined(__aarch64__)
constexpr int kRowTile = 12;  // what the registers hold: 2 accumulators a row
#else
constexpr int kRowTile = kLanes == 16 ? 12 : kLanes == 8 ? 6 : 4;
#endif

// Rows [first, first + width) of m, packed [cols, kTile] into `tile`; missing rows are zero.
static void pack_tile(const Matrix& m, int64_t first, int width, float* tile, float* buffer) {
  const float* rows[kTile];
  const int64_t n = m.cols;
  constexpr int kBlock = 64;
  // Decoded formats come a row at a time; FP32 goes by blocks of columns, so that reads and writes stay in L1.
  if (m.format != kF32) {
    for (int r = 0; r < kTile; ++r) {
      const float* w = r < width ? weight_row(m, first + r, buffer) : nullptr;
      for (int64_t k = 0; k < n; ++k) tile[k * kTile + r] = w ? w[k] : 0.0f;
    }
    return;
  }
  for (int r = 0; r < width; ++r) rows[r] = static_cast<const float*>(m.data) + (first + r) * n;
  for (int64_t k0 = 0; k0 < n; k0 += kBlock) {
    const int64_t k1 = k0 + kBlock < n ? k0 + kBlock : n;
    for (int r = 0; r < width; ++r)
      for (int64_t k = k0; k < k1; ++k) tile[k * kTile + r] = rows[r][k];
    for (int r = width; r < kTile; ++r)
      for (int64_t k = k0; k < k1; ++k) tile[k * kTile + r] = 0.0f;
  }
}

// t input rows times kTile weight rows, cut into row tiles of even heights. next: the panel that is multiplied after
// this one (null: the one behind it); it comes from memory while later row tiles read this one from the cache.
template <int LDB, class T, class Finish = AsSummed>
static void times_tile(const T* x, int64_t ldx, int64_t t, const T* tile, int64_t n, const void* next, float* out,
                       int64_t ldo, int width, const Finish& finish = {}) {
  const int64_t tiles = (t + kRowTile - 1) / kRowTile, step = LDB * sizeof(T), near = kPanelAhead / LDB, left = max64(0, n - near);
  const auto *here = reinterpret_cast<const char*>(tile), *there = next ? static_cast<const char*>(next) : here + n * step;
  for (int64_t i = 0, row = 0; i < tiles; ++i) {
    const int64_t rows = t / tiles + (i < t % tiles);
    Fetch fetch{here + near * step, left, there, step};  // of the next one only its beginning
    if (i > 0) fetch = {there, 0, there + (near + left * (i - 1) / (tiles - 1)) * step, (step + tiles - 2) / (tiles - 1)};
    switch (rows) {
#define UPWELL_ROWS(r)                                                                             \
  case r:                                                                                          \
    if constexpr (r <= kRowTile) tile_rows<r, LDB>(x, ldx, tile, n, fetch, out, ldo, width, row, finish); \
    break;
      UPWELL_ROWS(1) UPWELL_ROWS(2) UPWELL_ROWS(3) UPWELL_ROWS(4) UPWELL_ROWS(5) UPWELL_ROWS(6)
      UPWELL_ROWS(7) UPWELL_ROWS(8) UPWELL_ROWS(9) UPWELL_ROWS(10) UPWELL_ROWS(11) UPWELL_ROWS(12)
#undef UPWELL_ROWS
    }
    x += rows * ldx, out += rows * ldo, row += rows;
  }
}

// The panel of a weight row, null where the weight isn't in panels.
static const void* panel_of(const Matrix& m, int64_t row) {
  if (m.format != kPanels && m.format != kPairs && m.format != kQuads) return nullptr;
  const int64_t together = m.format == kQuads ? 4 : m.format == kPairs ? 2 : 1, steps = (m.cols + together - 1) / together;
  return static_cast<const float*>(m.data) + row / kPanel * kPanel * steps + row % kPanel;
}

#include "pairs.h"
#include "integers.h"

struct Job {  // out [t, m.rows] = x [t, m.cols] m^T
  Matrix m;
  const float* x;
  int64_t ldx, t;
  float* out;
  int64_t ldo;
  bool exact = false;  // a packed weight's inputs are never rounded
};

// Weight rows [first, first + width) of a job for its rows [t0, t1). tile: [cols * kTile] scratch, buffer [4 cols].
// inputs: where given, packed weights are decoded in registers (packed.h); x doesn't change while `phase` is the same.
// next: as for times_tile.
static void run_job(const Job& job, int64_t first, int width, int64_t t0, int64_t t1, float* tile, float* buffer,
                    Inputs* inputs = nullptr, int phase = 0, const void* next = nullptr) {
  const float* x = job.x + t0 * job.ldx;
  float* out = job.out + t0 * job.ldo + first;
  const int64_t t = t1 - t0, n = job.m.cols;
  const bool rounds = inputs && inputs->rounds && !job.exact;
  if (inputs && packed_product(job.m, first, width, x, job.ldx, t, out, job.ldo, *inputs, rounds, phase)) return;
  if (inputs && (job.m.format == kPairs || (rounds && is_packed(job.m) && rounds_rows(t)))) {
    auto* pairs = reinterpret_cast<int32_t*>(tile);
    pair_product(job.m, first, width, x, job.ldx, t, out, job.ldo, pairs, buffer, *inputs, phase, next);
    return;
  }
  if (is_integer(job.m)) {
    integer_product(job.m, first, width, x, job.ldx, t, out, job.ldo, tile, *inputs, phase, next);
    return;
  }
  if (job.m.format == kPanels) {
    const auto* panel = static_cast<const float*>(panel_of(job.m, first));
    times_tile<kPanel>(x, job.ldx, t, panel, n, next, out, job.ldo, width);
    return;
  }
  // Of a matrix of few rows the columns are many (mHC): there is nothing to gain from packing.
  if (t > kFewRows && job.m.rows > kPanel) {
    pack_tile(job.m, first, width, tile, buffer);
    times_tile<kTile>(x, job.ldx, t, tile, n, tile, out, job.ldo, width);
    return;
  }
  int r = 0;
  for (; r + 4 <= width; r += 4) {
    const float* w[4];
    for (int i = 0; i < 4; ++i) w[i] = weight_row(job.m, first + r + i, buffer + i * n);
    dot_rows<4>(w, x, job.ldx, t, n, out + r, job.ldo);
  }
  for (; r < width; ++r) {
    const float* w = weight_row(job.m, first + r, buffer);
    dot_rows<1>(&w, x, job.ldx, t, n, out + r, job.ldo);
  }
}
