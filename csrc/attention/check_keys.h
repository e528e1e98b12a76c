// Whether a segment's keys can be walked: their index, or their pages.
#pragma once

#include "mixedkv/attention.h"

namespace mixedkv {

/// Throws std::invalid_argument that names what is wrong and its value: an index that does not
/// ascend strictly from 0 or more (an unbroken run is known by its ends), pages that are negative,
/// of no size, or too far apart to be counted.
void check_keys(const KeySegment &segment);

} // namespace mixedkv
