// Vectors as the compiler's vector extension: one source for every instruction set. The file that includes this (isa_*.cpp) has
// set DECONV_ISA, the namespace of everything compiled for it, and DECONV_VECTOR_BYTES, after switching the compiler's target.
//
// No include guard across ISAs is needed: each isa_*.cpp is one translation unit. Nothing from the standard library may be
// instantiated in here, or the linker could keep the copy made for the wrong instruction set.
#pragma once

#include "../half.h"

namespace deconv {
namespace cpu {
namespace DECONV_ISA {

constexpr int kVectorBytes = DECONV_VECTOR_BYTES;
constexpr int kRegisters = DECONV_VECTOR_REGISTERS;

template <class T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

template <class T>
struct VectorOf {
  typedef T type __attribute__((vector_size(kVectorBytes)));
  typedef T unaligned __attribute__((vector_size(kVectorBytes), aligned(sizeof(T)), may_alias));
};
template <class T>
using Vector = typename VectorOf<T>::type;

template <class T>
inline Vector<T> load_vector(const T* p) {
  return *reinterpret_cast<const typename VectorOf<T>::unaligned*>(p);
}

template <class T>
inline void store_vector(T* p, Vector<T> v) {
  *reinterpret_cast<typename VectorOf<T>::unaligned*>(p) = v;
}

template <class I>
inline I min_of(I a, I b) {
  return a < b ? a : b;
}
template <class I>
inline I max_of(I a, I b) {
  return a > b ? a : b;
}
template <class I>
inline I round_up(I value, I multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

}  // namespace DECONV_ISA
}  // namespace cpu
}  // namespace deconv
