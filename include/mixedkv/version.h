// The version of these headers, C and C++. The build refuses where pyproject.toml has another one.
// A program asks the library that it runs with by mixedkv_version() (c.h).
#ifndef MIXEDKV_VERSION_H
#define MIXEDKV_VERSION_H

#define MIXEDKV_VERSION_MAJOR 0
#define MIXEDKV_VERSION_MINOR 1
#define MIXEDKV_VERSION_PATCH 0
#define MIXEDKV_VERSION_STRING "0.1.0"

#endif
