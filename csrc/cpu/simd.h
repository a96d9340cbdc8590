#pragma once

// Vectors of the compiler's own kind, as wide as CSB_VECTOR_BYTES. Kernel header: see kernel_prelude.h.
namespace csb::cpu::CSB_CPU_ISA {

template <typename T, int kCount>
struct VectorOf {
  typedef T type __attribute__((vector_size(kCount * sizeof(T))));
};

template <typename T, int kCount>
using Vector = typename VectorOf<T, kCount>::type;

template <typename T>
constexpr int kLanes = CSB_VECTOR_BYTES / static_cast<int>(sizeof(T));

template <typename V, typename T>
CSB_INLINE V load_vector(const T* from) {
  V v;
  __builtin_memcpy(&v, from, sizeof(V));
  return v;
}

template <typename V, typename T>
CSB_INLINE void store_vector(const V& v, T* to) {
  __builtin_memcpy(to, &v, sizeof(V));
}

template <typename To, typename From>
CSB_INLINE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps every bit");
  To to;
  __builtin_memcpy(&to, &from, sizeof(To));
  return to;
}

// a0 b0 a1 b1 ...: low() of the low halves of a and b, high() of the high ones.
#if defined(__clang__) || __GNUC__ >= 12
#define CSB_SHUFFLE(V, I, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define CSB_SHUFFLE(V, I, a, b, ...) __builtin_shuffle(a, b, (I){__VA_ARGS__})
#endif

template <typename T, int kCount>
struct Interleave {
  using V = Vector<T, kCount>;
  using I = Vector<std::conditional_t<sizeof(T) == 8, int64_t, int32_t>, kCount>;

  static CSB_INLINE V low(const V& a, const V& b) {
    if constexpr (kCount == 16) {
      return CSB_SHUFFLE(V, I, a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    } else if constexpr (kCount == 8) {
      return CSB_SHUFFLE(V, I, a, b, 0, 8, 1, 9, 2, 10, 3, 11);
    } else if constexpr (kCount == 4) {
      return CSB_SHUFFLE(V, I, a, b, 0, 4, 1, 5);
    } else {
      static_assert(kCount == 2, "vectors have 2, 4, 8 or 16 elements");
      return CSB_SHUFFLE(V, I, a, b, 0, 2);
    }
  }

  static CSB_INLINE V high(const V& a, const V& b) {
    if constexpr (kCount == 16) {
      return CSB_SHUFFLE(V, I, a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    } else if constexpr (kCount == 8) {
      return CSB_SHUFFLE(V, I, a, b, 4, 12, 5, 13, 6, 14, 7, 15);
    } else if constexpr (kCount == 4) {
      return CSB_SHUFFLE(V, I, a, b, 2, 6, 3, 7);
    } else {
      static_assert(kCount == 2, "vectors have 2, 4, 8 or 16 elements");
      return CSB_SHUFFLE(V, I, a, b, 1, 3);
    }
  }
};

// Transposes kCount vectors of kCount elements: log2(kCount) perfect shuffles of the rows.
template <typename T, int kCount>
CSB_INLINE void transpose(Vector<T, kCount> (&rows)[kCount]) {
  Vector<T, kCount> other[kCount];
  CSB_UNROLL
  for (int half = 1; half < kCount; half *= 2) {
    CSB_UNROLL
    for (int i = 0; i < kCount / 2; ++i) {
      other[2 * i] = Interleave<T, kCount>::low(rows[i], rows[i + kCount / 2]);
      other[2 * i + 1] = Interleave<T, kCount>::high(rows[i], rows[i + kCount / 2]);
    }
    CSB_UNROLL
    for (int i = 0; i < kCount; ++i) rows[i] = other[i];
  }
}

}  // namespace csb::cpu::CSB_CPU_ISA
