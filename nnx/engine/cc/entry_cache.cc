#include "nnx/engine/cc/entry_cache.h"

#include <utility>

namespace nnx::engine {

std::vector<EntryCache::Ptr> EntryCache::Find(size_t key) const {
  std::vector<Ptr> found;
  const auto [begin, end] = index_.equal_range(key);
  for (auto item = begin; item != end; ++item) {
    found.push_back(item->second->shared_from_this());
  }
  return found;
}

void EntryCache::Unindex(size_t key, const Entry* entry) {
  const auto [begin, end] = index_.equal_range(key);
  for (auto item = begin; item != end; ++item) {
    if (item->second != entry) continue;
    index_.erase(item);
    return;
  }
}

void EntryCache::Use(const Ptr& entry, std::optional<size_t> fingerprint) {
  if (!entry->cached_) return;  // dropped meanwhile
  entries_.splice(entries_.begin(), entries_, entry->place_);
  if (!fingerprint || fingerprint == entry->fingerprint_) return;
  if (entry->fingerprint_) Unindex(*entry->fingerprint_, entry.get());
  entry->fingerprint_ = fingerprint;
  index_.emplace(*fingerprint, entry.get());
}

void EntryCache::Insert(Ptr entry, size_t hash,
                        std::optional<size_t> fingerprint) {
  entry->hash_ = hash;
  entry->fingerprint_ = fingerprint;
  entry->cached_ = true;
  entries_.push_front(entry);
  entry->place_ = entries_.begin();
  index_.emplace(hash, entry.get());
  if (fingerprint) index_.emplace(*fingerprint, entry.get());
  ++version_;
  if (entries_.size() <= kMaxEntries) return;
  const Ptr dropped = entries_.back();
  Unindex(dropped->hash_, dropped.get());
  if (dropped->fingerprint_) Unindex(*dropped->fingerprint_, dropped.get());
  dropped->cached_ = false;
  entries_.pop_back();
}

void EntryCache::Clear() {
  std::list<Ptr> dropped;
  dropped.swap(entries_);
  index_.clear();
  for (const Ptr& entry : dropped) entry->cached_ = false;
}

}  // namespace nnx::engine
