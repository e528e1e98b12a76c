// Which table of kernels is in use: listing, selecting, refusing.
//
// Usage: test_dispatch [part of a check's name]

#include "kernels/dispatch.h"
#include "reporting.h"

#include <stdexcept>
#include <vector>

using namespace mixedkv;
using namespace testing;

namespace {

template <typename F> std::string message_of(F &&f) {
  try {
    f();
  } catch (const std::invalid_argument &error) {
    return error.what();
  }
  return "";
}

void test_dispatch() {
  check("dispatch lists scalar last and always available", [] {
    const std::vector<IsaInfo> isas = compiled_isas();
    EXPECT(!isas.empty() && std::string(isas.back().name) == "scalar" && isas.back().available,
           "compiled");
    const std::vector<std::string> available = available_isas();
    EXPECT(!available.empty() && available.back() == "scalar", "available");
  });
  check("dispatch selects what it is told", [] {
    for (const std::string &name : available_isas()) {
      select_isa(name);
      EXPECT(active_kernels().name == name, "%s", name.c_str());
      EXPECT(&active_kernels() == &kernels_for(name), "%s", name.c_str());
    }
  });
  check("dispatch refuses unknown and missing ISAs and changes nothing", [] {
    select_isa("scalar");
    const std::string message = message_of([] { select_isa("mmx"); });
    EXPECT(message.find("mmx") != std::string::npos && message.find("scalar") != std::string::npos,
           "message: %s", message.c_str());
    EXPECT(!message_of([] { kernels_for(""); }).empty(), "empty name");
    for (const IsaInfo &isa : compiled_isas())
      if (!isa.available)
        EXPECT(message_of([&] { select_isa(isa.name); }).find(isa.requires_) != std::string::npos,
               "%s", isa.name);
    EXPECT(std::string(active_kernels().name) == "scalar", "selection changed");
  });
}

} // namespace

int main(int argc, char **argv) {
  if (argc > 1)
    name_filter = argv[1];
  test_dispatch();
  return summary();
}
