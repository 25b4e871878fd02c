//! BART (Lewis et al., 2020): learned positions, a norm of the embeddings, and layer norms after both parts of a layer.
//! Its layer and the way it is put together serve all encoder-decoders with plain attention.

use burn::module::Module;
use burn::tensor::Tensor;
use oxiformers_nn::seq2seq::{Half, LmHead, Reader, ShiftRight, TiedTables, load_logits_bias};
use oxiformers_nn::{
    Activation, Attention, AttentionConfig, Context, CrossAttention, DecoderLayer, Error, Head, LayerNorm,
    Linear, Mlp, Positions, Reads, Result, Seq2SeqLayer, Stack, Weights,
};
use serde::{Deserialize, Serialize};

use crate::fields::one_or_more;
use crate::{Seq2SeqArchitecture, Task};

const EPS: f64 = 1e-5;

/// The fields of `config.json`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default)]
#[allow(missing_docs)]
pub struct Config {
    pub vocab_size: usize,
    pub max_position_embeddings: usize,
    pub encoder_layers: usize,
    pub encoder_ffn_dim: usize,
    pub encoder_attention_heads: usize,
    pub decoder_layers: usize,
    pub decoder_ffn_dim: usize,
    pub decoder_attention_heads: usize,
    pub activation_function: Activation,
    pub d_model: usize,
    pub init_std: f64,
    pub scale_embedding: bool,
    pub pad_token_id: Option<u32>,
    pub bos_token_id: Option<u32>,
    #[serde(deserialize_with = "one_or_more")]
    pub eos_token_id: Vec<u32>,
    pub decoder_start_token_id: Option<u32>,
    #[serde(deserialize_with = "one_or_more")]
    pub forced_eos_token_id: Vec<u32>,
    pub tie_word_embeddings: bool,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            vocab_size: 50_265,
            max_position_embeddings: 1024,
            encoder_layers: 12,
            encoder_ffn_dim: 4096,
            encoder_attention_heads: 16,
            decoder_layers: 12,
            decoder_ffn_dim: 4096,
            decoder_attention_heads: 16,
            activation_function: Activation::Gelu,
            d_model: 1024,
            init_std: 0.02,
            scale_embedding: false,
            pad_token_id: Some(1),
            bos_token_id: Some(0),
            eos_token_id: vec![2],
            decoder_start_token_id: Some(2),
            forced_eos_token_id: vec![2],
            tie_word_embeddings: true,
        }
    }
}

/// What the members of the family differ in.
#[derive(Debug, Clone)]
pub struct Family {
    /// Whether layer norms stand before the parts of a layer, and one at the end, instead of after each part.
    pub norm_before: bool,
    /// Whether there is a norm after the last layer.
    pub final_norm: bool,
    /// Whether the embeddings are normalized.
    pub embedding_norm: bool,
    /// Absolute positions.
    pub positions: PositionKind,
    /// Size of the vocabulary that is written with, where it has tables of its own.
    pub target_vocab_size: Option<usize>,
}

/// Absolute positions of a member of the family.
#[derive(Debug, Clone, Copy)]
pub enum PositionKind {
    /// A learned table with so many unused rows before it.
    Learned {
        /// Number of rows.
        offset: usize,
    },
    /// See [`Positions::sinusoidal`].
    Sinusoidal {
        /// What the first position is counted as.
        offset: usize,
        /// Whether the longest wavelength is 10000 · 2π.
        inclusive: bool,
    },
}

/// One layer of the encoder, or of the decoder, which also looks at what the encoder has read.
#[derive(Module, Debug)]
pub struct Layer {
    self_attn: Attention,
    self_attn_layer_norm: LayerNorm,
    encoder_attn: Option<CrossAttention>,
    encoder_attn_layer_norm: Option<LayerNorm>,
    mlp: Mlp,
    final_layer_norm: LayerNorm,
    norm_before: bool,
}

impl Layer {
    /// A part of the layer with its norm and the way around it.
    fn part(&self, norm: &LayerNorm, x: Tensor<3>, f: impl FnOnce(Tensor<3>) -> Tensor<3>) -> Tensor<3> {
        if self.norm_before {
            x.clone() + f(norm.forward(x))
        } else {
            norm.forward_sum(f(x.clone()), x)
        }
    }
}

impl DecoderLayer for Layer {
    fn forward(&self, x: Tensor<3>, cx: &mut Context) -> Tensor<3> {
        let mut x = self.part(&self.self_attn_layer_norm, x, |x| self.self_attn.forward(x, cx));
        if let (Some(attention), Some(norm)) = (&self.encoder_attn, &self.encoder_attn_layer_norm) {
            x = self.part(norm, x, |x| attention.forward(x, cx));
        }
        self.part(&self.final_layer_norm, x, |x| self.mlp.forward(x))
    }
}

impl Seq2SeqLayer for Layer {
    fn cross_attention(&self) -> Option<&CrossAttention> {
        self.encoder_attn.as_ref()
    }
}

impl Config {
    fn layer(&self, half: Half, w: &Weights, family: &Family) -> Result<Layer> {
        const NAMES: [&str; 4] = ["q_proj", "k_proj", "v_proj", "out_proj"];
        let hidden = self.d_model;
        let (heads, inner) = match half {
            Half::Encoder => (self.encoder_attention_heads, self.encoder_ffn_dim),
            Half::Decoder => (self.decoder_attention_heads, self.decoder_ffn_dim),
        };
        let attention = AttentionConfig {
            qkv_bias: true,
            out_bias: true,
            ..AttentionConfig::new(hidden, heads, heads, hidden / heads.max(1))
        };
        let norm = |name| LayerNorm::load(&w.pp(name), hidden, EPS, true);
        let (encoder_attn, encoder_attn_layer_norm) = if half == Half::Decoder {
            let w = w.pp("encoder_attn");
            let cross = CrossAttention::load_named(&w, NAMES, hidden, attention.clone())?;
            (Some(cross), Some(norm("encoder_attn_layer_norm")?))
        } else {
            (None, None)
        };
        Ok(Layer {
            self_attn: Attention::load_named(&w.pp("self_attn"), NAMES, attention)?,
            self_attn_layer_norm: norm("self_attn_layer_norm")?,
            encoder_attn,
            encoder_attn_layer_norm,
            mlp: Mlp::load(w, ["fc1", "fc2"], hidden, inner, self.activation_function, true)?,
            final_layer_norm: norm("final_layer_norm")?,
            norm_before: family.norm_before,
        })
    }

    /// Builds one half of a member of the family.
    ///
    /// # Errors
    /// A tensor that is missing or misshapen, or a field that contradicts another.
    pub fn stack_of(
        &self,
        half: Half,
        w: &Weights,
        tables: &mut TiedTables,
        family: &Family,
    ) -> Result<Stack<Layer>> {
        let hidden = self.d_model;
        let [own, other] = [half, half.other()].map(|half| format!("model.{}.embed_tokens", half.name()));
        let embed_tokens = match (family.target_vocab_size, half) {
            (Some(size), Half::Decoder) => tables.load(&own, &[], size, hidden)?,
            (Some(_), Half::Encoder) => tables.load(&own, &[], self.vocab_size, hidden)?,
            (None, _) => tables.load(
                &own,
                &["model.shared", &other, "lm_head"],
                self.vocab_size,
                hidden,
            )?,
        };
        let w = w.pp("model").pp(half.name());
        let positions = match family.positions {
            PositionKind::Learned { offset } => {
                let count = self.max_position_embeddings;
                Positions::learned(&w.pp("embed_positions"), count, hidden, offset)?
            }
            PositionKind::Sinusoidal { offset, inclusive } => {
                Positions::sinusoidal(hidden, offset, inclusive)?
            }
        };
        let norm = |name, wanted| match wanted {
            true => LayerNorm::load(&w.pp(name), hidden, EPS, true).map(|norm| Some(norm.into())),
            false => Ok(None),
        };
        let layers = match half {
            Half::Encoder => self.encoder_layers,
            Half::Decoder => self.decoder_layers,
        };
        let layers = (0..layers).map(|i| self.layer(half, &w.pp("layers").pp(i), family));
        let embed_scale = match self.scale_embedding {
            true => (hidden as f64).sqrt(),
            false => 1.0,
        };
        let final_norm = norm("layer_norm", family.final_norm)?;
        Ok(Stack {
            embed_scale,
            embed_positions: Some(positions),
            embed_norm: norm("layernorm_embedding", family.embedding_norm)?,
            ..Stack::new(embed_tokens, layers.collect::<Result<_>>()?, final_norm)
        })
    }

    /// Builds the layer that makes logits of a member of the family.
    ///
    /// # Errors
    /// As [`stack_of`](Self::stack_of).
    pub fn lm_head_of(&self, w: &Weights, tables: &mut TiedTables, family: &Family) -> Result<LmHead> {
        const SHARED: [&str; 3] = [
            "model.shared",
            "model.decoder.embed_tokens",
            "model.encoder.embed_tokens",
        ];
        let (tied, vocab_size) = match (self.tie_word_embeddings, family.target_vocab_size) {
            (false, size) => (&[][..], size.unwrap_or(self.vocab_size)),
            (true, None) => (&SHARED[..], self.vocab_size),
            (true, Some(size)) => (&SHARED[1..2], size),
        };
        let table = tables.load("lm_head", tied, vocab_size, self.d_model)?;
        let mut linear = table.tied_output(&tables.at("lm_head"))?;
        linear.bias = load_logits_bias(w, "final_logits_bias", vocab_size)?;
        Ok(LmHead { linear, scale: 1.0 })
    }

    /// Builds the head for a task that members of the family know, of those that there are: they classify texts by
    /// their last token, and find answers.
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
            Task::QuestionAnswering => Some(Head::new(Reads::All).output(linear("qa_outputs", 2)?)),
            _ => None,
        })
    }

    /// What mBART and PLBART put before a text that their decoder is given.
    pub(crate) fn shift_around(&self) -> Result<ShiftRight> {
        match self.pad_token_id {
            Some(pad) => Ok(ShiftRight::Around { pad }),
            None => Err(Error::config(
                "pad_token_id",
                "is missing; it tells where a text ends",
            )),
        }
    }
}

pub(crate) const FAMILY: Family = Family {
    norm_before: false,
    final_norm: false,
    embedding_norm: true,
    positions: PositionKind::Learned { offset: 2 },
    target_vocab_size: None,
};

impl Seq2SeqArchitecture for Config {
    type Layer = Layer;
    const BASE: &'static str = "model";
    const IGNORED: &'static [&'static str] = &["encoder.version", "decoder.version"];

    fn stack(&self, half: Half, w: &Weights, tables: &mut TiedTables) -> Result<Stack<Layer>> {
        self.stack_of(half, w, tables, &FAMILY)
    }

    fn lm_head(&self, w: &Weights, tables: &mut TiedTables) -> Result<LmHead> {
        self.lm_head_of(w, tables, &FAMILY)
    }

    fn max_position_embeddings(&self) -> Option<usize> {
        Some(self.max_position_embeddings)
    }

    fn reader(&self, _: Task, w: &Weights) -> Result<Reader<Layer>> {
        let start = self.decoder_start_token_id.ok_or_else(|| {
            Error::config("decoder_start_token_id", "is missing; the decoder starts with it")
        })?;
        self.both_read(w, ShiftRight::After(start))
    }

    fn head(&self, task: Task, w: &Weights, labels: usize) -> Result<Option<Head>> {
        self.head_of(task, w, labels)
    }
}
