"""What TVM's generated CUDA code takes from the C++ standard library, and no more.

NVIDIA's own headers of these names take NVRTC twice as long to read as the generated code itself, for every
architecture again, and would be one more package to install.
"""

from __future__ import annotations

_INTEGERS = """
#pragma once
namespace cuda { namespace std {
using int8_t = signed char;
using int16_t = short;
using int32_t = int;
using int64_t = long;
using uint8_t = unsigned char;
using uint16_t = unsigned short;
using uint32_t = unsigned int;
using uint64_t = unsigned long;
} }
"""

_TYPE_TRAITS = """
#pragma once
namespace cuda { namespace std {
template <bool B, class T = void> struct enable_if {};
template <class T> struct enable_if<true, T> { using type = T; };
template <bool B, class T, class F> struct conditional { using type = T; };
template <class T, class F> struct conditional<false, T, F> { using type = F; };
template <class T, class U> inline constexpr bool is_same_v = false;
template <class T> inline constexpr bool is_same_v<T, T> = true;
template <class T, class U> struct is_same { static constexpr bool value = is_same_v<T, U>; };
template <class T, class... U> inline constexpr bool is_one_of_v = (is_same_v<T, U> || ...);
template <class T> struct is_floating_point { static constexpr bool value = is_one_of_v<T, float, double>; };
template <class T> struct is_integral {
  static constexpr bool value =
      is_one_of_v<T, bool, char, signed char, unsigned char, short, unsigned short, int, unsigned int, long,
                  unsigned long, long long, unsigned long long>;
};
template <class T, bool = is_integral<T>::value> struct is_unsigned { static constexpr bool value = T(-1) > T(0); };
template <class T> struct is_unsigned<T, false> { static constexpr bool value = false; };
template <class T> struct is_signed {
  static constexpr bool value =
      is_floating_point<T>::value || (is_integral<T>::value && !is_unsigned<T>::value);
};
} }
"""

HEADERS = {"cuda/std/cstdint": _INTEGERS, "cuda/std/type_traits": _TYPE_TRAITS}
