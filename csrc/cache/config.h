// What a configuration must be, and what follows from it.
#pragma once

#include "mixedkv/cache.h"
#include "rows/row_storage.h"

#include <cstdint>
#include <vector>

namespace mixedkv {

/// Most cells in use in hot that no move is due for.
std::int64_t trigger_level(const CacheConfig &config);

/// Cells of the cold tier: none without quantisation.
std::int64_t cold_cells(const CacheConfig &config);

/// For each layer its number among the cached ones, -1 where it is not cached.
std::vector<int> cached_layers(const CacheConfig &config);

RowShape hot_shape(const CacheConfig &config);
RowShape cold_shape(const CacheConfig &config);

} // namespace mixedkv
