#define KERNELS_SIMD_ONLY 1
#include "kernels/decode_attention/cpu/tile_levels.inc"
