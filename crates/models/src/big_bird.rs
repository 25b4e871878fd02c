//! BigBird (Zaheer et al., 2020): BERT whose tokens are cut into blocks. A block sees itself and its neighbours, the
//! first and the last block, and some that are chosen at random; the first and the last block see everything. Short
//! sequences see everything too.
//!
//! As in Transformers, the blocks that are chosen at random in training are all the first one in use: each of its keys
//! counts that many times more.

use burn::module::Module;
use burn::tensor::{Device, Tensor};
use oxiformers_nn::blocks::GlobalKey;
use oxiformers_nn::encoder::run_layers;
use oxiformers_nn::head::question_end;
use oxiformers_nn::{
    Activation, Attention, AttentionConfig, AttentionOptions, Backbone, BlockWindows, Context, Embeddings,
    EmbeddingsConfig, EncoderInputs, EncoderOutput, Error, Head, LayerNorm, Linear, Mlp, Reads, Result,
    ScoreBias, Weights, attend,
};
use serde::{Deserialize, Serialize};

use crate::bert::{self, ATTENTION, Extended, Extends, Layer, pooled_head};
use crate::roberta::classification_head;
use crate::{EncoderArchitecture, Task};

/// The fields of `config.json`: BERT's with other defaults, and more.
pub type Config = Extended<Fields>;

/// Which tokens see each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AttentionType {
    /// Those of some blocks, in sequences that are long enough.
    BlockSparse,
    /// All.
    OriginalFull,
}

/// The fields that BERT does not have.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default)]
#[allow(missing_docs)]
pub struct Fields {
    pub attention_type: AttentionType,
    pub use_bias: bool,
    pub rescale_embeddings: bool,
    pub block_size: usize,
    pub num_random_blocks: usize,
    pub sep_token_id: u32,
}

impl Default for Fields {
    fn default() -> Self {
        Self {
            attention_type: AttentionType::BlockSparse,
            use_bias: true,
            rescale_embeddings: false,
            block_size: 64,
            num_random_blocks: 3,
            sep_token_id: 66,
        }
    }
}

impl Extends for Fields {
    fn bert() -> bert::Config {
        bert::Config {
            vocab_size: 50_358,
            hidden_act: Activation::GeluTanh,
            max_position_embeddings: 4096,
            ..bert::Config::default()
        }
    }
}

/// Attention by blocks.
fn attend_sparsely(
    attention: &Attention,
    x: Tensor<3>,
    windows: &BlockWindows,
    block: usize,
    cx: &mut Context,
) -> Tensor<3> {
    let [q, k, v] = attention.project(x);
    let seq = q.dims()[2];
    let last = (seq - 1) / block * block;
    // Without dropout, which Transformers' has neither.
    let options = AttentionOptions::default();
    let ends = vec![
        q.clone().narrow(2, 0, block),
        q.clone().narrow(2, last, seq - last),
    ];
    let ends = [Tensor::cat(ends, 2), k.clone(), v.clone()];
    let ends = attend(ends, &cx.mask(None), ScoreBias::default(), options);
    let middle = windows.attend([q, k, v], options).narrow(1, block, last - block);
    let (first, last) = (
        ends.clone().narrow(1, 0, block),
        ends.narrow(1, block, seq - last),
    );
    attention.output(Tensor::cat(vec![first, middle, last], 1))
}

/// The encoder.
#[derive(Module, Debug)]
pub struct Model {
    /// What the tokens begin as.
    pub embeddings: Embeddings,
    layers: Vec<Layer>,
    /// None where all tokens see each other.
    #[module(skip)]
    blocks: Option<Blocks>,
}

#[derive(Debug, Clone, Copy)]
struct Blocks {
    size: usize,
    random: usize,
}

impl Blocks {
    /// How many blocks a sequence has; none where it is short.
    fn count(self, seq: usize) -> Option<usize> {
        let short = (self.random.saturating_mul(2).saturating_add(5)).saturating_mul(self.size);
        (seq > short).then(|| seq.div_ceil(self.size))
    }

    /// What the blocks of a batch see; none where its sequences are short.
    fn windows(self, inputs: &EncoderInputs, device: &Device) -> Option<BlockWindows> {
        let seq = inputs.dims()[1];
        self.count(seq)?;
        let key = |place, bias| GlobalKey { place, bias };
        let often = (1.0 + self.random as f32).ln();
        let first = (0..self.size).map(|place| key(place, often));
        let last = ((seq - 1) / self.size * self.size..seq).map(|place| key(place, 0.0));
        let globals = vec![first.chain(last).collect(); inputs.tokens.len()];
        Some(BlockWindows::new(
            &inputs.tokens,
            seq,
            self.size,
            &globals,
            None,
            device,
        ))
    }
}

impl Backbone for Model {
    fn forward(&self, inputs: &EncoderInputs, device: &Device) -> Result<EncoderOutput> {
        let x = self.embeddings.forward(inputs, device)?;
        let sparse = (self.blocks).and_then(|blocks| Some((blocks.size, blocks.windows(inputs, device)?)));
        let cx = &mut inputs.context(device);
        Ok(run_layers(&self.layers, x, inputs, |_, layer, x| {
            layer.forward_with(x, |attention, x| match &sparse {
                Some((block, windows)) => attend_sparsely(attention, x, windows, *block, cx),
                None => attention.forward(x, cx),
            })
        }))
    }
}

impl Config {
    /// How sequences are cut; none where all tokens see each other.
    fn blocks(&self) -> Option<Blocks> {
        let blocks = Blocks {
            size: self.own.block_size,
            random: self.own.num_random_blocks,
        };
        (self.own.attention_type == AttentionType::BlockSparse).then_some(blocks)
    }
}

impl EncoderArchitecture for Config {
    type Model = Model;
    const BASE: &'static str = "bert";
    const IGNORED: &'static [&'static str] = &["embeddings.position_ids", "pooler.weight", "pooler.bias"];

    fn load(&self, w: &Weights) -> Result<Model> {
        let (c, own, w) = (&self.bert, &self.own, w.pp("bert"));
        c.check()?;
        if own.block_size == 0 {
            return Err(Error::config("block_size", "cannot be 0"));
        }
        let embeddings = EmbeddingsConfig {
            max_position_embeddings: Some(c.max_position_embeddings),
            type_vocab_size: c.type_vocab_size,
            scale: own.rescale_embeddings.then(|| (c.hidden_size as f64).sqrt()),
            ..EmbeddingsConfig::new(c.vocab_size, c.hidden_size, c.layer_norm_eps)
        };
        let attention = AttentionConfig {
            qkv_bias: own.use_bias,
            ..c.attention()
        };
        let layers = (0..c.num_hidden_layers).map(|i| {
            let w = w.pp("encoder.layer").pp(i);
            let attention = Attention::load_named(&w.pp("attention"), ATTENTION, attention.clone())?;
            c.layer_around(&w, attention)
        });
        Ok(Model {
            embeddings: Embeddings::load(&w.pp("embeddings"), embeddings)?,
            layers: layers.collect::<Result<_>>()?,
            blocks: self.blocks(),
        })
    }

    fn prepare(&self, task: Task, inputs: &EncoderInputs) -> Result<Option<EncoderInputs>> {
        if task != Task::QuestionAnswering || !inputs.token_type_ids.is_empty() {
            return Ok(None);
        }
        // The text is of another type than the question.
        let row = |ids: &Vec<u32>| {
            let end = question_end(ids, self.own.sep_token_id);
            (0..ids.len()).map(|place| u32::from(place > end)).collect()
        };
        Ok(Some(EncoderInputs {
            token_type_ids: inputs.input_ids.iter().map(row).collect(),
            ..inputs.clone()
        }))
    }

    fn head(&self, task: Task, w: &Weights, model: &Model, labels: usize) -> Result<Option<Head>> {
        let (c, hidden, inner) = (&self.bert, self.bert.hidden_size, self.bert.intermediate_size);
        Ok(Some(match task {
            Task::MaskedLM => {
                let table = &model.embeddings.word_embeddings;
                c.predictions(&w.pp("cls.predictions"), "LayerNorm", table)?
            }
            Task::SequenceClassification => {
                classification_head(&w.pp("classifier"), c.hidden_act, hidden, labels)?
            }
            Task::QuestionAnswering => {
                let w = w.pp("qa_classifier");
                let names = ["intermediate.dense", "output.dense"];
                let mlp = Mlp::load(&w, names, hidden, inner, c.hidden_act, true)?;
                let norm = LayerNorm::load(&w.pp("output.LayerNorm"), hidden, c.layer_norm_eps, true)?;
                let output = Linear::load(&w.pp("qa_outputs"), hidden, 2, true)?;
                let head = Head::new(Reads::All).feed_forward(mlp, norm).output(output);
                head.outside_of_question(self.own.sep_token_id)
            }
            _ => return pooled_head(task, w, &w.pp("bert.pooler"), hidden, labels),
        }))
    }

    /// Everyone sees the last block, which is that of the longest sequence of a batch.
    fn batch_group(&self, length: usize) -> usize {
        let count = self.blocks().and_then(|blocks| blocks.count(length));
        count.unwrap_or(0)
    }

    fn max_position_embeddings(&self) -> Option<usize> {
        Some(self.bert.max_position_embeddings)
    }
}
