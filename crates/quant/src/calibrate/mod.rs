//! Codes that fit what a model multiplies its weights with: functions of one matrix and of what calibration saw.
//!
//! They know no checkpoint and no model; how what they make is stored is said by one file per scheme.

pub mod affine;
pub mod awq;
pub mod gptq;
pub mod hessian;
pub mod hqq;
mod linalg;

pub use affine::{Affine, AffineOptions, Grouped, round_to_nearest};
pub use gptq::{GptqOptions, Report, gptq};
pub use hessian::Hessian;

/// What keeps a matrix from being quantized.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The number of weights is not what the shape says.
    #[error("{values} weights are no matrix of the shape {shape:?}")]
    Size {
        /// `[out_features, in_features]`.
        shape: [usize; 2],
        /// Number of weights.
        values: usize,
    },
    /// A weight is no number.
    #[error("the weight in row {row}, column {column} is {value}; only finite weights can be quantized")]
    NotFinite {
        /// Row of the weight.
        row: usize,
        /// Column of the weight.
        column: usize,
        /// The weight.
        value: f32,
    },
    /// An input that calibration saw is no number.
    #[error("calibration saw inputs that are not finite; check the model and the text")]
    Inputs,
    /// A scale does not fit its storage format.
    #[error("row {row} needs the scale {scale}, which is no half float")]
    Scale {
        /// Row of the group.
        row: usize,
        /// The scale.
        scale: f32,
    },
    /// What was seen has another number of features.
    #[error("calibration saw inputs of {found} features, the weight has {expected}")]
    Features {
        /// Features of the inputs.
        found: usize,
        /// Columns of the weight.
        expected: usize,
    },
    /// No damping makes the Hessian positive definite.
    #[error("the Hessian is not positive definite, not even with a damping of {damp_percent}; use more text")]
    NotPositiveDefinite {
        /// The largest damping tried.
        damp_percent: f32,
    },
    /// An option has a value that it cannot have.
    #[error("`{option}`: {message}")]
    Option {
        /// Name of the option.
        option: &'static str,
        /// What it may be.
        message: String,
    },
}
