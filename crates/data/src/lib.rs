//! Data for training: files of records, what is made of them, where that is kept, in which order it is seen, and how it
//! becomes batches; and tokenizers from a corpus. Nothing here needs the tensor engine.
//!
//! [`DataFile`]s hold records. A [`Preprocessor`], which every [objective](tasks) is, turns each into [`Example`]s, which
//! are kept in a [`TokenCache`]: files that are mapped into memory, so that a corpus may be larger than that, made once
//! for the same data, tokenizer and settings. A [`Dataset`] shows them, a [`Sampler`] says in which order, and an
//! [`Objective`](tasks::Objective) makes a [`Batch`](tasks::Batch) of some.

mod cache;
mod dataset;
mod error;
mod example;
mod files;
mod records;
pub mod shuffle;
pub mod tasks;
pub mod tokenizer;

pub(crate) use cache::hex;
pub use cache::{BadData, CacheOptions, Prepared, Preprocessor, Progress, TokenCache, prepare};
pub use dataset::{Dataset, Sampler, SamplingStrategy, batches};
pub use error::{Error, Result};
pub use example::{Example, Values};
pub use files::find;
pub use records::{DataFile, Format, Place, Record, Records, SampleBy, read};
