//! SentencePiece models.
#![no_main]

libfuzzer_sys::fuzz_target!(init: oxiformers_fuzz::let_panics_unwind(), |data: &[u8]| oxiformers_fuzz::tokenizer(&oxiformers_fuzz::model(
    "tokenizer.model",
    data
)));
