//! Layers: attention, norms, rotary embeddings, experts, caches.
