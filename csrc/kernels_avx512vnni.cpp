#include "kernels.h"
#if defined(__x86_64__)
#pragma GCC target("avx512vnni,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi2")
#define UPWELL_INFERENCE_ONLY  // its training is that of the set it extends
// g++ reads a file before it heeds the pragma: no __AVX2__ here, so what the set has is said by name.
#define UPWELL_BYTE_DOTS 1
#define UPWELL_VNNI
#define VECTOR_BYTES 64
namespace upwell::avx512vnni {
#include "all.h"
}
#endif
