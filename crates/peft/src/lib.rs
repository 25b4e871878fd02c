//! Adapters as Hugging Face's PEFT has them: a folder with `adapter_config.json` and `adapter_model.safetensors` changes
//! what a model computes, whose own weights stay as they are.
//!
//! An [`Adapter`] is read from its files and given to whatever loads a model, with
//! [`LoadOptions::adapters`](oxiformers_nn::LoadOptions::adapters); its layers are in `oxiformers-nn`.

pub mod adapter;
pub mod combine;
pub mod config;
mod error;
mod linalg;
#[cfg(not(target_arch = "wasm32"))]
pub mod merge;
mod pattern;
mod random;
#[cfg(not(target_arch = "wasm32"))]
pub mod save;

pub use adapter::Adapter;
pub use config::{AdapterConfig, Method};
pub use error::{Error, Result};
