//! Longformer (Beltagy et al., 2020): RoBERTa whose tokens see a window each, and a few global tokens that all others
//! see, and that see all others through projections of their own.

use std::collections::{BTreeMap, BTreeSet};

use burn::module::Module;
use burn::tensor::{Device, Int, Tensor, TensorData};
use oxiformers_nn::attention::split_heads;
use oxiformers_nn::blocks::GlobalKey;
use oxiformers_nn::encoder::run_layers;
use oxiformers_nn::{
    Activation, Attention, AttentionConfig, AttentionOptions, Backbone, BlockWindows, Context, Embeddings,
    EncoderInputs, EncoderOutput, Error, Head, Linear, PositionCount, Result, ScoreBias, Weights, attend,
    training,
};
use serde::{Deserialize, Serialize};

use crate::bert::{self, ATTENTION, Extended, Extends, Layer, pooled_head};
use crate::fields::one_or_more;
use crate::roberta::{classification_head, lm_head};
use crate::{EncoderArchitecture, Task};

/// The fields of `config.json`: BERT's with other defaults, and more.
pub type Config = Extended<Fields>;

/// The fields that BERT does not have.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default)]
#[allow(missing_docs)]
pub struct Fields {
    /// One for all layers, or one for each.
    #[serde(deserialize_with = "one_or_more")]
    pub attention_window: Vec<usize>,
    pub sep_token_id: u32,
}

impl Default for Fields {
    fn default() -> Self {
        Self {
            attention_window: vec![512],
            sep_token_id: 2,
        }
    }
}

impl Extends for Fields {
    fn bert() -> bert::Config {
        bert::Config {
            pad_token_id: 1,
            ..bert::Config::default()
        }
    }
}

/// Attention over a window, and of global tokens over everything.
#[derive(Module, Debug)]
pub struct LongAttention {
    local: Attention,
    query_global: Linear,
    key_global: Linear,
    value_global: Linear,
    heads: usize,
    window: usize,
}

/// The global tokens of a batch.
struct Globals {
    /// Rows of the batch that hold them, as many for each sequence: `[batch * count]`.
    rows: Tensor<1, Int>,
    count: usize,
    /// Where the result of each token lies among those of all tokens, followed by those of the global ones:
    /// `[batch * seq]`.
    results: Tensor<1, Int>,
    /// What queries see, by the width of the window.
    windows: BTreeMap<usize, BlockWindows>,
}

impl Globals {
    /// None where there are none.
    fn new(inputs: &EncoderInputs, windows: BTreeSet<usize>, device: &Device) -> Option<Self> {
        let [batch, seq] = inputs.dims();
        let places = (inputs.tokens.iter().zip(&inputs.global_attention_mask)).map(|(tokens, mask)| {
            let global = mask.iter().enumerate().filter(|(_, global)| **global != 0);
            let real = global
                .map(|(place, _)| place)
                .filter(|place| tokens.contains(place));
            real.collect::<Vec<_>>()
        });
        let places: Vec<Vec<usize>> = places.collect();
        let count = places.iter().map(Vec::len).max().filter(|count| *count > 0)?;
        let mut rows = Vec::with_capacity(batch * count);
        let mut results: Vec<usize> = (0..batch * seq).collect();
        for (row, places) in places.iter().enumerate() {
            for i in 0..count {
                // Sequences with fewer of them compute others for nothing.
                let place = places.get(i).copied();
                rows.push((row * seq + place.unwrap_or(0)) as i32);
                if let Some(result) = place.and_then(|place| results.get_mut(row * seq + place)) {
                    *result = batch * seq + row * count + i;
                }
            }
        }
        let key = |place: &usize| GlobalKey {
            place: *place,
            bias: 0.0,
        };
        let keys: Vec<Vec<_>> = places
            .iter()
            .map(|places| places.iter().map(key).collect())
            .collect();
        let windows = windows.into_iter().map(|window| {
            let reach = window / 2;
            let windows = BlockWindows::new(&inputs.tokens, seq, reach, &keys, Some(reach), device);
            (window, windows)
        });
        let results: Vec<i32> = results.into_iter().map(|result| result as i32).collect();
        Some(Self {
            rows: Tensor::from_data(TensorData::new(rows, [batch * count]), device),
            count,
            results: Tensor::from_data(TensorData::new(results, [batch * seq]), device),
            windows: windows.collect(),
        })
    }
}

impl LongAttention {
    fn forward(&self, x: Tensor<3>, cx: &mut Context, globals: Option<&Globals>) -> Tensor<3> {
        let Some((globals, windows)) = globals.and_then(|g| Some((g, g.windows.get(&self.window)?))) else {
            return self.local.forward(x, cx);
        };
        let [batch, seq, hidden] = x.dims();
        let options = || AttentionOptions {
            dropout: training::attention(),
            ..AttentionOptions::default()
        };
        let local = windows.attend(self.local.project(x.clone()), options());
        let width = local.dims()[2];

        let few = x
            .clone()
            .reshape([batch * seq, hidden])
            .select(0, globals.rows.clone());
        let few = few.reshape([batch, globals.count, hidden]);
        let [k, v] = Linear::forward_all([&self.key_global, &self.value_global], x);
        let qkv = [self.query_global.forward(few), k, v].map(|x| split_heads(x, self.heads));
        let global = attend(qkv, &cx.mask(None), ScoreBias::default(), options());

        let rows = |x: Tensor<3>, rows: usize| x.reshape([rows, width]);
        let all = vec![rows(local, batch * seq), rows(global, batch * globals.count)];
        let merged = Tensor::cat(all, 0).select(0, globals.results.clone());
        self.local.output(merged.reshape([batch, seq, width]))
    }
}

/// The encoder.
#[derive(Module, Debug)]
pub struct Model {
    /// What the tokens begin as.
    pub embeddings: Embeddings,
    layers: Vec<Layer<LongAttention>>,
}

impl Backbone for Model {
    fn forward(&self, inputs: &EncoderInputs, device: &Device) -> Result<EncoderOutput> {
        let x = self.embeddings.forward(inputs, device)?;
        if !inputs.global_attention_mask.is_empty() {
            inputs.check("global_attention_mask", &inputs.global_attention_mask)?;
        }
        let windows = self.layers.iter().map(|layer| layer.attention.window);
        let globals = Globals::new(inputs, windows.collect(), device);
        let cx = &mut inputs.context(device);
        Ok(run_layers(&self.layers, x, inputs, |_, layer, x| {
            layer.forward_with(x, |attention, x| attention.forward(x, cx, globals.as_ref()))
        }))
    }
}

impl Config {
    /// The window of a layer.
    fn window(&self, layer: usize) -> Result<usize> {
        let windows = &self.own.attention_window;
        let window = match windows.as_slice() {
            [one] => Some(one),
            all => all.get(layer),
        };
        let even = |window: &&usize| **window > 0 && window.is_multiple_of(2);
        window.filter(even).copied().ok_or_else(|| {
            let message = format!("is {windows:?}, but each layer needs an even number, layer {layer} too");
            Error::config("attention_window", message)
        })
    }

    fn attention(&self, w: &Weights, window: usize) -> Result<LongAttention> {
        let (hidden, heads) = (self.bert.hidden_size, self.bert.num_attention_heads);
        let config = AttentionConfig {
            window: Some(window),
            ..self.bert.attention()
        };
        let width = heads * config.head_dim;
        let local = Attention::load_named(w, ATTENTION, config)?;
        let linear = |name| Linear::load(&w.pp(name), hidden, width, true);
        Ok(LongAttention {
            local,
            query_global: linear("self.query_global")?,
            key_global: linear("self.key_global")?,
            value_global: linear("self.value_global")?,
            heads,
            window,
        })
    }

    /// The global tokens of a question with its text, which have three separators: those of the question, or for
    /// `continuations` those after the second one.
    fn global_row(&self, ids: &[u32], continuations: bool) -> Result<Vec<u32>> {
        let separators: Vec<_> = (ids.iter().enumerate())
            .filter(|(_, id)| **id == self.own.sep_token_id)
            .map(|(place, _)| place)
            .collect();
        let [first, _, _] = separators[..] else {
            let message = format!(
                "has {} separators (token {}) in a row where the task needs 3 to tell which tokens are global; \
                 give `global_attention_mask`",
                separators.len(),
                self.own.sep_token_id
            );
            return Err(Error::input("input_ids", message));
        };
        let global = |place: usize| match continuations {
            true => place > first + 1,
            false => place < first,
        };
        Ok((0..ids.len()).map(|place| u32::from(global(place))).collect())
    }
}

impl EncoderArchitecture for Config {
    type Model = Model;
    const BASE: &'static str = "longformer";
    const IGNORED: &'static [&'static str] = bert::IGNORED;

    fn load(&self, w: &Weights) -> Result<Model> {
        let (c, w) = (&self.bert, w.pp("longformer"));
        c.check()?;
        let pad_token_id = c.pad_token_id;
        let count = PositionCount::AfterPadding { pad_token_id };
        let layers = (0..c.num_hidden_layers).map(|i| {
            let w = w.pp("encoder.layer").pp(i);
            c.layer_around(&w, self.attention(&w.pp("attention"), self.window(i)?)?)
        });
        Ok(Model {
            embeddings: c.embeddings(&w.pp("embeddings"), c.hidden_size, count)?,
            layers: layers.collect::<Result<_>>()?,
        })
    }

    fn prepare(&self, task: Task, inputs: &EncoderInputs) -> Result<Option<EncoderInputs>> {
        if !inputs.global_attention_mask.is_empty() {
            return Ok(None);
        }
        let row = |ids: &Vec<u32>| match task {
            Task::SequenceClassification => Ok((0..ids.len()).map(|place| u32::from(place == 0)).collect()),
            _ => self.global_row(ids, task == Task::MultipleChoice),
        };
        Ok(match task {
            Task::SequenceClassification | Task::QuestionAnswering | Task::MultipleChoice => {
                Some(EncoderInputs {
                    global_attention_mask: inputs.input_ids.iter().map(row).collect::<Result<_>>()?,
                    ..inputs.clone()
                })
            }
            _ => None,
        })
    }

    fn head(&self, task: Task, w: &Weights, model: &Model, labels: usize) -> Result<Option<Head>> {
        let (c, hidden) = (&self.bert, self.bert.hidden_size);
        Ok(Some(match task {
            Task::MaskedLM => {
                let (table, tied) = (&model.embeddings.word_embeddings, c.tie_word_embeddings);
                lm_head(&w.pp("lm_head"), table, tied, hidden, c.layer_norm_eps)?
            }
            Task::SequenceClassification => {
                classification_head(&w.pp("classifier"), Activation::Tanh, hidden, labels)?
            }
            _ => return pooled_head(task, w, &w.pp("longformer.pooler.dense"), hidden, labels),
        }))
    }

    fn max_position_embeddings(&self) -> Option<usize> {
        // The first rows of the table are the padding token's and those before it.
        Some((self.bert.max_position_embeddings).saturating_sub(self.bert.pad_token_id as usize + 1))
    }
}
