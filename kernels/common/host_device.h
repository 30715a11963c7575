// Marks plain functions that CUDA kernels call as well.

#ifndef KERNELS_COMMON_HOST_DEVICE_H_
#define KERNELS_COMMON_HOST_DEVICE_H_

#if defined(__CUDACC__)
#define KERNELS_HOST_DEVICE __host__ __device__
#else
#define KERNELS_HOST_DEVICE
#endif

#endif  // KERNELS_COMMON_HOST_DEVICE_H_
