// Runs a CUDA kernel's source under the host's compiler, to test its logic:
// indices, masks, barriers, exchanges between lanes, out-of-range accesses
// under a sanitizer. Include it before the kernel's `.cu.cc` in a test:
//
//     #include "tests/testing/cuda_emulation.h"
//     #include "kernels/my_op/my_op_cuda.cu.cc"
//
// Blocks run one after the other. The threads of a block are fibers of one
// thread, which run until a barrier or an exchange; every other block runs them
// from the last to the first, so a barrier that is missing shows one way or the
// other. What cannot go on is an error of the launch: threads that wait for one
// another, an exchange with a lane that has returned.
//
// This is no GPU: it knows nothing of memory order between blocks, of caches,
// of limits on registers and shared memory, nor of time. Numbers that want a
// device are not settled by it.

#ifndef TESTS_TESTING_CUDA_EMULATION_H_
#define TESTS_TESTING_CUDA_EMULATION_H_

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "tests/testing/small_float.h"

#define KERNELS_CUDA_EMULATION

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
// Blocks run one at a time, so one copy is enough.
#define __shared__ static
#define KERNELS_DYNAMIC_SHARED(name) \
  unsigned char* const name = ::kernels::emulation::dynamic_shared

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1)  // NOLINT: as in CUDA
      : x(x), y(y), z(z) {}
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) {
  return {x, y, z, w};
}
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) {
  return {x, y, z, w};
}

// ---- The runtime, as far as launches need it.

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorUnsupportedPtxVersion = 222,
  cudaErrorLaunchFailure = 719
};
using cudaStream_t = struct CUstream_st*;
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrMaxSharedMemoryPerBlockOptin
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaMemcpyKind { cudaMemcpyDeviceToDevice };

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes,
                                   cudaMemcpyKind, cudaStream_t) {
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes,
                                   cudaStream_t) {
  std::memset(to, value, bytes);
  return cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, cudaFuncAttribute, int) {
  return cudaSuccess;
}

template <typename Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel*,
                                                          int, size_t) {
  *blocks = 2;
  return cudaSuccess;
}

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;
inline constexpr int warpSize = 32;

namespace kernels::emulation {

// What the emulated device says of itself; tests may change it.
inline int multiprocessors = 3;
inline int compute_capability_major = 9;
inline int shared_memory = 99 << 10;

inline unsigned char* dynamic_shared = nullptr;
// Why the last launch that failed did.
inline std::string failure;

constexpr int kLanes = 32;
constexpr size_t kStackBytes = size_t{256} << 10;
constexpr size_t kMessageBytes = 32;

enum class State { kReady, kAtBarrier, kAtExchange, kDone };

// A copy that has been started: it is made when it is waited for, and so shows
// whether that is forgotten.
struct Copy {
  void* to;
  const void* from;  // null: zeros
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<unsigned char[]> stack;
  uint3 index;
  State state;
  unsigned mask;  // of the exchange that it waits for
  unsigned char message[kMessageBytes];
  unsigned char inbox[kLanes][kMessageBytes];
  std::vector<Copy> started;
  std::deque<std::vector<Copy>> groups;
};

inline std::vector<std::unique_ptr<Fiber>> fibers;
inline int threads = 0;  // of the block; there may be more fibers
inline int current = 0;
inline ucontext_t scheduler;
inline const std::function<void()>* body = nullptr;

inline void Suspend() { swapcontext(&fibers[current]->context, &scheduler); }

// Gives up the launch; never comes back.
[[noreturn]] inline void Fail(const std::string& why) {
  if (failure.empty()) failure = why;
  while (true) Suspend();
}

inline void FiberMain() {
  (*body)();
  fibers[current]->state = State::kDone;
  while (true) Suspend();
}

inline void Barrier() {
  fibers[current]->state = State::kAtBarrier;
  Suspend();
}

// Sends `bytes` to the lanes of `mask`; afterwards the inbox holds theirs.
inline const unsigned char (*Exchange(unsigned mask, const void* value,
                                      size_t bytes)) [kMessageBytes] {
  Fiber& self = *fibers[current];
  const int first = current / kLanes * kLanes;
  if (!(mask >> (current - first) & 1)) {
    Fail("a lane takes part in an exchange whose mask leaves it out");
  }
  std::memcpy(self.message, value, bytes);
  self.mask = mask;
  self.state = State::kAtExchange;
  bool complete = true;
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!(mask >> lane & 1)) continue;
    if (first + lane >= threads ||
        fibers[first + lane]->state == State::kDone) {
      Fail("an exchange waits for a lane that has returned");
    }
    const Fiber& other = *fibers[first + lane];
    complete =
        complete && other.state == State::kAtExchange && other.mask == mask;
  }
  if (!complete) {
    Suspend();
    return self.inbox;
  }
  for (int to = 0; to < kLanes; ++to) {
    if (!(mask >> to & 1)) continue;
    Fiber& receiver = *fibers[first + to];
    for (int from = 0; from < kLanes; ++from) {
      if (mask >> from & 1) {
        std::memcpy(receiver.inbox[from], fibers[first + from]->message, bytes);
      }
    }
    receiver.state = State::kReady;
  }
  return self.inbox;
}

// Every lane's `value`, for instructions that work on a whole warp.
template <typename T>
void WarpGather(const T& value, T (&all)[kLanes]) {
  static_assert(sizeof(T) <= kMessageBytes);
  const auto* inbox = Exchange(0xffffffffu, &value, sizeof(T));
  for (int lane = 0; lane < kLanes; ++lane) {
    std::memcpy(&all[lane], inbox[lane], sizeof(T));
  }
}

template <typename T>
T Shuffle(unsigned mask, T value, int from) {
  static_assert(sizeof(T) <= kMessageBytes);
  const auto* inbox = Exchange(mask, &value, sizeof(T));
  if (mask >> from & 1) std::memcpy(&value, inbox[from], sizeof(T));
  return value;
}

inline int Lane() { return current % kLanes; }

inline void CopyAsync(void* to, const void* from) {
  constexpr uintptr_t kBytes = 16;
  if (reinterpret_cast<uintptr_t>(to) % kBytes != 0 ||
      reinterpret_cast<uintptr_t>(from) % kBytes != 0) {
    Fail("a copy is not aligned to its size");
  }
  fibers[current]->started.push_back({to, from});
}

inline void CommitCopies() {
  Fiber& self = *fibers[current];
  self.groups.push_back(std::move(self.started));
  self.started.clear();
}

inline void WaitForCopies(size_t pending) {
  std::deque<std::vector<Copy>>& groups = fibers[current]->groups;
  while (groups.size() > pending) {
    for (const Copy& copy : groups.front()) {
      if (copy.from == nullptr) {
        std::memset(copy.to, 0, 16);
      } else {
        std::memcpy(copy.to, copy.from, 16);
      }
    }
    groups.pop_front();
  }
}

// Sets a fiber to the beginning of thread `flat`. Apart, because getcontext
// returns twice as far as compilers know.
inline void Start(Fiber* fiber, unsigned flat) {
  fiber->state = State::kReady;
  fiber->started.clear();
  fiber->groups.clear();
  fiber->index = {flat % blockDim.x, flat / blockDim.x % blockDim.y,
                  flat / blockDim.x / blockDim.y};
  getcontext(&fiber->context);
  fiber->context.uc_stack.ss_sp = fiber->stack.get();
  fiber->context.uc_stack.ss_size = kStackBytes;
  fiber->context.uc_link = nullptr;
  makecontext(&fiber->context, FiberMain, 0);
}

// Runs the threads of one block to their end.
inline void RunBlock(bool backward) {
  void (*volatile start)(Fiber*, unsigned) = Start;  // not to be inlined
  for (int i = 0; i < threads; ++i) {
    start(fibers[i].get(), static_cast<unsigned>(i));
  }
  while (failure.empty()) {
    bool ran = false;
    int waiting = 0, done = 0;
    for (int i = 0; i < threads && failure.empty(); ++i) {
      current = backward ? threads - 1 - i : i;
      Fiber& fiber = *fibers[current];
      if (fiber.state == State::kReady) {
        threadIdx = fiber.index;
        swapcontext(&scheduler, &fiber.context);
        ran = true;
      }
    }
    for (int i = 0; i < threads; ++i) {
      waiting += fibers[i]->state == State::kAtBarrier;
      done += fibers[i]->state == State::kDone;
    }
    if (done == threads) return;
    if (ran) continue;
    if (waiting + done < threads) {
      failure = "threads of a block wait for one another in different places";
      return;
    }
    for (int i = 0; i < threads; ++i) {
      if (fibers[i]->state == State::kAtBarrier) {
        fibers[i]->state = State::kReady;
      }
    }
  }
}

inline std::mutex mutex;  // of everything above
inline int launches = 0;

template <typename... Params>
cudaError_t Launch(void (*kernel)(Params...), dim3 grid, dim3 block,
                   int shared_bytes, cudaStream_t, Params... args) {
  std::lock_guard<std::mutex> lock(mutex);
  const std::function<void()> call = [&] { kernel(args...); };
  // On the heap and of this size exactly, for sanitizers to guard.
  const size_t shared_size = static_cast<size_t>(shared_bytes);
  std::vector<uint4> shared((shared_size + 15) / 16);
  body = &call;
  failure.clear();
  gridDim = grid;
  blockDim = block;
  threads = static_cast<int>(block.x * block.y * block.z);
  if (threads < 1 || threads > 1024 || grid.x * grid.y * grid.z == 0 ||
      grid.y > 65535 || grid.z > 65535) {
    failure = "the launch has an empty or too large grid or block";
  }
  while (static_cast<int>(fibers.size()) < threads) {
    fibers.push_back(std::make_unique<Fiber>());
    fibers.back()->stack.reset(new unsigned char[kStackBytes]);
  }
  int blocks = launches++;
  for (unsigned z = 0; z < grid.z && failure.empty(); ++z) {
    for (unsigned y = 0; y < grid.y && failure.empty(); ++y) {
      for (unsigned x = 0; x < grid.x && failure.empty(); ++x) {
        blockIdx = {x, y, z};
        // Shared memory starts as garbage: as NaN, which shows.
        shared.assign(shared.size(), uint4{~0u, ~0u, ~0u, ~0u});
        dynamic_shared = reinterpret_cast<unsigned char*>(shared.data());
        RunBlock(/*backward=*/blocks++ % 2 == 1);
      }
    }
  }
  if (shared_bytes > shared_memory) {
    failure = "the launch wants more shared memory than there is";
  }
  if (failure.empty()) return cudaSuccess;
  std::fprintf(stderr, "CUDA emulation: %s.\n", failure.c_str());
  return cudaErrorLaunchFailure;
}

}  // namespace kernels::emulation

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute,
                                          int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = kernels::emulation::multiprocessors;
      break;
    case cudaDevAttrComputeCapabilityMajor:
      *value = kernels::emulation::compute_capability_major;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = kernels::emulation::shared_memory;
      break;
  }
  return cudaSuccess;
}
inline const char* cudaGetErrorName(cudaError_t) { return "emulation"; }
inline const char* cudaGetErrorString(cudaError_t) {
  return kernels::emulation::failure.c_str();
}

// ---- What device code calls.

inline void __syncthreads() { kernels::emulation::Barrier(); }
inline void __syncwarp(unsigned mask = 0xffffffffu) {
  const char nothing = 0;
  kernels::emulation::Exchange(mask, &nothing, 1);
}
inline void __threadfence() {}

template <typename T>
T __shfl_sync(unsigned mask, T value, int from, int width = 32) {
  const int lane = kernels::emulation::Lane();
  return kernels::emulation::Shuffle(
      mask, value, lane / width * width + (from & (width - 1)));
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32) {
  const int lane = kernels::emulation::Lane();
  const int from = lane ^ lanes;
  return kernels::emulation::Shuffle(
      mask, value, from / width == lane / width ? from : lane);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32) {
  const int lane = kernels::emulation::Lane();
  const int from = lane + static_cast<int>(by);
  return kernels::emulation::Shuffle(
      mask, value, from / width == lane / width ? from : lane);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32) {
  const int lane = kernels::emulation::Lane();
  const int from = lane - static_cast<int>(by);
  return kernels::emulation::Shuffle(
      mask, value, from >= lane / width * width ? from : lane);
}
inline unsigned __ballot_sync(unsigned mask, bool condition) {
  const auto* inbox = kernels::emulation::Exchange(mask, &condition, 1);
  unsigned out = 0;
  for (int lane = 0; lane < 32; ++lane) {
    if (mask >> lane & 1 && inbox[lane][0]) out |= 1u << lane;
  }
  return out;
}
inline int __any_sync(unsigned mask, bool condition) {
  return __ballot_sync(mask, condition) != 0;
}
inline int __all_sync(unsigned mask, bool condition) {
  return __ballot_sync(mask, condition) == mask;
}

template <typename T>
T __ldg(const T* from) {
  if (reinterpret_cast<uintptr_t>(from) % sizeof(T) != 0) {
    kernels::emulation::Fail("a read is not aligned to its size");
  }
  return *from;
}

template <typename T>
T __ldcg(const T* from) {
  return __ldg(from);
}

template <typename T>
T atomicAdd(T* at, T value) {
  const T old = *at;
  *at = old + value;
  return old;
}
template <typename T>
T atomicMax(T* at, T value) {
  const T old = *at;
  *at = old < value ? value : old;
  return old;
}
template <typename T>
T atomicExch(T* at, T value) {
  const T old = *at;
  *at = value;
  return old;
}
template <typename T>
T atomicCAS(T* at, T expected, T value) {
  const T old = *at;
  if (old == expected) *at = value;
  return old;
}

inline unsigned __float_as_uint(float x) {
  unsigned bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}
inline float __uint_as_float(unsigned bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}
inline int __float_as_int(float x) {
  return static_cast<int>(__float_as_uint(x));
}
inline float __int_as_float(int bits) {
  return __uint_as_float(static_cast<unsigned>(bits));
}
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(uint64_t{a} * b >> 32);
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) {
  return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x));
}
inline int __ffs(int x) { return __builtin_ffs(x); }
// Picks four of the eight bytes of `high:low`, one for each nibble.
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
  const uint64_t bytes = uint64_t{high} << 32 | low;
  unsigned out = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned at = selector >> (4 * i) & 7;
    out |= static_cast<unsigned>(bytes >> (8 * at) & 0xff) << (8 * i);
  }
  return out;
}

#endif  // TESTS_TESTING_CUDA_EMULATION_H_
