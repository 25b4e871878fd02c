//! The decoding loop: logits processors, stopping rules, caches, beams, speculation.
