//! Packed weights: one trait, one file per scheme.
