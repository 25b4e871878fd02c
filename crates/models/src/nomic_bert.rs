//! Nomic Embed (Nussbaum et al., 2024): BERT with rotary positions, gated feed-forward blocks and no biases.

use burn::module::Module;
use burn::tensor::Tensor;
use oxiformers_nn::{
    Activation, Attention, AttentionConfig, Context, Embedding, Embeddings, EmbeddingsConfig, Encoder,
    EncoderLayer, GatedMlp, Head, LayerNorm, Result, Rope, RopeSettings, Weights,
};
use serde::{Deserialize, Serialize};

use crate::bert::{self, pooled_head};
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
    pub head_dim: Option<usize>,
    pub intermediate_size: usize,
    pub hidden_act: Activation,
    pub max_position_embeddings: usize,
    pub type_vocab_size: usize,
    pub initializer_range: f64,
    pub layer_norm_eps: f64,
    pub tie_word_embeddings: bool,
    #[serde(flatten)]
    pub rope: RopeSettings,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            vocab_size: 30_528,
            hidden_size: 768,
            num_hidden_layers: 12,
            num_attention_heads: 12,
            head_dim: None,
            intermediate_size: 3072,
            hidden_act: Activation::Silu,
            max_position_embeddings: 2048,
            type_vocab_size: 2,
            initializer_range: 0.02,
            layer_norm_eps: 1e-12,
            tie_word_embeddings: true,
            rope: RopeSettings::default(),
        }
    }
}

/// One layer.
#[derive(Module, Debug)]
pub struct Layer {
    attn: Attention,
    norm1: LayerNorm,
    mlp: GatedMlp,
    norm2: LayerNorm,
}

impl EncoderLayer for Layer {
    fn forward(&self, x: Tensor<3>, cx: &mut Context) -> Tensor<3> {
        let x = self.norm1.forward(x.clone() + self.attn.forward(x, cx));
        self.norm2.forward(x.clone() + self.mlp.forward(x))
    }
}

impl Config {
    fn layer(&self, w: &Weights, rope: &Rope) -> Result<Layer> {
        const MLP: [&str; 3] = ["fc12", "fc11", "fc2"];
        let (hidden, heads) = (self.hidden_size, self.num_attention_heads);
        let attention = AttentionConfig {
            rope: Some(rope.clone()),
            ..AttentionConfig::new(hidden, heads, heads, self.head_dim())
        };
        let norm = |name| LayerNorm::load(&w.pp(name), hidden, self.layer_norm_eps, true);
        let (inner, act) = (self.intermediate_size, self.hidden_act);
        Ok(Layer {
            attn: Attention::load_stacked(&w.pp("attn"), ["Wqkv", "out_proj"], attention)?,
            norm1: norm("norm1")?,
            mlp: GatedMlp::load_named(&w.pp("mlp"), MLP, hidden, inner, act, false)?,
            norm2: norm("norm2")?,
        })
    }

    fn head_dim(&self) -> usize {
        (self.head_dim).unwrap_or(self.hidden_size / self.num_attention_heads.max(1))
    }
}

impl EncoderArchitecture for Config {
    type Model = Encoder<Layer>;
    const BASE: &'static str = "nomic_bert";
    const IGNORED: &'static [&'static str] = &[
        "rotary_emb.inv_freq",
        "embeddings.position_ids",
        "pooler.dense.weight",
        "pooler.dense.bias",
    ];

    fn load(&self, w: &Weights) -> Result<Encoder<Layer>> {
        let (w, hidden, eps) = (w.pp("nomic_bert"), self.hidden_size, self.layer_norm_eps);
        let at = w.pp("embeddings");
        let tokens = Embedding::load_tokens(&at.pp("word_embeddings"), self.vocab_size, hidden)?;
        let norm = LayerNorm::load(&w.pp("emb_ln"), hidden, eps, true)?;
        let config = EmbeddingsConfig {
            type_vocab_size: self.type_vocab_size,
            ..EmbeddingsConfig::new(self.vocab_size, hidden, eps)
        };
        let embeddings = Embeddings::with(tokens, norm, &at, config)?;
        let parameters = self.rope.resolve("full_attention", 1000.0)?;
        let rope = Rope::new(&parameters, self.head_dim(), self.max_position_embeddings, false)?;
        let layers = (0..self.num_hidden_layers).map(|i| self.layer(&w.pp("encoder.layers").pp(i), &rope));
        Ok(Encoder::new(embeddings, layers.collect::<Result<_>>()?))
    }

    fn head(&self, task: Task, w: &Weights, model: &Encoder<Layer>, labels: usize) -> Result<Option<Head>> {
        let hidden = self.hidden_size;
        match task {
            Task::MaskedLM => {
                let config = bert::Config {
                    hidden_size: hidden,
                    hidden_act: self.hidden_act,
                    layer_norm_eps: self.layer_norm_eps,
                    tie_word_embeddings: self.tie_word_embeddings,
                    ..bert::Config::default()
                };
                let table = &model.embeddings.word_embeddings;
                let head = config.predictions(&w.pp("cls.predictions"), "layer_norm", table);
                head.map(Some)
            }
            Task::Base | Task::SequenceClassification | Task::TokenClassification => {
                pooled_head(task, w, &w.pp("nomic_bert.pooler.dense"), hidden, labels)
            }
            _ => Ok(None),
        }
    }

    fn max_position_embeddings(&self) -> Option<usize> {
        Some(self.max_position_embeddings)
    }
}
