// ARM's dot products of BF16, with those of bytes: Kunpeng 920's 72xxZ models, Neoverse V1 and N2.
#include "kernels.h"
#if defined(__aarch64__)
#pragma GCC target("arch=armv8.2-a+dotprod+bf16")
#define UPWELL_INFERENCE_ONLY  // its training is that of the set it extends
#define UPWELL_BYTE_DOTS 1
#define UPWELL_BF16_DOTS 1
#define VECTOR_BYTES 16
namespace upwell::bf16 {
#include "all.h"
}
#endif
