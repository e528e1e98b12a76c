// Instruction sets and threads.
#include "bindings/arrays.h"

#include "mixedkv/attention.h"
#include "mixedkv/runtime.h"

#include <pybind11/stl.h>

#include <tuple>
#include <vector>

namespace mixedkv::bindings {

void register_machine(py::module_ &m) {
  m.def("compiled_isas", [] {
    std::vector<std::tuple<std::string, bool, std::string, bool>> isas;
    for (const IsaInfo &isa : compiled_isas()) {
      isas.emplace_back(isa.name, isa.available, isa.requires_, isa.has_bf16);
    }
    return isas;
  });
  m.def("auto_compute_type", [] {
    const py::gil_scoped_release release;
    return auto_compute_type() == ComputeType::bf16 ? "bf16" : "f32";
  });
  m.def("active_isa", [] { return std::string(active_isa()); });
  m.def(
      "select_isa", [](const std::string &name) { select_isa(name); }, py::arg("name"));
  m.def("get_num_threads", &get_num_threads,
        "Threads that a call uses where it does not say.\n\n"
        "set_num_threads, else the environment variable MIXEDKV_NUM_THREADS, else the CPUs that\n"
        "this process may use.");
  m.def(
      "set_num_threads", [](std::int64_t n) { set_num_threads(narrow(n, "num_threads")); },
      py::arg("n"),
      "Use n threads, 1 to 1024, from now on. Results have the same bits for any number.");
}

} // namespace mixedkv::bindings
