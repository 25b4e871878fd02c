//! Hugging Face Transformers, in Rust: load, run, fine-tune and share open models.
