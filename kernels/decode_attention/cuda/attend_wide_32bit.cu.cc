#include "kernels/common/cuda_util.h"
#include "kernels/decode_attention/cuda/attend_rows.h"
#include "kernels/decode_attention/cuda/decode.h"

namespace kernels {
namespace decode_attention {

template cudaError_t LaunchAttendWide<4>(cudaStream_t stream,
                                         DeviceDecode decode);

}  // namespace decode_attention
}  // namespace kernels
