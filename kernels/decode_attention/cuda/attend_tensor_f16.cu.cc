#include "kernels/cache/cc/layout.h"
#include "kernels/common/cuda_util.h"
#include "kernels/decode_attention/cuda/attend_tensor.h"
#include "kernels/decode_attention/cuda/decode.h"

namespace kernels {
namespace decode_attention {

template cudaError_t LaunchAttendTensor<cache::Element::kF16>(
    cudaStream_t stream, DeviceDecode decode);

}  // namespace decode_attention
}  // namespace kernels
