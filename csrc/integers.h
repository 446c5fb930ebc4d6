// Integer weights with an FP32 scale a row: INT8 (W8A8) and INT4 (W4A8). An input row becomes INT8 in steps of its own
// (amax / 127), products of bytes are summed exactly in 32 bits, then both scales multiply the sum: what Ascend's cube
// does, and ops.linear.int8_linear in FP32. Instruction sets without dot products of bytes multiply the same integers in
// FP32. A row with an inf or NaN comes to NaN.

struct RoundedRow {  // before a row's bytes (or, without dot products of bytes, floats)
  float step;
  int32_t sum;  // of its integers
};
constexpr int64_t kHead = 64;  // bytes

// The rows that a thread lays out at once: of bytes, three quarters of a MiB; of floats, what their room holds.
INLINE int64_t integer_rows(int64_t cols) {
  return UPWELL_INTEGER_DOTS ? max64(16, min64(kPairRows, (3 << 18) / cols)) : kPackedRows;
}

typedef int8_t EighthBytes __attribute__((vector_size(kLanes), aligned(1), may_alias));

struct Steps {  // what an integer is worth, NaN of a row that isn't finite; its inverse, or 0
  float step, up;
};
INLINE Steps steps_of(const float* x, int64_t n) {
  VecI most{};
  for (int64_t i = 0; i < n; i += kLanes) {  // magnitudes are in order as integers, inf and NaN above all
    const VecI bits = reinterpret_cast<VecI>(load_at(x, i, n)) & 0x7fffffff;
    most = bits > most ? bits : most;
  }
  const int32_t top = largest_lane(most);
  if (top >= 0x7f800000) return {__builtin_nanf(""), 0.0f};
  float amax;
  __builtin_memcpy(&amax, &top, 4);
  amax = amax < 1e-30f ? 1e-30f : amax;
  return {amax / 127, 127 / amax};
}

// x [n] as bytes, behind them zeros up to `padded`, a multiple of kLanes.
INLINE RoundedRow round_bytes(const float* x, int64_t n, int64_t padded, int8_t* bytes) {
  const Steps steps = steps_of(x, n);
  VecI sum{};
  for (int64_t i = 0; i < padded; i += kLanes) {
    const VecI integers = i < n && steps.up > 0.0f ? round_to_int(load_at(x, i, n) * steps.up) : VecI{};
    sum += integers;
    *reinterpret_cast<EighthBytes*>(bytes + i) = __builtin_convertvector(integers, EighthBytes);
  }
  return {steps.step, sum_lanes(sum)};
}

// x [t, n] into in.space. F: kInt8, bytes in their order; kInt4, of each 2 * VECTOR_BYTES columns the even ones first.
template <int64_t F>
static void lay_out_integers(Inputs& in, const float* x, int64_t ldx) {
  constexpr int64_t chunk = (F == kInt4 ? 2 : 1) * VECTOR_BYTES;
  const int64_t n = in.n, padded = (n + chunk - 1) / chunk * chunk;
  in.row_bytes = kHead + (UPWELL_INTEGER_DOTS ? padded : 4 * (n + kLanes));
  in.fits = true;
  for (int64_t c = 0; c < in.t; ++c, x += ldx) {
    char* row = in.space + c * in.row_bytes;
    auto* head = reinterpret_cast<RoundedRow*>(row);
    auto* bytes = reinterpret_cast<int8_t*>(row + kHead);
#if UPWELL_INTEGER_DOTS
    *head = round_bytes(x, n, padded, bytes);
    for (int64_t i = 0; F == kInt4 && i < padded; i += chunk) {
      int8_t wholes[chunk];
      __builtin_memcpy(wholes, bytes + i, chunk);
      for (int64_t k = 0; k < chunk / 2; ++k) bytes[i + k] = wholes[2 * k], bytes[i + chunk / 2 + k] = wholes[2 * k + 1];
    }
#else
    const Steps steps = steps_of(x, n);
    *head = {steps.step, 0};
    auto* out = reinterpret_cast<float*>(bytes);
    for (int64_t i = 0; i < n; i += kLanes) store(out + i, steps.up > 0.0f ? whole(round_to_int(load_at(x, i, n) * steps.up)) : zero());
#endif
  }
}

#if UPWELL_INTEGER_DOTS
// What VNNI adds to an INT4 weight; see kAdded.
constexpr uint32_t kAddedToInt4 = kAdded / 16;

// sums [4][C] of four weight rows, w [steps * VECTOR_BYTES] each, times C input rows. F: kInt8, or kInt4: two a byte.
// ahead: bytes from the weights to what is fetched.
template <int64_t F, int C>
INLINE void integer_steps(const uint8_t* const (&w)[4], int64_t steps, int64_t ahead, const char* x, int64_t row_bytes,
                          VecI (&sums)[4][C]) {
  constexpr int P = F == kInt4 ? 2 : 1;
  const char* x3 = x + 3 * row_bytes;
  const int64_t l1 = row_bytes, l2 = 2 * row_bytes;
  for (int64_t at = 0; at < steps * VECTOR_BYTES; at += VECTOR_BYTES) {
#pragma GCC unroll 2
    for (int part = 0; part < P; ++part, x += VECTOR_BYTES, x3 += VECTOR_BYTES) {
      VecQ rows[4];
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r) {
        if (part == 0) __builtin_prefetch(w[r] + at + ahead, 0, 2);
        const VecQ codes = reinterpret_cast<VecQ>(load_words(w[r] + at));
        if constexpr (F == kInt8) {
          rows[r] = weights_of(codes);
        } else {
#if defined(__aarch64__)
          const int8x16_t low = vreinterpretq_s8_u32(uint32x4_t(part ? codes : codes << 4));  // its low nibbles are cut off
          rows[r] = VecQ(vreinterpretq_u32_s8(vshrq_n_s8(low, 4)));
#else
          rows[r] = ((part ? codes >> 4 : codes) & 0x0f0f0f0f) ^ kAddedToInt4 * 0x01010101;
#endif
        }
        rows[r] = reinterpret_cast<VecQ>(held(reinterpret_cast<VecI>(rows[r])));
      }
#define UPWELL_STEP(c, at)                                                                         \
  if constexpr (C > (c)) {                                                                         \
    const VecQ v = reinterpret_cast<VecQ>(held(load_words(at)));                                   \
    for (int r = 0; r < 4; ++r) sums[r][(c) % C] = dot_bytes(sums[r][(c) % C], v, rows[r]);        \
  }
      UPWELL_STEP(0, x) UPWELL_STEP(1, x + l1) UPWELL_STEP(2, x + l2)
      UPWELL_STEP(3, x3) UPWELL_STEP(4, x3 + l1) UPWELL_STEP(5, x3 + l2)
#undef UPWELL_STEP
    }
  }
}

// Four weight rows from w on (fewer: `rows`) times input rows [c0, c0 + C).
template <int64_t F, int C>
static void integer_tile(const uint8_t* w, int rows, int64_t ahead, const float* scale, const Inputs& in, int64_t c0,
                         float* out, int64_t ldo) {
  const int64_t bytes = F == kInt4 ? (in.n + 1) / 2 : in.n, steps = bytes / VECTOR_BYTES, left = bytes % VECTOR_BYTES;
  const char* x = in.row<char>(c0) + kHead;
  const uint8_t* at[4];
  for (int r = 0; r < 4; ++r) at[r] = w + (r < rows ? r : rows - 1) * bytes;
  VecI sums[4][C] = {};
  integer_steps<F, C>(at, steps, ahead, x, in.row_bytes, sums);
  if (left) {  // a row's end may be the tensor's
    alignas(64) uint8_t padded[4][VECTOR_BYTES] = {};
    for (int r = 0; r < 4; ++r) __builtin_memcpy(padded[r], at[r] + steps * VECTOR_BYTES, size_t(left)), at[r] = padded[r];
    integer_steps<F, C>(at, 1, 0, x + steps * (F == kInt4 ? 2 : 1) * VECTOR_BYTES, in.row_bytes, sums);
  }
  typedef int32_t FourInts __attribute__((vector_size(16)));
  typedef float Four __attribute__((vector_size(16)));
  Four scales{};
  __builtin_memcpy(&scales, scale, sizeof(float) * size_t(rows));
#pragma GCC unroll 6
  for (int c = 0; c < C; ++c) {
    FourInts four;
    sum_four(sums[0][c], sums[1][c], sums[2][c], sums[3][c], reinterpret_cast<int32_t*>(&four));
    const auto& head = *in.row<RoundedRow>(c0 + c);
    const Four products = __builtin_convertvector(four - int32_t(F == kInt4 ? kAddedToInt4 : kAdded) * head.sum, Four) * head.step * scales;
    if (rows == 4) __builtin_memcpy(out + c * ldo, &products, sizeof products);
    else __builtin_memcpy(out + c * ldo, &products, sizeof(float) * size_t(rows));
  }
}

template <int64_t F>
static void integer_rows_product(const Matrix& m, int64_t first, int width, const Inputs& in, float* out, int64_t ldo) {
  const int64_t bytes = F == kInt4 ? (m.cols + 1) / 2 : m.cols;
  const auto* w = static_cast<const uint8_t*>(m.data) + first * bytes;
  const auto* scale = reinterpret_cast<const float*>(m.scale) + first;
  const int64_t groups = (in.t + 5) / 6;
  for (int r = 0; r < width; r += 4) {
    const int rows = width - r < 4 ? width - r : 4;
    for (int64_t g = 0, c = 0, end; g < groups; ++g, c = end) {
      end = in.t * (g + 1) / groups;
      float* o = out + c * ldo + r;
      switch (end - c) {
#define UPWELL_TILE(C)                                                                             \
  case C:                                                                                          \
    integer_tile<F, C>(w + r * bytes, rows, g == 0 ? 4 * bytes : 0, scale + r, in, c, o, ldo);     \
    break;
        UPWELL_TILE(1) UPWELL_TILE(2) UPWELL_TILE(3) UPWELL_TILE(4) UPWELL_TILE(5) UPWELL_TILE(6)
#undef UPWELL_TILE
      }
    }
  }
}
#else
// kTile rows of a panel from row `first` on, as they are, in FP32: tile [cols, kTile].
static void quads_tile(const Matrix& m, int64_t first, float* tile) {
  const auto* panel = static_cast<const int32_t*>(panel_of(m, first));
  for (int64_t k = 0; k < m.cols; k += 4, panel += kPanel, tile += 4 * kTile)
    for (int half = 0; half < kTile; half += kLanes) {
      const VecI four = load(panel + half);
      for (int i = 0; i < 4 && k + i < m.cols; ++i) store(tile + i * kTile + half, whole(four << (24 - 8 * i) >> 24));
    }
}
// A row that lies by itself, in FP32.
static void whole_row(const Matrix& m, int64_t row, float* out) {
  typedef int8_t Codes __attribute__((vector_size(kLanes), aligned(1), may_alias));
  const int64_t n = m.cols, bytes = m.format == kInt4 ? (n + 1) / 2 : n;
  const auto* codes = static_cast<const int8_t*>(m.data) + row * bytes;
  for (int64_t i = 0; i < bytes; i += kLanes) {
    Codes some{};
    if (bytes - i >= kLanes) some = *reinterpret_cast<const Codes*>(codes + i);
    else __builtin_memcpy(&some, codes + i, size_t(bytes - i));
    const VecI v = __builtin_convertvector(some, VecI);
    auto keep = [&](int64_t at, Vec values) {
      if (at + kLanes <= n) store(out + at, values);
      else if (at < n) store_part(out + at, values, int(n - at));
    };
    if (m.format == kInt8) {
      keep(i, whole(v));
    } else {
      const Vec even = whole(v << 28 >> 28), odd = whole(v >> 4);
      keep(2 * i, low_turns(even, odd)), keep(2 * i + kLanes, high_turns(even, odd));
    }
  }
}
#endif

// out [t, width] = x [t, cols] times weight rows [first, first + width). tile: scratch for [cols, kTile].
static void integer_product(const Matrix& m, int64_t first, int width, const float* x, int64_t ldx, int64_t t, float* out,
                            int64_t ldo, [[maybe_unused]] float* tile, Inputs& in, int phase, [[maybe_unused]] const void* next) {
  const int64_t most = integer_rows(m.cols), format = m.format == kInt4 && UPWELL_INTEGER_DOTS ? kInt4 : kInt8;
  const auto* scale = reinterpret_cast<const float*>(m.scale) + first;
  for (int64_t i = 0; i < t; i += most, x += most * ldx, out += most * ldo) {
    prepare(in, format, Meets::kBytes, x, ldx, min64(most, t - i), m.cols, phase);
#if UPWELL_INTEGER_DOTS
    if (m.format == kQuads) {
      const Vec scales[2] = {load(scale), load(scale + kLanes)};
      auto finish = [&](int64_t row, int half, VecI sums) {
        const auto& head = *in.row<RoundedRow>(row);
        return whole(sums - int32_t(kAdded) * head.sum) * head.step * scales[half];
      };
      const auto* panel = static_cast<const uint32_t*>(panel_of(m, first));
      times_tile<kPanel>(in.row<uint32_t>(0) + kHead / 4, in.row_bytes / 4, in.t, panel, (m.cols + 3) / 4, next, out, ldo, width, finish);
    } else if (m.format == kInt8) {
      integer_rows_product<kInt8>(m, first, width, in, out, ldo);
    } else {
      integer_rows_product<kInt4>(m, first, width, in, out, ldo);
    }
#else
    const auto* rows = in.row<float>(0) + kHead / 4;
    const int64_t ld = in.row_bytes / 4, n = m.cols;
    if (m.format == kQuads) {
      if (i == 0) quads_tile(m, first, tile);
      times_tile<kTile>(rows, ld, in.t, tile, n, tile, out, ldo, width);
    } else {
      for (int r = 0; r < width; r += 4) {
        const int some = width - r < 4 ? width - r : 4;
        const float* w[4];
        for (int k = 0; k < some; ++k) w[k] = tile + k * n, whole_row(m, first + r + k, tile + k * n);
        if (some == 4) dot_rows<4>(w, rows, ld, in.t, n, out + r, ldo);
        else
          for (int k = 0; k < some; ++k) dot_rows<1>(w + k, rows, ld, in.t, n, out + r + k, ldo);
      }
    }
    for (int64_t c = 0; c < in.t; ++c)
      for (int r = 0; r < width; ++r) out[c * ldo + r] *= in.row<RoundedRow>(c)->step, out[c * ldo + r] *= scale[r];
#endif
  }
}
