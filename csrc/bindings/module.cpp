#include "bindings/arrays.h"

#include "mixedkv/version.h"

PYBIND11_MODULE(_core, m) {
  m.doc() = "The core of mixedkv; its users are the package's own modules.";
  // pybind11 looks numpy's functions up at first use, and lets go of the GIL meanwhile: now, and
  // not in a thread that may end there.
  pybind11::detail::npy_api::get();
  m.attr("__version__") = MIXEDKV_VERSION_STRING;
  mixedkv::bindings::register_machine(m);
  mixedkv::bindings::register_quantize(m);
  mixedkv::bindings::register_attention(m);
  mixedkv::bindings::register_paged(m);
  mixedkv::bindings::register_cache(m);
}
