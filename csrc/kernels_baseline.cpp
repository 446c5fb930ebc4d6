// SSE2 on x86-64, NEON on aarch64: what every such machine has.
#include "kernels.h"
#include "training.h"
#define VECTOR_BYTES 16
namespace upwell::baseline {
#include "all.h"
}
