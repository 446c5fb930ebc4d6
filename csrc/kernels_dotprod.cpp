// ARMv8.2's dot products of bytes: Kunpeng 920, Neoverse, Apple.
#include "kernels.h"
#if defined(__aarch64__)
#pragma GCC target("arch=armv8.2-a+dotprod")
#define UPWELL_INFERENCE_ONLY  // its training is that of the set it extends
#define VECTOR_BYTES 16
namespace upwell::dotprod {
#include "all.h"
}
#endif
