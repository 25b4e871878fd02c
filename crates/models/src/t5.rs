//! T5 (Raffel et al., 2020), with T5 1.1 and Flan-T5: RMS norms before the parts of a layer, scores that are not scaled,
//! and a bias for relative positions that all layers share.

use burn::module::Module;
use burn::tensor::Tensor;
use oxiformers_nn::init::Normal;
use oxiformers_nn::seq2seq::{Half, LmHead, Reader, ShiftRight, TiedTables};
use oxiformers_nn::{
    Activation, Attention, AttentionConfig, Context, CrossAttention, DecoderLayer, Error, GatedMlp, Head,
    Linear, Mlp, Reads, RelativeBias, Result, RmsNorm, Seq2SeqLayer, Stack, Weights,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::fields::one_or_more;
use crate::{Seq2SeqArchitecture, Task};

/// The fields of `config.json`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default)]
#[allow(missing_docs)]
pub struct Config {
    pub vocab_size: usize,
    pub d_model: usize,
    pub d_kv: usize,
    pub d_ff: usize,
    pub num_layers: usize,
    pub num_decoder_layers: Option<usize>,
    pub num_heads: usize,
    pub relative_attention_num_buckets: usize,
    pub relative_attention_max_distance: usize,
    pub layer_norm_epsilon: f64,
    pub initializer_factor: f64,
    pub feed_forward_proj: String,
    pub pad_token_id: Option<u32>,
    #[serde(deserialize_with = "one_or_more")]
    pub eos_token_id: Vec<u32>,
    pub decoder_start_token_id: Option<u32>,
    /// Whether the decoder's output is scaled, not whether tables are tied: they are, unless they are stored apart.
    pub tie_word_embeddings: bool,
    pub scale_decoder_outputs: Option<bool>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            vocab_size: 32_128,
            d_model: 512,
            d_kv: 64,
            d_ff: 2048,
            num_layers: 6,
            num_decoder_layers: None,
            num_heads: 8,
            relative_attention_num_buckets: 32,
            relative_attention_max_distance: 128,
            layer_norm_epsilon: 1e-6,
            initializer_factor: 1.0,
            feed_forward_proj: "relu".to_string(),
            pad_token_id: Some(0),
            eos_token_id: vec![1],
            decoder_start_token_id: None,
            tie_word_embeddings: true,
            scale_decoder_outputs: None,
        }
    }
}

/// A feed-forward block of either kind.
#[derive(Module, Debug)]
pub enum FeedForward {
    /// `wo(act(wi(x)))`.
    Plain(Mlp),
    /// `wo(act(wi_0(x)) · wi_1(x))`.
    Gated(GatedMlp),
}

/// One layer of the encoder, or of the decoder, which also looks at what the encoder has read.
#[derive(Module, Debug)]
pub struct Layer {
    /// Holds from this layer on, until another one has its own.
    relative_bias: Option<RelativeBias>,
    self_attention: Attention,
    self_attention_norm: RmsNorm,
    cross_attention: Option<CrossAttention>,
    cross_attention_norm: Option<RmsNorm>,
    feed_forward: FeedForward,
    feed_forward_norm: RmsNorm,
}

impl DecoderLayer for Layer {
    fn prepare(&self, cx: &mut Context) {
        if let Some(bias) = &self.relative_bias {
            let (past, seq) = (cx.past(), cx.seq());
            cx.set_bias(Some(bias.forward(past, seq, past + seq)));
        }
    }

    fn forward(&self, x: Tensor<3>, cx: &mut Context) -> Tensor<3> {
        let normed = self.self_attention_norm.forward(x.clone());
        let mut x = x + self.self_attention.forward(normed, cx);
        if let (Some(attention), Some(norm)) = (&self.cross_attention, &self.cross_attention_norm) {
            x = x.clone() + attention.forward(norm.forward(x), cx);
        }
        let normed = self.feed_forward_norm.forward(x.clone());
        x + match &self.feed_forward {
            FeedForward::Plain(mlp) => mlp.forward(normed),
            FeedForward::Gated(mlp) => mlp.forward(normed),
        }
    }
}

impl Seq2SeqLayer for Layer {
    fn cross_attention(&self) -> Option<&CrossAttention> {
        self.cross_attention.as_ref()
    }
}

impl Config {
    /// What the tensor `name` is initialized with, if it is no norm and no bias: scores are not scaled, the weights of
    /// queries are.
    pub(crate) fn distribution(&self, name: &str) -> Option<Normal> {
        let root = |width: usize| (width.max(1) as f64).powf(-0.5);
        let of_module = match name.strip_suffix(".weight")?.rsplit('.').next()? {
            "layer_norm" | "final_layer_norm" => return None,
            "q" => root(self.d_model.saturating_mul(self.d_kv)),
            "k" | "v" | "relative_attention_bias" | "wi" | "wi_0" | "wi_1" => root(self.d_model),
            "qa_outputs" | "dense" | "out_proj" => root(self.d_model),
            "o" => root(self.num_heads.saturating_mul(self.d_kv)),
            "wo" => root(self.d_ff),
            _ => 1.0,
        };
        Some(Normal::new(self.initializer_factor * of_module))
    }

    /// The feed-forward block that `feed_forward_proj` names, such as `relu` or `gated-gelu`.
    fn feed_forward(&self, w: &Weights) -> Result<FeedForward> {
        // Its values are too large for half floats, and it stays as it is where others are quantized.
        let w = &w.keeping(&["wo"]);
        let (name, gated) = match self.feed_forward_proj.as_str() {
            // The one name that means another function here.
            "gated-gelu" => ("gelu_new", true),
            name => match name.strip_prefix("gated-") {
                Some(name) => (name, true),
                None => (name, false),
            },
        };
        let act: Activation = serde_json::from_value(Value::from(name))
            .map_err(|error| Error::config("feed_forward_proj", error.to_string()))?;
        let (hidden, inner) = (self.d_model, self.d_ff);
        Ok(if gated {
            let names = ["wi_0", "wi_1", "wo"];
            FeedForward::Gated(GatedMlp::load_named(w, names, hidden, inner, act, false)?)
        } else {
            FeedForward::Plain(Mlp::load(w, ["wi", "wo"], hidden, inner, act, false)?)
        })
    }

    /// Builds one half; `bias_per_layer` says whether each layer has a table of relative positions.
    ///
    /// # Errors
    /// A tensor that is missing or misshapen, or a field that contradicts another.
    pub fn stack_of(
        &self,
        half: Half,
        w: &Weights,
        tables: &mut TiedTables,
        bias_per_layer: bool,
    ) -> Result<Stack<Layer>> {
        const NAMES: [&str; 4] = ["q", "k", "v", "o"];
        let (hidden, heads, decoder) = (self.d_model, self.num_heads, half == Half::Decoder);
        let layers = match half {
            Half::Encoder => self.num_layers,
            Half::Decoder => self.num_decoder_layers.unwrap_or(self.num_layers),
        };
        let [own, other] = [half, half.other()].map(|half| format!("{}.embed_tokens", half.name()));
        let embed_tokens = tables.load(&own, &["shared", &other, "lm_head"], self.vocab_size, hidden)?;
        let w = w.pp(half.name());
        let attention = AttentionConfig {
            scale: Some(1.0),
            ..AttentionConfig::new(hidden, heads, heads, self.d_kv)
        };
        let norm = |w: &Weights| RmsNorm::load(w, hidden, self.layer_norm_epsilon);
        let layers = (0..layers).map(|i| {
            let w = w.pp("block").pp(i).pp("layer");
            let at = w.pp("0.SelfAttention");
            let relative_bias = if i == 0 || bias_per_layer {
                let (buckets, most) = (
                    self.relative_attention_num_buckets,
                    self.relative_attention_max_distance,
                );
                let w = at.pp("relative_attention_bias");
                Some(RelativeBias::load(&w, buckets, most, heads, !decoder)?)
            } else {
                None
            };
            let (cross_attention, cross_attention_norm) = if decoder {
                let at = w.pp("1.EncDecAttention");
                let cross = CrossAttention::load_named(&at, NAMES, hidden, attention.clone())?;
                (Some(cross), Some(norm(&w.pp("1.layer_norm"))?))
            } else {
                (None, None)
            };
            let last = w.pp(if decoder { 2 } else { 1 });
            Ok(Layer {
                relative_bias,
                self_attention: Attention::load_named(&at, NAMES, attention.clone())?,
                self_attention_norm: norm(&w.pp("0.layer_norm"))?,
                cross_attention,
                cross_attention_norm,
                feed_forward: self.feed_forward(&last.pp("DenseReluDense"))?,
                feed_forward_norm: norm(&last.pp("layer_norm"))?,
            })
        });
        let final_norm = norm(&w.pp("final_layer_norm"))?.into();
        Ok(Stack::new(
            embed_tokens,
            layers.collect::<Result<_>>()?,
            Some(final_norm),
        ))
    }

    /// Builds the layer that makes logits, of hidden states that are `scaled` or not.
    ///
    /// # Errors
    /// As [`stack_of`](Self::stack_of).
    pub fn lm_head_of(&self, tables: &mut TiedTables, scaled: bool) -> Result<LmHead> {
        let tied = ["shared", "decoder.embed_tokens", "encoder.embed_tokens"];
        let table = tables.load("lm_head", &tied, self.vocab_size, self.d_model)?;
        Ok(LmHead {
            linear: table.tied_output(&tables.at("lm_head"))?,
            scale: if scaled {
                (self.d_model as f64).powf(-0.5)
            } else {
                1.0
            },
        })
    }

    /// Builds what a head for `task` stands on, with the halves that `model` builds: both to judge a text as a whole,
    /// else the encoder.
    ///
    /// # Errors
    /// As [`stack_of`](Self::stack_of).
    pub fn reader_of(
        &self,
        task: Task,
        w: &Weights,
        model: &impl Seq2SeqArchitecture<Layer = Layer>,
    ) -> Result<Reader<Layer>> {
        const HEADS: [&str; 4] = ["lm_head.", "classification_head.", "classifier.", "qa_outputs."];
        w.ignore(|name| HEADS.iter().any(|head| name.starts_with(head)));
        // Some heads stand beside the model, others beside its halves.
        let beside = w.pp("transformer");
        let w = match beside.is_stored("encoder.final_layer_norm.weight") {
            true => &beside,
            false => w,
        };
        if !matches!(task, Task::SequenceClassification | Task::QuestionAnswering) {
            return model.encoder_reads(w);
        }
        let start = self.decoder_start_token_id.ok_or_else(|| {
            Error::config("decoder_start_token_id", "is missing; the decoder starts with it")
        })?;
        model.both_read(w, ShiftRight::After(start))
    }

    /// Builds the head for a task: texts are classified by their last token.
    ///
    /// # Errors
    /// As [`stack_of`](Self::stack_of).
    pub fn head_of(&self, task: Task, w: &Weights, labels: usize) -> Result<Option<Head>> {
        let linear = |name, outputs| Linear::load(&w.pp(name), self.d_model, outputs, true);
        Ok(match task {
            Task::SequenceClassification => Some(
                Head::new(Reads::Last)
                    .dense(
                        linear("classification_head.dense", self.d_model)?,
                        Activation::Tanh,
                    )
                    .output(linear("classification_head.out_proj", labels)?),
            ),
            Task::TokenClassification => Some(Head::new(Reads::All).output(linear("classifier", labels)?)),
            Task::QuestionAnswering => Some(Head::new(Reads::All).output(linear("qa_outputs", 2)?)),
            _ => None,
        })
    }
}

impl Seq2SeqArchitecture for Config {
    type Layer = Layer;
    const BASE: &'static str = "";
    const IGNORED: &'static [&'static str] = IGNORED;

    fn stack(&self, half: Half, w: &Weights, tables: &mut TiedTables) -> Result<Stack<Layer>> {
        self.stack_of(half, w, tables, false)
    }

    fn lm_head(&self, _: &Weights, tables: &mut TiedTables) -> Result<LmHead> {
        let scaled = self.scale_decoder_outputs.unwrap_or(self.tie_word_embeddings);
        self.lm_head_of(tables, scaled)
    }

    fn max_position_embeddings(&self) -> Option<usize> {
        None
    }

    fn reader(&self, task: Task, w: &Weights) -> Result<Reader<Layer>> {
        self.reader_of(task, w, self)
    }

    fn head(&self, task: Task, w: &Weights, labels: usize) -> Result<Option<Head>> {
        self.head_of(task, w, labels)
    }
}

/// The first conversions kept a table that cross-attention never had a use for.
pub(crate) const IGNORED: &[&str] = &["EncDecAttention.relative_attention_bias.weight"];
