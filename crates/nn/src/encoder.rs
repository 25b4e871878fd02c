//! The frame that encoders share: embed a batch of sequences, run layers that see them in both directions.

use std::fmt::Debug;
use std::ops::Range;

use burn::module::Module;
use burn::tensor::{Device, Int, Tensor, TensorData};

use crate::{
    Context, Embedding, Error, LayerNorm, Linear, Norm, RelativeBias, Result, Weights, checkpointing,
    training,
};

/// Number of types that a token has in a table.
pub const TABLE_IDS: usize = 7;

/// A batch of token sequences, as rows of equal length.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct EncoderInputs {
    /// Token ids.
    pub input_ids: Vec<Vec<u32>>,
    /// Where the real tokens of each row lie; what is not among them is padding, which nobody sees.
    pub tokens: Vec<Range<usize>>,
    /// Which text each token belongs to, where there are two; empty where all are 0.
    pub token_type_ids: Vec<Vec<u32>>,
    /// Positions; empty for those that the architecture gives its tokens.
    pub position_ids: Vec<Vec<u32>>,
    /// Which tokens see all others and are seen by them (1), where the others see a window only, as in Longformer;
    /// empty for those that the task asks for.
    pub global_attention_mask: Vec<Vec<u32>>,
    /// Where on a page each token stands, as [left, upper, right, lower], each from 0 to 1000, for architectures that read
    /// documents; empty where nothing is known.
    pub bbox: Vec<Vec<[u32; 4]>>,
    /// What each token is in a table, for architectures that read tables: its segment (0 for the question, 1 for the
    /// table), column, row, whether it was an answer before, rank in its column from below and from above, and relation
    /// to numbers of the question; empty where nothing is known.
    pub table_ids: Vec<Vec<[u32; TABLE_IDS]>>,
    /// How many rows belong together as choices of one question; 0 means all of them.
    pub num_choices: usize,
    /// Whether the hidden states of every layer are kept.
    pub output_hidden_states: bool,
}

impl EncoderInputs {
    /// Sequences of any length, padded to the right with `pad_token_id`.
    pub fn padded(rows: &[Vec<u32>], pad_token_id: u32) -> Self {
        let width = rows.iter().map(Vec::len).max().unwrap_or(0);
        let fill = |row: &Vec<u32>| {
            let missing = std::iter::repeat_n(pad_token_id, width - row.len());
            row.iter().copied().chain(missing).collect()
        };
        Self {
            input_ids: rows.iter().map(fill).collect(),
            tokens: rows.iter().map(|row| 0..row.len()).collect(),
            ..Self::default()
        }
    }

    /// Rows as a tokenizer pads them: 1 in the mask means a token, 0 padding, on the left or on the right.
    ///
    /// # Errors
    /// Where the mask has another shape than the ids, or padding within a sequence.
    pub fn with_mask(input_ids: Vec<Vec<u32>>, attention_mask: &[Vec<u32>]) -> Result<Self> {
        let shapes = |rows: &[Vec<u32>]| rows.iter().map(Vec::len).collect::<Vec<_>>();
        if shapes(&input_ids) != shapes(attention_mask) {
            let message = "has another shape than the token ids";
            return Err(Error::input("attention_mask", message));
        }
        let range = |(row, mask): (usize, &Vec<u32>)| {
            let start = mask.iter().position(|m| *m != 0).unwrap_or(0);
            let end = mask.iter().rposition(|m| *m != 0).map_or(0, |last| last + 1);
            if mask[start.min(end)..end].contains(&0) {
                let message = format!("row {row} has padding within the sequence");
                return Err(Error::input("attention_mask", message));
            }
            Ok(start.min(end)..end)
        };
        Ok(Self {
            tokens: (attention_mask.iter().enumerate().map(range)).collect::<Result<_>>()?,
            input_ids,
            ..Self::default()
        })
    }

    /// `[batch, seq]`.
    pub fn dims(&self) -> [usize; 2] {
        [self.input_ids.len(), self.input_ids.first().map_or(0, Vec::len)]
    }

    /// The token ids `[batch, seq]`.
    ///
    /// # Errors
    /// Where there is nothing, where rows differ in length, or where an id is outside of a vocabulary of that size.
    pub fn ids(&self, vocab_size: usize, device: &Device) -> Result<Tensor<2, Int>> {
        if self.dims().contains(&0) || self.tokens.len() != self.input_ids.len() {
            return Err(Error::input(
                "input_ids",
                "has no tokens, or rows without a place in `tokens`",
            ));
        }
        if !self.position_ids.is_empty() {
            self.check("position_ids", &self.position_ids)?;
        }
        self.tensor("input_ids", &self.input_ids, vocab_size, device)
    }

    /// Checks that there is something for each token.
    ///
    /// # Errors
    /// Where the shape differs; `name` is what the message calls the rows.
    pub fn check<T>(&self, name: &str, rows: &[Vec<T>]) -> Result<()> {
        let [batch, seq] = self.dims();
        if rows.len() != batch || rows.iter().any(|row| row.len() != seq) {
            let message = format!("must be {batch} rows of {seq}");
            return Err(Error::input(name, message));
        }
        Ok(())
    }

    /// Rows of the batch's shape as a tensor, each id less than `limit`.
    ///
    /// # Errors
    /// Where the shape or an id does not fit; `name` is what the message calls the rows.
    pub fn tensor(
        &self,
        name: &str,
        rows: &[Vec<u32>],
        limit: usize,
        device: &Device,
    ) -> Result<Tensor<2, Int>> {
        self.check(name, rows)?;
        let ids: Vec<i32> = rows.iter().flatten().map(|id| *id as i32).collect();
        if let Some(id) = (rows.iter().flatten()).find(|id| usize::try_from(**id).is_ok_and(|id| id >= limit))
        {
            let message = format!("holds {id}, but the model has {limit}, counted from 0");
            return Err(Error::input(name, message));
        }
        Ok(Tensor::from_data(TensorData::new(ids, self.dims()), device))
    }

    /// 1 for tokens, 0 for padding: `[batch, seq, 1]`.
    pub fn mask(&self, device: &Device) -> Tensor<3> {
        let [batch, seq] = self.dims();
        let row = |tokens: &Range<usize>| {
            let tokens = tokens.clone();
            (0..seq).map(move |i| f32::from(tokens.contains(&i)))
        };
        let mask: Vec<f32> = self.tokens.iter().flat_map(row).collect();
        Tensor::from_data(TensorData::new(mask, [batch, seq, 1]), device)
    }

    /// What the layers of an encoder need to know of the batch.
    pub fn context(&self, device: &Device) -> Context<'static> {
        let mut cx = Context::bidirectional(self.tokens.clone(), self.dims()[1], device.clone());
        let row = |row: &Vec<u32>| row.iter().map(|position| *position as usize).collect();
        cx.set_positions(self.position_ids.iter().map(row).collect());
        cx
    }
}

/// What an encoder makes of a batch.
#[derive(Debug, Clone)]
pub struct EncoderOutput {
    /// `[batch, seq, hidden_size]`; rows of padding tokens mean nothing.
    pub last_hidden_state: Tensor<3>,
    /// The embeddings and what each layer made of them, where it was asked for.
    pub hidden_states: Vec<Tensor<3>>,
}

/// The body of an encoder, on which heads stand.
pub trait Backbone: Debug {
    /// Runs a batch on the device that the parameters are on.
    ///
    /// # Errors
    /// Where the inputs do not fit the model: an id outside of the vocabulary, a sequence that is too long.
    fn forward(&self, inputs: &EncoderInputs, device: &Device) -> Result<EncoderOutput>;
}

/// How the positions of learned tables are counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PositionCount {
    /// 0, 1, 2 and so on, whatever the tokens are.
    Plain,
    /// From the padding token's id on, which padding itself gets, as fairseq does.
    AfterPadding {
        /// Id of the padding token.
        pad_token_id: u32,
    },
}

impl PositionCount {
    /// The positions of a row of token ids.
    fn of(self, ids: &[u32]) -> Vec<u32> {
        match self {
            Self::Plain => (0..ids.len() as u32).collect(),
            Self::AfterPadding { pad_token_id } => {
                let mut next = pad_token_id;
                let position = |id: &u32| match *id == pad_token_id {
                    true => pad_token_id,
                    false => {
                        next += 1;
                        next
                    }
                };
                ids.iter().map(position).collect()
            }
        }
    }
}

/// Numbers and switches of [`Embeddings`].
#[derive(Debug, Clone)]
pub struct EmbeddingsConfig {
    /// Size of the vocabulary.
    pub vocab_size: usize,
    /// Width of the embeddings.
    pub width: usize,
    /// Rows of the table of positions, where there is one.
    pub max_position_embeddings: Option<usize>,
    /// How positions are counted.
    pub position_count: PositionCount,
    /// Rows of the table of token types; 0 where there is none.
    pub type_vocab_size: usize,
    /// What the embedding of a token is multiplied by.
    pub scale: Option<f64>,
    /// Epsilon of the layer norm.
    pub eps: f64,
}

impl EmbeddingsConfig {
    /// Tokens without positions and types.
    pub fn new(vocab_size: usize, width: usize, eps: f64) -> Self {
        Self {
            vocab_size,
            width,
            max_position_embeddings: None,
            position_count: PositionCount::Plain,
            type_vocab_size: 0,
            scale: None,
            eps,
        }
    }
}

/// BERT's embeddings: the sum of a token's, its position's and its type's, normalized.
#[derive(Module, Debug)]
pub struct Embeddings {
    /// `[vocab_size, width]`; an output layer may share it.
    pub word_embeddings: Embedding,
    position_embeddings: Option<Embedding>,
    token_type_embeddings: Option<Embedding>,
    norm: LayerNorm,
    #[module(skip)]
    config: EmbeddingsConfig,
}

impl Embeddings {
    /// Loads `word_embeddings`, `position_embeddings`, `token_type_embeddings` and `LayerNorm`.
    ///
    /// # Errors
    /// A tensor that is missing or misshapen.
    pub fn load(w: &Weights, config: EmbeddingsConfig) -> Result<Self> {
        let tokens = Embedding::load_tokens(&w.pp("word_embeddings"), config.vocab_size, config.width)?;
        let norm = LayerNorm::load(&w.pp("LayerNorm"), config.width, config.eps, true)?;
        Self::with(tokens, norm, w, config)
    }

    /// The same with a table of tokens and a norm that have names of their own, or another width after a projection.
    ///
    /// # Errors
    /// As [`load`](Self::load).
    pub fn with(
        word_embeddings: Embedding,
        norm: LayerNorm,
        w: &Weights,
        config: EmbeddingsConfig,
    ) -> Result<Self> {
        let table = |name, rows, padding| {
            let w = w.pp(name);
            Embedding::load_padded(&w, rows, config.width, padding)?.adapted(&w)
        };
        let padding = match config.position_count {
            PositionCount::Plain => None,
            PositionCount::AfterPadding { pad_token_id } => Some(pad_token_id as usize),
        };
        let types = config.type_vocab_size;
        Ok(Self {
            word_embeddings,
            position_embeddings: (config.max_position_embeddings)
                .map(|rows| table("position_embeddings", rows, padding))
                .transpose()?,
            token_type_embeddings: (types > 0)
                .then(|| table("token_type_embeddings", types, None))
                .transpose()?,
            norm,
            config,
        })
    }

    /// `[batch, seq, width]`.
    ///
    /// # Errors
    /// Where the inputs do not fit: an id outside of a table, a sequence that is too long.
    pub fn forward(&self, inputs: &EncoderInputs, device: &Device) -> Result<Tensor<3>> {
        Ok(self.norm(self.sum(inputs, device)?))
    }

    /// The same before the norm, for architectures that add more to it.
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    pub fn sum(&self, inputs: &EncoderInputs, device: &Device) -> Result<Tensor<3>> {
        let ids = inputs.ids(self.config.vocab_size, device)?;
        let mut x = training::noise(self.word_embeddings.forward(ids));
        if let Some(scale) = self.config.scale {
            x = x * scale;
        }
        if let (Some(table), Some(most)) = (&self.position_embeddings, self.config.max_position_embeddings) {
            let computed: Vec<_>;
            let positions = if inputs.position_ids.is_empty() {
                // Rows with the same positions need them once.
                computed = match self.config.position_count {
                    PositionCount::Plain => vec![PositionCount::Plain.of(&inputs.input_ids[0])],
                    count => inputs.input_ids.iter().map(|row| count.of(row)).collect(),
                };
                &computed
            } else {
                &inputs.position_ids
            };
            x = x + table.forward(position_ids(inputs, positions, most, device)?);
        }
        if let Some(table) = &self.token_type_embeddings {
            let types = match inputs.token_type_ids.is_empty() {
                true => Tensor::zeros([1, inputs.dims()[1]], device),
                false => inputs.tensor(
                    "token_type_ids",
                    &inputs.token_type_ids,
                    self.config.type_vocab_size,
                    device,
                )?,
            };
            x = x + table.forward(types);
        }
        Ok(x)
    }

    /// The norm and dropout, for those who use [`sum`](Self::sum).
    pub fn norm(&self, x: Tensor<3>) -> Tensor<3> {
        training::embedding(self.norm.forward(x))
    }
}

/// `[batch or 1, seq]`.
fn position_ids(
    inputs: &EncoderInputs,
    rows: &[Vec<u32>],
    most: usize,
    device: &Device,
) -> Result<Tensor<2, Int>> {
    let [batch, seq] = inputs.dims();
    if let Some(position) = rows.iter().flatten().max().filter(|max| **max as usize >= most) {
        let message = format!(
            "a sequence of {seq} tokens reaches position {position}, but the model was made for {most}; \
             truncate it"
        );
        return Err(Error::input("input_ids", message));
    }
    match rows {
        [row] if batch != 1 => {
            let ids: Vec<i32> = row.iter().map(|id| *id as i32).collect();
            Ok(Tensor::from_data(TensorData::new(ids, [1, seq]), device))
        }
        rows => inputs.tensor("position_ids", rows, most, device),
    }
}

/// One layer of an encoder.
pub trait EncoderLayer: Module + Debug + 'static {
    /// `[batch, seq, hidden_size]` to the same shape.
    fn forward(&self, x: Tensor<3>, cx: &mut Context) -> Tensor<3>;
}

/// An encoder made of layers `L`.
#[derive(Module, Debug)]
pub struct Encoder<L: EncoderLayer> {
    /// What the tokens begin as.
    pub embeddings: Embeddings,
    /// From the width of the embeddings to that of the layers, where they differ.
    pub project: Option<Linear>,
    /// A bias for relative positions that all layers share.
    pub relative_bias: Option<RelativeBias>,
    /// The layers.
    pub layers: Vec<L>,
    /// Which layer runs in each place; one may run in many.
    #[module(skip)]
    pub order: Vec<usize>,
    /// Norm of the output.
    pub norm: Option<Norm>,
}

impl<L: EncoderLayer> Encoder<L> {
    /// Embeddings as wide as the layers, and nothing after these.
    pub fn new(embeddings: Embeddings, layers: Vec<L>) -> Self {
        Self {
            embeddings,
            project: None,
            relative_bias: None,
            order: (0..layers.len()).collect(),
            layers,
            norm: None,
        }
    }
}

impl<L: EncoderLayer> Backbone for Encoder<L> {
    fn forward(&self, inputs: &EncoderInputs, device: &Device) -> Result<EncoderOutput> {
        let mut x = self.embeddings.forward(inputs, device)?;
        if let Some(project) = &self.project {
            x = project.forward(x);
        }
        let cx = &mut inputs.context(device);
        if let Some(bias) = &self.relative_bias {
            let seq = cx.seq();
            cx.set_bias(Some(bias.forward(0, seq, seq)));
        }
        let layers = self.order.iter().filter_map(|index| self.layers.get(*index));
        let mut output = run_layers(layers, x, inputs, |index, layer, x| {
            cx.enter_layer(index);
            checkpointing::run_layer(layer, x, cx, |layer, x, cx| layer.forward(x, cx))
        });
        if let Some(norm) = &self.norm {
            output.last_hidden_state = norm.forward(output.last_hidden_state);
            if let Some(last) = output.hidden_states.last_mut() {
                *last = output.last_hidden_state.clone();
            }
        }
        Ok(output)
    }
}

/// Runs layers one after the other: `step` is given the place of a layer, the layer and `[batch, seq, hidden_size]`.
/// For backbones with a frame of their own.
pub fn run_layers<'a, L: 'a>(
    layers: impl IntoIterator<Item = &'a L>,
    mut x: Tensor<3>,
    inputs: &EncoderInputs,
    mut step: impl FnMut(usize, &L, Tensor<3>) -> Tensor<3>,
) -> EncoderOutput {
    let mut hidden_states = Vec::new();
    for (index, layer) in layers.into_iter().enumerate() {
        if inputs.output_hidden_states {
            hidden_states.push(x.clone());
        }
        x = step(index, layer, x);
    }
    if inputs.output_hidden_states {
        hidden_states.push(x.clone());
    }
    EncoderOutput {
        last_hidden_state: x,
        hidden_states,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn masks_become_ranges() {
        let ids = vec![vec![1, 2, 3], vec![4, 5, 0], vec![0, 6, 0]];
        let mask = |rows: [[u32; 3]; 3]| rows.map(|row| row.to_vec()).to_vec();
        let inputs = EncoderInputs::with_mask(ids.clone(), &mask([[1, 1, 1], [0, 0, 1], [0, 0, 0]]));
        assert_eq!(inputs.expect("mask").tokens, [0..3, 2..3, 0..0]);
        let hole = EncoderInputs::with_mask(ids.clone(), &mask([[1, 1, 1], [1, 0, 1], [0, 0, 0]]));
        assert!(hole.expect_err("hole").to_string().contains("row 1"));
        assert!(EncoderInputs::with_mask(ids, &[vec![1; 3]]).is_err());
        let padded = EncoderInputs::padded(&[vec![7], vec![8, 9]], 1);
        assert_eq!(padded.input_ids, [[7, 1], [8, 9]]);
        assert_eq!(padded.tokens, [0..1, 0..2]);
    }

    #[test]
    fn positions_after_the_padding_token() {
        let count = PositionCount::AfterPadding { pad_token_id: 1 };
        assert_eq!(count.of(&[0, 9, 2, 1, 1]), [2, 3, 4, 1, 1]);
        assert_eq!(PositionCount::Plain.of(&[0, 9, 1]), [0, 1, 2]);
    }
}
