#include "kernels.h"
#include "training.h"
#if defined(__x86_64__)
// After the standard headers: their inline functions must stay runnable everywhere.
#pragma GCC target("avx2,fma,f16c,bmi2")
// g++ reads a file before it heeds the pragma: no __AVX2__ here, so what the set has is said by name.
#define UPWELL_BYTE_DOTS 1
#define VECTOR_BYTES 32
namespace upwell::avx2 {
#include "all.h"
}
#endif
