// What newer C and C++ libraries have and older ones lack, made here, so that what is compiled on a new Linux
// loads on an old one too: manylinux_2_28 has glibc 2.28 and the libstdc++ of gcc 8, and torch itself asks
// for no more. Each of these stands in for a symbol that the compiler's headers call; all stay inside the
// shared object that they are linked into (tools/native.py hides them), and libstdc++ itself stays shared,
// for exceptions that cross to torch. tests/test_build.py holds the files to the versions.
#include <cstddef>  // defines __GLIBC__, __GLIBCXX__

#include "common/old_symbols.h"

// glibc 2.29 gave these a version that leaves errno to the caller: the same numbers.
SPARSE_ATTN_OLD(exp);
SPARSE_ATTN_OLD(exp2);
SPARSE_ATTN_OLD(log);
SPARSE_ATTN_OLD(log2);
SPARSE_ATTN_OLD(pow);

#if defined(__GLIBC__)
// glibc 2.32: whether the process has one thread, where libstdc++ counts references without atomics. 0 means
// "perhaps not", and is always right.
extern "C" __attribute__((visibility("hidden"))) char __libc_single_threaded;
char __libc_single_threaded = 0;
#endif  // __GLIBC__

#if defined(__GLIBCXX__) && defined(__linux__)
#include <exception>
#include <new>
#include <sstream>

// gcc 9 and 11: members of string streams that are compiled into libstdc++, and so not into what uses them.
template std::basic_ostringstream<char>::basic_ostringstream();
template std::basic_stringstream<char>::basic_stringstream();
#if __cplusplus > 201703L && defined(_GLIBCXX_RELEASE) && _GLIBCXX_RELEASE >= 11
template std::string std::basic_stringbuf<char>::str() const&;
template std::string std::basic_stringbuf<char>::str() &&;
#endif

// gcc 11: what std::vector calls for a size that no memory has.
#if defined(_GLIBCXX_RELEASE) && _GLIBCXX_RELEASE >= 11
namespace std {
void __throw_bad_array_new_length() {
    throw bad_array_new_length();
}
}  // namespace std
#endif

// gcc 12 inlines copying and destroying an exception_ptr down to these two; older ones have only the whole
// members, which are still there: a copy of `this` that is never destroyed is one more reference, a
// destruction one less.
#if defined(_GLIBCXX_RELEASE) && _GLIBCXX_RELEASE >= 12
extern "C" {
void sparse_attn_copy_exception(void* to, const void* from) noexcept;
void sparse_attn_destroy_exception(void* at) noexcept;
// By version, so that they are libstdc++'s and not inline ones of a file of ours, which call what is defined
// here.
asm(".symver sparse_attn_copy_exception, _ZNSt15__exception_ptr13exception_ptrC1ERKS0_@CXXABI_1.3.3");
asm(".symver sparse_attn_destroy_exception, _ZNSt15__exception_ptr13exception_ptrD1Ev@CXXABI_1.3.3");
}

namespace std::__exception_ptr {
void exception_ptr::_M_addref() noexcept {
    void* copy;
    sparse_attn_copy_exception(&copy, this);
}

void exception_ptr::_M_release() noexcept {
    sparse_attn_destroy_exception(this);
    _M_exception_object = nullptr;
}
}  // namespace std::__exception_ptr
#endif
#endif  // __GLIBCXX__
