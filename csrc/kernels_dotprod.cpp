// ARMv8.2's dot products of bytes: Kunpeng 920, Neoverse, Apple.
#include "kernels.h"
#if defined(__aarch64__)
#pragma GCC target("arch=armv8.2-a+dotprod")
#define UPWELL_INFERENCE_ONLY  // its training is that of the set it extends
#define UPWELL_BYTE_DOTS 1  // __ARM_FEATURE_DOTPROD isn't defined by the pragma: g++ reads a file before it heeds it
#define VECTOR_BYTES 16
namespace upwell::dotprod {
#include "all.h"
}
#endif
