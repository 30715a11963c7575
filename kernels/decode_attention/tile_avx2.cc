#define KERNELS_SIMD_ONLY 1
#include "kernels/decode_attention/tile_levels.inc"
