// The caches.
#include "bindings/arrays.h"
#include "bindings/cache_config.h"
#include "bindings/op_views.h"
#include "bindings/threads.h"

#include "mixedkv/cache.h"
#include "mixedkv/errors.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

namespace mixedkv::bindings {
namespace {

/// A cache and the guard that keeps a second thread out.
class Handle {
public:
  explicit Handle(const CacheConfig &config) : cache_(config) {}

  /// Runs f on the cache without the GIL.
  template <typename F> auto with(F &&f) {
    const Guarded guarded(guard_);
    GilRelease release;
    return f(cache_);
  }
  /// For what is short: runs f with the GIL held.
  template <typename F> auto quickly(F &&f) {
    const Guarded guarded(guard_);
    return f(cache_);
  }
  const CacheConfig &config() const { return cache_.config(); }
  /// Arrays are made before the cache is entered: refuses where it was changed in between.
  void need_unchanged(bool unchanged) const {
    if (!unchanged) {
      guard_.refuse();
    }
  }
  CacheStats stats() {
    const Guarded guarded(guard_);
    CacheStats stats = cache_.stats();
    stats.books_bytes += static_cast<std::int64_t>(tokens_.capacity() * sizeof(tokens_[0]));
    return stats;
  }

  /// find_slot on copies of what the caller gave: arrays that another thread may write to once the
  /// GIL is gone must not change between check and use. n tokens, n + 1 begins, num_ids ids.
  std::optional<Slot> find_slot(const std::int64_t *pos, const std::int64_t *begin,
                                const std::int64_t *ids, std::int64_t n, std::int64_t num_ids) {
    const Guarded guarded(guard_);
    tokens_.assign(pos, pos + n);
    tokens_.insert(tokens_.end(), begin, begin + n + 1);
    tokens_.insert(tokens_.end(), ids, ids + num_ids);
    const std::int64_t *copy = tokens_.data();
    const std::int64_t *begins = copy + n;
    if (begins[0] != 0 || begins[n] != num_ids || !std::is_sorted(begins, begins + n + 1)) {
      throw std::invalid_argument("begin must ascend from 0 to the length of ids");
    }
    GilRelease release;
    return cache_.find_slot(copy, {begins, begins + n + 1}, n);
  }

private:
  MixedCache cache_;
  std::vector<std::int64_t> tokens_; ///< kept for its memory
  Guard guard_{"the cache"};
};

std::optional<std::tuple<std::int64_t, std::int64_t, std::int64_t, std::int64_t>>
find_slot(Handle &handle, const py::array &pos_array, const py::array &begin_array,
          const py::array &ids_array) {
  const ArrayView pos = view_contiguous(pos_array, "pos", 1, {DType::i64});
  const ArrayView begin = view_contiguous(begin_array, "begin", 1, {DType::i64});
  const ArrayView ids = view_contiguous(ids_array, "ids", 1, {DType::i64});
  const std::int64_t n = pos.shape[0];
  check_shape(begin, "begin", {n + 1});
  const auto slot = handle.find_slot(pos.as<const std::int64_t>(), begin.as<const std::int64_t>(),
                                     ids.as<const std::int64_t>(), n, ids.shape[0]);
  if (!slot) {
    return std::nullopt;
  }
  return std::make_tuple(slot->num_tokens, slot->num_hot, slot->num_cold, slot->num_moved);
}

RowsView rows_view(const py::array &array, const std::string &format, const char *name,
                   std::int64_t heads, std::int64_t tokens, std::int64_t width) {
  RowsArray rows = view_rows(array, name, 3, parse_format(format, name));
  rows.shape[2] = rows.width;
  check_shape(rows, name, {heads, tokens, width});
  return {rows.data, rows.format, rows.strides[0], rows.strides[1]};
}

void store(Handle &handle, std::int64_t layer, const py::array &k, const py::array &v,
           const std::string &k_format, const std::string &v_format) {
  const std::int64_t n = handle.quickly([](MixedCache &cache) {
    if (!cache.has_slot()) {
      throw std::invalid_argument("store without a slot: call find_slot first");
    }
    return cache.slot_tokens();
  });
  const CacheConfig &config = handle.config();
  const RowsView k_rows = rows_view(k, k_format, "k", config.num_kv_heads, n, config.head_dim);
  const RowsView v_rows = rows_view(v, v_format, "v", config.num_kv_heads, n, config.head_dim_v);
  const int layer_index = narrow(layer, "layer");
  handle.with([&](MixedCache &cache) {
    handle.need_unchanged(cache.slot_tokens() == n);
    cache.store(layer_index, k_rows, v_rows);
  });
}

void attend_layer(Handle &handle, std::int64_t layer, const py::array &q_array,
                  const py::array &out_array, const OptionalArray &lse_array, double sm_scale,
                  double logits_soft_cap, std::optional<std::int64_t> window_left,
                  const OptionalArray &alibi_array, const OptionalArray &sinks_array, int threads,
                  const std::string &compute_type) {
  for (const NamedArray &target : {NamedArray("out", out_array), NamedArray("lse", lse_array)}) {
    check_apart(target, {{"q", q_array}, {"alibi_slopes", alibi_array}, {"sinks", sinks_array}});
  }
  const std::int64_t n = handle.quickly([](MixedCache &cache) {
    if (!cache.has_slot()) {
      throw std::invalid_argument("attend without a slot: call find_slot first");
    }
    return cache.slot_tokens();
  });
  const CacheConfig &config = handle.config();
  const ArrayView q = view_array(q_array, "q", 3, {DType::f32, DType::f16});
  const std::int64_t heads = q.shape[0];
  if (heads < 1 || heads % config.num_kv_heads != 0) {
    throw std::invalid_argument("the heads of q must be a multiple of num_kv_heads " +
                                std::to_string(config.num_kv_heads) + ", got " +
                                std::to_string(heads));
  }
  check_shape(q, "q", {heads, n, config.head_dim});
  const ArrayView out = view_array(out_array, "out", 3, {DType::f32}, Access::write);
  check_shape(out, "out", {heads, n, config.head_dim_v});
  AttendOptions options;
  options.sm_scale = static_cast<float>(sm_scale);
  options.logits_soft_cap = static_cast<float>(logits_soft_cap);
  options.window_left = window_left;
  options.num_threads = threads;
  options.compute_type = parse_compute_type(compute_type);
  options.alibi_slopes = per_head(alibi_array, "alibi_slopes", heads);
  options.sinks = per_head(sinks_array, "sinks", heads);

  QueryView queries;
  queries.data = q.data;
  queries.type = plain_format(q.dtype);
  queries.head_stride = q.strides[0];
  queries.row_stride = q.strides[1];
  queries.len = n;
  OutputView output = output_view(out.data, out.strides[0], out.strides[1]);
  if (lse_array) {
    const ArrayView lse = view_contiguous(*lse_array, "lse", 2, {DType::f32}, Access::write);
    check_shape(lse, "lse", {heads, n});
    set_lse(output, lse.data, n * kFloatSize, kFloatSize);
  }
  const int layer_index = narrow(layer, "layer");
  const int num_heads = narrow(heads, "Hq");
  handle.with([&](MixedCache &cache) {
    handle.need_unchanged(cache.slot_tokens() == n);
    cache.attend(layer_index, queries, num_heads, options, output);
  });
}

py::tuple positions(Handle &handle, std::int64_t seq) {
  const std::int64_t n = handle.quickly([&](MixedCache &cache) { return cache.seq_len(seq); });
  py::array_t<std::int64_t> pos(n);
  py::array_t<bool> in_cold(n);
  std::vector<std::uint8_t> cold(static_cast<std::size_t>(n));
  handle.quickly([&](MixedCache &cache) {
    handle.need_unchanged(cache.seq_len(seq) == n);
    cache.positions(seq, pos.mutable_data(), cold.data());
  });
  for (std::int64_t i = 0; i < n; ++i) {
    in_cold.mutable_data()[i] = cold[static_cast<std::size_t>(i)] != 0;
  }
  return py::make_tuple(pos, in_cold);
}

template <typename Fill>
py::array_t<float> rows_copy(Handle &handle, std::int64_t seq, std::int64_t width, Fill &&fill) {
  const std::int64_t n = handle.quickly([&](MixedCache &cache) { return cache.seq_len(seq); });
  py::array_t<float> out({static_cast<std::int64_t>(handle.config().num_kv_heads), n, width});
  float *data = out.mutable_data();
  handle.with([&](MixedCache &cache) {
    handle.need_unchanged(cache.seq_len(seq) == n);
    fill(cache, data);
  });
  return out;
}

py::array rows_array(Format type, std::int64_t heads, std::int64_t n, std::int64_t width) {
  switch (type) {
  case Format::f32:
    return py::array(py::dtype::of<float>(), std::vector<py::ssize_t>{heads, n, width});
  case Format::f16:
    return py::array(py::dtype("float16"), std::vector<py::ssize_t>{heads, n, width});
  default:
    const auto bytes = static_cast<py::ssize_t>(row_bytes(type, static_cast<std::size_t>(width)));
    return py::array(py::dtype::of<std::uint8_t>(), std::vector<py::ssize_t>{heads, n, bytes});
  }
}

/// ((pos, k, v) of hot, (pos, k, v) of cold): as stored, or as f32.
py::tuple export_rows(Handle &handle, std::int64_t layer, std::int64_t seq, bool dequantize) {
  const CacheConfig &config = handle.config();
  const int index = narrow(layer, "layer");
  std::int64_t num_hot = 0;
  std::int64_t num_cold = 0;
  handle.quickly([&](MixedCache &cache) { cache.export_len(seq, num_hot, num_cold); });
  struct TierRows {
    py::array_t<std::int64_t> pos;
    py::array k;
    py::array v;
    StoredRows stored() { return {pos.mutable_data(), k.mutable_data(), v.mutable_data()}; }
    DequantizedRows dequantized() {
      return {pos.mutable_data(), static_cast<float *>(k.mutable_data()),
              static_cast<float *>(v.mutable_data())};
    }
  };
  const auto make = [&](std::int64_t n, Format k_type, Format v_type) {
    const std::int64_t heads = config.num_kv_heads;
    return TierRows{py::array_t<std::int64_t>(n),
                    rows_array(dequantize ? Format::f32 : k_type, heads, n, config.head_dim),
                    rows_array(dequantize ? Format::f32 : v_type, heads, n, config.head_dim_v)};
  };
  TierRows hot = make(num_hot, config.hot_k_type, config.hot_v_type);
  TierRows cold = make(num_cold, config.cold_k_type, config.cold_v_type);
  const auto check = [&](MixedCache &cache) {
    std::int64_t hot_now = 0;
    std::int64_t cold_now = 0;
    cache.export_len(seq, hot_now, cold_now);
    handle.need_unchanged(hot_now == num_hot && cold_now == num_cold);
  };
  if (dequantize) {
    const DequantizedRows to_hot = hot.dequantized();
    const DequantizedRows to_cold = cold.dequantized();
    handle.with([&](MixedCache &cache) {
      check(cache);
      cache.export_dequantized(index, seq, to_hot, to_cold);
    });
  } else {
    const StoredRows to_hot = hot.stored();
    const StoredRows to_cold = cold.stored();
    handle.quickly([&](MixedCache &cache) {
      check(cache);
      cache.export_rows(index, seq, to_hot, to_cold);
    });
  }
  return py::make_tuple(py::make_tuple(hot.pos, hot.k, hot.v),
                        py::make_tuple(cold.pos, cold.k, cold.v));
}

py::dict stats(Handle &handle) {
  const CacheStats s = handle.stats();
  py::dict d;
  d["hot_tokens"] = s.hot_tokens;
  d["cold_tokens"] = s.cold_tokens;
  d["hot_size"] = s.hot_size;
  d["cold_size"] = s.cold_size;
  d["tokens_seen"] = s.tokens_seen;
  d["moved"] = s.moved;
  d["events"] = s.events;
  d["move_seconds"] = s.move_seconds;
  d["hot_bytes"] = s.hot_bytes;
  d["cold_bytes"] = s.cold_bytes;
  d["journal_bytes"] = s.journal_bytes;
  d["books_bytes"] = s.books_bytes;
  d["scratch_bytes"] = s.scratch_bytes;
  d["bytes_saved"] = s.bytes_saved;
  return d;
}

std::vector<int> held_layers(Handle &handle) {
  const CacheConfig &config = handle.config();
  std::vector<int> held;
  for (int layer = 0; layer < config.num_layers; ++layer) {
    if (config.layer_filter.empty() || config.layer_filter[static_cast<std::size_t>(layer)] != 0) {
      held.push_back(layer);
    }
  }
  return held;
}

} // namespace

void register_cache(py::module_ &m) {
  py::register_exception<CacheFull>(m, "CacheFull", PyExc_RuntimeError).doc() =
      "There is no room for what was asked; the message says what was asked and what is free.";
  m.def("cache_config_fields", &config_fields);
  m.def("check_config", [](const py::kwargs &options) { check_config(read_config(options)); });
  py::class_<Handle>(m, "MixedCache")
      .def(py::init(
          [](const py::kwargs &options) { return std::make_unique<Handle>(read_config(options)); }))
      .def("config", [](const Handle &h) { return config_dict(h.config()); })
      .def("find_slot", &find_slot, py::arg("pos"), py::arg("begin"), py::arg("ids"))
      .def("store", &store, py::arg("layer"), py::arg("k"), py::arg("v"), py::arg("k_format"),
           py::arg("v_format"))
      .def("attend", &attend_layer, py::arg("layer"), py::arg("q"), py::arg("out"), py::arg("lse"),
           py::arg("sm_scale"), py::arg("logits_soft_cap"), py::arg("window_left"),
           py::arg("alibi_slopes"), py::arg("sinks"), py::arg("threads"), py::arg("compute_type"))
      .def("commit", [](Handle &h) { h.with([](MixedCache &c) { c.commit(); }); })
      .def("restore", [](Handle &h) { h.with([](MixedCache &c) { c.restore(); }); })
      .def(
          "seq_rm",
          [](Handle &h, std::int64_t seq, std::int64_t p0, std::int64_t p1) {
            h.quickly([&](MixedCache &c) { c.seq_rm(seq, p0, p1); });
          },
          py::arg("seq"), py::arg("p0"), py::arg("p1"))
      .def(
          "seq_cp",
          [](Handle &h, std::int64_t src, std::int64_t dst, std::int64_t p0, std::int64_t p1) {
            h.quickly([&](MixedCache &c) { c.seq_cp(src, dst, p0, p1); });
          },
          py::arg("src"), py::arg("dst"), py::arg("p0"), py::arg("p1"))
      .def(
          "seq_keep",
          [](Handle &h, std::int64_t seq) { h.quickly([&](MixedCache &c) { c.seq_keep(seq); }); },
          py::arg("seq"))
      .def(
          "seq_add",
          [](Handle &h, std::int64_t seq, std::int64_t p0, std::int64_t p1, std::int64_t delta) {
            h.with([&](MixedCache &c) { c.seq_add(seq, p0, p1, delta); });
          },
          py::arg("seq"), py::arg("p0"), py::arg("p1"), py::arg("delta"))
      .def(
          "seq_div",
          [](Handle &h, std::int64_t seq, std::int64_t p0, std::int64_t p1, std::int64_t d) {
            h.with([&](MixedCache &c) { c.seq_div(seq, p0, p1, d); });
          },
          py::arg("seq"), py::arg("p0"), py::arg("p1"), py::arg("d"))
      .def(
          "seq_gather",
          [](Handle &h, const py::array &sources) {
            const ArrayView view = view_contiguous(sources, "sources", 1, {DType::i64});
            h.quickly(
                [&](MixedCache &c) { c.seq_gather(view.as<const std::int64_t>(), view.shape[0]); });
          },
          py::arg("sources"))
      .def(
          "seq_pos_min",
          [](Handle &h, std::int64_t seq) {
            return h.quickly([&](MixedCache &c) { return c.seq_pos_min(seq); });
          },
          py::arg("seq"))
      .def(
          "seq_pos_max",
          [](Handle &h, std::int64_t seq) {
            return h.quickly([&](MixedCache &c) { return c.seq_pos_max(seq); });
          },
          py::arg("seq"))
      .def("clear", [](Handle &h) { h.quickly([](MixedCache &c) { c.clear(); }); })
      .def("size", [](Handle &h) { return h.quickly([](MixedCache &c) { return c.size(); }); })
      .def("layers", &held_layers)
      .def("positions", &positions, py::arg("seq"))
      .def(
          "keys",
          [](Handle &h, std::int64_t layer, std::int64_t seq) {
            const int index = narrow(layer, "layer");
            return rows_copy(h, seq, h.config().head_dim,
                             [&](MixedCache &c, float *out) { c.keys(index, seq, out); });
          },
          py::arg("layer"), py::arg("seq"))
      .def(
          "values",
          [](Handle &h, std::int64_t layer, std::int64_t seq) {
            const int index = narrow(layer, "layer");
            return rows_copy(h, seq, h.config().head_dim_v,
                             [&](MixedCache &c, float *out) { c.values(index, seq, out); });
          },
          py::arg("layer"), py::arg("seq"))
      .def("export_rows", &export_rows, py::arg("layer"), py::arg("seq"), py::arg("dequantize"))
      .def("stats", &stats);
}

} // namespace mixedkv::bindings
