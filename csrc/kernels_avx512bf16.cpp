// AVX-512 with dot products of BF16: Zen 4, Sapphire Rapids. (Cooper Lake has them without the byte tables of VBMI.)
#include "kernels.h"
#if defined(__x86_64__)
#pragma GCC target("avx512bf16,avx512vbmi,avx512vnni,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi2")
#define UPWELL_INFERENCE_ONLY  // its training is that of the set it extends
// g++ reads a file before it heeds the pragma: no __AVX2__ here, so what the set has is said by name.
#define UPWELL_BYTE_DOTS 1
#define UPWELL_VNNI
#define UPWELL_BF16_DOTS 1
#define VECTOR_BYTES 64
namespace upwell::avx512bf16 {
#include "all.h"
}
#endif
