//! Raw data to tensors and back: tokenizers and chat templates.
