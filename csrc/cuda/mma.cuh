// Products of 16 x 16 tiles, c += a * b, by tensor cores or by scalar multiply-adds, behind one
// interface. Operands lie in shared memory in vectors of 16 bytes, [channels / v][index][v], index
// a pixel or a row of the weights.
//
// C of every product is spread over a warp as mma.sync m16n8 does it: lane 4 g + t holds
//
//     c[e] = C[g + 8 (e / 2 % 2)][8 (e / 4) + 2 t + e % 2]        e = 0 .. 7
//
// ChannelMma<product, T> sums over channels, kVectors vectors at a time; PixelMma<product, T> over
// pixels, kPixels at a time, reading the same layout transposed. Both say which addresses a lane
// has to give for a strip of 16 indices (channels):
//
//                     ChannelMma                          PixelMma
//     16 bits         ldmatrix                            ldmatrix.trans
//     TF32            ldmatrix on 32-bit pairs            32-bit reads
//     float64         64-bit reads                        64-bit reads
//     float32, FFMA   128-bit reads of 4 channels         32- and 64-bit reads
//
// Bank conflicts: none in ChannelMma, since 8 neighbouring vectors are all 32 banks, wherever they
// begin; in PixelMma none if the pitch of a vector of channels is 4 modulo 8 (odd for 16 bits).
#pragma once

#include <cuda_runtime_api.h>

#include "../half.h"
#include "configs.h"
#include "memory.cuh"
#include "ptx.cuh"

namespace deconv {
namespace cuda {

constexpr int kAccumulators = 8;  // of a lane in a 16 x 16 tile

// A few elements of an array, as an array.
template <int n, class U>
__device__ __forceinline__ U (&part(U* from))
    [n] { return *reinterpret_cast<U(*)[n]>(from); } template <int n, class U>
    __device__ __forceinline__ const U (&part(const U* from))
        [n] { return *reinterpret_cast<const U(*)[n]>(from); }

template <class U>
__device__ __forceinline__ U load_at(const unsigned char* from) {
  return load(reinterpret_cast<const U*>(from));
}

// What one lane holds of an operand.
template <class U, int n>
struct Fragment {
  U r[n];
};

// `index_a(lane, i)`: which of the 16 indices the i-th address of the lane is for; `offset_a(lane,
// pitch)`: bytes to add to it, for the vector of channels and the place within it.
template <Product kProduct, class T>
struct ChannelMma;

// `pixel_a(lane, i)`: which of the kPixels the i-th address is for; `offset_a(lane, pitch)`: bytes
// to add for the lane's channel.
template <Product kProduct, class T>
struct PixelMma;

// ---- tensor cores, operands of 16 bits ----------------------------------------------------------

// ldmatrix takes the address of row lane % 8 of 8x8 matrix lane / 8, and gives register lane / 8 of
// the fragment: A in the order (row, K) = (0, 0), (8, 0), (0, 8), (8, 8), B of two n8 tiles as (n,
// K) = (0, 0), (0, 8), (8, 0), (8, 8).
template <class T>
struct ChannelMma<kMma16, T> {
  static constexpr int kVectors = 2, kAddressesA = 1, kAddressesB = 1;
  using Sum = float;
  using A = Fragment<uint32_t, 4>;
  using B = Fragment<uint32_t, 4>;
  __device__ static int index_a(int lane, int) { return lane / 8 % 2 * 8 + lane % 8; }
  __device__ static int index_b(int lane, int) { return lane / 16 * 8 + lane % 8; }
  __device__ static int offset_a(int lane, int pitch) { return lane / 16 * pitch * kVectorBytes; }
  __device__ static int offset_b(int lane, int pitch) {
    return lane / 8 % 2 * pitch * kVectorBytes;
  }
  __device__ static void load_a(A& a, const unsigned char* const (&from)[1]) {
    ldmatrix<4>(a.r, from[0]);
  }
  __device__ static void load_b(B& b, const unsigned char* const (&from)[1]) {
    ldmatrix<4>(b.r, from[0]);
  }
  __device__ static void multiply(float (&c)[kAccumulators], const A& a, const B& b) {
    mma_16x8x16<T>(part<4>(c), a.r, part<2>(b.r));
    mma_16x8x16<T>(part<4>(c + 4), a.r, part<2>(b.r + 2));
  }
};

// The same matrices with pixels in rows: .trans turns them.
template <class T>
struct PixelMma<kMma16, T> {
  static constexpr int kPixels = 16, kAddresses = 1;
  using Sum = float;
  using A = Fragment<uint32_t, 4>;
  using B = Fragment<uint32_t, 4>;
  __device__ static int pixel_a(int lane, int) { return lane / 16 * 8 + lane % 8; }
  __device__ static int pixel_b(int lane, int) { return lane / 8 % 2 * 8 + lane % 8; }
  __device__ static int offset_a(int lane, int pitch) {
    return lane / 8 % 2 * pitch * kVectorBytes;
  }
  __device__ static int offset_b(int lane, int pitch) { return lane / 16 * pitch * kVectorBytes; }
  __device__ static void load_a(A& a, const unsigned char* const (&from)[1], int) {
    ldmatrix<4, true>(a.r, from[0]);
  }
  __device__ static void load_b(B& b, const unsigned char* const (&from)[1], int) {
    ldmatrix<4, true>(b.r, from[0]);
  }
  __device__ static void multiply(float (&c)[kAccumulators], const A& a, const B& b) {
    mma_16x8x16<T>(part<4>(c), a.r, part<2>(b.r));
    mma_16x8x16<T>(part<4>(c + 4), a.r, part<2>(b.r + 2));
  }
};

// ---- tensor cores, TF32 -------------------------------------------------------------------------

// A row of a 16-bit 8x8 matrix is four floats, and its lane 4 g + t gets the t-th of row g: so
// ldmatrix and the addresses are those of 16 bits, and K is 8 channels.
template <class T>
struct ChannelMma<kTf32, T> : ChannelMma<kMma16, T> {
  using typename ChannelMma<kMma16, T>::A;
  using typename ChannelMma<kMma16, T>::B;
  __device__ static void load_a(A& a, const unsigned char* const (&from)[1]) {
    ldmatrix<4>(a.r, from[0]);
#pragma unroll
    for (uint32_t& r : a.r) r = to_tf32(bit_cast<float>(r));
  }
  __device__ static void load_b(B& b, const unsigned char* const (&from)[1]) {
    ldmatrix<4>(b.r, from[0]);
#pragma unroll
    for (uint32_t& r : b.r) r = to_tf32(bit_cast<float>(r));
  }
  __device__ static void multiply(float (&c)[kAccumulators], const A& a, const B& b) {
    mma_16x8x8_tf32(part<4>(c), a.r, part<2>(b.r));
    mma_16x8x8_tf32(part<4>(c + 4), a.r, part<2>(b.r + 2));
  }
};

// Lane 4 g + t needs pixels t and t + 4 of channels g and g + 8, the latter two vectors away.
template <class T>
struct PixelMma<kTf32, T> {
  static constexpr int kPixels = 8, kAddresses = 2;
  using Sum = float;
  using A = Fragment<uint32_t, 4>;
  using B = Fragment<uint32_t, 4>;
  __device__ static int pixel_a(int lane, int i) { return lane % 4 + 4 * i; }
  __device__ static int pixel_b(int lane, int i) { return lane % 4 + 4 * i; }
  __device__ static int offset_a(int lane, int pitch) {
    const int channel = lane / 4;
    return channel / 4 * pitch * kVectorBytes + channel % 4 * 4;
  }
  __device__ static int offset_b(int lane, int pitch) { return offset_a(lane, pitch); }
  __device__ static void load_a(A& a, const unsigned char* const (&from)[2], int pitch) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      a.r[i] = to_tf32(load_at<float>(from[i / 2] + i % 2 * 2 * pitch * kVectorBytes));
  }
  __device__ static void load_b(B& b, const unsigned char* const (&from)[2], int pitch) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      b.r[i] = to_tf32(load_at<float>(from[i % 2] + i / 2 * 2 * pitch * kVectorBytes));
  }
  __device__ static void multiply(float (&c)[kAccumulators], const A& a, const B& b) {
    mma_16x8x8_tf32(part<4>(c), a.r, part<2>(b.r));
    mma_16x8x8_tf32(part<4>(c + 4), a.r, part<2>(b.r + 2));
  }
};

// ---- float32 by multiply-adds -------------------------------------------------------------------

// The rows (i = 0, 1) and columns (i = 0 .. 3) of a lane's accumulators.
__device__ inline int lane_row(int lane, int i) { return lane / 4 + 8 * i; }
__device__ inline int lane_column(int lane, int i) { return i / 2 * 8 + lane % 4 * 2 + i % 2; }

template <class T>
struct ChannelMma<kFma32, T> {
  static constexpr int kVectors = 1, kAddressesA = 2, kAddressesB = 4;
  using Sum = float;
  using A = Fragment<float4, 2>;
  using B = Fragment<float4, 4>;
  __device__ static int index_a(int lane, int i) { return lane_row(lane, i); }
  __device__ static int index_b(int lane, int i) { return lane_column(lane, i); }
  __device__ static int offset_a(int, int) { return 0; }
  __device__ static int offset_b(int, int) { return 0; }
  __device__ static void load_a(A& a, const unsigned char* const (&from)[2]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) a.r[i] = load_at<float4>(from[i]);
  }
  __device__ static void load_b(B& b, const unsigned char* const (&from)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) b.r[i] = load_at<float4>(from[i]);
  }
  __device__ static void multiply(float (&c)[kAccumulators], const A& a, const B& b) {
#pragma unroll
    for (int e = 0; e < kAccumulators; ++e) {
      const float4 x = a.r[e / 2 % 2], y = b.r[e / 4 * 2 + e % 2];
      c[e] = fmaf(x.w, y.w, fmaf(x.z, y.z, fmaf(x.y, y.y, fmaf(x.x, y.x, c[e]))));
    }
  }
};

template <class T>
struct PixelMma<kFma32, T> {
  static constexpr int kPixels = 2, kAddresses = 2;
  using Sum = float;
  using A = Fragment<float, 4>;   // [pixel][row]
  using B = Fragment<float2, 4>;  // [pixel][pair of columns]
  __device__ static int pixel_a(int, int i) { return i; }
  __device__ static int pixel_b(int, int i) { return i; }
  __device__ static int offset_a(int lane, int pitch) {
    return PixelMma<kTf32, T>::offset_a(lane, pitch);
  }
  __device__ static int offset_b(int lane, int pitch) {
    const int column = lane % 4 * 2;
    return column / 4 * pitch * kVectorBytes + column % 4 * 4;
  }
  __device__ static void load_a(A& a, const unsigned char* const (&from)[2], int pitch) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      a.r[i] = load_at<float>(from[i / 2] + i % 2 * 2 * pitch * kVectorBytes);
  }
  __device__ static void load_b(B& b, const unsigned char* const (&from)[2], int pitch) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      b.r[i] = load_at<float2>(from[i / 2] + i % 2 * 2 * pitch * kVectorBytes);
  }
  __device__ static void multiply(float (&c)[kAccumulators], const A& a, const B& b) {
#pragma unroll
    for (int e = 0; e < kAccumulators; ++e)
#pragma unroll
      for (int pixel = 0; pixel < 2; ++pixel) {
        const float2 pair = b.r[pixel * 2 + e / 4];
        c[e] = fmaf(a.r[pixel * 2 + e / 2 % 2], e % 2 ? pair.y : pair.x, c[e]);
      }
  }
};

// ---- tensor cores, float64 ----------------------------------------------------------------------

// m8n8k4: lane 4 g + t holds A[g][t], B[t][g], C[g][2 t .. 2 t + 1]; four of them are a 16 x 16
// tile.
template <class T>
struct ChannelMma<kMma64, T> {
  static constexpr int kVectors = 2, kAddressesA = 2, kAddressesB = 2;
  using Sum = double;
  using A = Fragment<double, 2>;
  using B = Fragment<double, 2>;
  __device__ static int index_a(int lane, int i) { return lane_row(lane, i); }
  __device__ static int index_b(int lane, int i) { return lane_row(lane, i); }
  __device__ static int offset_a(int lane, int pitch) {
    return lane % 4 / 2 * pitch * kVectorBytes + lane % 2 * 8;
  }
  __device__ static int offset_b(int lane, int pitch) { return offset_a(lane, pitch); }
  __device__ static void load_a(A& a, const unsigned char* const (&from)[2]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) a.r[i] = load_at<double>(from[i]);
  }
  __device__ static void load_b(B& b, const unsigned char* const (&from)[2]) { load_a(b, from); }
  __device__ static void multiply(double (&c)[kAccumulators], const A& a, const B& b) {
#pragma unroll
    for (int e = 0; e < kAccumulators; e += 2)
      mma_8x8x4(part<2>(c + e), a.r[e / 2 % 2], b.r[e / 4]);
  }
};

// Lane 4 g + t needs pixel t of channels g and g + 8, the latter four vectors away.
template <class T>
struct PixelMma<kMma64, T> {
  static constexpr int kPixels = 4, kAddresses = 1;
  using Sum = double;
  using A = Fragment<double, 2>;
  using B = Fragment<double, 2>;
  __device__ static int pixel_a(int lane, int) { return lane % 4; }
  __device__ static int pixel_b(int lane, int) { return lane % 4; }
  __device__ static int offset_a(int lane, int pitch) {
    const int channel = lane / 4;
    return channel / 2 * pitch * kVectorBytes + channel % 2 * 8;
  }
  __device__ static int offset_b(int lane, int pitch) { return offset_a(lane, pitch); }
  __device__ static void load_a(A& a, const unsigned char* const (&from)[1], int pitch) {
#pragma unroll
    for (int i = 0; i < 2; ++i) a.r[i] = load_at<double>(from[0] + i * 4 * pitch * kVectorBytes);
  }
  __device__ static void load_b(B& b, const unsigned char* const (&from)[1], int pitch) {
    load_a(b, from, pitch);
  }
  __device__ static void multiply(double (&c)[kAccumulators], const A& a, const B& b) {
    ChannelMma<kMma64, T>::multiply(c, a, b);
  }
};

}  // namespace cuda
}  // namespace deconv
