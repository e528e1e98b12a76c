// From subjects to benchmarks that google-benchmark knows.
#pragma once

#include "options.h"
#include "subject.h"

#include <cstddef>
#include <functional>
#include <memory>
#include <string>

namespace mixedkv::bench {

/// What a call's speed is counted by.
struct Work {
  std::size_t bytes = 0; ///< K and V read, or a conversion's wider side
  double ops = 0;        ///< arithmetic operations, or values converted or read
  bool resets = false;   ///< each call needs a reset before it, which is not timed
};

using MakeSubject = std::function<std::unique_ptr<Subject>()>;

/// Registers name/ISA/threads=N for every ISA and number of threads that the options name. They
/// share one subject, which is made when the first of them runs, and stays: repetitions of all
/// benchmarks take turns.
void add_benchmarks(const Options &options, const std::string &name, const Work &work,
                    const MakeSubject &make);
/// The same without an ISA of ours.
void add_foreign_benchmarks(const Options &options, const std::string &name, const Work &work,
                            const MakeSubject &make);

/// Whether a result was not finite, or something threw, in any benchmark so far.
bool any_failed();

void add_read_benchmarks(const Options &options);
void add_attention_benchmarks(const Options &options);
void add_conversion_benchmarks(const Options &options);
void add_kernel_benchmarks(const Options &options);

} // namespace mixedkv::bench
