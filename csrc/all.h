#include "simd.h"
#include "gemm.h"
#include "attention.h"
#include "mixing.h"
#include "forward.h"
#ifndef UPWELL_INFERENCE_ONLY
#include "training_rows.h"
#include "training_attention.h"
#include "training_streams.h"
#endif
