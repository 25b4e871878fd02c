//! The frame that all decoder-only language models share: embed, run the layers, normalize, project.

use std::fmt::Debug;

use burn::module::Module;
use burn::tensor::{Device, Int, Tensor};

use crate::prompt::Prompt;
use crate::{
    Backbone, Cache, CacheKind, Context, Embedding, EncoderInputs, EncoderOutput, Linear, Norm, Positions,
    Result, Role, Stack, Weights,
};

/// One layer of a decoder.
pub trait DecoderLayer: Module + Debug + 'static {
    /// Says what holds from this layer on. Runs before [`forward`](Self::forward).
    fn prepare(&self, _cx: &mut Context) {}

    /// `[batch, seq, hidden_size]` to the same shape.
    fn forward(&self, x: Tensor<3>, cx: &mut Context) -> Tensor<3>;
}

/// Which positions logits are computed for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogitsFor {
    /// Every position: `[batch, seq, vocab_size]`.
    All,
    /// The last position only: `[batch, 1, vocab_size]`.
    Last,
}

/// Names and numbers of the frame.
#[derive(Debug, Clone)]
pub struct DecoderConfig {
    /// Size of the vocabulary.
    pub vocab_size: usize,
    /// Width of the hidden states.
    pub hidden_size: usize,
    /// Place of the token embedding, such as `model.embed_tokens`.
    pub embedding: String,
    /// Place of the output layer, such as `lm_head`.
    pub lm_head: String,
    /// Whether the output layer shares the embedding's weight.
    pub tie_word_embeddings: bool,
    /// Whether the output layer has a bias.
    pub lm_head_bias: bool,
    /// Each layer's sliding window; one entry per layer.
    pub windows: Vec<Option<usize>>,
    /// Learned positions: their place, their number, and how many unused rows stand before them.
    pub positions: Option<(String, usize, usize)>,
    /// Factor of the embeddings, a part of their table.
    pub embedding_scale: f64,
    /// Factor of what goes on of them.
    pub embedding_multiplier: f64,
    /// Factor of the logits.
    pub logit_scale: f64,
    /// Soft cap of the logits.
    pub logit_softcap: Option<f64>,
}

impl DecoderConfig {
    /// The frame of the Llama family: `model.embed_tokens`, `lm_head`, no learned positions, no scaling.
    pub fn new(vocab_size: usize, hidden_size: usize, num_layers: usize) -> Self {
        Self {
            vocab_size,
            hidden_size,
            embedding: "model.embed_tokens".to_string(),
            lm_head: "lm_head".to_string(),
            tie_word_embeddings: false,
            lm_head_bias: false,
            windows: vec![None; num_layers],
            positions: None,
            embedding_scale: 1.0,
            embedding_multiplier: 1.0,
            logit_scale: 1.0,
            logit_softcap: None,
        }
    }
}

/// A decoder-only language model made of layers `L`.
#[derive(Module, Debug)]
pub struct Decoder<L: DecoderLayer> {
    stack: Stack<L>,
    /// Back to the width of the embedding, where the layers have another one, as in OPT.
    project_out: Option<Linear>,
    lm_head: Linear,
    /// Virtual tokens of adapters.
    prompts: Vec<Prompt>,
    #[module(skip)]
    config: DecoderConfig,
}

impl<L: DecoderLayer> Decoder<L> {
    /// Loads the frame around `layers` and the final `norm`.
    pub fn load(w: &Weights, config: DecoderConfig, layers: Vec<L>, norm: Option<Norm>) -> Result<Self> {
        Self::load_with_width(w, config.hidden_size, config, layers, norm)
    }

    /// Like [`load`](Self::load), with embeddings of another width than the layers.
    pub fn load_with_width(
        w: &Weights,
        embedding_width: usize,
        config: DecoderConfig,
        layers: Vec<L>,
        norm: Option<Norm>,
    ) -> Result<Self> {
        let embed_tokens =
            Embedding::load_tokens(&w.pp(&config.embedding), config.vocab_size, embedding_width)?;
        let embed_positions = match &config.positions {
            Some((place, count, offset)) => {
                let width = config.hidden_size;
                Some(Positions::learned(&w.pp(place), *count, width, *offset)?)
            }
            None => None,
        };
        let mut lm_head = if w.without_output {
            Linear::from_matrix(embed_tokens.weight.clone())
        } else if config.tie_word_embeddings {
            // Some checkpoints store the shared weight twice.
            w.ignore(|name| name == format!("{}.weight", config.lm_head));
            let mut head = embed_tokens.tied_output(&w.pp(&config.lm_head))?;
            if config.lm_head_bias {
                head.bias = Some(w.pp(&config.lm_head).param(
                    "bias",
                    [config.vocab_size],
                    crate::Init::Zeros,
                )?);
            }
            head
        } else {
            Linear::load(
                &w.pp(&config.lm_head).with_role(Role::Output),
                embedding_width,
                config.vocab_size,
                config.lm_head_bias,
            )?
        };
        if !w.without_output {
            lm_head.weight = w.pp(&config.lm_head).output(lm_head.weight)?;
        }
        Ok(Self {
            stack: Stack {
                embed_scale: config.embedding_scale,
                embedding_multiplier: config.embedding_multiplier,
                embed_positions,
                ..Stack::new(embed_tokens, layers, norm)
            },
            project_out: None,
            lm_head,
            prompts: w.prompts(embedding_width, config.windows.len())?,
            config,
        })
    }

    /// Adds a norm of the embeddings.
    pub fn with_embedding_norm(mut self, norm: impl Into<Norm>) -> Self {
        self.stack.embed_norm = Some(norm.into());
        self
    }

    /// Adds projections into and out of the layers.
    pub fn with_projections(mut self, project_in: Linear, project_out: Linear) -> Self {
        self.stack.project_in = Some(project_in);
        self.project_out = Some(project_out);
        self
    }

    /// Number of layers.
    pub fn num_layers(&self) -> usize {
        self.stack.layers.len()
    }

    /// Size of the vocabulary.
    pub fn vocab_size(&self) -> usize {
        self.config.vocab_size
    }

    /// Width of the hidden states that the output layer gets.
    pub fn hidden_size(&self) -> usize {
        match &self.project_out {
            Some(project_out) => project_out.out_features(),
            None => self.config.hidden_size,
        }
    }

    /// An empty cache for sequences with the given left padding.
    pub fn new_cache(&self, kind: CacheKind, padding: Vec<usize>) -> Cache {
        Cache::new(kind, &self.config.windows, padding)
    }

    /// Hidden states `[batch, seq, hidden_size]` after the final norm; the tokens are appended to `cache`.
    pub fn hidden_states(&self, input_ids: Tensor<2, Int>, cache: &mut Cache) -> Tensor<3> {
        Prompt::begin(&self.prompts, &self.stack, cache, &input_ids.device());
        self.stack.append(input_ids, cache, false).last_hidden_state
    }

    /// What the first layer gets for the whole sequences `input_ids` `[batch, seq]`: `[batch, seq, hidden_size]`.
    pub fn embed(&self, input_ids: Tensor<2, Int>) -> Tensor<3> {
        let [batch, seq] = input_ids.dims();
        let mut cache = self.new_cache(CacheKind::Dynamic, vec![0; batch]);
        let mut cx = Context::new(&mut cache, seq, input_ids.device());
        self.stack.embed(input_ids, &mut cx)
    }

    /// What the layer `index` makes of the hidden states of whole sequences `[batch, seq, hidden_size]`: how calibration
    /// runs a model, one layer over all texts before the next one.
    pub fn run_layer(&self, index: usize, x: Tensor<3>) -> Tensor<3> {
        let [batch, seq, _] = x.dims();
        let mut cache = self.new_cache(CacheKind::Dynamic, vec![0; batch]);
        let mut cx = Context::new(&mut cache, seq, x.device());
        self.stack.run_layer(index, x, &mut cx)
    }

    /// Logits `[batch, seq or 1, vocab_size]`; the tokens `[batch, seq]` are appended to `cache`.
    pub fn forward(&self, input_ids: Tensor<2, Int>, cache: &mut Cache, logits_for: LogitsFor) -> Tensor<3> {
        let mut x = self.hidden_states(input_ids, cache);
        if logits_for == LogitsFor::Last {
            let seq = x.dims()[1];
            x = x.narrow(1, seq - 1, 1);
        }
        self.logits(x)
    }

    /// Logits of hidden states `[batch, seq, hidden_size]`.
    pub fn logits(&self, mut x: Tensor<3>) -> Tensor<3> {
        if let Some(project_out) = &self.project_out {
            x = project_out.forward(x);
        }
        let mut logits = self.lm_head.forward(x);
        if self.config.logit_scale != 1.0 {
            logits = logits * self.config.logit_scale;
        }
        match self.config.logit_softcap {
            Some(cap) => (logits / cap).tanh() * cap,
            None => logits,
        }
    }
}

/// A decoder judges texts by its hidden states; each token sees those before it.
impl<L: DecoderLayer> Backbone for Decoder<L> {
    fn forward(&self, inputs: &EncoderInputs, device: &Device) -> Result<EncoderOutput> {
        let ids = inputs.ids(self.vocab_size(), device)?;
        // Padding on the right is after all that is looked at.
        let padding = inputs.tokens.iter().map(|tokens| tokens.start).collect();
        let mut cache = self.new_cache(CacheKind::Dynamic, padding);
        let mut output = self.stack.append(ids, &mut cache, inputs.output_hidden_states);
        if let Some(project_out) = &self.project_out {
            output.last_hidden_state = project_out.forward(output.last_hidden_state);
        }
        Ok(output)
    }
}
