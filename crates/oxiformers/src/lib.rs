//! Hugging Face Transformers, in Rust: open models from their own files, in one safe, fast library.
//!
//! ```no_run
//! use oxiformers::{FromPretrained, LanguageModel, Message};
//!
//! fn main() -> Result<(), oxiformers::Error> {
//!     let model = LanguageModel::from_pretrained("HuggingFaceTB/SmolLM2-135M-Instruct")?;
//!     let mut chat = model.conversation();
//!     chat.messages.push(Message::user("What is the capital of France?"));
//!     let answer = oxiformers::block_on(chat.answer(model.generation_config.clone(), |tokens| {
//!         tokens.iter().for_each(|token| print!("{}", token.text));
//!         std::ops::ControlFlow::Continue(())
//!     }))?;
//!     println!("\n{} tokens", answer.ids.len());
//!     Ok(())
//! }
//! ```
//!
//! [`LanguageModel`] puts the parts together that a checkpoint consists of, [`Seq2SeqModel`] those of an
//! encoder-decoder. A [`Pipeline`] does a whole task, from raw input to an answer. The parts live in rooms of their own,
//! re-exported here: [`pipelines`] holds the tasks, [`hub`] finds and reads files, [`processors`] turns text into token ids and back, [`models`]
//! holds the architectures, [`nn`] their layers, [`peft`] adapters of them, [`quant`] their packed weights, [`generate`] the
//! decoding loop. `train` learns, and `data` is what it learns from.

pub mod device;
mod perplexity;

#[cfg(not(target_arch = "wasm32"))]
pub use oxiformers_data as data;
pub use oxiformers_generate as generate;
pub use oxiformers_hub as hub;
pub use oxiformers_models as models;
pub use oxiformers_nn as nn;
pub use oxiformers_peft as peft;
pub use oxiformers_pipelines as pipelines;
pub use oxiformers_processors as processors;
pub use oxiformers_quant as quant;
#[cfg(not(target_arch = "wasm32"))]
pub use oxiformers_train as train;

pub use burn::tensor::FloatDType;
pub use futures::executor::block_on;
pub use generate::{
    CacheConfig, Constraint, Draft, FinishReason, Generated, GenerationConfig, Generator, Grammar, Step,
    Token,
};
pub use models::{
    AutoConfig, AutoModel, AutoModelFor, AutoModelForCausalLM, AutoModelForDocumentQuestionAnswering,
    AutoModelForMaskedLM, AutoModelForMultipleChoice, AutoModelForNextSentencePrediction,
    AutoModelForPreTraining, AutoModelForQuestionAnswering, AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification, AutoModelForTableQuestionAnswering, AutoModelForTextEncoding,
    AutoModelForTokenClassification, CausalLM, Labels, ProblemType, Seq2SeqLM,
};
pub use nn::{EncoderInputs, LoadOptions};
pub use perplexity::{Perplexity, PerplexityOptions, perplexity, perplexity_with};
#[cfg(all(feature = "fetch", not(target_arch = "wasm32")))]
pub use pipelines::pipeline;
pub use pipelines::{
    AnyPipeline, Conversation, Embeddings, Error, FeatureExtraction, FillMask, FromPretrained, LanguageModel,
    OneOrMany, Pipeline, QuestionAnswering, Reranking, Result, SentenceEncoder, SentenceSimilarity,
    Seq2SeqModel, Summarization, TableQuestionAnswering, Task, Text2TextGeneration, TextClassification,
    TextGeneration, TokenClassification, Translation, ZeroShotClassification, tasks, with_base,
};
pub use processors::{
    ChatTemplate, Message, RenderOptions, Table, TableEncoding, Tokenizer, Tokenizer as AutoTokenizer,
};
