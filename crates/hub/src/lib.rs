//! Find, fetch, cache and read checkpoints.
//!
//! [`ModelFiles`] is what every upper room reads from: the files of one model, whether they lie in a folder,
//! in one GGUF file or in the memory of a browser. With the feature `fetch` they come from the places that a
//! `Source` names: the Hugging Face Hub, a Python package, a folder or a file.

pub mod checkpoint;
mod error;
#[cfg(all(feature = "fetch", not(target_arch = "wasm32")))]
mod fetch;
mod files;
#[cfg(not(target_arch = "wasm32"))]
mod output;

pub use error::{Error, Result};
#[cfg(all(fuzzing, feature = "fetch", not(target_arch = "wasm32")))]
pub use fetch::read_index_page;
#[cfg(all(feature = "fetch", not(target_arch = "wasm32")))]
pub use fetch::{
    Bars, Event, FetchOptions, Progress, Silent, Source, cache, default_chat_model, fetch_dataset, resolve,
};
pub use files::{ModelFiles, release};
#[cfg(not(target_arch = "wasm32"))]
pub use output::OutputFile;
