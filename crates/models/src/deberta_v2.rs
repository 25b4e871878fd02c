//! DeBERTa-v2 and v3 (He et al., 2021): BERT whose scores have two more parts, content to position and position to
//! content, from embeddings of the distance between tokens that all layers share.

use burn::module::{Module, Param};
use burn::tensor::ops::ConvOptions;
use burn::tensor::{Device, Int, Tensor, TensorData, module};
use oxiformers_nn::attention::split_heads;
use oxiformers_nn::encoder::run_layers;
use oxiformers_nn::{
    Activation, Attention, AttentionConfig, AttentionOptions, Backbone, Embedding, Embeddings,
    EmbeddingsConfig, EncoderInputs, EncoderOutput, Error, Head, Init, LayerNorm, Linear, Mask, Reads,
    Result, ScoreBias, Weights, attend, training,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::bert::{self, Extended, Extends, Layer};
use crate::{EncoderArchitecture, Task};

/// The fields of `config.json`: BERT's with other defaults, and more.
pub type Config = Extended<Fields>;

/// The fields that BERT does not have.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default)]
#[allow(missing_docs)]
pub struct Fields {
    pub embedding_size: Option<usize>,
    pub attention_head_size: Option<usize>,
    pub relative_attention: bool,
    pub max_relative_positions: i64,
    pub position_buckets: i64,
    pub norm_rel_ebd: String,
    pub share_att_key: bool,
    /// A list, or a text with `|` between its parts.
    pub pos_att_type: Value,
    pub position_biased_input: bool,
    pub conv_kernel_size: usize,
    pub conv_groups: usize,
    pub conv_act: Activation,
    pub pooler_hidden_act: Activation,
    pub legacy: bool,
}

impl Default for Fields {
    fn default() -> Self {
        Self {
            embedding_size: None,
            attention_head_size: None,
            relative_attention: false,
            max_relative_positions: -1,
            position_buckets: -1,
            norm_rel_ebd: "none".to_string(),
            share_att_key: false,
            pos_att_type: Value::Null,
            position_biased_input: true,
            conv_kernel_size: 0,
            conv_groups: 1,
            conv_act: Activation::Tanh,
            pooler_hidden_act: Activation::Gelu,
            legacy: true,
        }
    }
}

impl Extends for Fields {
    fn bert() -> bert::Config {
        bert::Config {
            vocab_size: 128_100,
            hidden_size: 1536,
            num_hidden_layers: 24,
            num_attention_heads: 24,
            intermediate_size: 6144,
            type_vocab_size: 0,
            layer_norm_eps: 1e-7,
            ..bert::Config::default()
        }
    }
}

/// How distances between tokens become rows of a table.
#[derive(Debug, Clone, Copy)]
struct Distances {
    /// Distances to either side that have a row, or share one with others.
    span: usize,
    /// Number of buckets and the largest distance, where far ones share rows.
    buckets: Option<(usize, usize)>,
}

impl Distances {
    /// The row for a key that stands `distance` tokens before its query.
    fn row(self, distance: isize) -> usize {
        let place = match self.buckets {
            Some((buckets, most)) if distance.unsigned_abs() > buckets / 2 => {
                let (middle, far) = (buckets / 2, distance.unsigned_abs());
                // In f32, as the original computes it: the borders of buckets depend on its rounding.
                let log = |x: usize| (x as f32 / middle as f32).ln();
                let further = (log(far) / log(most - 1) * (middle - 1) as f32).ceil();
                (further as isize + middle as isize) * distance.signum()
            }
            _ => distance,
        };
        let span = self.span as isize;
        place.saturating_add(span).clamp(0, 2 * span - 1).unsigned_abs()
    }

    /// The rows for all pairs of query and key: `[seq, seq]`.
    fn rows(self, seq: usize, device: &Device) -> Tensor<2, Int> {
        let distances = -(seq as isize) + 1..seq as isize;
        let rows: Vec<i32> = distances.map(|distance| self.row(distance) as i32).collect();
        let of_query = |query: usize| (0..seq).map(move |key| query + seq - 1 - key);
        let all: Vec<i32> = ((0..seq).flat_map(of_query))
            .filter_map(|i| rows.get(i).copied())
            .collect();
        Tensor::from_data(TensorData::new(all, [seq, seq]), device)
    }
}

/// What all layers know of distances in a batch.
struct Relative {
    /// `[1, 2 * span, hidden_size]`.
    table: Tensor<3>,
    /// `[seq, seq]`.
    rows: Tensor<2, Int>,
}

/// Attention with scores for content and content, content and position, position and content.
#[derive(Module, Debug)]
pub struct DisentangledAttention {
    content: Attention,
    /// Keys of distances, which queries of tokens meet. Where there are neither these nor queries of distances, both are
    /// made as those of tokens are.
    pos_key: Option<Linear>,
    /// Queries of distances, which meet keys of tokens.
    pos_query: Option<Linear>,
    #[module(skip)]
    parts: Parts,
}

#[derive(Debug, Clone, Copy)]
struct Parts {
    content_to_position: bool,
    position_to_content: bool,
    heads: usize,
    scale: f64,
}

impl DisentangledAttention {
    fn forward(&self, x: Tensor<3>, mask: &Mask, relative: Option<&Relative>) -> Tensor<3> {
        let qkv = self.content.project(x);
        let bias = relative.and_then(|relative| {
            let table = training::embedding(relative.table.clone());
            self.bias(&qkv, table, &relative.rows)
        });
        let options = AttentionOptions {
            scale: Some(self.parts.scale),
            softcap: None,
            dropout: training::attention(),
        };
        let bias = ScoreBias {
            bias,
            ..ScoreBias::default()
        };
        self.content.output(attend(qkv, mask, bias, options))
    }

    /// What distances add to the scores: `[batch, heads, seq, seq]`.
    fn bias(&self, [q, k, _]: &[Tensor<4>; 3], table: Tensor<3>, rows: &Tensor<2, Int>) -> Option<Tensor<4>> {
        let [batch, heads, seq, _] = q.dims();
        let of = |linear: &Linear| split_heads(linear.forward(table.clone()), self.parts.heads);
        let (query, key) = match (&self.pos_query, &self.pos_key) {
            (None, None) => {
                let [query, key, _] = self.content.project(table.clone());
                (Some(query), Some(key))
            }
            (query, key) => (query.as_ref().map(of), key.as_ref().map(of)),
        };
        // Scores of tokens and distances, of which each pair takes the one that is its own.
        let scores = |tokens: &Tensor<4>, distances: Tensor<4>, rows: Tensor<2, Int>| {
            let rows = rows.reshape([1, 1, seq, seq]).expand([batch, heads, seq, seq]);
            (tokens.clone() * self.parts.scale)
                .matmul(distances.swap_dims(2, 3))
                .gather(3, rows)
        };
        let to_position =
            (key.filter(|_| self.parts.content_to_position)).map(|key| scores(q, key, rows.clone()));
        let to_content = (query.filter(|_| self.parts.position_to_content))
            .map(|query| scores(k, query, rows.clone().transpose()).swap_dims(2, 3));
        match (to_position, to_content) {
            (Some(a), Some(b)) => Some(a + b),
            (a, b) => a.or(b),
        }
    }
}

/// A convolution over the embeddings, which joins the output of the first layer.
#[derive(Module, Debug)]
struct Conv {
    /// `[hidden_size, hidden_size / groups, kernel_size]`.
    weight: Param<Tensor<3>>,
    bias: Param<Tensor<1>>,
    norm: LayerNorm,
    #[module(skip)]
    act: Activation,
    groups: usize,
}

impl Conv {
    /// `embeddings` and the layer's output `x` `[batch, seq, hidden_size]`; `mask` `[batch, seq, 1]` is 0 for padding.
    fn forward(&self, embeddings: Tensor<3>, x: Tensor<3>, mask: Tensor<3>) -> Tensor<3> {
        let (weight, bias) = (self.weight.val(), self.bias.val());
        let padding = weight.dims()[2] / 2;
        let options = ConvOptions::new([1], [padding], [1], self.groups);
        let y = module::conv1d(embeddings.swap_dims(1, 2), weight, Some(bias), options).swap_dims(1, 2);
        let y = self.act.forward(training::feed_forward(y * mask.clone()));
        self.norm.forward(x + y) * mask
    }
}

/// The encoder.
#[derive(Module, Debug)]
pub struct Model {
    /// What the tokens begin as.
    pub embeddings: Embeddings,
    embed_proj: Option<Linear>,
    /// `[2 * span, hidden_size]`.
    rel_embeddings: Option<Param<Tensor<2>>>,
    rel_norm: Option<LayerNorm>,
    layers: Vec<Layer<DisentangledAttention>>,
    conv: Option<Conv>,
    #[module(skip)]
    distances: Distances,
}

impl Backbone for Model {
    fn forward(&self, inputs: &EncoderInputs, device: &Device) -> Result<EncoderOutput> {
        let mut x = self.embeddings.sum(inputs, device)?;
        if let Some(project) = &self.embed_proj {
            x = project.forward(x);
        }
        let mut x = self.embeddings.norm(x);
        let tokens = inputs.mask(device).cast(x.dtype());
        if self.conv.is_some() {
            x = x * tokens.clone();
        }
        let relative = self.rel_embeddings.as_ref().map(|table| {
            let table = table.val().unsqueeze::<3>();
            Relative {
                table: match &self.rel_norm {
                    Some(norm) => norm.forward(table),
                    None => table,
                },
                rows: self.distances.rows(inputs.dims()[1], device),
            }
        });
        let embeddings = x.clone();
        let mask = inputs.context(device).mask(None);
        Ok(run_layers(&self.layers, x, inputs, |index, layer, x| {
            let x = layer.forward_with(x, |attention, x| attention.forward(x, &mask, relative.as_ref()));
            match (&self.conv, index) {
                (Some(conv), 0) => conv.forward(embeddings.clone(), x, tokens.clone()),
                _ => x,
            }
        }))
    }
}

impl Config {
    /// Whether `part` is among the kinds of scores.
    fn has_score(&self, part: &str) -> bool {
        match &self.own.pos_att_type {
            Value::String(all) => all.split('|').any(|name| name.trim().eq_ignore_ascii_case(part)),
            Value::Array(all) => all.iter().any(|name| name == part),
            _ => false,
        }
    }

    fn distances(&self) -> Result<Distances> {
        let positive = |x: i64| usize::try_from(x).ok().filter(|x| (1..1 << 24).contains(x));
        let most = positive(self.own.max_relative_positions).unwrap_or(self.bert.max_position_embeddings);
        let buckets = positive(self.own.position_buckets);
        if let Some(buckets) = buckets.filter(|buckets| *buckets < 2 || most <= buckets / 2 + 1) {
            let message = format!("{buckets} buckets cannot hold distances up to {most}");
            return Err(Error::config("position_buckets", message));
        }
        let span = buckets.unwrap_or(most);
        if span == 0 || span >= 1 << 24 {
            return Err(Error::config(
                "max_relative_positions",
                format!("cannot be {span}"),
            ));
        }
        Ok(Distances {
            span,
            buckets: buckets.map(|buckets| (buckets, most)),
        })
    }

    fn attention(&self, w: &Weights) -> Result<DisentangledAttention> {
        const NAMES: [&str; 4] = [
            "self.query_proj",
            "self.key_proj",
            "self.value_proj",
            "output.dense",
        ];
        let (hidden, heads) = (self.bert.hidden_size, self.bert.num_attention_heads);
        let head_dim = (self.own.attention_head_size).unwrap_or(hidden / heads.max(1));
        let config = AttentionConfig {
            qkv_bias: true,
            out_bias: true,
            ..AttentionConfig::new(hidden, heads, heads, head_dim)
        };
        let (c2p, p2c) = (self.has_score("c2p"), self.has_score("p2c"));
        let parts = Parts {
            content_to_position: c2p,
            position_to_content: p2c,
            heads,
            scale: ((1 + usize::from(c2p) + usize::from(p2c)) as f64 * head_dim as f64).powf(-0.5),
        };
        let content = Attention::load_named(w, NAMES, config)?;
        let own = self.own.relative_attention && !self.own.share_att_key;
        let linear = |name, wanted: bool| {
            let load = || Linear::load(&w.pp(name), hidden, heads * head_dim, true);
            (own && wanted).then(load).transpose()
        };
        Ok(DisentangledAttention {
            content,
            pos_key: linear("self.pos_key_proj", c2p)?,
            pos_query: linear("self.pos_query_proj", p2c)?,
            parts,
        })
    }

    fn conv(&self, w: &Weights) -> Result<Conv> {
        let (hidden, size, groups) = (
            self.bert.hidden_size,
            self.own.conv_kernel_size,
            self.own.conv_groups,
        );
        if size.is_multiple_of(2) {
            return Err(Error::config(
                "conv_kernel_size",
                format!("is {size}, which is not odd"),
            ));
        }
        if groups == 0 || !hidden.is_multiple_of(groups) {
            let message = format!("{hidden} channels cannot be cut into {groups} groups");
            return Err(Error::config("conv_groups", message));
        }
        Ok(Conv {
            weight: w.param("conv.weight", [hidden, hidden / groups, size], Init::Normal)?,
            bias: w.param("conv.bias", [hidden], Init::Zeros)?,
            norm: self.norm(&w.pp("LayerNorm"))?,
            act: self.own.conv_act,
            groups,
        })
    }

    fn norm(&self, w: &Weights) -> Result<LayerNorm> {
        LayerNorm::load(w, self.bert.hidden_size, self.bert.layer_norm_eps, true)
    }
}

impl EncoderArchitecture for Config {
    type Model = Model;
    const BASE: &'static str = "deberta";
    const IGNORED: &'static [&'static str] =
        &["embeddings.position_ids", "embeddings.position_embeddings.weight"];

    fn load(&self, w: &Weights) -> Result<Model> {
        let (c, own, w) = (&self.bert, &self.own, w.pp("deberta"));
        c.check()?;
        let distances = self.distances()?;
        let (hidden, at) = (c.hidden_size, w.pp("embeddings"));
        let width = own.embedding_size.unwrap_or(hidden);
        let config = EmbeddingsConfig {
            max_position_embeddings: own.position_biased_input.then_some(c.max_position_embeddings),
            type_vocab_size: c.type_vocab_size,
            ..EmbeddingsConfig::new(c.vocab_size, width, c.layer_norm_eps)
        };
        let tokens = Embedding::load_tokens(&at.pp("word_embeddings"), c.vocab_size, width)?;
        let project = || Linear::load(&at.pp("embed_proj"), width, hidden, false);
        let norm = self.norm(&at.pp("LayerNorm"))?;
        let embeddings = Embeddings::with(tokens, norm, &at, config)?;
        let w = w.pp("encoder");
        let layers = (0..c.num_hidden_layers).map(|i| {
            let w = w.pp("layer").pp(i);
            c.layer_around(&w, self.attention(&w.pp("attention"))?)
        });
        let table = || {
            w.param(
                "rel_embeddings.weight",
                [2 * distances.span, hidden],
                Init::Normal,
            )
        };
        let normed = own.norm_rel_ebd.to_lowercase();
        let normed = normed.split('|').any(|name| name.trim() == "layer_norm");
        Ok(Model {
            embeddings,
            embed_proj: (width != hidden).then(project).transpose()?,
            rel_embeddings: own.relative_attention.then(table).transpose()?,
            rel_norm: normed.then(|| self.norm(&w.pp("LayerNorm"))).transpose()?,
            layers: layers.collect::<Result<_>>()?,
            conv: (own.conv_kernel_size > 0)
                .then(|| self.conv(&w.pp("conv")))
                .transpose()?,
            distances,
        })
    }

    fn head(&self, task: Task, w: &Weights, model: &Model, labels: usize) -> Result<Option<Head>> {
        let (c, hidden, table) = (
            &self.bert,
            self.bert.hidden_size,
            &model.embeddings.word_embeddings,
        );
        let linear = |name, outputs| Linear::load(&w.pp(name), hidden, outputs, true);
        let of_text = |outputs| -> Result<Head> {
            let dense = linear("pooler.dense", hidden)?;
            let head = Head::new(Reads::First).dense(dense, self.own.pooler_hidden_act);
            Ok(head.output(linear("classifier", outputs)?))
        };
        let of_tokens = || Head::new(Reads::All);
        Ok(Some(match task {
            Task::MaskedLM if self.own.legacy => {
                c.predictions(&w.pp("cls.predictions"), "LayerNorm", table)?
            }
            Task::MaskedLM => {
                let at = w.pp("lm_predictions.lm_head");
                let dense = Linear::load(&at.pp("dense"), hidden, hidden, true)?;
                let mut output = table.tied_output(&w.pp("lm_predictions.lm_head"))?;
                output.bias = Some(at.param("bias", [c.vocab_size], Init::Zeros)?);
                let head = of_tokens().dense(dense, c.hidden_act);
                head.norm(self.norm(&at.pp("LayerNorm"))?).output(output)
            }
            Task::SequenceClassification => of_text(labels)?,
            Task::MultipleChoice => of_text(1)?,
            Task::TokenClassification => of_tokens().output(linear("classifier", labels)?),
            Task::QuestionAnswering => of_tokens().output(linear("qa_outputs", 2)?),
            _ => return Ok(None),
        }))
    }

    fn max_position_embeddings(&self) -> Option<usize> {
        Some(self.bert.max_position_embeddings)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn borders_of_buckets_are_those_of_pytorch() {
        let borders = |buckets: usize, most: usize, until: isize| {
            let distances = Distances {
                span: buckets,
                buckets: Some((buckets, most)),
            };
            for distance in 0..until {
                // Those to the other side mirror them, but for the last.
                let (before, after) = (distances.row(distance), distances.row(-distance));
                assert_eq!(after, (2 * buckets - before).min(2 * buckets - 1));
            }
            let first = buckets as isize / 2 + 1;
            let far = (first..until).filter(|d| distances.row(*d) != distances.row(d - 1));
            far.collect::<Vec<_>>()
        };
        let few = [17, 19, 22, 25, 28, 32, 37, 43, 49, 56, 64, 74, 84, 97, 111];
        assert_eq!(borders(32, 128, 128), few);
        let many = [
            129, 130, 131, 133, 134, 136, 137, 139, 140, 142, 143, 145, 146, 148, 150, 151, 153, 155, 156,
            158, 160, 161, 163, 165, 167, 169, 170, 172, 174, 176, 178, 180, 182, 184, 186, 188, 190, 192,
            194, 196, 198, 201, 203, 205, 207, 210, 212, 214, 216, 219, 221, 224, 226, 229, 231, 234, 236,
            239, 241, 244, 247, 249, 252, 255, 258, 260, 263, 266, 269, 272, 275, 278, 281, 284, 287, 290,
            294, 297, 300, 303, 307, 310, 313, 317, 320, 324, 327, 331, 335, 338, 342, 346, 349, 353, 357,
            361, 365, 369, 373, 377, 381, 385, 390, 394, 398, 403, 407, 411, 416, 420, 425, 430, 434, 439,
            444, 449, 454, 459, 464, 469, 474, 479, 484, 490, 495, 500, 506,
        ];
        assert_eq!(borders(256, 512, 512), many);
    }
}
