// Weights that stay packed: BF16, FP8 and FP4 are decoded in registers, a whole vector of packed
// bytes at once (many input rows: packed_tiles.h). A lane's 32-bit word holds 2, 4 or 8 neighbouring weights; one shift and mask a part gives that part of
// all lanes. So inputs are laid out once a phase by part (Inputs), and no weight is ever moved across lanes.
//
// FP8 and FP4 fields land in FP32's exponent as they are, that is times 2^-120 and 2^-126. Inputs are scaled by a power
// of two, so that no product is subnormal; the result is scaled back. All exact. What doesn't fit (inputs that aren't
// finite, scales outside 2^+-63, FP8's NaN) takes weight_row.

constexpr int kPackedRows = 64;  // the most input rows that are laid out at once
constexpr int64_t kPairRows = 2 * kPackedRows;  // of rounded ones, what Inputs::space holds
constexpr int kPadding = 8 * kLanes;  // cols are padded to whole chunks
constexpr int64_t kRowShift = 512;  // bytes between input rows: without it, they would share the same few sets of L1
#if VECTOR_BYTES == 64 || defined(__aarch64__)
constexpr bool kManyRegisters = true;  // 32
#else
constexpr bool kManyRegisters = false;
#endif

template <int64_t F>
constexpr int kParts = F == kFP4 ? 8 : F == kFP8 ? 4 : 2;  // weights in a 32-bit word
template <int64_t F>
constexpr int kLift = F == kFP4 ? 63 : F == kFP8 ? 60 : 0;  // scales carry 2^kLift, inputs 2^60: both stay normal

typedef int16_t VecH __attribute__((vector_size(VECTOR_BYTES)));
typedef int32_t Words __attribute__((vector_size(VECTOR_BYTES), aligned(1), may_alias));
INLINE VecI load_words(const void* p) { return *static_cast<const Words*>(p); }

// Each part of all lanes, as FP32 times 2^-120 (FP8) or 2^-126 (FP4).
template <int64_t F>
INLINE void decode(VecI word, Vec* parts) {
  if constexpr (F == kBF16) {
    parts[0] = reinterpret_cast<Vec>(word << 16);
    parts[1] = reinterpret_cast<Vec>(word & int32_t(0xffff0000));
  } else if constexpr (F == kFP8) {  // two bytes at once in 16 bits: sign, spread over the exponent's top, then cut
    const VecH half = reinterpret_cast<VecH>(word), keep = int16_t(0x87f0) - VecH{};
    const VecI even = reinterpret_cast<VecI>(((half << 8) >> 4) & keep), odd = reinterpret_cast<VecI>((half >> 4) & keep);
    parts[0] = reinterpret_cast<Vec>(even << 16);
    parts[1] = reinterpret_cast<Vec>(odd << 16);
    parts[2] = reinterpret_cast<Vec>(even & int32_t(0xffff0000));
    parts[3] = reinterpret_cast<Vec>(odd & int32_t(0xffff0000));
  } else {
#pragma GCC unroll 8
    for (int p = 0; p < 8; ++p) parts[p] = reinterpret_cast<Vec>(((word << (28 - 4 * p)) >> 6) & int32_t(0x81c00000));
  }
}

INLINE float power_of_two(int exponent) {  // -126 .. 127
  const uint32_t bits = uint32_t(exponent + 127) << 23;
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}

// The largest finite magnitude's exponent: 2^e <= max |x| < 2^(e+1). INT_MAX where x has an inf or NaN, INT_MIN for 0.
static int exponent_of(const float* x, int64_t n) {
  uint32_t most = 0;
  for (int64_t i = 0; i < n; ++i) {
    uint32_t bits;
    __builtin_memcpy(&bits, x + i, 4);
    bits &= 0x7fffffffu;
    most = bits > most ? bits : most;
  }
  if (most >= 0x7f800000u) return INT_MAX;
  if (most == 0) return INT_MIN;
  return most >> 23 ? int(most >> 23) - 127 : -118 - __builtin_clz(most);
}

// The input rows of a phase's products in the order in which a kernel meets them. One a thread; a phase's inputs don't
// change while it runs, so the rows are laid out when a thread first meets them.
struct Inputs {
  char* space = nullptr;  // kPackedRows * packed_row_bytes(widest cols)
  const float* x = nullptr;
  int64_t t = 0, n = 0, row_bytes = 0;
  int phase = -1, kind = -1;
  bool fits = false;
  bool rounds = false;  // to BF16, see rounds_rows
  float back[kPackedRows][2];  // multiplied together: the power of two that undoes the scaling

  template <class T>
  const T* row(int64_t c) const {
    return reinterpret_cast<const T*>(space + c * row_bytes);
  }
};

static void lay_out_pairs(Inputs& in, const float* x, int64_t ldx);  // pairs.h
template <int64_t F>
static void lay_out_integers(Inputs& in, const float* x, int64_t ldx);  // integers.h

// f(Packed<F>{}) for a packed format F.
template <int64_t F>
struct Packed {
  static constexpr int64_t format = F;
};
template <class Function>
static auto of_format(int64_t format, Function f) {
  if (format == kBF16) return f(Packed<kBF16>{});
  if (format == kFP8) return f(Packed<kFP8>{});
  return f(Packed<kFP4>{});
}

// Of words of FP8 codes: bits that any_nan finds where one is NaN.
INLINE VecI nan_bits(VecI word) { return (word & 0x7f7f7f7f) + 0x01010101; }
static bool any_nan(VecI bits) {
  return fold_lanes(bits, [](auto a, auto b) { return a | b; }) & int32_t(0x80808080);
}

template <int R, int C>
INLINE void copy_sums(const Vec* from, Vec* to) {
#pragma GCC unroll 64
  for (int i = 0; i < R * C; ++i) to[i] = from[i];
}

// Where R weight rows begin, and their scales.
struct Rows {
  const uint8_t *data, *scale;
  int64_t row_bytes, row_scales;

  Rows at(int64_t r) const { return {data + r * row_bytes, scale + r * row_scales, row_bytes, row_scales}; }
};
template <int64_t F>
static Rows rows_at(const Matrix& m, int64_t first) {
  const int64_t n = m.cols, row_bytes = n * 4 / kParts<F>, row_scales = F == kFP4 ? n / 32 : 0;
  const int64_t scale = F == kFP8 ? first / 128 * ((n + 127) / 128) : first * row_scales;
  return {static_cast<const uint8_t*>(m.data) + first * row_bytes, m.scale + scale, row_bytes, row_scales};
}

// Scale bytes for each lane, one for each four, as FP32 times 2^lift.
INLINE Vec lane_scales(const uint8_t* scale, int lift) {
  uint32_t bytes = 0;
  __builtin_memcpy(&bytes, scale, kLanes / 4);
  VecI word = int32_t(bytes) - VecI{};
#if VECTOR_BYTES == 64
  word = word >> VecI{0, 0, 0, 0, 8, 8, 8, 8, 16, 16, 16, 16, 24, 24, 24, 24};
#elif VECTOR_BYTES == 32
  word = word >> VecI{0, 0, 0, 0, 8, 8, 8, 8};
#endif
  return reinterpret_cast<Vec>(((word & 255) + lift) << 23);
}

#if UPWELL_BYTE_DOTS
#include "packed_bytes.h"
#endif

constexpr int64_t kPairChunk = 2 * VECTOR_BYTES;  // columns (packed_pairs.h)

// f(p, scale) for each chunk of a row's columns [col, col + count); the last may be a copy, padded with zeros, as what
// follows in the row may not be there to read.
template <int64_t F, int64_t chunk, class Function>
INLINE void each_chunk(const Rows& w, int64_t col, int64_t count, int64_t ahead, Function f) {
  constexpr int bytes = int(chunk * 4 / kParts<F>);
  for (int64_t left = count; left > 0; left -= chunk, col += chunk) {
    const uint8_t *p = w.data + col * 4 / kParts<F>, *scale = w.scale + (F == kFP8 ? col / 128 : col / 32);
    if (left >= chunk) {
      for (int k = 0; k < bytes; k += 64) __builtin_prefetch(p + ahead + k, 0, 2);
      f(p, scale);
      continue;
    }
    uint8_t padded[bytes] = {}, scales[4] = {127, 127, 127, 127};
    __builtin_memcpy(padded, p, size_t(left * 4 / kParts<F>));
    if (F == kFP4) __builtin_memcpy(scales, scale, size_t(left / 32)), scale = scales;
    f(padded, scale);
  }
}

// One row's columns [col, col + count) in FP32 times their scales, in the order of the parts, padded with zeros to whole
// chunks; F: FP8 or FP4. nan: see any_nan.
template <int64_t F>
INLINE void decode_scaled(const Rows& w, int64_t col, int64_t count, int64_t ahead, float* out, VecI& nan) {
  each_chunk<F, kParts<F> * kLanes>(w, col, count, ahead, [&](const uint8_t* p, const uint8_t* scale) {
    const VecI word = load_words(p);
    if (F == kFP8) nan |= nan_bits(word);
    const Vec factor = F == kFP8 ? splat(power_of_two(int(*scale) - 127 + kLift<F>)) : lane_scales(scale, kLift<F>);
    Vec parts[kParts<F>];
    decode<F>(word, parts);
    for (int k = 0; k < kParts<F>; ++k, out += kLanes) store(out, parts[k] * factor);
  });
}

#if UPWELL_BF16_DOTS
#include "packed_pairs.h"
#endif
#include "packed_tiles.h"

constexpr int64_t packed_row_bytes(int64_t cols) {  // of one prepared row: floats, or bytes with their sums and scales
  return 4 * (cols + 2 * kPadding) + 64 + kRowShift;
}

template <int64_t F>
static void lay_out_floats(Inputs& in, const float* x, int64_t ldx) {
  constexpr int P = kParts<F>;
  const int64_t chunk = P * kLanes, padded = (in.n + chunk - 1) / chunk * chunk;
  in.row_bytes = 4 * padded + kRowShift;
  in.fits = true;
  for (int64_t c = 0; c < in.t; ++c, x += ldx) {
    float up[2] = {1.0f, 1.0f};
    in.back[c][0] = in.back[c][1] = 1.0f;
    if (F != kBF16) {
      const int e = exponent_of(x, in.n);
      if (e == INT_MAX) {
        in.fits = false;
        return;
      }
      const int shift = e == INT_MIN ? 0 : 60 - e, down = (F == kFP8 ? 120 : 126) - kLift<F> - shift;
      up[0] = power_of_two(shift / 2), up[1] = power_of_two(shift - shift / 2);
      in.back[c][0] = power_of_two(down / 2), in.back[c][1] = power_of_two(down - down / 2);
    }
    float* out = reinterpret_cast<float*>(in.space + c * in.row_bytes);
    const int64_t whole = in.n / chunk * chunk;
    for (int64_t base = 0; base < whole; base += chunk) {
      Vec values[P], parts[P];
      for (int i = 0; i < P; ++i) values[i] = load(x + base + i * kLanes) * up[0] * up[1];
      every_pth<P>(values, parts);
      for (int i = 0; i < P; ++i) store(out + base + i * kLanes, parts[i]);
    }
    for (int64_t i = whole; i < padded; ++i) {
      const int64_t at = whole + (i - whole) % P * kLanes + (i - whole) / P;
      out[at] = i < in.n ? x[i] * up[0] * up[1] : 0.0f;
    }
  }
}

// How a kernel meets its inputs: in bytes, in floats, or in BF16.
enum class Meets { kBytes, kFloats, kPairs };

static void prepare(Inputs& in, int64_t format, Meets meets, const float* x, int64_t ldx, int64_t t, int64_t n, int phase) {
  const int kind = int(4 * format) + int(meets);
  if (in.x == x && in.t == t && in.n == n && in.phase == phase && in.kind == kind) return;
  in.x = x, in.t = t, in.n = n, in.phase = phase, in.kind = kind;
  if (format == kPairs) lay_out_pairs(in, x, ldx);
  else if (format == kInt8) lay_out_integers<kInt8>(in, x, ldx);
  else if (format == kInt4) lay_out_integers<kInt4>(in, x, ldx);
#if UPWELL_BF16_DOTS
  else if (meets == Meets::kPairs) of_format(format, [&](auto f) { lay_out_paired<f.format>(in, x, ldx); });
#endif
#if UPWELL_BYTE_DOTS
  else if (meets == Meets::kBytes) lay_out_bytes(in, x, ldx);
#endif
  else of_format(format, [&](auto f) { lay_out_floats<f.format>(in, x, ldx); });
}

// All scales that rows [first, first + width) use lie in 2^-63 .. 2^63, so that no factor leaves FP32's normals.
static bool plain_scales(const Matrix& m, int64_t first, int width) {
  if (m.format == kBF16) return true;
  const int64_t stride = m.format == kFP8 ? (m.cols + 127) / 128 : m.cols / 32;
  const int64_t begin = (m.format == kFP8 ? first / 128 : first) * stride;
  const int64_t end = (m.format == kFP8 ? (first + width - 1) / 128 + 1 : first + width) * stride;
  uint8_t odd = 0;
  for (int64_t i = begin; i < end; ++i) odd |= uint8_t(m.scale[i] - 64) > 126;
  return !odd;
}

// acc[r][c] += one chunk of R weight rows times C input rows. `ahead`: bytes to prefetch ahead.
template <int64_t F, int R, int C>
INLINE void packed_chunk(const Rows& w, int64_t col, int64_t ahead, const Inputs& in, int64_t c0, Vec (&acc)[R][C], VecI& nan) {
  constexpr int P = kParts<F>;
  Vec shared = splat(1.0f);
  if constexpr (F == kFP8) shared = splat(power_of_two(int(w.scale[col / 128]) - 127 + kLift<F>));
  Vec parts[R][P], factor[R];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    const uint8_t* p = w.data + r * w.row_bytes + col * 4 / P;
    __builtin_prefetch(p + ahead, 0, 2);  // into L2: L1 holds the inputs
    const VecI word = load_words(p);
    decode<F>(word, parts[r]);
    if constexpr (F == kFP8) nan |= nan_bits(word);
    factor[r] = shared;
    if constexpr (F == kFP4) factor[r] = lane_scales(w.scale + r * w.row_scales + col / 32, kLift<F>);
    if constexpr (C == 1 && F != kBF16) {
      const float* x = in.row<float>(c0) + col;
      Vec sum = parts[r][0] * load(x);
#pragma GCC unroll 8
      for (int k = 1; k < P; ++k) sum += parts[r][k] * load(x + k * kLanes);
      acc[r][0] += sum * factor[r];
    }
  }
  if constexpr (C > 1 || F == kBF16) {
#pragma GCC unroll 8
    for (int k = 0; k < P; ++k) {
      if constexpr (F != kBF16)
        for (int r = 0; r < R; ++r) parts[r][k] *= factor[r];
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) {
        Vec x = load(in.row<float>(c0 + c) + col + k * kLanes);
        if constexpr (C == kPackedRows) x = held(x);  // once for all rows
        for (int r = 0; r < R; ++r) acc[r][c] += parts[r][k] * x;
      }
    }
  }
}

template <int64_t F>
constexpr bool kBytes = UPWELL_BYTE_DOTS && F == kFP4;  // packed_bytes.h
template <int64_t F, bool kPaired>
constexpr int kChunk = kPaired || kBytes<F> ? 2 * VECTOR_BYTES : kParts<F> * kLanes;  // columns

// Columns [from, to) of R weight rows times C input rows, added to sums [R][C]. The last chunk of a row may be cut off:
// it is read through a padded copy, as the row's end may be the tensor's.
template <int64_t F, bool kPaired, int R, int C>
static void packed_block(const Rows& w, int64_t from, int64_t to, int64_t ahead, const Inputs& in, int64_t c0, Vec* sums,
                         VecI& nan) {
  constexpr int64_t chunk = kChunk<F, kPaired>, bytes = chunk * 4 / kParts<F>;
  Vec acc[R][C];
  copy_sums<R, C>(sums, acc[0]);
  int64_t col = from;
#if UPWELL_BYTE_DOTS
  const ByteVec table = load_bytes(doubles_of_codes.values);
#endif
  auto step = [&](const Rows& rows, int64_t at) {
#if UPWELL_BF16_DOTS
    if constexpr (kPaired) paired_chunk<F, R, C>(rows, at, ahead, in, c0, acc);
    else
#endif
#if UPWELL_BYTE_DOTS
    if constexpr (kBytes<F>) byte_chunk<R, C>(rows.data, rows.scale, rows.row_bytes, rows.row_scales, at, ahead, in, c0, at, table, acc);
    else
#endif
      packed_chunk<F, R, C>(rows, at, ahead, in, c0, acc, nan);
  };
  for (; col + chunk <= to; col += chunk) step(w, col);
  if (col < to) {
    uint8_t data[R * bytes] = {}, scale[R * 4];
    for (int i = 0; i < R * 4; ++i) scale[i] = 127;
    const int64_t left = (to - col) * 4 / kParts<F>;
    for (int r = 0; r < R; ++r) {
      __builtin_memcpy(data + r * bytes, w.data + r * w.row_bytes + col * 4 / kParts<F>, size_t(left));
      if (F == kFP8) scale[0] = w.scale[col / 128];
      if (F == kFP4) __builtin_memcpy(scale + r * 4, w.scale + r * w.row_scales + col / 32, size_t((to - col) / 32));
    }
    ahead = 0;
    step(Rows{data - col * 4 / kParts<F>, scale - (F == kFP8 ? col / 128 : col / 32), bytes, 4}, col);
  }
  copy_sums<R, C>(acc[0], sums);
}

// Weight rows [first, first + width) times input rows [c0, c0 + C). From four input rows on, a block of columns is done
// for all weight rows at once, so that the inputs' block stays in L1. Returns whether FP8's NaN was met.
template <int64_t F, bool kPaired, int C>
__attribute__((noinline)) static bool packed_columns(const Matrix& m, int64_t first, int width, const Inputs& in, int64_t c0, float* out, int64_t ldo) {
  constexpr int R = C < 4 ? 4 : 2;
  const int64_t n = m.cols, block = C < 4 ? n : 512;
  const Rows rows = rows_at<F>(m, first);
  const int64_t row_bytes = rows.row_bytes;
  VecI nan{};
  auto scaled_back = [&](int c, float sum) { return kPaired ? sum : sum * in.back[c0 + c][0] * in.back[c0 + c][1]; };
  if (n <= block && width == kTile) {  // short rows: what a row comes to never leaves the registers
    for (int r = 0; r < kTile; r += R) {
      Vec sums[R * C] = {};
      packed_block<F, kPaired, R, C>(rows.at(r), 0, n, R * row_bytes, in, c0, sums, nan);
#pragma GCC unroll 4
      for (int i = 0; i < R * C; i += 4) {  // four at once: of one input row, or of one weight row
        constexpr int step = R == 4 ? C : 1;
        const int at = R == 4 ? i / 4 : i;
        float four[4];
        sum_four(sums[at], sums[at + step], sums[at + 2 * step], sums[at + 3 * step], four);
        for (int k = 0; k < 4; ++k) {
          const int c = R == 4 ? at : i % C + k, row = R == 4 ? k : i / C;
          out[c * ldo + r + row] = scaled_back(c, four[k]);
        }
      }
    }
    return any_nan(nan);
  }
  Vec sums[kTile * C] = {};
  for (int64_t from = 0; from < n; from += block) {
    const int64_t to = from + block < n ? from + block : n;
    // What comes next: rows, the next block of these, or the first of the tile after next (the next is another thread's).
    int64_t ahead = R * row_bytes;
    if (block < n) ahead = to < n ? block * 4 / kParts<F> : 2 * kTile * row_bytes - from * 4 / kParts<F>;
    int r = 0;
    for (; r + R <= width; r += R)
      packed_block<F, kPaired, R, C>(rows.at(r), from, to, ahead, in, c0, sums + r * C, nan);
    for (; r < width; ++r) packed_block<F, kPaired, 1, C>(rows.at(r), from, to, ahead, in, c0, sums + r * C, nan);
  }
  for (int c = 0; c < C; ++c)
    for (int r = 0; r < width; ++r) out[c * ldo + r] = scaled_back(c, sum_lanes(sums[r * C + c]));
  return any_nan(nan);
}

template <int64_t F, bool kPaired = false>
static bool packed_rows(const Matrix& m, int64_t first, int width, const Inputs& in, float* out, int64_t ldo) {
  bool nan = false;
  int64_t c = 0;
  if constexpr (kManyRegisters && !kPaired && !kBytes<F>)
    for (; in.t - c >= 8; c += 8) nan |= packed_columns<F, kPaired, 8>(m, first, width, in, c, out + c * ldo, ldo);
  for (; in.t - c >= 4; c += 4) nan |= packed_columns<F, kPaired, 4>(m, first, width, in, c, out + c * ldo, ldo);
  if (in.t - c == 3) nan |= packed_columns<F, kPaired, 3>(m, first, width, in, c, out + c * ldo, ldo);
  if (in.t - c == 2) nan |= packed_columns<F, kPaired, 2>(m, first, width, in, c, out + c * ldo, ldo);
  if (in.t - c == 1) nan |= packed_columns<F, kPaired, 1>(m, first, width, in, c, out + c * ldo, ldo);
  return nan;
}

// Whether packed weights and t input rows are multiplied in BF16, where that is asked for: where it is faster.
static bool rounds_rows(int64_t t) {
#if UPWELL_BF16_DOTS
  return kPairsInRegisters || t >= kTiledRows<kFP8>;
#else
  return false;
#endif
}

// The input rows that a thread lays out at once: three quarters of a MiB, what leaves room in the L2 cache for weights.
static int64_t rows_at_once(const Matrix& m, bool rounds) {
  const int64_t most = UPWELL_BF16_DOTS && rounds ? 2 * kPackedRows : kPackedRows;
  return max64(16, min64(most, most / kPackedRows * 48 * 4096 / m.cols));
}

// Weight rows times all inputs in FP32, or (rounds) in BF16; returns whether FP8's NaN was met.
template <int64_t F>
static bool packed_rows_of(Inputs& in, const Matrix& m, int64_t first, int width, bool rounds, float* out, int64_t ldo) {
#if UPWELL_BF16_DOTS
  if (rounds) {
    if constexpr (kPairsInRegisters)
      if (in.t < kTiledRows<F>) return packed_rows<F, true>(m, first, width, in, out, ldo);
    return packed_tiles<F, int32_t>(m, first, width, in, out, ldo);
  }
#endif
  if constexpr (F != kBF16)
    if (in.t >= kTiledFloats) return packed_tiles<F, float>(m, first, width, in, out, ldo);
  return packed_rows<F>(m, first, width, in, out, ldo);
}

// out [t, width] = x [t, cols] times weight rows [first, first + width). rounds: both in BF16, where that is faster.
// False where these kernels don't serve these values, and out is unspecified.
__attribute__((noinline)) static bool packed_product(const Matrix& m, int64_t first, int width, const float* x, int64_t ldx,
                                                     int64_t t, float* out, int64_t ldo, Inputs& in, bool rounds, int phase) {
  if (!is_packed(m) || !plain_scales(m, first, width)) return false;
  rounds = rounds && rounds_rows(t);
  const int64_t most = rows_at_once(m, rounds);
  for (int64_t i = 0; i < t; i += most, x += most * ldx, out += most * ldo) {
    const int64_t rows = min64(most, t - i);
    const Meets floats = UPWELL_BYTE_DOTS && m.format == kFP4 && rows < kTiledFloats ? Meets::kBytes : Meets::kFloats;
    prepare(in, m.format, rounds ? Meets::kPairs : floats, x, ldx, rows, m.cols, phase);
    if (!in.fits) return false;
    const bool nan = of_format(m.format, [&](auto f) { return packed_rows_of<f.format>(in, m, first, width, rounds, out, ldo); });
    if (nan) return false;
  }
  return true;
}
