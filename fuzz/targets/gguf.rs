//! GGUF: the tensors, and the tokenizer that the metadata describe.
#![no_main]

libfuzzer_sys::fuzz_target!(init: oxiformers_fuzz::let_panics_unwind(), |data: &[u8]| {
    oxiformers_fuzz::checkpoint("model.gguf", data);
    oxiformers_fuzz::tokenizer(&oxiformers_fuzz::model("model.gguf", data));
});
