//! What models of tokens have in common: embed, run the layers, normalize.

use burn::module::Module;
use burn::tensor::{Int, Tensor};

use crate::{
    Cache, Context, DecoderLayer, Embedding, EncoderOutput, Linear, Norm, Positions, checkpointing, training,
};

/// Embeddings, layers and a norm: a decoder without its output layer, or either half of an encoder-decoder.
#[derive(Module, Debug)]
pub struct Stack<L: DecoderLayer> {
    /// Token embedding.
    pub embed_tokens: Embedding,
    /// Factor of the token embeddings, a part of their table.
    pub embed_scale: f64,
    /// Factor of what goes on of them.
    pub embedding_multiplier: f64,
    /// From the width of the embeddings to that of the layers, where they differ, as in OPT.
    pub project_in: Option<Linear>,
    /// Absolute positions.
    pub embed_positions: Option<Positions>,
    /// Norm of the embeddings.
    pub embed_norm: Option<Norm>,
    /// Layers.
    pub layers: Vec<L>,
    /// Norm of the output.
    pub norm: Option<Norm>,
}

impl<L: DecoderLayer> Stack<L> {
    /// Embeddings that go to the layers as they are.
    pub fn new(embed_tokens: Embedding, layers: Vec<L>, norm: Option<Norm>) -> Self {
        Self {
            embed_tokens,
            embed_scale: 1.0,
            embedding_multiplier: 1.0,
            project_in: None,
            embed_positions: None,
            embed_norm: None,
            layers,
            norm,
        }
    }

    /// What the first layer gets for `input_ids` `[batch, seq]`: `[batch, seq, hidden_size]`.
    pub fn embed(&self, input_ids: Tensor<2, Int>, cx: &mut Context) -> Tensor<3> {
        let scaled = |x: Tensor<3>, factor: f64| if factor == 1.0 { x } else { x * factor };
        let x = scaled(self.embed_tokens.forward(input_ids), self.embed_scale);
        self.enter(scaled(training::noise(x), self.embedding_multiplier), cx)
    }

    /// What the first layer gets for embeddings `[batch, seq, embedding_dim]`: `[batch, seq, hidden_size]`.
    pub fn enter(&self, mut x: Tensor<3>, cx: &mut Context) -> Tensor<3> {
        if let Some(project_in) = &self.project_in {
            x = project_in.forward(x);
        }
        if let Some(positions) = &self.embed_positions {
            let positions = positions.forward(cx).cast(x.dtype());
            x = x + positions;
        }
        if let Some(norm) = &self.embed_norm {
            x = norm.forward(x);
        }
        training::embedding(x)
    }

    /// What the layer `index` makes of what it gets.
    pub fn run_layer(&self, index: usize, x: Tensor<3>, cx: &mut Context) -> Tensor<3> {
        cx.enter_layer(index);
        self.layers[index].prepare(cx);
        checkpointing::run_layer(&self.layers[index], x, cx, |layer, x, cx| layer.forward(x, cx))
    }

    /// Hidden states of `input_ids` `[batch, seq]`; with `keep`, also the embeddings and what each layer made of them.
    pub fn forward(&self, input_ids: Tensor<2, Int>, cx: &mut Context, keep: bool) -> EncoderOutput {
        let mut x = self.embed(input_ids, cx);
        let mut hidden_states = Vec::new();
        for index in 0..self.layers.len() {
            hidden_states.extend(keep.then(|| x.clone()));
            x = self.run_layer(index, x, cx);
        }
        if let Some(norm) = &self.norm {
            x = norm.forward(x);
        }
        x = training::last(x);
        hidden_states.extend(keep.then(|| x.clone()));
        EncoderOutput {
            last_hidden_state: x,
            hidden_states,
        }
    }

    /// Like [`forward`](Self::forward), over the tokens of `cache`, to which these are appended.
    pub fn append(&self, input_ids: Tensor<2, Int>, cache: &mut Cache, keep: bool) -> EncoderOutput {
        let [_, seq] = input_ids.dims();
        let mut cx = Context::new(cache, seq, input_ids.device());
        let output = self.forward(input_ids, &mut cx, keep);
        cache.advance(seq);
        output
    }
}
