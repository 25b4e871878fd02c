//! What a model is made of, found out by loading it without its values.

use std::sync::Mutex;

use oxiformers_quant::PackedMatrix;

use crate::weights::{Role, lock};

/// A matrix of a model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SurveyedMatrix {
    /// What the model calls it, such as `model.layers.0.mlp.up_proj.weight`; of experts that are stored together, the name
    /// of the tensor and a number.
    pub name: String,
    /// The tensor of the checkpoint that it is, where that is one of its own.
    pub stored: Option<String>,
    /// `[out_features, in_features]`.
    pub shape: [usize; 2],
    /// What it is for.
    pub role: Role,
    /// How it is stored.
    pub scheme: String,
    /// Bytes that it takes.
    pub num_bytes: usize,
}

impl SurveyedMatrix {
    /// The module that it is the weight of.
    pub fn module(&self) -> &str {
        crate::quantized::module_of(&self.name)
    }
}

/// Collects the matrices of a model: see [`LoadOptions::survey`](crate::LoadOptions::survey).
#[derive(Debug, Default)]
pub struct Survey(Mutex<Vec<SurveyedMatrix>>);

impl Survey {
    pub(crate) fn note(&self, name: String, stored: Option<String>, role: Role, matrix: &dyn PackedMatrix) {
        lock(&self.0).push(SurveyedMatrix {
            name,
            stored,
            shape: matrix.shape(),
            role,
            scheme: matrix.scheme().to_string(),
            num_bytes: matrix.num_bytes(),
        });
    }

    /// What was found, in the order of loading.
    pub fn matrices(&self) -> Vec<SurveyedMatrix> {
        lock(&self.0).clone()
    }
}
