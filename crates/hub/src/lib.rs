//! Find, fetch, cache and read checkpoints.
//!
//! [`ModelFiles`] is what every upper room reads from: the files of one model, whether they lie in a folder,
//! in one GGUF file or in the memory of a browser. On native platforms they come from the places that a
//! `Source` names: the Hugging Face Hub, a Python package, a folder or a file.

pub mod checkpoint;
mod error;
mod files;

pub use error::{Error, Result};
pub use files::ModelFiles;
