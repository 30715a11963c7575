#define KERNELS_SIMD_ONLY 2
#include "kernels/decode_attention/cpu/tile_levels.inc"
