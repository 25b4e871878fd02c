//! GGUF: the tensors, and the tokenizer that the metadata describe.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    oxiformers_fuzz::checkpoint("model.gguf", data);
    oxiformers_fuzz::tokenizer(&oxiformers_fuzz::model("model.gguf", data));
});
