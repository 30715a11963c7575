#include "kernels/common/cuda_util.h"
#include "kernels/decode_attention/attend_tensor_cuda.h"
#include "kernels/decode_attention/decode_attention_cuda.h"
#include "kernels/kv_cache/cache_layout.h"

namespace kernels {
namespace decode_attention {

template cudaError_t LaunchAttendTensor<kv_cache::Element::kF16>(
    cudaStream_t stream, DeviceDecode decode);

}  // namespace decode_attention
}  // namespace kernels
