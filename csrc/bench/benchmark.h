// What is timed: subjects, and the benchmarks (a subject on an instruction set and a number of
// threads) in groups. The benchmarks of a group take turns.
#pragma once

#include "../kernels/kernels.h"
#include "options.h"

#include <cstddef>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace mixedkv::bench {

/// How a subject is to run. The table is the active one, and the threads are the default, too.
struct Context {
  const Kernels *kernels;
  int threads;
};

/// Owns its data, which are random and touched. Benchmarks of a group share a subject.
class Subject {
public:
  Subject() = default;
  Subject(const Subject &) = delete;
  Subject &operator=(const Subject &) = delete;
  virtual ~Subject() = default;

  /// Before each of a benchmark's turns.
  virtual void prepare(const Context &) {}
  /// One call, which is timed.
  virtual void run(const Context &context) = 0;
  /// True where each call must be preceded by a reset, which is not timed.
  virtual bool resets() const { return false; }
  virtual void reset() {}
  /// Some number that hangs on what run wrote, finite where that is.
  virtual float result() const = 0;
};

struct Benchmark {
  std::string subject_name; ///< "decode/cold_q4_0/32x8x128/kv=4096"
  std::string isa;          ///< empty: none of ours
  int threads = 1;
  std::size_t bytes = 0; ///< that its GB/s count: K and V read, or a conversion's wider side
  double flops = 0;      ///< 0: not counted
  std::function<std::shared_ptr<Subject>()> make;

  std::string name() const;
};

struct Group {
  std::string name;
  std::vector<Benchmark> benchmarks;
};

/// Adds subjects to a group, each on every ISA and number of threads that the options name.
class GroupBuilder {
public:
  GroupBuilder(const Options &options, std::string name);

  template <typename Make>
  void add(const std::string &subject_name, std::size_t bytes, double flops, Make make) {
    add_each(subject_name, options_.isas, bytes, flops, sharing(make));
  }
  /// The same without an ISA of ours.
  template <typename Make>
  void add_foreign(const std::string &subject_name, std::size_t bytes, Make make) {
    add_each(subject_name, {""}, bytes, 0, sharing(make));
  }
  Group take() { return std::move(group_); }

private:
  /// A maker that hands out one subject as long as anybody holds it.
  template <typename Make> static std::function<std::shared_ptr<Subject>()> sharing(Make make) {
    auto held = std::make_shared<std::weak_ptr<Subject>>();
    return [held, make]() -> std::shared_ptr<Subject> {
      std::shared_ptr<Subject> subject = held->lock();
      if (subject == nullptr) {
        subject = make();
        *held = subject;
      }
      return subject;
    };
  }
  void add_each(const std::string &subject_name, const std::vector<std::string> &isas,
                std::size_t bytes, double flops, std::function<std::shared_ptr<Subject>()> make);

  const Options &options_;
  Group group_;
};

/// The numbers or shapes that the user named, else a subject's own.
template <typename T>
std::vector<T> chosen(const std::vector<T> &named, const std::vector<T> &own) {
  return named.empty() ? own : named;
}

void add_attention_groups(const Options &options, std::vector<Group> &groups);
void add_conversion_groups(const Options &options, std::vector<Group> &groups);
void add_kernel_groups(const Options &options, std::vector<Group> &groups);

/// The sum of n numbers, for result().
float sum_of(const float *x, std::size_t n);

} // namespace mixedkv::bench
