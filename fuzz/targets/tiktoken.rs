//! Vocabularies in tiktoken's format and in Mistral's.
#![no_main]

libfuzzer_sys::fuzz_target!(init: oxiformers_fuzz::let_panics_unwind(), |data: &[u8]| {
    for name in ["tiktoken.model", "tekken.json"] {
        oxiformers_fuzz::tokenizer(&oxiformers_fuzz::model(name, data));
    }
});
