// The CPU kernels against scalar double-precision references, without Python or torch: for machines that only a
// cross-compiler and an emulator reach. Compile for one instruction set, with VECTOR_BYTES set; see check_aarch64.sh.
// With the argument "bench": bytes per second of one thread from packed weights.
#include "../../csrc/kernels.h"

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

namespace upwell {
#include "../../csrc/simd.h"
#include "../../csrc/gemm.h"
#include "../../csrc/attention_bytes.h"
#include "../../csrc/attention.h"
#include "../../csrc/attention_pairs.h"
#include "../../csrc/indexer.h"
}  // namespace upwell

using namespace upwell;

namespace {

std::mt19937 generator(1);
double uniform() { return double(generator()) / 4294967296.0; }
double normal() {
  double sum = -6;
  for (int i = 0; i < 12; ++i) sum += uniform();
  return sum;
}

double ue8m0_value(int code) { return code == 255 ? NAN : std::ldexp(1.0, code - 127); }
double fp8_value(int code) {
  const int exponent = code >> 3 & 15, mantissa = code & 7;
  if ((code & 127) == 127) return NAN;
  const double size = exponent ? std::ldexp(8 + mantissa, exponent - 10) : std::ldexp(mantissa, -9);
  return code & 128 ? -size : size;
}
double fp4_value(int code) {
  const double sizes[] = {0, .5, 1, 1.5, 2, 3, 4, 6};
  return code & 8 ? -sizes[code & 7] : sizes[code & 7];
}

struct Weight {
  std::vector<uint8_t> data, scale;
  Matrix m;
  std::vector<double> dense;
};

// Random codes, exactly as long as the tensor, so that a read past its end shows under a memory checker.
Weight random_weight(int64_t format, int64_t rows, int64_t cols, int scale_from, int scale_to) {
  Weight w;
  const int64_t bytes = format == kF32 ? 4 * cols : format == kBF16 ? 2 * cols : format == kFP8 ? cols : cols / 2;
  w.data.resize(size_t(rows * bytes));
  const int64_t across = format == kFP8 ? (cols + 127) / 128 : cols / 32;
  if (format == kFP8) w.scale.resize(size_t((rows + 127) / 128 * across));
  if (format == kFP4) w.scale.resize(size_t(rows * across));
  for (auto& s : w.scale) s = uint8_t(scale_from + int(uniform() * (scale_to - scale_from + 1)));
  w.m = {w.data.data(), w.scale.data(), rows, cols, format};
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < cols; ++c) {
      double value = 0;
      if (format == kF32 || format == kBF16) {
        const float v = float(normal());
        uint32_t bits;
        std::memcpy(&bits, &v, 4);
        if (format == kBF16) {
          bits &= 0xffff0000u;
          const uint16_t half = uint16_t(bits >> 16);
          std::memcpy(&w.data[size_t(2 * (r * cols + c))], &half, 2);
        } else {
          std::memcpy(&w.data[size_t(4 * (r * cols + c))], &bits, 4);
        }
        float kept;
        std::memcpy(&kept, &bits, 4);
        value = kept;
      } else if (format == kFP8) {
        int code = int(uniform() * 256);
        if ((code & 127) == 127) code ^= 1;
        w.data[size_t(r * cols + c)] = uint8_t(code);
        value = fp8_value(code) * ue8m0_value(w.scale[size_t(r / 128 * across + c / 128)]);
      } else {
        const int code = int(uniform() * 16);
        w.data[size_t(r * cols / 2 + c / 2)] |= uint8_t(code << (c % 2 * 4));
        value = fp4_value(code) * ue8m0_value(w.scale[size_t(r * across + c / 32)]);
      }
      w.dense.push_back(value);
    }
  return w;
}

int failures = 0, checks = 0;
void expect(bool good, const char* what, double got, double wanted) {
  ++checks;
  if (good) return;
  if (++failures <= 10) std::printf("FAILED %s: got %g, reference %g\n", what, got, wanted);
}

// out [t, rows] = x [t, cols] times the weight, in one thread; `repeats` times.
std::vector<float> product(const Weight& w, const std::vector<float>& x, int64_t t, int repeats = 1, bool rounds = false) {
  const int64_t n = w.m.cols, rows = w.m.rows;
  std::vector<float> out(size_t(t * rows), -1), tile(size_t(n * kTile)), buffer(size_t(4 * n));
  std::vector<char> space(size_t(kPackedRows * packed_row_bytes(n) + 64));
  Inputs inputs;
  inputs.space = space.data() + (64 - reinterpret_cast<uintptr_t>(space.data()) % 64);
  inputs.rounds = rounds;
  const Job job{w.m, x.data(), n, t, out.data(), rows};
  for (int phase = 0; phase < repeats; ++phase)
    for (int64_t first = 0; first < rows; first += kTile)
      run_job(job, first, int(rows - first < kTile ? rows - first : kTile), 0, t, tile.data(), buffer.data(), &inputs, phase);
  return out;
}

// out [t, rows] is x [t, cols] times dense [rows, cols], within FP32's rounding of the terms.
void expect_product(const std::vector<float>& out, const std::vector<double>& dense, const std::vector<float>& x,
                    int64_t rows, int64_t cols, int64_t t, const char* name) {
  for (int64_t c = 0; c < t; ++c)
    for (int64_t r = 0; r < rows; ++r) {
      double sum = 0, size = 0;
      for (int64_t k = 0; k < cols; ++k) {
        const double term = dense[size_t(r * cols + k)] * x[size_t(c * cols + k)];
        sum += term, size += std::fabs(term);
      }
      const double off = std::fabs(out[size_t(c * rows + r)] - sum);
      expect(off <= 2e-6 * size + 1e-44, name, out[size_t(c * rows + r)], sum);
    }
}

float in_bf16(float x) {
  const uint32_t bits = uint32_t(round_to_bf16(x)) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// rounds: the inputs to BF16, where they are so many.
void check_product(int64_t format, int64_t rows, int64_t cols, int64_t t, double x_scale, int scale_from, int scale_to,
                   bool rounds = false) {
  const Weight w = random_weight(format, rows, cols, scale_from, scale_to);
  std::vector<float> x(size_t(t * cols));
  for (auto& v : x) v = float(normal() * x_scale);
  const auto out = product(w, x, t, 1, rounds);
  if (rounds && rounds_rows(t))
    for (auto& v : x) v = in_bf16(v);
  const char* names[] = {"F32 product", "BF16 product", "FP8 product", "FP4 product"};
  expect_product(out, w.dense, x, rows, cols, t, names[format]);
}

// Weights in pairs of BF16 columns: the product of rounded operands.
void check_pairs(int64_t rows, int64_t cols, int64_t t) {
  Weight w = random_weight(kF32, rows, cols, 127, 127);
  std::vector<uint16_t> pairs(size_t((rows + kPanel - 1) / kPanel * kPanel * ((cols + 1) / 2 * 2)));
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < cols; ++c)
      pairs[size_t((r / kPanel * kPanel * ((cols + 1) / 2) + c / 2 * kPanel + r % kPanel) * 2 + c % 2)] =
          round_to_bf16(float(w.dense[size_t(r * cols + c)]));
  w.m = {pairs.data(), nullptr, rows, cols, kPairs};
  std::vector<float> x(size_t(t * cols));
  for (auto& v : x) v = float(normal());
  const auto out = product(w, x, t);
  for (auto& v : x) v = in_bf16(v);
  for (auto& v : w.dense) v = in_bf16(float(v));
  expect_product(out, w.dense, x, rows, cols, t, "product of pairs");
}

// Integer weights times inputs that are whole steps: exact up to the last multiplications.
void check_integers(int64_t format, int64_t rows, int64_t cols, int64_t t) {
  const int64_t quads = (cols + 3) / 4, bytes = (cols + 1) / 2, panels = (rows + kPanel - 1) / kPanel;
  const bool small = format == kInt4;
  std::vector<int8_t> data(size_t(format == kQuads ? panels * quads * kPanel * 4 : small ? rows * bytes : rows * cols));
  std::vector<float> scale(size_t(panels * kPanel)), x(size_t(t * cols));
  Weight w;
  for (int64_t r = 0; r < rows; ++r) {
    scale[size_t(r)] = float(0.001 + 0.01 * uniform());
    for (int64_t c = 0; c < cols; ++c) {
      const int code = small ? int(uniform() * 16) - 8 : int(uniform() * 256) - 128;
      if (format == kQuads) data[size_t((r / kPanel * quads * kPanel + c / 4 * kPanel + r % kPanel) * 4 + c % 4)] = int8_t(code);
      else if (small) data[size_t(r * bytes + c / 2)] = int8_t(data[size_t(r * bytes + c / 2)] | (code & 15) << (c % 2 * 4));
      else data[size_t(r * cols + c)] = int8_t(code);
      w.dense.push_back(code);
    }
  }
  w.m = {data.data(), reinterpret_cast<const uint8_t*>(scale.data()), rows, cols, format};
  for (int64_t c = 0; c < t; ++c) {
    const float step = std::ldexp(1.0f, int(uniform() * 40) - 20);
    for (int64_t k = 0; k < cols; ++k) x[size_t(c * cols + k)] = step * float(k ? int(uniform() * 255) - 127 : 127);
  }
  const auto out = product(w, x, t);
  for (int64_t c = 0; c < t; ++c)
    for (int64_t r = 0; r < rows; ++r) {
      double sum = 0;
      for (int64_t k = 0; k < cols; ++k) sum += w.dense[size_t(r * cols + k)] * x[size_t(c * cols + k)];
      sum *= scale[size_t(r)];
      expect(std::fabs(out[size_t(c * rows + r)] - sum) <= 2e-7 * std::fabs(sum), "integer product", out[size_t(c * rows + r)], sum);
    }
  for (const float special : {INFINITY, NAN, 0.0f}) {
    for (int64_t k = 0; k < cols; ++k) x[size_t(k)] = special;
    const auto got = product(w, x, t);
    for (int64_t r = 0; r < rows; ++r)
      expect(special == 0 ? got[size_t(r)] == 0 : std::isnan(got[size_t(r)]), "integers times a special", got[size_t(r)], special);
    for (int64_t i = rows; i < t * rows; ++i) expect(got[size_t(i)] == out[size_t(i)], "the rows beside it", got[size_t(i)], out[size_t(i)]);
  }
}

void check_specials(int64_t format) {
  Weight w = random_weight(format, 5, 160, 120, 130);
  std::vector<float> x(160, 1.0f);
  const float specials[] = {INFINITY, -INFINITY, NAN};
  for (const float special : specials) {
    x[33] = special;
    const auto out = product(w, x, 1);
    for (int r = 0; r < 5; ++r) {
      double sum = 0;
      for (int k = 0; k < 160; ++k) sum += w.dense[size_t(r * 160 + k)] * x[size_t(k)];
      const bool same = std::isnan(sum) ? std::isnan(out[size_t(r)]) : out[size_t(r)] == sum;
      expect(same, "product of a special", out[size_t(r)], sum);
    }
  }
  x[33] = 0.0f;
  std::vector<float> none(160, 0.0f);
  for (const float v : product(w, none, 1)) expect(v == 0, "product of zeros", v, 0);
  if (format == kFP8) {
    w.data[2 * 160 + 7] = 0xff;
    const auto out = product(w, x, 1);
    for (int r = 0; r < 5; ++r) expect(std::isnan(out[size_t(r)]) == (r == 2), "a weight that is NaN", out[size_t(r)], r);
  }
}

// A query's heads over scattered rows, with a sink.
void check_attention(int heads, int64_t dim, int64_t rope, int64_t n) {
  auto draw = [](size_t count) {
    std::vector<float> v(count);
    for (auto& e : v) e = float(normal());
    return v;
  };
  const auto q = draw(size_t(heads * dim)), rows = draw(size_t(n * dim)), sink = draw(size_t(heads));
  std::vector<float> cos, sin;
  for (int64_t i = 0; i < rope / 2; ++i) cos.push_back(float(std::cos(0.7 * double(i)))), sin.push_back(float(std::sin(0.7 * double(i))));
  std::vector<float> turn(size_t(2 * rope));  // as rotate wants it
  for (int64_t i = 0; i < rope; ++i) {
    turn[size_t(i)] = cos[size_t(i / 2)];
    turn[size_t(rope + i)] = i % 2 ? sin[size_t(i / 2)] : -sin[size_t(i / 2)];
  }
  std::vector<const float*> pointers;
  for (int64_t j = 0; j < n; ++j) pointers.push_back(&rows[size_t((j * 7 % n) * dim)]);
  std::vector<float> qt(size_t((dim + kLanes) * kLanes)), scores(size_t((n + 2) * kLanes)), out(size_t(heads * dim)), rough(out);
  attend_query(q.data(), heads, dim, 1e-6f, turn.data(), rope, sink.data(), RowsRead<float>{pointers.data(), pointers.data(), n},
               qt.data(), scores.data(), out.data());
  // In pairs of BF16, with one row too many, which is hidden.
  const int64_t even = (n + 1) / 2 * 2, pairs = row_pairs(dim);
  std::vector<int32_t> rounded(size_t(even * pairs)), joined(size_t(even * pairs));
  std::vector<const int32_t*> at, columns;
  for (int64_t j = 0; j < even; ++j) {
    at.push_back(&rounded[size_t(j * pairs)]);
    round_row(pointers[size_t(j < n ? j : 0)], dim, &rounded[size_t(j * pairs)]);
  }
  for (int64_t j = 0; j < even; j += 2) {
    columns.push_back(&joined[size_t(j * pairs)]);
    join_rows(at[size_t(j)], at[size_t(j + 1)], pairs, &joined[size_t(j * pairs)]);
  }
  attend_query(q.data(), heads, dim, 1e-6f, turn.data(), rope, sink.data(),
               RowsRead<int32_t>{at.data(), columns.data(), even, int(even - n), {n}}, qt.data(), scores.data(), rough.data());
  // In INT8, with up to three rows too many.
  const int64_t fours = (n + 3) / 4 * 4, size = byte_row(dim), columns_of_bytes = byte_columns(dim);
  std::vector<char> bytes(size_t(fours * size));
  std::vector<uint32_t> four(size_t(fours / 4 * columns_of_bytes));
  std::vector<const uint32_t*> byte_at, byte_columns_at;
  RowsRead<uint32_t> read{nullptr, nullptr, fours};
  for (int64_t j = 0; j < fours; ++j) {
    round_to_row(pointers[size_t(j < n ? j : 0)], dim, &bytes[size_t(j * size)]);
    byte_at.push_back(bytes_of(&bytes[size_t(j * size)]));
    if (j >= n) read.hides[read.hidden++] = j;
  }
  for (int64_t j = 0; j < fours; j += 4) {
    byte_columns_at.push_back(&four[size_t(j / 4 * columns_of_bytes)]);
    join_four(&byte_at[size_t(j)], columns_of_bytes, &four[size_t(j / 4 * columns_of_bytes)]);
  }
  read.rows = byte_at.data(), read.columns = byte_columns_at.data();
  std::vector<float> byte_scores(size_t((fours + 2) * kLanes)), coarse(out);
  attend_query(q.data(), heads, dim, 1e-6f, turn.data(), rope, sink.data(), read, qt.data(), byte_scores.data(), coarse.data());
  for (int h = 0; h < heads; ++h) {
    std::vector<double> query(static_cast<size_t>(dim));
    double square = 0;
    for (int64_t k = 0; k < dim; ++k) square += double(q[size_t(h * dim + k)]) * q[size_t(h * dim + k)];
    for (int64_t k = 0; k < dim; ++k) query[size_t(k)] = q[size_t(h * dim + k)] / std::sqrt(square / double(dim) + 1e-6);
    auto turn = [&](std::vector<double>& v, double sign) {
      for (int64_t i = 0; i < rope / 2; ++i) {
        double &a = v[size_t(dim - rope + 2 * i)], &b = v[size_t(dim - rope + 2 * i + 1)];
        const double s = sign * sin[size_t(i)], first = a * cos[size_t(i)] - b * s;
        b = a * s + b * cos[size_t(i)], a = first;
      }
    };
    turn(query, 1);
    std::vector<double> weighed(static_cast<size_t>(dim));
    double total = std::exp(double(sink[size_t(h)]));
    for (int64_t j = 0; j < n; ++j) {
      double score = 0;
      for (int64_t k = 0; k < dim; ++k) score += query[size_t(k)] * pointers[size_t(j)][k];
      const double p = std::exp(score / std::sqrt(double(dim)));
      total += p;
      for (int64_t k = 0; k < dim; ++k) weighed[size_t(k)] += p * pointers[size_t(j)][k];
    }
    for (auto& v : weighed) v /= total;
    turn(weighed, -1);
    for (int64_t k = 0; k < dim; ++k)
      expect(std::fabs(out[size_t(h * dim + k)] - weighed[size_t(k)]) < 1e-5, "attention", out[size_t(h * dim + k)], weighed[size_t(k)]);
    for (int64_t k = 0; k < dim; ++k)
      expect(std::fabs(rough[size_t(h * dim + k)] - weighed[size_t(k)]) < 2e-2, "in BF16", rough[size_t(h * dim + k)], weighed[size_t(k)]);
    for (int64_t k = 0; k < dim; ++k)
      expect(std::fabs(coarse[size_t(h * dim + k)] - weighed[size_t(k)]) < 4e-2, "in INT8", coarse[size_t(h * dim + k)], weighed[size_t(k)]);
  }
}

// Bytes times bytes at their extremes, exactly; and the indexer over a tile of rows of them.
void check_bytes(int64_t heads, int64_t dim) {
  uint32_t x[kLanes], w[kLanes];
  int32_t sums[kLanes];
  for (int i = 0; i < kLanes; ++i) {
    int8_t a[4], b[4];
    sums[i] = i - 3;
    for (int k = 0; k < 4; ++k) {
      a[k] = int8_t(i == 0 ? -128 : i == 1 ? 127 : int(generator() % 256) - 128);
      b[k] = int8_t(i < 2 ? -127 : int(generator() % 255) - 127);
      sums[i] += a[k] * (b[k] + int(kAdded));
    }
    std::memcpy(&x[i], a, 4), std::memcpy(&w[i], b, 4);
  }
  const VecQ ws = weights_of(load(w));
  VecI from{};
  for (int i = 0; i < kLanes; ++i) from[i] = i - 3;
  const VecI got = dot_bytes(from, load(x), ws);
  for (int i = 0; i < kLanes; ++i) expect(got[i] == sums[i], "bytes", got[i], sums[i]);

  const int64_t size = byte_row(dim), count = (dim + 3) / 4;
  std::vector<float> q(size_t(heads * dim)), keys(size_t(kTile * dim)), weights(static_cast<size_t>(heads)), factor(weights);
  for (auto& v : q) v = float(normal());
  for (auto& v : keys) v = float(normal());
  for (auto& v : weights) v = float(normal());
  std::vector<char> queries(size_t(heads * size)), rows(size_t(kTile * size));
  std::vector<const float*> pointers;
  float step[kTile], out[kTile];
  std::vector<float> tile(size_t((count + kLanes) * kTile));
  for (int64_t h = 0; h < heads; ++h) {
    round_to_row(&q[size_t(h * dim)], dim, &queries[size_t(h * size)]);
    factor[size_t(h)] = weights[size_t(h)] * head_of(bytes_of(&queries[size_t(h * size)])).step;
  }
  for (int r = 0; r < kTile; ++r) {
    round_to_row(&keys[size_t(r * dim)], dim, &rows[size_t(r * size)]);
    pointers.push_back(reinterpret_cast<const float*>(bytes_of(&rows[size_t(r * size)])));
    step[r] = head_of(bytes_of(&rows[size_t(r * size)])).step;
  }
  key_tile(pointers.data(), kTile, count, tile.data());
  auto* four = reinterpret_cast<uint32_t*>(tile.data());
  for (int64_t k = 0; k < count * kTile; k += kLanes) store(four + k, weights_of(load(four + k)));
  integer_tile_scores(bytes_of(queries.data()), size / 4, factor.data(), heads, count, four, step, out);
  for (int r = 0; r < kTile; ++r) {
    double score = 0, most = 0;
    for (int64_t h = 0; h < heads; ++h) {
      int64_t sum = 0;
      for (int64_t k = 0; k < dim; ++k)
        sum += int64_t(reinterpret_cast<const int8_t*>(bytes_of(&queries[size_t(h * size)]))[k]) *
               reinterpret_cast<const int8_t*>(bytes_of(&rows[size_t(r * size)]))[k];
      score += double(factor[size_t(h)]) * double(sum > 0 ? sum : 0) * step[r];
      most += std::fabs(double(factor[size_t(h)]) * double(sum) * step[r]);
    }
    expect(std::fabs(out[r] - score) <= 1e-5 * most, "index scores of bytes", out[r], score);
  }
}

// Weights of 1 MiB (what the arithmetic can do) and of 64 MiB (what memory lets it do).
void bench() {
  const char* names[] = {"F32", "BF16", "FP8", "FP4"};
  for (int64_t format : {kBF16, kFP8, kFP4})
    for (int64_t t : {1, 2, 3, 4, 8}) {
      std::printf("%-4s x%d:", names[format], int(t));
      for (const int64_t bytes : {1 << 20, 1 << 26}) {
        const int64_t cols = 4096, rows = bytes / (format == kBF16 ? 2 * cols : format == kFP8 ? cols : cols / 2);
        const int repeats = bytes < (1 << 24) ? 32 : 1;
        Weight w;
        w.data.resize(size_t(bytes));
        for (auto& b : w.data) b = uint8_t((generator() & 0x77) | 0x10);  // as in real weights, few are subnormal
        w.scale.assign(size_t(rows * cols / 32), 127);
        w.m = {w.data.data(), w.scale.data(), rows, cols, format};
        std::vector<float> x(size_t(t * cols));
        for (auto& v : x) v = float(normal());
        double best = 1e9;
        for (int run = 0; run < 5; ++run) {
          const auto begin = std::chrono::steady_clock::now();
          product(w, x, t, repeats);
          best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count() / repeats);
        }
        std::printf("  %.1f GB/s, %.1f G products/s;", double(bytes) / best / 1e9, double(rows * cols * t) / best / 1e9);
      }
      std::printf("\n");
    }
}

}  // namespace

int main(int count, char** arguments) {
  if (count > 1 && std::strcmp(arguments[1], "bench") == 0) {
    bench();
    return 0;
  }
  for (int64_t format : {kF32, kBF16, kFP8, kFP4}) {
    for (int64_t t : {1, 2, 3, 4, 5, 7, 8, 9, 13, 50, 70}) {
      const bool any = format != kFP4;  // FP4's columns come in groups of 32
      check_product(format, 1 + t * 3, any ? 130 + t : 32 * t, t, 1, 118, 130);
      check_product(format, 37, 256, t, 1, 127, 127);
      check_product(format, 6, any ? 77 : 96, t, 1e-38, 120, 130);
      check_product(format, 6, any ? 77 : 96, t, 1e30, 120, 130);
    }
    if (format == kFP8 || format == kFP4) check_product(format, 7, 192, 2, 1e10, 1, 20);  // scales near the ends
    check_product(format, 3, 2048, 1, 1, 100, 150);
    check_specials(format);
    for (int64_t t : {1, 5, 6, 13, 40, 70})
      if (format != kF32) check_product(format, 1 + t % 37, format == kFP4 ? 32 * (1 + t % 37) : 200 + 31 * t, t, 1, 110, 130, true);
  }
  for (int64_t t : {1, 2, 3, 5, 8, 13, 140}) check_pairs(1 + t * 3 % 97, 30 + t, t);
  for (int64_t format : {kInt8, kInt4, kQuads})
    for (int64_t t : {1, 2, 5, 6, 7, 13, 130}) check_integers(format, 1 + t * 3 % 97, 100 + 2 * t + (format != kInt4), t);
  for (int heads : {1, 3, 4, 5, kLanes})
    if (heads <= kLanes) check_attention(heads, 20 + 4 * heads, 8, 5 + 11 * heads);
  check_attention(kLanes, 512, 64, 130);
  for (int64_t heads : {1, 4, 7}) check_bytes(heads, 13 * heads), check_bytes(heads, 128);
  std::printf("%d checks, %d failed (vectors of %d bytes, %s%s)\n", checks, failures, VECTOR_BYTES,
              UPWELL_BYTE_DOTS ? "FP4 by bytes" : "FP4 by floats", UPWELL_BF16_DOTS ? ", dot products of BF16" : "");
  return failures != 0;
}
