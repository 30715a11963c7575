#include <cstdint>

#include "kernels/common/cuda_util.h"
#include "kernels/decode_attention/cuda/attend_rows.h"
#include "kernels/decode_attention/cuda/decode.h"

namespace kernels {
namespace decode_attention {

cudaError_t LaunchAttendSingle(cudaStream_t stream, DeviceDecode decode) {
  const cache::CacheShape& shape = decode.args.shape;
  const int64_t dim = shape.k_dim > shape.v_dim ? shape.k_dim : shape.v_dim;
  return dim <= Single<8>::kMostDim
             ? LaunchAttendWith<Single<8>, 1>(stream, decode)
             : LaunchAttendWith<Single<16>, 1>(stream, decode);
}

}  // namespace decode_attention
}  // namespace kernels
