// A weight in any of the checkpoint's formats to INT8 or INT4: what upwell.ops.requantize.requantize defines, to the bit.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace upwell {

enum class WeightFormat : int64_t { f32, bf16, fp8, fp4 };

struct Requantize {
  const uint8_t* weight;  // [rows, cols] of `format`; FP4 two a byte, the low nibble first
  const uint8_t* scale;   // UE8M0: FP8 a 128 x 128 block, FP4 a row and 32 columns; else null
  int64_t rows, cols;
  WeightFormat format;
  int64_t bits;       // 8 or 4
  int64_t group;      // columns a scale of `scales`; cols: one a row
  int64_t bf16_scales;  // they are rounded to BF16
  int64_t on_grid;    // INT8's of FP8 and FP4: powers of two where those have less error (formats/int8.py)
  int64_t pack_rows;  // INT4: byte [j, i] is rows 2j (low) and 2j + 1; else columns 2i (low) and 2i + 1
  int64_t blocks;     // of columns, for `sums`; 0: none
  uint8_t* codes;     // [rows, cols] of INT8; INT4 half of that
  float* scales;      // [rows, cols / group]; a NaN or an infinity among the weights makes one of them the same
  int32_t* sums;      // [rows, blocks]
};

}  // namespace upwell
