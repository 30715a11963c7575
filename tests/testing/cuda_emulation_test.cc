// What the emulation promises: it runs barriers and exchanges as a GPU would,
// and a kernel that gets them wrong fails.

#include "tests/testing/cuda_emulation.h"

#include <cstdio>
#include <cstdlib>
#include <string>

#include "kernels/common/cuda_util.h"

namespace kernels {
namespace {

using cuda::Launch;

void Check(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "must hold: %s\n", what);
  std::exit(1);
}

bool FailsWith(cudaError_t error, const std::string& why) {
  return error != cudaSuccess &&
         emulation::failure.find(why) != std::string::npos;
}

// Adds x[0, n) to *sum, through shared memory.
__global__ void SumKernel(const float* x, float* sum, int n, bool barrier) {
  KERNELS_DYNAMIC_SHARED(shared);
  auto* warps = reinterpret_cast<float*>(shared);
  float value = 0;
  for (int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x); i < n;
       i += static_cast<int>(gridDim.x * blockDim.x)) {
    value += __ldg(x + i);
  }
  value = cuda::WarpSum(value);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
  if (barrier) __syncthreads();
  if (threadIdx.x == 0) {
    float total = 0;
    for (unsigned w = 0; w < blockDim.x / 32; ++w) total += warps[w];
    atomicAdd(sum, total);
  }
}

__global__ void HalfAtTheBarrierKernel() {
  if (threadIdx.x % 2 == 0) {
    __syncthreads();
  } else {
    __syncwarp();
  }
}

__global__ void LaneReturnsKernel() {
  if (threadIdx.x == 7) return;
  __shfl_sync(0xffffffffu, 1, 0);
}

__global__ void LoadKernel(const char* from) {
  cuda::LoadVector<F32, 4>(reinterpret_cast<const float*>(from));
}

__global__ void LanesKernel(int* out) {
  const int lane = static_cast<int>(threadIdx.x);
  out[lane] = __shfl_down_sync(0xffffu << (lane / 16 * 16), lane, 1, 8) +
              100 * static_cast<int>(__ballot_sync(0xffffffffu, lane < 3));
}

void TestSum() {
  float x[1000], sum = 0;
  for (int i = 0; i < 1000; ++i) x[i] = static_cast<float>(i);
  Check(Launch(SumKernel, 3, 128, 16, nullptr, x, &sum, 1000, true) ==
            cudaSuccess,
        "the launch succeeds");
  Check(sum == 499500.0f, "blocks, warps and barriers add up");
  sum = 0;
  Launch(SumKernel, 2, 128, 16, nullptr, x, &sum, 1000, false);
  Check(!(sum == 499500.0f), "a missing barrier shows in the result");
}

void TestLanes() {
  int out[32];
  Launch(LanesKernel, 1, 32, 0, nullptr, &out[0]);
  Check(out[0] == 701 && out[7] == 707 && out[31] == 731,
        "exchanges keep to their masks and widths");
}

void TestFailures() {
  Check(FailsWith(Launch(HalfAtTheBarrierKernel, 1, 64, 0, nullptr),
                  "wait for one another"),
        "threads in different places are an error");
  Check(FailsWith(Launch(LaneReturnsKernel, 1, 32, 0, nullptr),
                  "a lane that has returned"),
        "an exchange with a lane that has returned is an error");
  alignas(16) char bytes[32] = {};
  Check(
      FailsWith(Launch(LoadKernel, 1, 1, 0, nullptr, bytes + 4), "not aligned"),
      "a misaligned vector is an error");
  Check(FailsWith(Launch(LaneReturnsKernel, 0, 32, 0, nullptr), "empty"),
        "an empty grid is an error");
}

}  // namespace
}  // namespace kernels

int main() {
  kernels::TestSum();
  kernels::TestLanes();
  kernels::TestFailures();
  std::puts("ok");
}
