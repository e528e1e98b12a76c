#include "report.h"

#include "../kernels/dispatch.h"
#include "../parallel.h"

#include <algorithm>
#include <cmath>
#include <string>

namespace mixedkv::bench {
namespace {

#if defined(__clang__)
const char *const kCompiler = __VERSION__;
#elif defined(__GNUC__)
const char *const kCompiler = "gcc " __VERSION__;
#else
const char *const kCompiler = "unknown";
#endif

double speed(const Result &result, double seconds) {
  return static_cast<double>(result.bytes) / seconds * 1e-9;
}

std::string size_text(std::size_t bytes) {
  char text[32];
  const double kib = static_cast<double>(bytes) / 1024;
  std::snprintf(text, sizeof text, kib < 1024 ? "%.0f KiB" : "%.2f MiB",
                kib < 1024 ? kib : kib / 1024);
  return text;
}

/// Of a read in the table: how much, on how many threads, and how.
std::string read_title(const Result &read) {
  return "read " + size_text(read.bytes) + ", threads=" + std::to_string(read.threads) + " (" +
         read.way + ")";
}

/// Three digits, whatever the size.
int decimals(double x) { return x < 1 ? 3 : x < 10 ? 2 : x < 100 ? 1 : 0; }

void print_row(std::FILE *file, int width, const std::string &title, const Result &result) {
  const double gb_per_s = speed(result, result.best);
  std::fprintf(file, "%-*s %11.3f %11.3f %8.*f", width, title.c_str(), result.best * 1e6,
               result.median * 1e6, decimals(gb_per_s), gb_per_s);
  if (result.read >= 0) {
    const double percent = result.of_read * 100;
    std::fprintf(file, " %7.*f%%", std::max(decimals(percent) - 1, 0), percent);
  }
  if (result.flops > 0) {
    std::fprintf(file, " %9.1f", result.flops / result.best * 1e-9);
  }
  std::fprintf(file, result.finite ? "\n" : "  NOT FINITE\n");
}

/// Names are ours and hold nothing that JSON would have to escape; a compiler's version might.
std::string quoted(const std::string &text) {
  std::string json = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') {
      json += '\\';
    }
    if (static_cast<unsigned char>(c) >= 0x20) {
      json += c;
    }
  }
  return json + "\"";
}

void print_json_result(std::FILE *file, const Result &result, const std::vector<Result> &reads) {
  std::fprintf(file,
               "{\"name\": %s, \"threads\": %d, \"bytes\": %zu, \"best_seconds\": %.6g, "
               "\"median_seconds\": %.6g, \"best_gb_per_s\": %.6g, \"median_gb_per_s\": %.6g",
               quoted(result.name).c_str(), result.threads, result.bytes, result.best,
               result.median, speed(result, result.best), speed(result, result.median));
  if (!result.isa.empty()) {
    std::fprintf(file, ", \"isa\": %s", quoted(result.isa).c_str());
  }
  if (!result.way.empty()) {
    std::fprintf(file, ", \"way\": %s", quoted(result.way).c_str());
  }
  if (result.flops > 0) {
    std::fprintf(file, ", \"best_gflop_per_s\": %.6g", result.flops / result.best * 1e-9);
  }
  if (result.read >= 0) {
    std::fprintf(file, ", \"read\": %s, \"of_read\": %.6g",
                 quoted(reads[static_cast<std::size_t>(result.read)].name).c_str(), result.of_read);
  }
  std::fprintf(file, ", \"finite\": %s}", result.finite ? "true" : "false");
}

} // namespace

void print_header(std::FILE *file) {
  std::string isas;
  for (const std::string &isa : available_isas()) {
    isas += (isas.empty() ? "" : " ") + isa;
  }
  std::fprintf(
      file,
      "%s; instruction sets here: %s\n"
      "best, median: microseconds a call; GB/s by the best; of read: the share of what the "
      "read loop of\nthe same size and threads reaches in the same rounds (median)\n",
      kCompiler, isas.c_str());
}

void print_table(std::FILE *file, const GroupResults &results) {
  std::size_t width = results.name.size();
  for (const Result &read : results.reads) {
    width = std::max(width, read_title(read).size());
  }
  for (const Result &result : results.benchmarks) {
    width = std::max(width, result.name.size());
  }
  const int column = static_cast<int>(width);
  std::fprintf(file, "\n%-*s %11s %11s %8s %8s %9s\n", column, results.name.c_str(), "best",
               "median", "GB/s", "of read", "GFLOP/s");
  for (const Result &read : results.reads) {
    print_row(file, column, read_title(read), read);
  }
  for (const Result &result : results.benchmarks) {
    print_row(file, column, result.name, result);
  }
  std::fflush(file);
}

void print_json(std::FILE *file, const Options &options, const std::vector<GroupResults> &groups) {
  std::fprintf(file, "{\"compiler\": %s, \"min_time\": %g, \"isas\": [", quoted(kCompiler).c_str(),
               options.min_time);
  const char *separator = "";
  for (const std::string &isa : available_isas()) {
    std::fprintf(file, "%s%s", separator, quoted(isa).c_str());
    separator = ", ";
  }
  std::fprintf(file, "],\n\"groups\": [");
  separator = "\n";
  for (const GroupResults &group : groups) {
    std::fprintf(file, "%s{\"name\": %s,\n \"reads\": [", separator, quoted(group.name).c_str());
    separator = ",\n";
    const char *inner = "\n  ";
    for (const Result &read : group.reads) {
      std::fputs(inner, file);
      print_json_result(file, read, group.reads);
      inner = ",\n  ";
    }
    std::fprintf(file, "],\n \"benchmarks\": [");
    inner = "\n  ";
    for (const Result &result : group.benchmarks) {
      std::fputs(inner, file);
      print_json_result(file, result, group.reads);
      inner = ",\n  ";
    }
    std::fprintf(file, "]}");
  }
  std::fprintf(file, "]}\n");
}

} // namespace mixedkv::bench
