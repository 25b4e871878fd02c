//! What turns hidden states into answers.

use std::ops::Range;

use burn::module::Module;
use burn::tensor::{Int, Tensor, TensorData};

use crate::{
    Activation, Embedding, EncoderInputs, Init, LayerNorm, Linear, Mlp, Norm, Result, Role, Weights, training,
};

/// Which hidden states of a sequence a head reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reads {
    /// Those of every token.
    All,
    /// That in the first place, be it a token or padding.
    First,
    /// That of the first real token.
    FirstToken,
    /// That of the last real token.
    Last,
    /// The mean over the real tokens.
    Mean,
}

impl Reads {
    /// `[batch, seq, hidden_size]` to `[batch, seq or 1, hidden_size]`; `tokens` says where each sequence's real
    /// tokens lie.
    pub fn from(self, x: Tensor<3>, tokens: &[Range<usize>]) -> Tensor<3> {
        let [batch, seq, hidden] = x.dims();
        let device = x.device();
        let one = |x: Tensor<3>, place: fn(&Range<usize>, usize) -> usize| {
            let ids =
                (tokens.iter().enumerate()).map(|(row, tokens)| (row * seq + place(tokens, seq)) as i32);
            let ids = TensorData::new(ids.collect::<Vec<_>>(), [tokens.len()]);
            let ids = Tensor::<1, Int>::from_data(ids, &device);
            x.reshape([batch * seq, hidden])
                .select(0, ids)
                .reshape([batch, 1, hidden])
        };
        match self {
            Self::All => x,
            Self::First => x.narrow(1, 0, 1),
            Self::FirstToken => one(x, |tokens, seq| tokens.start.min(seq - 1)),
            Self::Last => one(x, |tokens, seq| tokens.end.clamp(1, seq) - 1),
            Self::Mean => {
                // The mean as a product, so that padding costs nothing to leave out.
                let weight = |tokens: &Range<usize>| {
                    let share = 1.0 / tokens.len().max(1) as f32;
                    let tokens = tokens.clone();
                    (0..seq).map(move |i| if tokens.contains(&i) { share } else { 0.0 })
                };
                let weights: Vec<f32> = tokens.iter().flat_map(weight).collect();
                let weights = TensorData::new(weights, [batch, 1, seq]);
                let weights = Tensor::<3>::from_data(weights, &device).cast(x.dtype());
                weights.matmul(x)
            }
        }
    }
}

/// Some hidden states of a sequence, a dense layer with an activation and perhaps a norm, an output layer: the
/// form that the heads of all architectures have, if not all parts of it.
#[derive(Module, Debug)]
pub struct Head {
    #[module(skip)]
    reads: Reads,
    dense: Option<Linear>,
    #[module(skip)]
    act: Option<Activation>,
    norm: Option<Norm>,
    feed_forward: Option<(Mlp, LayerNorm)>,
    output: Option<Linear>,
    #[module(skip)]
    separator: Option<u32>,
}

/// What is taken from the scores of tokens that must not be answers.
const NO_ANSWER: f64 = 1e6;

impl Head {
    /// A head that hands on what it reads.
    pub fn new(reads: Reads) -> Self {
        Self {
            reads,
            dense: None,
            act: None,
            norm: None,
            feed_forward: None,
            output: None,
            separator: None,
        }
    }

    /// Adds a dense layer with an activation.
    pub fn dense(mut self, dense: Linear, act: Activation) -> Self {
        self.dense = Some(dense);
        self.act = Some(act);
        self
    }

    /// Adds a norm after the dense layer.
    pub fn norm(mut self, norm: impl Into<Norm>) -> Self {
        self.norm = Some(norm.into());
        self
    }

    /// Adds a feed-forward block as layers have one, with a norm after it.
    pub fn feed_forward(mut self, mlp: Mlp, norm: LayerNorm) -> Self {
        self.feed_forward = Some((mlp, norm));
        self
    }

    /// Keeps the answer out of the question, which ends with the first `separator`: its tokens, but the first, score
    /// too low to be chosen.
    pub fn outside_of_question(mut self, separator: u32) -> Self {
        self.separator = Some(separator);
        self
    }

    /// Adds the output layer.
    pub fn output(mut self, output: Linear) -> Self {
        self.output = Some(output);
        self
    }

    /// Hidden states `[batch, seq, hidden_size]` to `[batch, seq, outputs]`, or `[batch, 1, outputs]` where the head
    /// reads one of a sequence. `inputs` is what the hidden states are made of.
    pub fn forward(&self, hidden_states: Tensor<3>, inputs: &EncoderInputs) -> Tensor<3> {
        let mut x = self.reads.from(hidden_states, &inputs.tokens);
        if let Some(dense) = &self.dense {
            x = dense.forward(training::head_input(x));
        }
        if let Some(act) = &self.act {
            x = act.forward(x);
        }
        if let Some(norm) = &self.norm {
            x = norm.forward(x);
        }
        if let Some((mlp, norm)) = &self.feed_forward {
            x = norm.forward(x.clone() + mlp.forward(training::head_input(x)));
        }
        if let Some(output) = &self.output {
            x = output.forward(training::classifier(x));
        }
        if let Some(separator) = self.separator {
            let [batch, seq] = inputs.dims();
            let row = |ids: &Vec<u32>| {
                let end = question_end(ids, separator);
                (0..seq).map(move |i| f32::from((1..=end).contains(&i)))
            };
            let question: Vec<f32> = inputs.input_ids.iter().flat_map(row).collect();
            let question = Tensor::<3>::from_data(TensorData::new(question, [batch, seq, 1]), &x.device());
            x = x.clone() - question.cast(x.dtype()) * NO_ANSWER;
        }
        x
    }
}

/// Where a question ends: the place of the first `separator`, or the first place where there is none.
pub fn question_end(ids: &[u32], separator: u32) -> usize {
    ids.iter().position(|id| *id == separator).unwrap_or(0)
}

/// The output layer over the vocabulary: `table` with `bias` where the two are tied, else `decoder`.
///
/// # Errors
/// A tensor that is missing or misshapen.
pub fn vocabulary_output(
    w: &Weights,
    [decoder, bias]: [&str; 2],
    table: &Embedding,
    tied: bool,
) -> Result<Linear> {
    let [vocab_size, width] = table.weight.shape();
    let at = w.pp(decoder);
    let mut output = match tied {
        true => table.tied_output(&at)?,
        false => Linear::load(&at.with_role(Role::Output), width, vocab_size, false)?,
    };
    // Checkpoints store the bias under one of two names, or under both, which are then the same if the rest is.
    let places = [(w, bias), (&at, "bias")];
    let [first, second] = if tied { places } else { [places[1], places[0]] };
    let (w, name) = if second.0.is_stored(second.1) && !first.0.is_stored(first.1) {
        second
    } else {
        first
    };
    output.bias = Some(w.param(name, [vocab_size], Init::Zeros)?);
    // Nothing is made of what is stored again.
    for (w, name) in [(&at, "weight"), first, second] {
        w.ignore_one(name);
    }
    Ok(output)
}
