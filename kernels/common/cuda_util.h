// What CUDA kernels share: launches, vectors of 16 bytes, element types, sums
// over a warp.
//
// A kernel's source, `<op>/cuda/*.cu.cc`, is compiled by nvcc, knows nothing of
// XLA, and offers `Launch...` functions that return cudaError_t. It can also be
// compiled by the host's compiler, behind tests/testing/cuda_emulation.h, which
// runs its logic without a GPU; so it launches with `Launch` below, declares
// dynamic shared memory with KERNELS_DYNAMIC_SHARED, and keeps to what that
// header knows of CUDA.

#ifndef KERNELS_COMMON_CUDA_UTIL_H_
#define KERNELS_COMMON_CUDA_UTIL_H_

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "kernels/common/element_types.h"

#if !defined(KERNELS_CUDA_EMULATION)
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>

// Declares `name`, bytes of dynamic shared memory. Aligned as memory is read:
// asynchronous copies to elsewhere ask for each sector twice.
#define KERNELS_DYNAMIC_SHARED(name) \
  extern __shared__ __align__(128) unsigned char name[]
#endif

// Unrolls the loop that follows, or leaves it as it is; the host's compiler
// would warn of nvcc's form.
#if defined(__CUDACC__)
#define KERNELS_UNROLL _Pragma("unroll")
#define KERNELS_NO_UNROLL _Pragma("unroll 1")
#else
#define KERNELS_UNROLL
#define KERNELS_NO_UNROLL
#endif

namespace kernels::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
// The widest access of one thread.
constexpr int kVectorBytes = 16;

// ---- On the host.

// What a block may have of dynamic shared memory without asking for it, beside
// up to 16 KB that its kernel declares.
constexpr int kSharedWithoutAsking = 32 << 10;

// Returns `error`, and sees to it that the next launch does not return it
// again.
inline cudaError_t Forget(cudaError_t error) {
  if (error != cudaSuccess) cudaGetLastError();
  return error;
}

// Starts `kernel` and returns what starting it gave.
template <typename... Params, typename... Args>
cudaError_t Launch(void (*kernel)(Params...), dim3 grid, dim3 block,
                   int shared_bytes, cudaStream_t stream, const Args&... args) {
#if defined(KERNELS_CUDA_EMULATION)
  return emulation::Launch(kernel, grid, block, shared_bytes, stream,
                           static_cast<Params>(args)...);
#else
  if (shared_bytes > kSharedWithoutAsking) {
    const cudaError_t error = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (error != cudaSuccess) return Forget(error);
  }
  kernel<<<grid, block, static_cast<size_t>(shared_bytes), stream>>>(
      static_cast<Params>(args)...);
  return cudaGetLastError();
#endif
}

// As Launch, for a kernel that may begin while the one before it in the stream,
// which must be LetNextBegin's, is still running, and that calls
// WaitForPrevious. Where a device or the build of a kernel does not know of
// that, it begins when the other has ended. What the other writes must not be
// `const __restrict__` in it, nor read by LoadVector.
template <typename... Params, typename... Args>
cudaError_t LaunchEarly(void (*kernel)(Params...), dim3 grid, dim3 block,
                        int shared_bytes, cudaStream_t stream,
                        const Args&... args) {
#if defined(KERNELS_CUDA_EMULATION)
  return Launch(kernel, grid, block, shared_bytes, stream, args...);
#else
  cudaFuncAttributes built;
  cudaError_t error = cudaFuncGetAttributes(&built, kernel);
  if (error != cudaSuccess) return Forget(error);
  if (built.ptxVersion < 90) {
    return Launch(kernel, grid, block, shared_bytes, stream, args...);
  }
  if (shared_bytes > kSharedWithoutAsking) {
    error = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (error != cudaSuccess) return Forget(error);
  }
  cudaLaunchAttribute early = {};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  config.attrs = &early;
  config.numAttrs = 1;
  return Forget(
      cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...));
#endif
}

// How many blocks of `kernel` the current device runs at a time.
template <typename... Params>
cudaError_t ResidentBlocks(void (*kernel)(Params...), int threads,
                           int shared_bytes, int* blocks) {
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return Forget(error);
  error =
      cudaDeviceGetAttribute(blocks, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return Forget(error);
  if (shared_bytes > kSharedWithoutAsking) {
    error = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (error != cudaSuccess) return Forget(error);
  }
  int of_each = 0;
  error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(
      &of_each, kernel, threads, static_cast<size_t>(shared_bytes));
  if (error != cudaSuccess) return Forget(error);
  *blocks *= of_each;
  return cudaSuccess;
}

// How many multiprocessors the current device has, for grids that stay.
inline cudaError_t MultiprocessorCount(int* count) {
  int device = 0;
  const cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  return cudaDeviceGetAttribute(count, cudaDevAttrMultiProcessorCount, device);
}

template <typename T>
constexpr __host__ __device__ T CeilDiv(T a, T b) {
  return (a + b - 1) / b;
}

// ---- Element types: the tags of element_types.h.

// A number in the type that arithmetic on T is done in.
template <typename T>
__device__ __forceinline__ typename T::Compute ToCompute(
    typename T::Storage value);
// The nearest number of T, ties to even; out of range as jax's `astype` does,
// except int8, which saturates.
template <typename T>
__device__ __forceinline__ typename T::Storage FromCompute(
    typename T::Compute value);

template <>
__device__ __forceinline__ double ToCompute<F64>(double value) {
  return value;
}
template <>
__device__ __forceinline__ double FromCompute<F64>(double value) {
  return value;
}
template <>
__device__ __forceinline__ float ToCompute<F32>(float value) {
  return value;
}
template <>
__device__ __forceinline__ float FromCompute<F32>(float value) {
  return value;
}
template <>
__device__ __forceinline__ float ToCompute<BF16>(uint16_t value) {
  const uint32_t bits = static_cast<uint32_t>(value) << 16;
  float out;
  std::memcpy(&out, &bits, sizeof(out));
  return out;
}
template <>
__device__ __forceinline__ float ToCompute<Int8>(int8_t value) {
  return value;
}
template <>
__device__ __forceinline__ int8_t FromCompute<Int8>(float value) {
  return static_cast<int8_t>(rintf(fminf(fmaxf(value, -128.0f), 127.0f)));
}

#if defined(KERNELS_CUDA_EMULATION)

template <>
inline uint16_t FromCompute<BF16>(float value) {
  return static_cast<uint16_t>(emulation::BFloat16::Encode(value));
}
template <>
inline float ToCompute<F16>(uint16_t value) {
  return emulation::Float16::Decode(value);
}
template <>
inline uint16_t FromCompute<F16>(float value) {
  return static_cast<uint16_t>(emulation::Float16::Encode(value));
}
template <>
inline float ToCompute<E4M3>(uint8_t value) {
  return emulation::Float8E4M3::Decode(value);
}
template <>
inline uint8_t FromCompute<E4M3>(float value) {
  return static_cast<uint8_t>(emulation::Float8E4M3::Encode(value));
}
template <>
inline float ToCompute<E5M2>(uint8_t value) {
  return emulation::Float8E5M2::Decode(value);
}
template <>
inline uint8_t FromCompute<E5M2>(float value) {
  return static_cast<uint8_t>(emulation::Float8E5M2::Encode(value));
}

#else

template <>
__device__ __forceinline__ uint16_t FromCompute<BF16>(float value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  uint16_t out;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out) : "f"(value));
  return out;
#else
  const uint32_t bits = __float_as_uint(value);
  if (value != value) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
#endif
}
template <>
__device__ __forceinline__ float ToCompute<F16>(uint16_t value) {
  return __half2float(__ushort_as_half(value));
}
template <>
__device__ __forceinline__ uint16_t FromCompute<F16>(float value) {
  return __half_as_ushort(__float2half_rn(value));
}

// fp8 numbers are float16 numbers of fewer bits.
template <>
__device__ __forceinline__ float ToCompute<E4M3>(uint8_t value) {
  return __half2float(__half(__nv_cvt_fp8_to_halfraw(value, __NV_E4M3)));
}
template <>
__device__ __forceinline__ float ToCompute<E5M2>(uint8_t value) {
  return ToCompute<F16>(static_cast<uint16_t>(value << 8));
}
template <>
__device__ __forceinline__ uint8_t FromCompute<E4M3>(float value) {
  return __nv_cvt_float_to_fp8(value, __NV_NOSAT, __NV_E4M3);
}
template <>
__device__ __forceinline__ uint8_t FromCompute<E5M2>(float value) {
  return __nv_cvt_float_to_fp8(value, __NV_NOSAT, __NV_E5M2);
}

#endif  // KERNELS_CUDA_EMULATION

// 2^x to within 2 in the last place; 0 where that is no normal number.
__device__ __forceinline__ float Exp2(float x) {
#if defined(KERNELS_CUDA_EMULATION)
  return exp2f(x);
#else
  float out;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
  return out;
#endif
}

// ---- Vectors.

// N elements as they lie in memory, N * sizeof(Storage) a power of two.
template <typename T, int N>
struct alignas(N * sizeof(typename T::Storage) < kVectorBytes
                   ? N * sizeof(typename T::Storage)
                   : kVectorBytes) Vector {
  typename T::Storage data[N];
};

namespace internal {

template <int kBytes>
struct Word;
template <>
struct Word<1> {
  using Type = uint8_t;
};
template <>
struct Word<2> {
  using Type = uint16_t;
};
template <>
struct Word<4> {
  using Type = uint32_t;
};
template <>
struct Word<8> {
  using Type = uint2;
};
template <>
struct Word<16> {
  using Type = uint4;
};

template <int kBytes>
struct Words {
  static constexpr int kEach = kBytes < kVectorBytes ? kBytes : kVectorBytes;
  using Type = typename Word<kEach>::Type;
  static constexpr int kCount = kBytes / kEach;
};

}  // namespace internal

// How many elements of T one access of 16 bytes holds.
template <typename T>
constexpr int kVectorSize =
    kVectorBytes / static_cast<int>(sizeof(typename T::Storage));

namespace internal {

// N elements from `from`, by `read(address)` of each word.
template <typename T, int N, typename Read>
__device__ __forceinline__ Vector<T, N> ReadVector(
    const typename T::Storage* from, const Read& read) {
  using Each = Words<sizeof(Vector<T, N>)>;
  typename Each::Type words[Each::kCount];
  KERNELS_UNROLL
  for (int i = 0; i < Each::kCount; ++i) {
    words[i] = read(reinterpret_cast<const typename Each::Type*>(from) + i);
  }
  Vector<T, N> out;
  std::memcpy(&out, words, sizeof(out));
  return out;
}

}  // namespace internal

// Reads N elements from global memory that the kernel does not write; `from`
// is aligned to them, or to 16 bytes where they are more.
template <typename T, int N>
__device__ __forceinline__ Vector<T, N> LoadVector(
    const typename T::Storage* from) {
  return internal::ReadVector<T, N>(
      from, [](const auto* word) { return __ldg(word); });
}

// Adds 1 to `count` and returns what it was. Who comes after, in any block,
// sees what the threads of this block have written before a barrier before
// this.
__device__ __forceinline__ int Arrive(int* count) {
#if defined(KERNELS_CUDA_EMULATION) || __CUDA_ARCH__ < 700
  return atomicAdd(count, 1);
#else
  int before;
  asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], 1;"
               : "=r"(before)
               : "l"(count)
               : "memory");
  return before;
#endif
}

// Brings what lies at `from` nearer, without waiting for it.
__device__ __forceinline__ void Prefetch(const void* from) {
#if !defined(KERNELS_CUDA_EMULATION)
  asm volatile("prefetch.global.L1 [%0];" ::"l"(from));
#else
  static_cast<void>(from);
#endif
}

// Reads what other blocks of the kernel have written.
template <typename T, int N>
__device__ __forceinline__ Vector<T, N> LoadFreshVector(
    const typename T::Storage* from) {
  return internal::ReadVector<T, N>(
      from, [](const auto* word) { return __ldcg(word); });
}
__device__ __forceinline__ float LoadFresh(const float* from) {
  return LoadFreshVector<F32, 1>(from).data[0];
}

// Writes what LoadVector reads.
template <typename T, int N>
__device__ __forceinline__ void StoreVector(typename T::Storage* to,
                                            const Vector<T, N>& value) {
  using Words = internal::Words<sizeof(Vector<T, N>)>;
  typename Words::Type words[Words::kCount];
  std::memcpy(words, &value, sizeof(value));
  KERNELS_UNROLL
  for (int i = 0; i < Words::kCount; ++i) {
    reinterpret_cast<typename Words::Type*>(to)[i] = words[i];
  }
}

// As StoreVector, for what this kernel and the next have no use for: the cache
// gives it up before what was read.
template <typename T, int N>
__device__ __forceinline__ void StreamVector(typename T::Storage* to,
                                             const Vector<T, N>& value) {
#if defined(KERNELS_CUDA_EMULATION)
  StoreVector<T, N>(to, value);
#else
  using Words = internal::Words<sizeof(Vector<T, N>)>;
  typename Words::Type words[Words::kCount];
  std::memcpy(words, &value, sizeof(value));
  KERNELS_UNROLL
  for (int i = 0; i < Words::kCount; ++i) {
    __stcs(reinterpret_cast<typename Words::Type*>(to) + i, words[i]);
  }
#endif
}

// The nearest numbers of T, as FromCompute gives them.
template <typename T, int N>
__device__ __forceinline__ Vector<T, N> VectorFromCompute(
    const typename T::Compute (&values)[N]) {
  Vector<T, N> out;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  constexpr bool kIsBf16 = std::is_same_v<T, BF16>;
  if constexpr (N % 2 == 0 && (kIsBf16 || std::is_same_v<T, F16>)) {
    // One instruction rounds two numbers and packs them.
    uint32_t pairs[N / 2];
    KERNELS_UNROLL
    for (int i = 0; i < N / 2; ++i) {
      const float low = values[2 * i], high = values[2 * i + 1];
      if constexpr (kIsBf16) {
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;"
            : "=r"(pairs[i])
            : "f"(high), "f"(low));
      } else {
        asm("cvt.rn.f16x2.f32 %0, %1, %2;"
            : "=r"(pairs[i])
            : "f"(high), "f"(low));
      }
    }
    std::memcpy(&out, pairs, sizeof(out));
  } else
#endif
  {
    KERNELS_UNROLL
    for (int i = 0; i < N; ++i) out.data[i] = FromCompute<T>(values[i]);
  }
  return out;
}

// ---- Copies that go on while their thread does something else: of 16 bytes,
// from global to shared memory. The thread may read them once it has waited,
// other threads after a barrier as well.

// Starts a copy of `from`, or of zeros where `valid` is false: nothing is read
// then. With kOnce, the cache gives up first what is copied, as what is not
// read again. Before compute capability 8.0, copies at once.
template <bool kOnce>
__device__ __forceinline__ void CopyAsync(uint4* to, const uint4* from,
                                          bool valid) {
#if defined(KERNELS_CUDA_EMULATION)
  emulation::CopyAsync(to, valid ? from : nullptr);
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  const auto at = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  if constexpr (kOnce) {
    uint64_t policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    asm volatile(
        "cp.async.cg.shared.global.L2::cache_hint.L2::128B [%0], [%1], 16, %2, "
        "%3;" ::"r"(at),
        "l"(from), "r"(valid ? 16 : 0), "l"(policy)
        : "memory");
  } else {
    asm volatile(
        "cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(at),
        "l"(from), "r"(valid ? 16 : 0)
        : "memory");
  }
#else
  *to = valid ? __ldg(from) : make_uint4(0, 0, 0, 0);
#endif
}

// Ends a group of copies, which may be empty.
__device__ __forceinline__ void CommitCopies() {
#if defined(KERNELS_CUDA_EMULATION)
  emulation::CommitCopies();
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits for all groups but the last kPending.
template <int kPending>
__device__ __forceinline__ void WaitForCopies() {
#if defined(KERNELS_CUDA_EMULATION)
  emulation::WaitForCopies(kPending);
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

// ---- Kernels that overlap; see LaunchEarly.

// Lets a kernel that is launched early begin. All blocks must call it.
__device__ __forceinline__ void LetNextBegin() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Waits until the kernel before has ended and what it wrote can be seen. Every
// thread must call it before it ends, or the kernel after might begin too soon.
__device__ __forceinline__ void WaitForPrevious() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// ---- Warps. Every lane of a warp of 32 takes part, and gets the result.

template <typename A>
__device__ __forceinline__ A WarpSum(A value) {
  KERNELS_UNROLL
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, lanes);
  }
  return value;
}

template <typename A>
__device__ __forceinline__ A WarpMax(A value) {
  KERNELS_UNROLL
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
    const A other = __shfl_xor_sync(kAllLanes, value, lanes);
    value = other > value ? other : value;
  }
  return value;
}

}  // namespace kernels::cuda

#endif  // KERNELS_COMMON_CUDA_UTIL_H_
