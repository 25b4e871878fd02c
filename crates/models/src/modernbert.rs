//! ModernBERT (Warner et al., 2024): an encoder with norms before its blocks, rotary positions and gated feed-forward
//! blocks. Two of three layers see a window.

use burn::module::Module;
use burn::tensor::Tensor;
use oxiformers_nn::head::vocabulary_output;
use oxiformers_nn::init::Normal;
use oxiformers_nn::{
    Activation, Attention, AttentionConfig, Context, Embedding, Embeddings, EmbeddingsConfig, Encoder,
    EncoderLayer, GatedMlp, Head, LayerNorm, Linear, Reads, Result, Role, Rope, RopeSettings, Weights,
};
use serde::{Deserialize, Serialize};

use crate::{EncoderArchitecture, Task, layer_types};

/// The fields of `config.json`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default)]
#[allow(missing_docs)]
pub struct Config {
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    pub hidden_activation: Activation,
    pub max_position_embeddings: usize,
    pub initializer_range: f64,
    pub initializer_cutoff_factor: Option<f64>,
    pub norm_eps: f64,
    pub norm_bias: bool,
    pub attention_bias: bool,
    pub layer_types: Option<Vec<String>>,
    pub global_attn_every_n_layers: usize,
    pub global_rope_theta: f64,
    pub local_rope_theta: f64,
    pub local_attention: usize,
    pub mlp_bias: bool,
    pub decoder_bias: bool,
    pub classifier_pooling: ClassifierPooling,
    pub classifier_bias: bool,
    pub classifier_activation: Activation,
    pub tie_word_embeddings: bool,
    #[serde(flatten)]
    pub rope: RopeSettings,
}

/// What heads of whole texts read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ClassifierPooling {
    /// The first token.
    Cls,
    /// The mean over all tokens.
    Mean,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            vocab_size: 50_368,
            hidden_size: 768,
            intermediate_size: 1152,
            num_hidden_layers: 22,
            num_attention_heads: 12,
            hidden_activation: Activation::Gelu,
            max_position_embeddings: 8192,
            initializer_range: 0.02,
            initializer_cutoff_factor: Some(2.0),
            norm_eps: 1e-5,
            norm_bias: false,
            attention_bias: false,
            layer_types: None,
            global_attn_every_n_layers: 3,
            global_rope_theta: 160_000.0,
            local_rope_theta: 10_000.0,
            local_attention: 128,
            mlp_bias: false,
            decoder_bias: true,
            classifier_pooling: ClassifierPooling::Cls,
            classifier_bias: false,
            classifier_activation: Activation::Gelu,
            tie_word_embeddings: true,
            rope: RopeSettings::default(),
        }
    }
}

/// One layer.
#[derive(Module, Debug)]
pub struct Layer {
    /// None in the first layer: the embeddings are normalized already.
    attn_norm: Option<LayerNorm>,
    attn: Attention,
    mlp_norm: LayerNorm,
    mlp: GatedMlp,
}

impl EncoderLayer for Layer {
    fn forward(&self, x: Tensor<3>, cx: &mut Context) -> Tensor<3> {
        let normed = match &self.attn_norm {
            Some(norm) => norm.forward(x.clone()),
            None => x.clone(),
        };
        let x = x + self.attn.forward(normed, cx);
        x.clone() + self.mlp.forward(self.mlp_norm.forward(x))
    }
}

impl Config {
    fn norm(&self, w: &Weights) -> Result<LayerNorm> {
        LayerNorm::load(w, self.hidden_size, self.norm_eps, self.norm_bias)
    }

    /// What the tensor `name` is initialized with: what is added to the hidden states starts smaller the more layers add
    /// to them.
    pub(crate) fn distribution(&self, name: &str) -> Option<Normal> {
        let range = self.initializer_range;
        let residual = range / (2.0 * self.num_hidden_layers.max(1) as f64).sqrt();
        let std = match name.strip_suffix(".weight")?.rsplit('.').next()? {
            "tok_embeddings" | "Wqkv" | "Wi" => range,
            "Wo" | "dense" | "decoder" => residual,
            "classifier" => (self.hidden_size.max(1) as f64).powf(-0.5),
            _ => return None,
        };
        let cutoff = self.initializer_cutoff_factor.unwrap_or(3.0);
        Some(Normal { std, cutoff })
    }

    fn rope(&self, layer_type: &str, theta: f64) -> Result<Rope> {
        let head_dim = self.hidden_size / self.num_attention_heads.max(1);
        let parameters = self.rope.resolve(layer_type, theta)?;
        Rope::new(&parameters, head_dim, self.max_position_embeddings, false)
    }
}

impl EncoderArchitecture for Config {
    type Model = Encoder<Layer>;
    const BASE: &'static str = "model";
    const IGNORED: &'static [&'static str] = &["rotary_emb.inv_freq"];

    fn load(&self, w: &Weights) -> Result<Encoder<Layer>> {
        let (w, hidden, heads) = (w.pp("model"), self.hidden_size, self.num_attention_heads);
        let at = w.pp("embeddings");
        let tokens = Embedding::load_tokens(&at.pp("tok_embeddings"), self.vocab_size, hidden)?;
        let config = EmbeddingsConfig::new(self.vocab_size, hidden, self.norm_eps);
        let embeddings = Embeddings::with(tokens, self.norm(&at.pp("norm"))?, &at, config)?;
        let everywhere = self.rope("full_attention", self.global_rope_theta)?;
        let nearby = self.rope("sliding_attention", self.local_rope_theta)?;
        let layers = (0..self.num_hidden_layers).map(|i| {
            let slides = !i.is_multiple_of(self.global_attn_every_n_layers);
            let window = layer_types::window(&self.layer_types, i, Some(self.local_attention), slides)?;
            let rope = if window.is_some() { &nearby } else { &everywhere };
            let attention = AttentionConfig {
                qkv_bias: self.attention_bias,
                out_bias: self.attention_bias,
                window,
                rope: Some(rope.clone()),
                ..AttentionConfig::new(hidden, heads, heads, hidden / heads.max(1))
            };
            let w = w.pp("layers").pp(i);
            let (inner, act) = (self.intermediate_size, self.hidden_activation);
            Ok(Layer {
                attn_norm: (i > 0).then(|| self.norm(&w.pp("attn_norm"))).transpose()?,
                attn: Attention::load_stacked(&w.pp("attn"), ["Wqkv", "Wo"], attention)?,
                mlp_norm: self.norm(&w.pp("mlp_norm"))?,
                mlp: GatedMlp::load_fused(&w.pp("mlp"), ["Wi", "Wo"], hidden, inner, act, self.mlp_bias)?,
            })
        });
        let mut encoder = Encoder::new(embeddings, layers.collect::<Result<_>>()?);
        encoder.norm = Some(self.norm(&w.pp("final_norm"))?.into());
        Ok(encoder)
    }

    fn head(&self, task: Task, w: &Weights, model: &Encoder<Layer>, labels: usize) -> Result<Option<Head>> {
        let hidden = self.hidden_size;
        let (reads, outputs) = match task {
            Task::MaskedLM | Task::TokenClassification => (Reads::All, labels),
            Task::QuestionAnswering => (Reads::All, 2),
            Task::SequenceClassification | Task::MultipleChoice => match (self.classifier_pooling, task) {
                (ClassifierPooling::Mean, Task::SequenceClassification) => (Reads::Mean, labels),
                (ClassifierPooling::Mean, _) => (Reads::Mean, 1),
                (ClassifierPooling::Cls, Task::SequenceClassification) => (Reads::First, labels),
                (ClassifierPooling::Cls, _) => (Reads::FirstToken, 1),
            },
            _ => return Ok(None),
        };
        let dense = Linear::load(&w.pp("head.dense"), hidden, hidden, self.classifier_bias)?;
        let head = Head::new(reads).dense(dense, self.classifier_activation);
        let head = head.norm(self.norm(&w.pp("head.norm"))?);
        if task != Task::MaskedLM {
            return Ok(Some(head.output(Linear::load(
                &w.pp("classifier"),
                hidden,
                outputs,
                true,
            )?)));
        }
        let (table, tied) = (&model.embeddings.word_embeddings, self.tie_word_embeddings);
        let output = match (self.decoder_bias, tied) {
            (true, _) => vocabulary_output(w, ["decoder", "decoder.bias"], table, tied)?,
            (false, true) => table.tied_output(&w.pp("decoder"))?,
            (false, false) => Linear::load(
                &w.pp("decoder").with_role(Role::Output),
                hidden,
                self.vocab_size,
                false,
            )?,
        };
        Ok(Some(head.output(output)))
    }

    fn max_position_embeddings(&self) -> Option<usize> {
        Some(self.max_position_embeddings)
    }
}
