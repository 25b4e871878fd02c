//! What the parity tests share.

// Each test uses some of it.
#![allow(dead_code)]

pub mod encoders;

use std::path::{Path, PathBuf};

use burn::tensor::{Device, Int, Tensor, TensorData};
use oxiformers_hub::ModelFiles;
use oxiformers_hub::checkpoint::{Checkpoint, DType};

/// Largest absolute difference of logits that are scaled to about 1.
pub const TOLERANCE: f32 = 1e-4;

/// The fixtures in a folder of `tests/fixtures`, sorted by name.
pub fn fixtures(folder: &str) -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fixtures")
        .join(folder);
    let mut dirs: Vec<_> = std::fs::read_dir(root)
        .expect("fixtures")
        .map(|entry| entry.expect("entry").path())
        .filter(|path| path.join("reference.safetensors").exists())
        .collect();
    dirs.sort();
    dirs
}

/// Tensors of a `reference.safetensors`.
pub struct Reference(Checkpoint);

impl Reference {
    pub fn open(dir: &Path) -> Self {
        Self::open_file(&dir.join("reference.safetensors"))
    }

    pub fn open_file(path: &Path) -> Self {
        let files = ModelFiles::from_file(path).expect("reference");
        Self(Checkpoint::open(&files).expect("reference"))
    }

    pub fn names(&self) -> Vec<String> {
        self.0.tensors().map(|info| info.name.clone()).collect()
    }

    pub fn contains(&self, name: &str) -> bool {
        self.0.info(name).is_some()
    }

    pub fn ids(&self, name: &str) -> Vec<Vec<i64>> {
        let view = self.0.tensor(name).expect(name);
        assert_eq!(view.dtype, DType::I64, "{name}");
        let values: Vec<i64> = view
            .data
            .as_chunks()
            .0
            .iter()
            .map(|b| i64::from_le_bytes(*b))
            .collect();
        values
            .chunks(*view.shape.last().expect("shape"))
            .map(<[i64]>::to_vec)
            .collect()
    }

    pub fn floats(&self, name: &str) -> Vec<f32> {
        let view = self.0.tensor(name).expect(name);
        assert_eq!(view.dtype, DType::F32, "{name}");
        view.data
            .as_chunks()
            .0
            .iter()
            .map(|b| f32::from_le_bytes(*b))
            .collect()
    }
}

pub fn tensor(rows: &[Vec<i64>], columns: std::ops::Range<usize>) -> Tensor<2, Int> {
    let flat: Vec<i32> = rows
        .iter()
        .flat_map(|row| &row[columns.clone()])
        .map(|id| *id as i32)
        .collect();
    Tensor::from_data(
        TensorData::new(flat, [rows.len(), columns.len()]),
        &Device::flex(),
    )
}

pub fn values(tensor: Tensor<3>) -> Vec<f32> {
    tensor.into_data().try_to_vec().expect("f32")
}

pub fn largest_difference(ours: &[f32], reference: &[f32]) -> f32 {
    assert_eq!(ours.len(), reference.len());
    // A NaN must not hide behind `max`.
    let difference = |(a, b): (&f32, &f32)| {
        if (a - b).is_nan() {
            f32::INFINITY
        } else {
            (a - b).abs()
        }
    };
    ours.iter().zip(reference).map(difference).fold(0.0, f32::max)
}
