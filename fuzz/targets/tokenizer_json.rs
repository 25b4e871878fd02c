//! `tokenizer.json`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| oxiformers_fuzz::tokenizer(&oxiformers_fuzz::model(
    "tokenizer.json",
    data
)));
