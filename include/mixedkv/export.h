// MIXEDKV_API marks what the shared library exports; everything else is hidden, and MIXEDKV_LOCAL
// marks what is hidden within something exported. C and C++.
// The macro is one for both libraries: they are made of the same objects. Programs for Windows that
// link the static library define MIXEDKV_STATIC (its CMake target does).
#ifndef MIXEDKV_EXPORT_H
#define MIXEDKV_EXPORT_H

#if defined(_WIN32)
#if defined(MIXEDKV_BUILDING)
#define MIXEDKV_API __declspec(dllexport)
#elif defined(MIXEDKV_STATIC)
#define MIXEDKV_API
#else
#define MIXEDKV_API __declspec(dllimport)
#endif
#define MIXEDKV_LOCAL
#elif defined(__GNUC__)
#define MIXEDKV_API __attribute__((visibility("default")))
#define MIXEDKV_LOCAL __attribute__((visibility("hidden")))
#else
#define MIXEDKV_API
#define MIXEDKV_LOCAL
#endif

#endif
