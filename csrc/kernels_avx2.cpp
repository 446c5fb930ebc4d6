#include "kernels.h"
#include "training.h"
#if defined(__x86_64__)
// After the standard headers: their inline functions must stay runnable everywhere.
#pragma GCC target("avx2,fma,f16c,bmi2")
#define VECTOR_BYTES 32
namespace upwell::avx2 {
#include "all.h"
}
#endif
