#ifndef NNX_ENGINE_CC_ENTRY_CACHE_H_
#define NNX_ENGINE_CC_ENTRY_CACHE_H_

#include <Python.h>

#include <cstddef>
#include <cstdint>
#include <list>
#include <memory>
#include <optional>
#include <unordered_map>
#include <vector>

#include "nnx/engine/cc/py_ref.h"

namespace nnx::engine {

// One structure of the arguments that a function was called with, and the flat
// function for it.
struct Entry : std::enable_shared_from_this<Entry> {
  Ref structure;
  Ref names;     // tuple of keyword names, sorted; null for none
  Ref compiled;  // (tuple of kept leaves[, tuple of donated leaves]) -> Packed
  std::vector<int32_t> kept;     // leaf numbers; used when anything is donated
  std::vector<int32_t> donated;  // leaf numbers
  // Where it is not null, `compiled` donates nothing; this does, and takes a
  // Loan of the donated leaves, which are Variables of their own.
  Ref in_place;
  std::vector<int32_t> lenders;  // index of the Variable of each donated leaf
  std::vector<bool> owners;      // by index: whether it is one of them
  // The calls in a row that would have copied most of what they donate.
  mutable int copying = 0;
  mutable bool only_plain = false;  // it turned out not to be possible
  // The plan that was last found to fit what has this structure: mostly the
  // only one there is.
  mutable Ref checked_plan;

 private:
  friend class EntryCache;
  size_t hash_ = 0;                    // of the structure
  std::optional<size_t> fingerprint_;  // of arguments that had it
  std::list<std::shared_ptr<Entry>>::iterator place_;
  bool cached_ = false;
};

// The entries of one function: found by hash, and the least recently used go
// where there are too many. Nothing here runs Python code, but for what the
// end of an entry runs, which comes last.
class EntryCache {
 public:
  // A program for one structure of a small model takes a megabyte or two.
  static constexpr size_t kMaxEntries = 256;

  using Ptr = std::shared_ptr<Entry>;

  size_t size() const { return entries_.size(); }
  const std::list<Ptr>& entries() const { return entries_; }
  // Counts what was put in: one that has not changed finds what it found.
  uint64_t version() const { return version_; }

  // The most recently used, or null.
  Ptr Front() const { return entries_.empty() ? nullptr : entries_.front(); }
  // Those with a hash or fingerprint. To be compared by the caller, which may
  // run Python code that changes the cache.
  std::vector<Ptr> Find(size_t key) const;
  // Marks an entry as used now, for arguments with this fingerprint, if any.
  void Use(const Ptr& entry, std::optional<size_t> fingerprint);
  void Insert(Ptr entry, size_t hash, std::optional<size_t> fingerprint);
  void Clear();

 private:
  void Unindex(size_t key, const Entry* entry);

  std::list<Ptr> entries_;  // the most recently used first
  std::unordered_multimap<size_t, Entry*> index_;
  uint64_t version_ = 0;
};

}  // namespace nnx::engine

#endif  // NNX_ENGINE_CC_ENTRY_CACHE_H_
