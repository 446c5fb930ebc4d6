// Included inside a namespace of each instruction set, after VECTOR_BYTES is set; no include guard.
#include "simd.h"

typedef int8_t Narrow __attribute__((vector_size(VECTOR_BYTES / 4), aligned(1), may_alias));
typedef uint8_t V16 __attribute__((vector_size(16)));
typedef uint8_t V16U __attribute__((vector_size(16), aligned(1), may_alias));

constexpr int64_t kFp8Block = 128, kFp4Group = 32;

// 2^(code - 127); 255 is NaN.
INLINE float ue8m0(uint8_t code) {
  const uint32_t bits = code == 255 ? 0x7FC00000u : code == 0 ? 1u << 22 : uint32_t(code) << 23;
  float out;
  __builtin_memcpy(&out, &bits, 4);
  return out;
}

INLINE float to_bf16(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  if (x == x) bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000u;
  __builtin_memcpy(&x, &bits, 4);
  return x;
}

// The power of two at or above a positive x.
INLINE float power_at_least(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  bits = (bits + 0x7FFFFF) & 0x7F800000u;
  __builtin_memcpy(&x, &bits, 4);
  return x;
}

// The step that brings `amax` to the largest integer.
INLINE float step_of(const Requantize& call, float amax) {
  const float step = (amax == 0.0f ? 1.0f : amax) / (call.bits == 8 ? 127.0f : 7.0f);
  return call.bf16_scales ? to_bf16(step) : step;
}

// e4m3 to FP32, times `scale`: its bits lie as FP32's do, with the exponent's bias 120 less.
INLINE void expand_fp8(const uint8_t* in, float scale, int64_t n, float* out) {
  const Vec up = splat(0x1p120f), factor = splat(scale), nan = splat(__builtin_nanf(""));
  for (int64_t i = 0; i < n; i += kLanes) {
    Bytes bytes{};
    __builtin_memcpy(&bytes, in + i, n - i < kLanes ? n - i : kLanes);
    const VecI code = __builtin_convertvector(bytes, VecI), magnitude = code & 0x7F;
    const Vec value = reinterpret_cast<Vec>((magnitude << 20) | ((code & 0x80) << 24)) * up * factor;
    store_part(out + i, select(magnitude == 0x7F, nan, value), min_lanes(n - i));
  }
}

constexpr float kMagnitudes[8] = {0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f};

INLINE void expand_fp4(const uint8_t* in, const uint8_t* scale, int64_t cols, float* out) {
  for (int64_t i = 0; i < cols; ++i) {
    const int code = (in[i / 2] >> (i % 2 * 4)) & 15;
    const float magnitude = kMagnitudes[code & 7] * ue8m0(scale[i / kFp4Group]);
    out[i] = code & 8 ? -magnitude : magnitude;
  }
}

INLINE void expand_row(const Requantize& call, int64_t row, float* out) {
  const int64_t cols = call.cols;
  if (call.format == WeightFormat::f32) {
    std::memcpy(out, call.weight + 4 * row * cols, 4 * cols);
  } else if (call.format == WeightFormat::bf16) {
    const uint8_t* in = call.weight + 2 * row * cols;
    for (int64_t i = 0; i < cols; ++i) {
      uint16_t half;
      __builtin_memcpy(&half, in + 2 * i, 2);
      const uint32_t bits = uint32_t(half) << 16;
      __builtin_memcpy(out + i, &bits, 4);
    }
  } else if (call.format == WeightFormat::fp4) {
    expand_fp4(call.weight + row * cols / 2, call.scale + row * (cols / kFp4Group), cols, out);
  } else {
    const uint8_t* scale = call.scale + row / kFp8Block * ((cols + kFp8Block - 1) / kFp8Block);
    for (int64_t i = 0; i < cols; i += kFp8Block)
      expand_fp8(call.weight + row * cols + i, ue8m0(scale[i / kFp8Block]), cols - i < kFp8Block ? cols - i : kFp8Block,
                 out + i);
  }
}

// max |x|, NaN where there is one.
INLINE float largest(const float* x, int64_t n) {
  Vec best{}, bad{};
  int64_t i = 0;
  for (; i < n; i += kLanes) {
    const Vec v = load_at(x, i, n), magnitude = select(v < 0.0f, -v, v);
    best = select(magnitude > best, magnitude, best);
    bad += v * 0.0f;  // NaN for NaN and infinity
  }
  return sum_lanes(bad) == 0.0f ? largest_lane(best) : __builtin_nanf("");
}

INLINE void round_row(const float* x, float step, float most, int64_t n, int8_t* out) {
  const Vec steps = splat(step), top = splat(most), magic = splat(kRounding);
  for (int64_t i = 0; i < n; i += kLanes) {
    Vec v = (load_at(x, i, n) / steps + magic) - magic;
    v = select(v > top, top, select(v < -top, -top, v));
    const Narrow codes = __builtin_convertvector(__builtin_convertvector(v, VecI), Narrow);
    __builtin_memcpy(out + i, &codes, min_lanes(n - i));
  }
}

// Of a row rounded with this step, the squared error. Sums are exact where step and weights are few bits of like size.
INLINE double error_of(const float* x, float step, int64_t n) {
  typedef double Wide __attribute__((vector_size(2 * VECTOR_BYTES)));
  const Vec steps = splat(step), top = splat(127.0f), magic = splat(kRounding);
  Wide sums{};
  for (int64_t i = 0; i < n; i += kLanes) {
    const Vec v = load_at(x, i, n);
    Vec q = (v / steps + magic) - magic;
    q = select(q > top, top, select(q < -top, -top, q));
    const Wide error = __builtin_convertvector(v, Wide) - __builtin_convertvector(q, Wide) * double(step);
    sums += error * error;
  }
  double sum = 0.0;
  for (int lane = 0; lane < kLanes; ++lane) sum += sums[lane];
  return sum;
}

// The step of a row of FP8 or FP4 with the least error: the power of two that covers it, half of that, or `full`.
INLINE float grid_step(const float* x, float full, int64_t n) {
  if (full != full) return full;
  const float covers = power_at_least(full), steps[3] = {covers, covers / 2, full};
  float best = covers;
  double least = error_of(x, covers, n);
  for (int i = 1; i < 3 && least > 0.0; ++i) {
    const double error = error_of(x, steps[i], n);
    if (error < least) least = error, best = steps[i];
  }
  return best;
}

INLINE V16 look_up(V16 table, V16 index) {
#if defined(__clang__)
  V16 out;
  for (int i = 0; i < 16; ++i) out[i] = table[index[i]];
  return out;
#else
  return __builtin_shuffle(table, index);
#endif
}

INLINE V16 max_bytes(V16 a, V16 b) { return a > b ? a : b; }

// FP4's eight magnitudes and their negatives in steps, as bytes: the whole of a group's rounding is a look-up.
INLINE V16 fp4_table(float scale, float step, float most) {
  V16 table{};
  for (int i = 0; i < 8; ++i) {
    float v = (kMagnitudes[i] * scale / step + kRounding) - kRounding;
    v = v < most ? v : most;
    table[i] = uint8_t(int8_t(v));
    table[i + 8] = uint8_t(int8_t(-v));
  }
  return table;
}

// grid_step of a row of FP4. Without decoding it, where each group's steps of a half are whole ones of the power of two.
INLINE float fp4_grid_step(const Requantize& call, int64_t row, float full, float* wide) {
  const int64_t groups = call.cols / kFp4Group;
  const uint8_t* scale = call.scale + row * groups;
  uint8_t least = 255;
  for (int64_t g = 0; g < groups; ++g) least = scale[g] < least ? scale[g] : least;
  if (full == full && 0.5f * ue8m0(least) >= power_at_least(full)) return power_at_least(full);
  expand_row(call, row, wide);
  return grid_step(wide, full, call.cols);
}

// A row of FP4 to integers, one a byte, in order.
INLINE void requantize_fp4_row(const Requantize& call, int64_t row, float* wide, int8_t* out) {
  const int64_t groups = call.cols / kFp4Group;
  const uint8_t* in = call.weight + row * call.cols / 2;
  const uint8_t* scale = call.scale + row * groups;
  const float most = call.bits == 8 ? 127.0f : 7.0f;
  const int64_t a_step = call.group / kFp4Group;  // groups a step
  float* steps = call.scales + row * (call.cols / call.group);
  for (int64_t first = 0; first < groups; first += a_step) {
    float amax = 0.0f;
    for (int64_t g = first; g < first + a_step; ++g) {
      const V16 bytes = *reinterpret_cast<const V16U*>(in + 16 * g);
      const V16 best = max_bytes(bytes & 7, (bytes >> 4) & 7);
      uint8_t code = 0;
      for (int i = 0; i < 16; ++i) code = best[i] > code ? best[i] : code;
      const float value = kMagnitudes[code] * ue8m0(scale[g]);
      amax = value > amax || value != value ? value : amax;
      if (amax != amax) break;
    }
    float step = step_of(call, amax);
    if (call.on_grid) step = fp4_grid_step(call, row, step, wide);
    *steps++ = step;
    for (int64_t g = first; g < first + a_step; ++g) {
      const V16 table = fp4_table(ue8m0(scale[g]), step, most);
      const V16 bytes = *reinterpret_cast<const V16U*>(in + 16 * g);
      const V16 low = look_up(table, bytes & 15), high = look_up(table, bytes >> 4);
      V16U* to = reinterpret_cast<V16U*>(out + 32 * g);
      to[0] = __builtin_shufflevector(low, high, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
      to[1] = __builtin_shufflevector(low, high, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    }
  }
}

INLINE void requantize_row(const Requantize& call, int64_t row, float* wide, int8_t* out) {
  if (call.format == WeightFormat::fp4) return requantize_fp4_row(call, row, wide, out);
  const float most = call.bits == 8 ? 127.0f : 7.0f;
  expand_row(call, row, wide);
  float* steps = call.scales + row * (call.cols / call.group);
  for (int64_t i = 0; i < call.cols; i += call.group) {
    float step = step_of(call, largest(wide + i, call.group));
    if (call.on_grid) step = grid_step(wide + i, step, call.group);
    *steps++ = step;
    round_row(wide + i, step, most, call.group, out + i);
  }
}

void requantize(const Requantize& call) {
  const int64_t cols = call.cols, width = call.blocks ? cols / call.blocks : 0;
  static thread_local std::vector<float> wide;
  static thread_local std::vector<int8_t> narrow;
  wide.resize(cols);
  narrow.resize(2 * cols);
  for (int64_t row = 0; row < call.rows; ++row) {
    const bool direct = call.bits == 8, second = call.pack_rows && row % 2;
    int8_t* codes = direct ? reinterpret_cast<int8_t*>(call.codes) + row * cols : narrow.data() + (second ? cols : 0);
    requantize_row(call, row, wide.data(), codes);
    for (int64_t b = 0; b < call.blocks; ++b) {
      int32_t sum = 0;
      for (int64_t i = b * width; i < (b + 1) * width; ++i) sum += codes[i];
      call.sums[row * call.blocks + b] = sum;
    }
    if (direct || (call.pack_rows && !second)) continue;
    uint8_t* out = call.codes + row / (call.pack_rows ? 2 : 1) * (call.pack_rows ? cols : cols / 2);
    const int8_t* n = narrow.data();
    if (call.pack_rows)
      for (int64_t i = 0; i < cols; ++i) out[i] = uint8_t((n[i] & 15) | (n[cols + i] << 4));
    else
      for (int64_t i = 0; i < cols / 2; ++i) out[i] = uint8_t((n[2 * i] & 15) | (n[2 * i + 1] << 4));
  }
}
