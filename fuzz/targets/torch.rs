//! PyTorch checkpoints.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| oxiformers_fuzz::checkpoint("pytorch_model.bin", data));
