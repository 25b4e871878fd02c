//! From a name to the files of a model: the Hub, package indexes, and the cache that they fill.

mod archive;
pub mod cache;
mod default_model;
mod download;
mod http;
mod hub;
mod names;
mod options;
mod progress;
mod pypi;
mod source;

pub use default_model::default_chat_model;
pub use options::FetchOptions;
pub use progress::{Bars, Event, Progress, Silent};
#[cfg(fuzzing)]
pub use pypi::read_index_page;
pub use source::{Source, fetch_dataset, resolve};
