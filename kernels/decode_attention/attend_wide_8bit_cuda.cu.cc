#include "kernels/common/cuda_util.h"
#include "kernels/decode_attention/attend_rows_cuda.h"
#include "kernels/decode_attention/decode_attention_cuda.h"

namespace kernels {
namespace decode_attention {

template cudaError_t LaunchAttendWide<1>(cudaStream_t stream,
                                         DeviceDecode decode);

}  // namespace decode_attention
}  // namespace kernels
