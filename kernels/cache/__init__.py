"""What the ops on key-value caches share: layouts, addressing, checks, rows."""
