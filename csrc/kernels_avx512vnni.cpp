#include "kernels.h"
#if defined(__x86_64__)
#pragma GCC target("avx512vnni,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi2")
#define UPWELL_INFERENCE_ONLY  // its training is that of the set it extends
#define VECTOR_BYTES 64
namespace upwell::avx512vnni {
#include "all.h"
}
#endif
