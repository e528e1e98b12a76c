#include "arrays.h"

PYBIND11_MODULE(_core, m) {
  m.doc() = "The core of mixedkv; its users are the package's own modules.";
  m.attr("__version__") = MIXEDKV_VERSION;
  mixedkv::bindings::register_machine(m);
  mixedkv::bindings::register_quantize(m);
  mixedkv::bindings::register_attention(m);
  mixedkv::bindings::register_cache(m);
}
