// What the user reads.
#pragma once

#include "timing.h"

#include <cstdio>
#include <vector>

namespace mixedkv::bench {

void print_header(std::FILE *file);
void print_table(std::FILE *file, const GroupResults &results);
void print_json(std::FILE *file, const Options &options, const std::vector<GroupResults> &groups);

} // namespace mixedkv::bench
