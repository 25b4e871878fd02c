//! BERT (Devlin et al., 2019): learned positions and token types, layer norms after attention and after a
//! feed-forward block, and a pooler over the first token. Its layer and heads serve most encoders.

use burn::module::Module;
use burn::tensor::Tensor;
use oxiformers_nn::head::vocabulary_output;
use oxiformers_nn::{
    Activation, Attention, AttentionConfig, Context, Embedding, Embeddings, EmbeddingsConfig, Encoder,
    EncoderLayer, Error, Head, LayerNorm, Linear, Mlp, PositionCount, Reads, Result, Weights,
};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::fields::over_defaults;
use crate::{EncoderArchitecture, Task};

/// The fields of `config.json`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default)]
#[allow(missing_docs)]
pub struct Config {
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    pub intermediate_size: usize,
    pub hidden_act: Activation,
    pub max_position_embeddings: usize,
    pub position_embedding_type: String,
    pub type_vocab_size: usize,
    pub initializer_range: f64,
    pub layer_norm_eps: f64,
    pub pad_token_id: u32,
    pub is_decoder: bool,
    pub tie_word_embeddings: bool,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            vocab_size: 30_522,
            hidden_size: 768,
            num_hidden_layers: 12,
            num_attention_heads: 12,
            intermediate_size: 3072,
            hidden_act: Activation::Gelu,
            max_position_embeddings: 512,
            position_embedding_type: "absolute".to_string(),
            type_vocab_size: 2,
            initializer_range: 0.02,
            layer_norm_eps: 1e-12,
            pad_token_id: 0,
            is_decoder: false,
            tie_word_embeddings: true,
        }
    }
}

/// The fields of a relative's `config.json`: BERT's, with the relative's defaults, and those that BERT does not have.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(try_from = "Value", bound = "")]
#[allow(missing_docs)]
pub struct Extended<F: Extends> {
    #[serde(flatten)]
    pub bert: Config,
    #[serde(flatten)]
    pub own: F,
}

/// The fields that an architecture has and BERT has not.
pub trait Extends: Default + Serialize + DeserializeOwned {
    /// BERT's fields where the architecture's configuration does not say them.
    fn bert() -> Config {
        Config::default()
    }
}

impl<F: Extends> Default for Extended<F> {
    fn default() -> Self {
        Self {
            bert: F::bert(),
            own: F::default(),
        }
    }
}

impl<F: Extends> TryFrom<Value> for Extended<F> {
    type Error = serde_json::Error;

    fn try_from(json: Value) -> serde_json::Result<Self> {
        Ok(Self {
            own: serde_json::from_value(json.clone())?,
            bert: over_defaults(&F::bert(), json)?,
        })
    }
}

/// Where the layers of the attention stand.
pub const ATTENTION: [&str; 4] = ["self.query", "self.key", "self.value", "output.dense"];

/// One layer, around attention of any kind.
#[derive(Module, Debug)]
pub struct Layer<A: Module = Attention> {
    /// Attention.
    pub attention: A,
    /// After attention.
    pub attention_norm: LayerNorm,
    /// Feed-forward block.
    pub mlp: Mlp,
    /// After the feed-forward block.
    pub output_norm: LayerNorm,
}

impl<A: Module> Layer<A> {
    /// `[batch, seq, hidden_size]` to the same shape, with an attention that is told more than the context knows.
    pub fn forward_with(&self, x: Tensor<3>, attend: impl FnOnce(&A, Tensor<3>) -> Tensor<3>) -> Tensor<3> {
        let attended = attend(&self.attention, x.clone());
        let x = self.attention_norm.forward_sum(attended, x);
        self.output_norm.forward_sum(self.mlp.forward(x.clone()), x)
    }
}

impl EncoderLayer for Layer {
    fn forward(&self, x: Tensor<3>, cx: &mut Context) -> Tensor<3> {
        self.forward_with(x, |attention, x| attention.forward(x, cx))
    }
}

impl Config {
    /// Checks that the model is an encoder with absolute positions.
    ///
    /// # Errors
    /// Names the field that says otherwise.
    pub fn check(&self) -> Result<()> {
        if self.is_decoder {
            return Err(Error::config("is_decoder", "only encoders are supported"));
        }
        let positions = &self.position_embedding_type;
        if positions != "absolute" {
            let message = format!("is `{positions}`; only `absolute` is supported");
            return Err(Error::config("position_embedding_type", message));
        }
        Ok(())
    }

    /// The layer at `w`.
    ///
    /// # Errors
    /// A tensor that is missing or misshapen, or a field that contradicts another.
    pub fn layer(&self, w: &Weights) -> Result<Layer> {
        let attention = Attention::load_named(&w.pp("attention"), ATTENTION, self.attention())?;
        self.layer_around(w, attention)
    }

    /// The layer at `w` around an attention that is loaded already.
    ///
    /// # Errors
    /// As [`layer`](Self::layer).
    pub fn layer_around<A: Module>(&self, w: &Weights, attention: A) -> Result<Layer<A>> {
        let (hidden, inner) = (self.hidden_size, self.intermediate_size);
        let norm = |name| LayerNorm::load(&w.pp(name), hidden, self.layer_norm_eps, true);
        let names = ["intermediate.dense", "output.dense"];
        Ok(Layer {
            attention,
            attention_norm: norm("attention.output.LayerNorm")?,
            mlp: Mlp::load(w, names, hidden, inner, self.hidden_act, true)?,
            output_norm: norm("output.LayerNorm")?,
        })
    }

    /// The numbers of the attention.
    pub fn attention(&self) -> AttentionConfig {
        let (hidden, heads) = (self.hidden_size, self.num_attention_heads);
        AttentionConfig {
            qkv_bias: true,
            out_bias: true,
            ..AttentionConfig::new(hidden, heads, heads, hidden / heads.max(1))
        }
    }

    /// The embeddings at `w`, `width` wide, with positions counted as given.
    ///
    /// # Errors
    /// As [`layer`](Self::layer).
    pub fn embeddings(&self, w: &Weights, width: usize, position_count: PositionCount) -> Result<Embeddings> {
        let config = EmbeddingsConfig {
            max_position_embeddings: Some(self.max_position_embeddings),
            position_count,
            type_vocab_size: self.type_vocab_size,
            ..EmbeddingsConfig::new(self.vocab_size, width, self.layer_norm_eps)
        };
        Embeddings::load(w, config)
    }

    /// The encoder below `w`, with positions counted as given.
    ///
    /// # Errors
    /// As [`layer`](Self::layer).
    pub fn encoder(&self, w: &Weights, position_count: PositionCount) -> Result<Encoder<Layer>> {
        self.check()?;
        let embeddings = self.embeddings(&w.pp("embeddings"), self.hidden_size, position_count)?;
        let layers = (0..self.num_hidden_layers).map(|i| self.layer(&w.pp("encoder.layer").pp(i)));
        Ok(Encoder::new(embeddings, layers.collect::<Result<_>>()?))
    }
}

impl Config {
    /// The head for masked tokens at `w`, which may share the `table` of tokens, with its norm of that name.
    ///
    /// # Errors
    /// A tensor that is missing or misshapen.
    pub fn predictions(&self, w: &Weights, norm: &str, table: &Embedding) -> Result<Head> {
        let [_, width] = table.weight.shape();
        let at = w.pp("transform");
        let dense = Linear::load(&at.pp("dense"), self.hidden_size, width, true)?;
        let norm = LayerNorm::load(&at.pp(norm), width, self.layer_norm_eps, true)?;
        let output = vocabulary_output(w, ["decoder", "bias"], table, self.tie_word_embeddings)?;
        let head = Head::new(Reads::All).dense(dense, self.hidden_act);
        Ok(head.norm(norm).output(output))
    }
}

/// What BERT's pooler makes of the first token; `w` is the place of its dense layer.
///
/// # Errors
/// A tensor that is missing or misshapen.
pub fn pooler(w: &Weights, hidden: usize) -> Result<Head> {
    let dense = Linear::load(w, hidden, hidden, true)?;
    Ok(Head::new(Reads::First).dense(dense, Activation::Tanh))
}

/// The heads that stand on BERT's pooler, whose dense layer is at `pooler_place`, and those of single tokens; none for
/// the other tasks.
///
/// # Errors
/// A tensor that is missing or misshapen.
pub fn pooled_head(
    task: Task,
    w: &Weights,
    pooler_place: &Weights,
    hidden: usize,
    labels: usize,
) -> Result<Option<Head>> {
    let pooled = || pooler(pooler_place, hidden);
    let linear = |name, outputs| Linear::load(&w.pp(name), hidden, outputs, true);
    Ok(match task {
        Task::Base if pooler_place.contains("weight") => Some(pooled()?),
        Task::SequenceClassification => Some(pooled()?.output(linear("classifier", labels)?)),
        Task::MultipleChoice => Some(pooled()?.output(linear("classifier", 1)?)),
        Task::TokenClassification => Some(Head::new(Reads::All).output(linear("classifier", labels)?)),
        Task::QuestionAnswering => Some(Head::new(Reads::All).output(linear("qa_outputs", 2)?)),
        _ => None,
    })
}

/// Tensors that BERT's relatives may hold and a model need not use.
pub const IGNORED: &[&str] = &[
    "embeddings.position_ids",
    "pooler.dense.weight",
    "pooler.dense.bias",
];

impl EncoderArchitecture for Config {
    type Model = Encoder<Layer>;
    const BASE: &'static str = "bert";
    const IGNORED: &'static [&'static str] = IGNORED;

    fn load(&self, w: &Weights) -> Result<Encoder<Layer>> {
        self.encoder(&w.pp("bert"), PositionCount::Plain)
    }

    fn head(&self, task: Task, w: &Weights, model: &Encoder<Layer>, labels: usize) -> Result<Option<Head>> {
        let (hidden, place) = (self.hidden_size, w.pp("bert.pooler.dense"));
        Ok(Some(match task {
            Task::MaskedLM => {
                let table = &model.embeddings.word_embeddings;
                self.predictions(&w.pp("cls.predictions"), "LayerNorm", table)?
            }
            Task::NextSentencePrediction => {
                let output = Linear::load(&w.pp("cls.seq_relationship"), hidden, 2, true)?;
                pooler(&place, hidden)?.output(output)
            }
            _ => return pooled_head(task, w, &place, hidden, labels),
        }))
    }

    fn max_position_embeddings(&self) -> Option<usize> {
        Some(self.max_position_embeddings)
    }
}
