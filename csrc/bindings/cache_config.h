// A cache's configuration between Python's keywords and the core's struct, option by option as the
// core's list has them.
#pragma once

#include "bindings/arrays.h"
#include "mixedkv/cache_config.h"

#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace mixedkv::bindings {

/// value as a T; py::type_error naming the option where it is none.
template <typename T> T option_value(const py::handle &value, const char *name, const char *what) {
  try {
    return value.cast<T>();
  } catch (const py::cast_error &) {
    throw py::type_error(std::string(name) + " must be " + what + ", got " +
                         py::repr(value).cast<std::string>());
  }
}

inline void set_option(std::int64_t &option, const py::handle &value, const char *name) {
  option = option_value<std::int64_t>(value, name, "an int of 64 bits");
}
inline void set_option(int &option, const py::handle &value, const char *name) {
  option = narrow(option_value<std::int64_t>(value, name, "an int of 64 bits"), name);
}
inline void set_option(double &option, const py::handle &value, const char *name) {
  option = option_value<double>(value, name, "a float");
}
inline void set_option(bool &option, const py::handle &value, const char *name) {
  option = option_value<bool>(value, name, "a bool");
}
inline void set_option(Format &option, const py::handle &value, const char *name) {
  option = parse_format(option_value<std::string>(value, name, "a str"), name);
}
inline void set_option(std::vector<std::uint8_t> &option, const py::handle &value,
                       const char *name) {
  const auto flags = option_value<std::vector<bool>>(value, name, "a list of bools");
  option.assign(flags.begin(), flags.end());
}

template <typename T> py::object get_option(const T &option) { return py::cast(option); }
inline py::object get_option(const Format &option) { return py::str(format_name(option)); }
inline py::object get_option(const std::vector<std::uint8_t> &option) {
  return py::cast(std::vector<bool>(option.begin(), option.end()));
}

/// Options that are not given keep the core's defaults.
inline CacheConfig read_config(const py::kwargs &options) {
  CacheConfig config;
  for (const auto &[key, value] : options) {
    const auto given = key.cast<std::string>();
    const py::handle handle = value;
    bool known = false;
    for_each_field([&](const char *name, auto member, const char *) {
      if (given == name) {
        set_option(config.*member, handle, name);
        known = true;
      }
    });
    if (!known) {
      throw py::type_error("a cache has no option '" + given + "'");
    }
  }
  return config;
}

inline py::dict config_dict(const CacheConfig &config) {
  py::dict options;
  for_each_field([&](const char *name, auto member, const char *) {
    options[name] = get_option(config.*member);
  });
  return options;
}

/// [(name, default, meaning)].
inline py::list config_fields() {
  const CacheConfig defaults;
  py::list fields;
  for_each_field([&](const char *name, auto member, const char *meaning) {
    fields.append(py::make_tuple(name, get_option(defaults.*member), meaning));
  });
  return fields;
}

} // namespace mixedkv::bindings
