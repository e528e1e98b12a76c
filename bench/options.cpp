#include "options.h"

#include "kernels/dispatch.h"
#include "mixedkv/formats.h"
#include "runtime/parallel.h"

#include <algorithm>
#include <cstdlib>
#include <stdexcept>
#include <utility>

namespace mixedkv::bench {
namespace {

[[noreturn]] void refuse(const std::string &option, const std::string &what,
                         const std::string &value) {
  throw std::invalid_argument(option + " must be " + what + ", got '" + value + "'");
}

std::vector<std::string> split(const std::string &text, char separator) {
  std::vector<std::string> parts(1);
  for (const char c : text) {
    if (c == separator) {
      parts.emplace_back();
    } else {
      parts.back() += c;
    }
  }
  return parts;
}

/// A decimal number from 1 to most; 0 where text is anything else.
std::int64_t positive(const std::string &text, std::int64_t most) {
  const bool digits = !text.empty() && text.size() <= 18 &&
                      text.find_first_not_of("0123456789") == std::string::npos;
  const std::int64_t n = digits ? std::strtoll(text.c_str(), nullptr, 10) : 0;
  return n <= most ? n : 0;
}

template <typename T>
std::vector<T> parse_numbers(const std::string &option, const std::string &value,
                             std::int64_t most) {
  std::vector<T> numbers;
  for (const std::string &part : split(value, ',')) {
    const std::int64_t n = positive(part, most);
    if (n == 0) {
      refuse(option, "numbers from 1 to " + std::to_string(most) + ", separated by commas", value);
    }
    if (std::find(numbers.begin(), numbers.end(), static_cast<T>(n)) == numbers.end()) {
      numbers.push_back(static_cast<T>(n));
    }
  }
  return numbers;
}

std::vector<Shape> parse_shapes(const std::string &value) {
  std::vector<Shape> shapes;
  for (const std::string &part : split(value, ',')) {
    const std::vector<std::string> numbers = split(part, 'x');
    Shape shape{0, 0, 0};
    if (numbers.size() == 3) {
      constexpr std::int64_t most = 1 << 14;
      shape = {static_cast<int>(positive(numbers[0], most)),
               static_cast<int>(positive(numbers[1], most)),
               static_cast<int>(positive(numbers[2], most))};
    }
    if (shape.num_qo_heads == 0 || shape.num_kv_heads == 0 || shape.head_dim == 0 ||
        shape.num_qo_heads % shape.num_kv_heads != 0 || shape.head_dim % QK4_0 != 0) {
      refuse("--shapes",
             "HqxHkvxD such as 32x8x128, Hq a multiple of Hkv and D of 32, separated by commas",
             value);
    }
    shapes.push_back(shape);
  }
  return shapes;
}

std::vector<std::string> parse_isas(const std::string &value) {
  if (value == "all") {
    return available_isas();
  }
  std::vector<std::string> isas;
  for (const std::string &name : split(value, ',')) {
    kernels_for(name); // throws where there is none
    if (std::find(isas.begin(), isas.end(), name) == isas.end()) {
      isas.push_back(name);
    }
  }
  return isas;
}

} // namespace

const char *const kUsage =
    R"(mixedkv-bench [option...]: times mixedkv's parts beside this machine's read bandwidth

  --isa=NAME,...|all   instruction sets; default: the one that mixedkv takes by itself
  --threads=N,...      default: 1 and as many as mixedkv takes by itself
  --kv=N,...           tokens in context; default: each subject's own
  --shapes=HqxHkvxD,.. query heads, kv heads, head dim; default: each subject's own

Exit status: 0; 1 where a result was not a number or something failed; 2 on wrong use.
The rest is google-benchmark's:

)";

std::string name_of(const Shape &shape) {
  return std::to_string(shape.num_qo_heads) + "x" + std::to_string(shape.num_kv_heads) + "x" +
         std::to_string(shape.head_dim);
}

Options take_options(std::vector<char *> &arguments) {
  Options options;
  std::vector<char *> rest;
  for (char *const text : arguments) {
    const std::string argument = text;
    const std::size_t equals = argument.find('=');
    const std::string option = argument.substr(0, equals);
    const std::string value = equals == std::string::npos ? "" : argument.substr(equals + 1);
    if (option == "--isa") {
      options.isas = parse_isas(value);
    } else if (option == "--threads") {
      options.threads = parse_numbers<int>(option, value, 1024);
    } else if (option == "--kv") {
      options.kv = parse_numbers<std::int64_t>(option, value, std::int64_t{1} << 24);
    } else if (option == "--shapes") {
      options.shapes = parse_shapes(value);
    } else {
      rest.push_back(text);
    }
  }
  if (options.isas.empty()) {
    options.isas = {active_kernels().name};
  }
  if (options.threads.empty()) {
    options.threads = {1};
    if (get_num_threads() > 1) {
      options.threads.push_back(get_num_threads());
    }
  }
  arguments = std::move(rest);
  return options;
}

} // namespace mixedkv::bench
