#define KERNELS_SIMD_ONLY 0
#include "kernels/decode_attention/cpu/tile_levels.inc"
