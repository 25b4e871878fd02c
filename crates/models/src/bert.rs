//! BERT (Devlin et al., 2019): learned positions and token types, layer norms after attention and after a
//! feed-forward block, and a pooler over the first token. Its layer and heads serve most encoders.

use burn::module::Module;
use burn::tensor::Tensor;
use oxiformers_nn::head::vocabulary_output;
use oxiformers_nn::{
    Activation, Attention, AttentionConfig, Context, Embeddings, EmbeddingsConfig, Encoder, EncoderLayer,
    Error, Head, LayerNorm, Linear, Mlp, PositionCount, Reads, Result, Weights,
};
use serde::{Deserialize, Serialize};

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
            is_decoder: false,
            tie_word_embeddings: true,
        }
    }
}

/// One layer.
#[derive(Module, Debug)]
pub struct Layer {
    /// Attention.
    pub attention: Attention,
    /// After attention.
    pub attention_norm: LayerNorm,
    /// Feed-forward block.
    pub mlp: Mlp,
    /// After the feed-forward block.
    pub output_norm: LayerNorm,
}

impl EncoderLayer for Layer {
    fn forward(&self, x: Tensor<3>, cx: &mut Context) -> Tensor<3> {
        let x = self
            .attention_norm
            .forward(x.clone() + self.attention.forward(x, cx));
        self.output_norm.forward(x.clone() + self.mlp.forward(x))
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
        const NAMES: [&str; 4] = ["self.query", "self.key", "self.value", "output.dense"];
        let (hidden, heads, inner) = (self.hidden_size, self.num_attention_heads, self.intermediate_size);
        let attention = AttentionConfig {
            qkv_bias: true,
            out_bias: true,
            ..AttentionConfig::new(hidden, heads, heads, hidden / heads.max(1))
        };
        let norm = |name| LayerNorm::load(&w.pp(name), hidden, self.layer_norm_eps, true);
        let names = ["intermediate.dense", "output.dense"];
        Ok(Layer {
            attention: Attention::load_named(&w.pp("attention"), NAMES, attention)?,
            attention_norm: norm("attention.output.LayerNorm")?,
            mlp: Mlp::load(w, names, hidden, inner, self.hidden_act, true)?,
            output_norm: norm("output.LayerNorm")?,
        })
    }

    /// The encoder below `w`, whose positions are counted as given.
    ///
    /// # Errors
    /// As [`layer`](Self::layer).
    pub fn encoder(&self, w: &Weights, position_count: PositionCount) -> Result<Encoder<Layer>> {
        self.check()?;
        let embeddings = EmbeddingsConfig {
            vocab_size: self.vocab_size,
            width: self.hidden_size,
            max_position_embeddings: Some(self.max_position_embeddings),
            position_count,
            type_vocab_size: self.type_vocab_size,
            eps: self.layer_norm_eps,
        };
        let embeddings = Embeddings::load(&w.pp("embeddings"), embeddings)?;
        let layers = (0..self.num_hidden_layers).map(|i| self.layer(&w.pp("encoder.layer").pp(i)));
        Ok(Encoder::new(embeddings, layers.collect::<Result<_>>()?))
    }

    /// The head that hands on the pooler's output, from the place of the pooler.
    ///
    /// # Errors
    /// A tensor that is missing or misshapen.
    pub fn pooler(&self, w: &Weights) -> Result<Head> {
        let dense = Linear::load(&w.pp("dense"), self.hidden_size, self.hidden_size, true)?;
        Ok(Head::new(Reads::First).dense(dense, Activation::Tanh))
    }
}

impl EncoderArchitecture for Config {
    type Model = Encoder<Layer>;
    const BASE: &'static str = "bert";
    const IGNORED: &'static [&'static str] = &[
        "embeddings.position_ids",
        "pooler.dense.weight",
        "pooler.dense.bias",
    ];

    fn load(&self, w: &Weights) -> Result<Encoder<Layer>> {
        self.encoder(&w.pp("bert"), PositionCount::Plain)
    }

    fn head(&self, task: Task, w: &Weights, model: &Encoder<Layer>, labels: usize) -> Result<Option<Head>> {
        let (hidden, pooler) = (self.hidden_size, w.pp("bert.pooler"));
        let linear = |name, outputs| Linear::load(&w.pp(name), hidden, outputs, true);
        let head = match task {
            Task::Base if !pooler.contains("dense.weight") => return Ok(None),
            Task::Base => self.pooler(&pooler)?,
            Task::MaskedLM => {
                let w = w.pp("cls.predictions");
                let dense = Linear::load(&w.pp("transform.dense"), hidden, hidden, true)?;
                let norm = LayerNorm::load(&w.pp("transform.LayerNorm"), hidden, self.layer_norm_eps, true)?;
                let table = &model.embeddings.word_embeddings;
                let output = vocabulary_output(&w, ["decoder", "bias"], table, self.tie_word_embeddings)?;
                Head::new(Reads::All)
                    .dense(dense, self.hidden_act)
                    .norm(norm)
                    .output(output)
            }
            Task::NextSentencePrediction => self.pooler(&pooler)?.output(linear("cls.seq_relationship", 2)?),
            Task::SequenceClassification => self.pooler(&pooler)?.output(linear("classifier", labels)?),
            Task::MultipleChoice => self.pooler(&pooler)?.output(linear("classifier", 1)?),
            Task::TokenClassification => Head::new(Reads::All).output(linear("classifier", labels)?),
            Task::QuestionAnswering => Head::new(Reads::All).output(linear("qa_outputs", 2)?),
            Task::PreTraining => return Ok(None),
        };
        Ok(Some(head))
    }

    fn max_position_embeddings(&self) -> Option<usize> {
        Some(self.max_position_embeddings)
    }
}
