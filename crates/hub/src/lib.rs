//! Find, fetch, cache and read checkpoints.
