//! What the tests share.

// Each test uses some of it.
#![allow(dead_code)]

use std::path::{Path, PathBuf};

use safetensors::SafeTensors;

/// A file of `tests/fixtures`.
pub fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fixtures")
        .join(name)
}

/// A JSON file of `tests/fixtures`.
pub fn json(name: &str) -> serde_json::Value {
    let bytes = std::fs::read(fixture(name)).expect(name);
    serde_json::from_slice(&bytes).expect(name)
}

/// Numbers from -1 to 1: those of `noise` in `make.py`.
pub fn noise(seed: u32, len: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(12_345);
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..len).map(|_| next()).collect()
}

/// Tensors of a fixture.
pub struct Reference(Vec<u8>);

impl Reference {
    pub fn open(name: &str) -> Self {
        Self(std::fs::read(fixture(name)).expect(name))
    }

    pub fn floats(&self, name: &str) -> Vec<f32> {
        let tensors = SafeTensors::deserialize(&self.0).expect("safetensors");
        let data = tensors.tensor(name).expect(name).data().to_vec();
        data.as_chunks()
            .0
            .iter()
            .map(|b| f32::from_le_bytes(*b))
            .collect()
    }
}
