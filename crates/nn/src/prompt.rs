//! Virtual tokens: what stands before every sequence of a decoder, and is learned while the model stays as it is.

use std::sync::Arc;

use burn::module::{Module, Param};
use burn::tensor::{Device, Tensor};

use crate::adapter::Switch;
use crate::{Activation, Cache, Context, DecoderLayer, Linear, Stack};

/// Virtual tokens that an adapter brings.
#[derive(Module, Debug)]
pub struct Prompt {
    values: PromptValues,
    #[module(skip)]
    kind: PromptKind,
    #[module(skip)]
    switch: Arc<Switch>,
}

/// Where the values of virtual tokens come from.
#[derive(Module, Debug)]
pub enum PromptValues {
    /// `[tokens, hidden_size]`, or `[tokens, layers * 2 * heads * head_dim]`.
    Stored(Param<Tensor<2>>),
    /// They are made of others while they are learned.
    Encoded(PromptEncoder),
}

/// Linear layers with an activation between them over a table: what P-tuning learns, and prefix tuning where it projects.
#[derive(Module, Debug)]
pub struct PromptEncoder {
    /// `[tokens, width]`.
    pub embedding: Param<Tensor<2>>,
    /// The layers.
    pub layers: Vec<Linear>,
    /// What is between them.
    #[module(skip)]
    pub act: Activation,
}

impl PromptEncoder {
    /// `[tokens, outputs of the last layer]`.
    pub fn forward(&self) -> Tensor<2> {
        let mut x = self.embedding.val();
        for (index, layer) in self.layers.iter().enumerate() {
            if index > 0 {
                x = self.act.forward(x);
            }
            x = layer.forward(x);
        }
        x
    }
}

impl PromptValues {
    fn val(&self) -> Tensor<2> {
        match self {
            Self::Stored(values) => values.val(),
            Self::Encoded(encoder) => encoder.forward(),
        }
    }
}

/// What virtual tokens are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PromptKind {
    /// Embeddings before those of the text, as in prompt tuning (Lester et al., 2021) and P-tuning (Liu et al., 2021).
    Embeddings,
    /// Keys and values before the text's in every layer, after the rotation: prefix tuning (Li and Liang, 2021).
    KeysAndValues {
        /// Layers of the model.
        layers: usize,
        /// Key and value heads of a layer.
        heads: usize,
    },
}

impl Prompt {
    /// From its values.
    pub fn new(values: PromptValues, kind: PromptKind, switch: Arc<Switch>) -> Self {
        Self { values, kind, switch }
    }

    /// What it is.
    pub fn kind(&self) -> PromptKind {
        self.kind
    }

    /// Puts the virtual tokens of the last of `prompts` that takes part into a cache that is empty.
    pub(crate) fn begin<L: DecoderLayer>(
        prompts: &[Self],
        stack: &Stack<L>,
        cache: &mut Cache,
        device: &Device,
    ) {
        let Some(prompt) = prompts.iter().rev().find(|prompt| prompt.switch.is_on()) else {
            return;
        };
        if !cache.is_empty() || cache.virtual_tokens() > 0 {
            return;
        }
        let values = prompt.values.val();
        let ([tokens, width], batch) = (values.dims(), cache.padding().len());
        if tokens == 0 {
            return;
        }
        match prompt.kind {
            PromptKind::Embeddings => {
                let x = values.unsqueeze::<3>().expand([batch, tokens, width]);
                // There is no padding before them.
                let padding = cache.replace_padding(vec![0; batch]);
                let mut cx = Context::new(cache, tokens, device.clone());
                let mut x = stack.enter(x, &mut cx);
                for index in 0..stack.layers.len() {
                    x = stack.run_layer(index, x, &mut cx);
                }
                if let Some(norm) = &stack.norm {
                    x = norm.forward(x);
                }
                cache.replace_padding(padding);
                cache.set_prompt_state(x.narrow(1, tokens - 1, 1));
            }
            PromptKind::KeysAndValues { layers, heads } => {
                let dim = width / (2 * layers * heads).max(1);
                let all = values
                    .reshape([tokens, 2 * layers, heads, dim])
                    .permute([1, 2, 0, 3]);
                for index in 0..layers {
                    let of = |at: usize| all.clone().narrow(0, at, 1).expand([batch, heads, tokens, dim]);
                    cache.layer(index).update(of(2 * index), of(2 * index + 1));
                }
            }
        }
        cache.set_virtual_tokens(tokens);
    }
}
