// What can be read of a cache: its tokens and their rows, and the counters. Changes nothing.
#include "cache/mixed_cache_impl.h"

namespace mixedkv {
namespace {

using GetRow = void (RowStorage::*)(int layer, int head, std::int64_t cell, float *row) const;

struct Place {
  const RowStorage &rows;
  int layer;
};

/// Where the rows of a token are in the layer that has this number.
Place place_of(const KeySources &sources, const Token &token, int number) {
  if (token.source == Source::scratch) {
    return {*sources.scratch, 0};
  }
  return {token.source == Source::cold ? sources.cold.rows : sources.hot.rows, number};
}

/// Rows of tokens as what they stand for, of all heads.
void get_rows(const KeySources &sources, const std::vector<Token> &tokens, int number, GetRow get,
              const RowTransform *transform, int width, float *out) {
  for (int head = 0; head < sources.hot.rows.shape().num_kv_heads; ++head) {
    for (const Token &token : tokens) {
      const Place place = place_of(sources, token, number);
      (place.rows.*get)(place.layer, head, token.cell, out);
      if (transform != nullptr) {
        transform->undo(out, static_cast<std::size_t>(width));
      }
      out += width;
    }
  }
}

/// Rows of tokens as they are stored, of all heads.
void get_stored_rows(const KeySources &sources, const std::vector<Token> &tokens, int number,
                     const RowShape &shape, const StoredRows &to) {
  char *k = static_cast<char *>(to.k);
  char *v = static_cast<char *>(to.v);
  for (std::size_t i = 0; i < tokens.size(); ++i) {
    to.pos[i] = tokens[i].pos;
  }
  for (int head = 0; head < shape.num_kv_heads; ++head) {
    for (const Token &token : tokens) {
      const Place place = place_of(sources, token, number);
      place.rows.get_stored_k(place.layer, head, token.cell, k);
      place.rows.get_stored_v(place.layer, head, token.cell, v);
      k += shape.k_row_bytes();
      v += shape.v_row_bytes();
    }
  }
}

} // namespace

std::vector<Token> MixedCache::Impl::committed(std::int64_t seq) const {
  check_seq("seq", seq, config.n_seq_max);
  return committed_tokens(hot, cold, static_cast<int>(seq));
}

std::vector<Token> MixedCache::Impl::attended(std::int64_t seq, bool in_cold) const {
  check_seq("seq", seq, config.n_seq_max);
  return attended_tokens(sources(), static_cast<int>(seq), in_cold);
}

const CacheConfig &MixedCache::config() const { return impl_->config; }

bool MixedCache::has_slot() const { return impl_->slot.active; }

std::int64_t MixedCache::slot_tokens() const {
  return impl_->slot.active ? impl_->slot.num_tokens() : 0;
}

std::int64_t MixedCache::size() const {
  return impl_->hot.cells.num_committed() + impl_->cold.cells.num_committed();
}

std::int64_t MixedCache::seq_len(std::int64_t seq) const {
  check_seq("seq", seq, impl_->config.n_seq_max);
  std::int64_t n = 0;
  for (const Cells *cells : {&impl_->hot.cells, &impl_->cold.cells}) {
    for (std::int32_t cell = 0; cell < cells->end(); ++cell) {
      n += cells->committed(cell) && cells->owned_by(cell, static_cast<int>(seq));
    }
  }
  return n;
}

void MixedCache::positions(std::int64_t seq, std::int64_t *pos, std::uint8_t *in_cold) const {
  std::size_t i = 0;
  for (const Token &token : impl_->committed(seq)) {
    if (pos != nullptr) {
      pos[i] = token.pos;
    }
    if (in_cold != nullptr) {
      in_cold[i] = token.source == Source::cold;
    }
    ++i;
  }
}

void MixedCache::keys(int layer, std::int64_t seq, float *out) const {
  const Impl &m = *impl_;
  const int number = m.layer_number(layer);
  get_rows(m.sources(), m.committed(seq), number, &RowStorage::get_k, m.transforms.keys.get(),
           m.config.head_dim, out);
}

void MixedCache::values(int layer, std::int64_t seq, float *out) const {
  const Impl &m = *impl_;
  const int number = m.layer_number(layer);
  get_rows(m.sources(), m.committed(seq), number, &RowStorage::get_v, m.transforms.values.get(),
           m.config.head_dim_v, out);
}

void MixedCache::export_len(std::int64_t seq, std::int64_t &num_hot, std::int64_t &num_cold) const {
  num_hot = static_cast<std::int64_t>(impl_->attended(seq, false).size());
  num_cold = static_cast<std::int64_t>(impl_->attended(seq, true).size());
}

void MixedCache::export_rows(int layer, std::int64_t seq, const StoredRows &to_hot,
                             const StoredRows &to_cold) const {
  const Impl &m = *impl_;
  const int number = m.layer_number(layer);
  if (m.cold.rows.shape().center_keys) {
    throw std::invalid_argument("export_rows: center_keys is on, and the rows of cold keys say "
                                "nothing without what they were stored less of; dequantised "
                                "rows have it added");
  }
  m.need_exportable(layer, number);
  get_stored_rows(m.sources(), m.attended(seq, false), number, m.hot.rows.shape(), to_hot);
  get_stored_rows(m.sources(), m.attended(seq, true), number, m.cold.rows.shape(), to_cold);
}

void MixedCache::export_dequantized(int layer, std::int64_t seq, const DequantizedRows &to_hot,
                                    const DequantizedRows &to_cold) const {
  const Impl &m = *impl_;
  const int number = m.layer_number(layer);
  m.need_exportable(layer, number);
  for (const DequantizedRows *to : {&to_hot, &to_cold}) {
    const std::vector<Token> tokens = m.attended(seq, to == &to_cold);
    for (std::size_t i = 0; i < tokens.size(); ++i) {
      to->pos[i] = tokens[i].pos;
    }
    get_rows(m.sources(), tokens, number, &RowStorage::get_k, m.transforms.keys.get(),
             m.config.head_dim, to->k);
    get_rows(m.sources(), tokens, number, &RowStorage::get_v, m.transforms.values.get(),
             m.config.head_dim_v, to->v);
  }
}

CacheStats MixedCache::stats() const {
  const Impl &m = *impl_;
  CacheStats stats;
  stats.hot_tokens = m.hot.cells.num_committed();
  stats.cold_tokens = m.cold.cells.num_committed();
  stats.hot_size = m.hot.cells.size();
  stats.cold_size = m.cold.cells.size();
  stats.tokens_seen = m.counters.tokens_seen;
  stats.moved = m.counters.moved;
  stats.events = m.counters.events;
  stats.move_seconds = m.counters.move_seconds;
  stats.hot_bytes = static_cast<std::int64_t>(m.hot.rows.bytes());
  stats.cold_bytes = static_cast<std::int64_t>(m.cold.rows.bytes());
  stats.journal_bytes = static_cast<std::int64_t>(m.journal.bytes());
  stats.books_bytes = static_cast<std::int64_t>(
      m.hot.cells.bytes() + m.hot.placement.bytes() + m.cold.cells.bytes() +
      m.cold.placement.bytes() + m.slot.bytes() + m.visibility.bytes() + m.movable.bytes() +
      m.targets.capacity() * sizeof(std::int32_t) +
      m.owner_words.capacity() * sizeof(std::uint64_t) + m.changed_k.bytes() + m.changed_v.bytes() +
      m.layer_numbers.capacity() * sizeof(int) + sizeof(Impl));
  stats.scratch_bytes = static_cast<std::int64_t>(m.slot.scratch_bytes());
  RowShape f16 = m.cold.rows.shape();
  f16.k_type = Format::f16;
  f16.v_type = Format::f16;
  stats.bytes_saved =
      stats.cold_tokens * (static_cast<std::int64_t>(f16.bytes_per_cell()) -
                           static_cast<std::int64_t>(m.cold.rows.shape().bytes_per_cell()));
  return stats;
}

} // namespace mixedkv
