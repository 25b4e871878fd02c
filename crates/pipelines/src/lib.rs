//! Tasks: from raw input through a model to an answer.
//!
//! A [`Pipeline`] is a model with what turns its inputs into tensors and its outputs into answers. There is one file per
//! task; inputs, options and outputs are types of their own, and as JSON they have the keys of Transformers' pipelines.
//! [`AnyPipeline`] is a pipeline of a task that is known only at run time, JSON in and JSON out.
//!
//! Below them are the models that tasks are made of: [`LanguageModel`] continues texts, [`Seq2SeqModel`] reads one and
//! writes another, [`SentenceEncoder`] makes vectors of sentences. [`FromPretrained`] loads all of them by name.
//!
//! ```no_run
//! use oxiformers::{FromPretrained, Pipeline, TextClassification, block_on};
//!
//! # fn main() -> Result<(), oxiformers::Error> {
//! let classify = TextClassification::from_pretrained("distilbert/distilbert-base-uncased-finetuned-sst-2-english")?;
//! let texts = ["I love this film.".into(), "What a waste of time.".into()];
//! for answer in block_on(classify.run(&texts, &Default::default(), 8))? {
//!     println!("{answer}");
//! }
//! # Ok(())
//! # }
//! ```

mod auto;
mod conversation;
mod error;
mod generation;
mod language_model;
mod pipeline;
mod sentence_encoder;
mod seq2seq_model;
pub mod tasks;
mod texts;

pub use auto::{FromPretrained, with_base};
pub use conversation::Conversation;
pub use error::{Error, Result};
pub use language_model::LanguageModel;
#[cfg(all(feature = "fetch", not(target_arch = "wasm32")))]
pub use pipeline::pipeline;
pub use pipeline::{AnyPipeline, OneOrMany, Pipeline, Task};
pub use sentence_encoder::SentenceEncoder;
pub use seq2seq_model::Seq2SeqModel;
pub use tasks::{
    Embeddings, FeatureExtraction, FillMask, QuestionAnswering, Reranking, SentenceSimilarity, Summarization,
    TableQuestionAnswering, Text2TextGeneration, TextClassification, TextGeneration, TokenClassification,
    Translation, ZeroShotClassification,
};
