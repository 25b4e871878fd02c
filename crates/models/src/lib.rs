//! One file per architecture.
//!
//! A file holds the [`Config`](llama::Config) (the fields of `config.json`, same names, same defaults), the
//! layer, and how a checkpoint becomes the model. Everything else is shared: layers come from
//! `oxiformers-nn`, loading and the registry from this crate. To add an architecture, read
//! [`llama`] and one neighbour, then add a line to `registry.rs`; for an encoder and its heads, read [`bert`] and
//! [`roberta`].

use std::ops::Range;

use burn::tensor::{Device, Int, Tensor};
use oxiformers_nn::seq2seq::{Half, LmHead, Reader, ShiftRight, TiedTables};
use oxiformers_nn::{
    Backbone, Cache, CacheKind, CachePrecision, Decoder, DecoderLayer, EncoderDecoder, EncoderInputs, Head,
    LogitsFor, Result, Seq2SeqDecoder, Seq2SeqLayer, Stack, Weights,
};

pub mod auto;
pub mod auto_encoder;
#[cfg(not(target_arch = "wasm32"))]
pub mod calibration;
pub mod dropout;
pub mod error;
pub mod fields;
pub mod gguf;
#[cfg(not(target_arch = "wasm32"))]
pub mod quantize;
pub mod registry;
#[cfg(not(target_arch = "wasm32"))]
pub mod save;
pub mod sentence;
pub mod tasks;

mod layer_types;

pub mod albert;
pub mod bart;
pub mod bert;
pub mod big_bird;
pub mod bitnet;
pub mod bloom;
pub mod cohere;
pub mod deberta_v2;
pub mod deepseek_v3;
pub mod distilbert;
pub mod electra;
pub mod falcon;
pub mod gemma;
pub mod gemma2;
pub mod gemma3_text;
pub mod gpt2;
pub mod gpt_neox;
pub mod gpt_oss;
pub mod gptj;
pub mod granite;
pub mod layoutlm;
pub mod llama;
pub mod longformer;
pub mod m2m_100;
pub mod marian;
pub mod mbart;
#[cfg(not(target_arch = "wasm32"))]
pub mod memory;
pub mod mistral;
pub mod mixtral;
pub mod modernbert;
pub mod mpnet;
pub mod mpt;
pub mod mt5;
pub mod nomic_bert;
pub mod olmo2;
pub mod opt;
pub mod pegasus;
pub mod phi;
pub mod phi3;
pub mod plbart;
pub mod qwen2;
pub mod qwen2_moe;
pub mod qwen3;
pub mod qwen3_moe;
pub mod roberta;
pub mod smollm3;
pub mod stablelm;
pub mod starcoder2;
pub mod t5;
pub mod tapas;
pub mod umt5;

pub use auto::{AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM};
pub use auto_encoder::{
    AutoModel, AutoModelFor, AutoModelForDocumentQuestionAnswering, AutoModelForMaskedLM,
    AutoModelForMultipleChoice, AutoModelForNextSentencePrediction, AutoModelForPreTraining,
    AutoModelForQuestionAnswering, AutoModelForSequenceClassification, AutoModelForTableQuestionAnswering,
    AutoModelForTextEncoding, AutoModelForTokenClassification, BaseModelOutput, ModelOutput,
    TableQuestionAnsweringOutput,
};
pub use error::Error;
pub use oxiformers_nn as nn;
pub use sentence::{PoolingMode, SentenceModel};
pub use tasks::{Labels, ProblemType, SpanLogits, Task, TaskType};

/// What an architecture's configuration knows: how its model is built.
pub trait Architecture {
    /// Its layer.
    type Layer: DecoderLayer;

    /// Where the base model stands within the language model's checkpoint, such as `model`.
    const BASE: &'static str;

    /// Tensors that checkpoints of this architecture may hold and the model does not need.
    const IGNORED: &'static [&'static str] = &["rotary_emb.inv_freq"];

    /// Builds the model from its parameters.
    ///
    /// # Errors
    /// A tensor that is missing or misshapen, or a field of the configuration that contradicts another.
    fn load(&self, w: &Weights) -> Result<Decoder<Self::Layer>>;

    /// Longest sequence the model was made for, if it says so.
    fn max_position_embeddings(&self) -> Option<usize>;
}

/// What the configuration of an encoder-decoder knows: how its model is built.
pub trait Seq2SeqArchitecture {
    /// The layer of both halves.
    type Layer: Seq2SeqLayer;

    /// Where the base model stands within the language model's checkpoint, such as `model`.
    const BASE: &'static str;

    /// Tensors that checkpoints of this architecture may hold and the model does not need.
    const IGNORED: &'static [&'static str] = &[];

    /// Builds one half. `tables` are token embeddings, which both and the output layer may share.
    ///
    /// # Errors
    /// A tensor that is missing or misshapen, or a field of the configuration that contradicts another.
    fn stack(&self, half: Half, w: &Weights, tables: &mut TiedTables) -> Result<Stack<Self::Layer>>;

    /// Builds the layer that makes logits.
    ///
    /// # Errors
    /// As [`stack`](Self::stack).
    fn lm_head(&self, w: &Weights, tables: &mut TiedTables) -> Result<LmHead>;

    /// Longest sequence that either half was made for, if it says so.
    fn max_position_embeddings(&self) -> Option<usize>;

    /// Builds the head for a task, which stands on what [`reader`](Self::reader) builds; none where the architecture
    /// knows no such task. `labels` is the number of classes.
    ///
    /// # Errors
    /// As [`stack`](Self::stack).
    fn head(&self, _task: Task, _w: &Weights, _labels: usize) -> Result<Option<Head>> {
        Ok(None)
    }

    /// Builds the model as one that judges texts; where nothing says how its decoder could read one, the encoder alone.
    ///
    /// # Errors
    /// As [`stack`](Self::stack).
    fn reader(&self, _task: Task, w: &Weights) -> Result<Reader<Self::Layer>> {
        self.encoder_reads(w)
    }

    /// A [`Reader`] of the encoder alone.
    ///
    /// # Errors
    /// As [`stack`](Self::stack).
    fn encoder_reads(&self, w: &Weights) -> Result<Reader<Self::Layer>> {
        w.ignore(|name| name.contains("decoder."));
        let encoder = self.stack(Half::Encoder, w, &mut TiedTables::new(w))?;
        Ok(Reader::encoder(encoder, self.max_position_embeddings()))
    }

    /// A [`Reader`] of both halves.
    ///
    /// # Errors
    /// As [`stack`](Self::stack).
    fn both_read(&self, w: &Weights, shift: ShiftRight) -> Result<Reader<Self::Layer>> {
        let model = self.base(w, &mut TiedTables::new(w))?;
        Ok(Reader::both(model, shift, self.max_position_embeddings()))
    }

    /// Builds both halves.
    ///
    /// # Errors
    /// As [`stack`](Self::stack).
    fn base(&self, w: &Weights, tables: &mut TiedTables) -> Result<EncoderDecoder<Self::Layer>> {
        Ok(EncoderDecoder {
            encoder: self.stack(Half::Encoder, w, tables)?,
            decoder: self.stack(Half::Decoder, w, tables)?,
        })
    }

    /// Builds the model from its parameters.
    ///
    /// # Errors
    /// As [`stack`](Self::stack).
    fn load(&self, w: &Weights) -> Result<Seq2SeqDecoder<Self::Layer>> {
        let mut tables = TiedTables::new(w);
        Ok(Seq2SeqDecoder {
            model: self.base(w, &mut tables)?,
            lm_head: self.lm_head(w, &mut tables)?,
        })
    }
}

/// What the configuration of an encoder knows: how the encoder and the heads that can stand on it are built.
pub trait EncoderArchitecture {
    /// The encoder.
    type Model: Backbone;

    /// Where the base model stands within the checkpoint of a model with a head, such as `bert`. What stands beside it
    /// are heads.
    const BASE: &'static str;

    /// Tensors that checkpoints of this architecture may hold and a model need not use.
    const IGNORED: &'static [&'static str] = &[];

    /// Builds the encoder from its parameters.
    ///
    /// # Errors
    /// A tensor that is missing or misshapen, or a field of the configuration that contradicts another.
    fn load(&self, w: &Weights) -> Result<Self::Model>;

    /// Builds the head for a task; none where the architecture knows no such task, or [`Task::Base`] has no pooler.
    /// `labels` is the number of classes.
    ///
    /// # Errors
    /// As [`load`](Self::load).
    fn head(&self, task: Task, w: &Weights, model: &Self::Model, labels: usize) -> Result<Option<Head>>;

    /// The batch as a task wants it, where that differs from what was given.
    ///
    /// # Errors
    /// Where the inputs lack what the task needs.
    fn prepare(&self, _task: Task, _inputs: &EncoderInputs) -> Result<Option<EncoderInputs>> {
        Ok(None)
    }

    /// Which sequences can share a batch: those whose lengths are of one group come to the same in it as each alone. The
    /// padding of most architectures changes nothing, and all lengths are one group.
    fn batch_group(&self, _length: usize) -> usize {
        0
    }

    /// Longest sequence the model was made for, if it says so.
    fn max_position_embeddings(&self) -> Option<usize>;
}

/// A causal language model: what decoding needs to know of it.
pub trait CausalLM: Send + Sync {
    /// Size of the vocabulary.
    fn vocab_size(&self) -> usize;

    /// Where it runs.
    fn device(&self) -> Device;

    /// Longest sequence the model was made for, if it says so.
    fn max_position_embeddings(&self) -> Option<usize>;

    /// An empty cache for sequences whose left padding is given, one entry each.
    fn new_cache(&self, kind: CacheKind, padding: Vec<usize>) -> Cache;

    /// What such a cache keeps keys and values as, where nothing else is asked for.
    fn cache_precision(&self) -> CachePrecision {
        CachePrecision::Full
    }

    /// Logits `[batch, seq or 1, vocab_size]` after the tokens `input_ids` `[batch, seq]`, which are
    /// appended to `cache`.
    fn forward(&self, input_ids: Tensor<2, Int>, cache: &mut Cache, logits_for: LogitsFor) -> Tensor<3>;

    /// The same model where it is an encoder-decoder, whose decoder writes a sequence of its own for each prompt that
    /// its encoder has read.
    fn as_seq2seq(&self) -> Option<&dyn Seq2SeqLM> {
        None
    }
}

/// An encoder-decoder: what decoding needs to know of it besides its decoder.
pub trait Seq2SeqLM: CausalLM {
    /// Size of the vocabulary that it reads, which need not be the one that it writes with.
    fn source_vocab_size(&self) -> usize;

    /// Reads `input_ids` `[batch, source]`, and lets the sequences of `cache` look at them. `tokens` says where the real
    /// ones of each row lie; the others are padding.
    fn encode(&self, input_ids: Tensor<2, Int>, tokens: Vec<Range<usize>>, cache: &mut Cache);
}
