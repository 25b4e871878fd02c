//! Safetensors checkpoints.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| oxiformers_fuzz::checkpoint("model.safetensors", data));
