// Picks the instruction set that the other kernels use. Single-threaded: a conversion runs several at once.
#include "requantize.h"
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

extern "C" const char* upwell_isa();

#define VECTOR_BYTES 16
namespace upwell::requantize_baseline {
#include "requantize_rows.h"
}
#undef VECTOR_BYTES
#undef INLINE

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi2")
#define VECTOR_BYTES 32
namespace upwell::requantize_avx2 {
#include "requantize_rows.h"
}
#undef VECTOR_BYTES
#undef INLINE
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi2")
#define VECTOR_BYTES 64
namespace upwell::requantize_avx512 {
#include "requantize_rows.h"
}
#undef VECTOR_BYTES
#undef INLINE
#pragma GCC pop_options
#endif

extern "C" void upwell_requantize_weight(const upwell::Requantize* call) {
#if defined(__x86_64__)
  if (std::strncmp(upwell_isa(), "avx512", 6) == 0) return upwell::requantize_avx512::requantize(*call);
  if (std::strcmp(upwell_isa(), "avx2") == 0) return upwell::requantize_avx2::requantize(*call);
#endif
  upwell::requantize_baseline::requantize(*call);
}
