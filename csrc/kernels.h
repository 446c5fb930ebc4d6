// The functions that every instruction set provides.
#pragma once
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif
#include <climits>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "layout.h"
#include "team.h"

namespace upwell {

struct Kernels {
  Body forward, head, product, experts;
  int64_t (*workspace_bytes)(const Model&, const Layer*, int64_t layers, const Sequence*, int64_t sequences,
                             int64_t tokens, int threads);
  int64_t (*head_workspace_bytes)(const Model&, int64_t tokens, int threads);
  int64_t (*product_workspace_bytes)(int64_t cols, int threads);
  int64_t (*experts_workspace_bytes)(const Model&, int64_t tokens, int threads);
  bool byte_dots;  // FP4 by integer products of bytes (packed_bytes.h)
  bool bf16_dots;  // pairs of BF16 multiplied by the CPU (simd.h)
  bool integer_dots;  // INT8 weights times INT8 inputs, too (integers.h)
};

namespace baseline { extern const Kernels kernels; }
#if defined(__x86_64__)
namespace avx2 { extern const Kernels kernels; }
namespace avx512 { extern const Kernels kernels; }
namespace avx512vnni { extern const Kernels kernels; }
namespace avx512bf16 { extern const Kernels kernels; }
#elif defined(__aarch64__)
namespace dotprod { extern const Kernels kernels; }
namespace bf16 { extern const Kernels kernels; }
#endif

}  // namespace upwell
