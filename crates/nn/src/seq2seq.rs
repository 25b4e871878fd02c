//! The frame that encoder-decoders share: the encoder reads a source as a whole, and the decoder writes, looking at it.

use std::fmt::Debug;
use std::ops::Range;

use burn::module::{Module, Param};
use burn::tensor::{Int, Tensor};

use crate::{
    Cache, CacheKind, Context, CrossAttention, DecoderLayer, Embedding, Init, Linear, LogitsFor, Norm,
    Positions, Result, Weights,
};

/// A layer of either half.
pub trait Seq2SeqLayer: DecoderLayer {
    /// Attention to what the encoder has read; the encoder's own layers have none.
    fn cross_attention(&self) -> Option<&CrossAttention>;
}

/// Either half: embed, run the layers, normalize.
#[derive(Module, Debug)]
pub struct Stack<L: DecoderLayer> {
    /// Token embedding.
    pub embed_tokens: Embedding,
    /// Factor of the token embeddings.
    pub embed_scale: f64,
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
    /// `[batch, seq]` ids to hidden states `[batch, seq, hidden_size]`.
    pub fn forward(&self, input_ids: Tensor<2, Int>, cx: &mut Context) -> Tensor<3> {
        let mut x = self.embed_tokens.forward(input_ids);
        if self.embed_scale != 1.0 {
            x = x * self.embed_scale;
        }
        if let Some(positions) = &self.embed_positions {
            x = x + positions.forward(cx);
        }
        if let Some(norm) = &self.embed_norm {
            x = norm.forward(x);
        }
        for (index, layer) in self.layers.iter().enumerate() {
            cx.enter_layer(index);
            x = layer.forward(x, cx);
        }
        match &self.norm {
            Some(norm) => norm.forward(x),
            None => x,
        }
    }
}

/// What an encoder makes of a source.
#[derive(Debug, Clone)]
pub struct Encoded {
    /// `[batch, source, hidden_size]`; rows of padding tokens mean nothing.
    pub hidden_states: Tensor<3>,
    /// Where the real tokens of each sequence lie.
    pub tokens: Vec<Range<usize>>,
}

/// An encoder-decoder made of layers `L`, without the layer that makes logits.
#[derive(Module, Debug)]
pub struct EncoderDecoder<L: Seq2SeqLayer> {
    /// Reads.
    pub encoder: Stack<L>,
    /// Writes.
    pub decoder: Stack<L>,
}

impl<L: Seq2SeqLayer> EncoderDecoder<L> {
    /// An empty cache for sequences with the given left padding.
    pub fn new_cache(&self, kind: CacheKind, padding: Vec<usize>) -> Cache {
        Cache::new(kind, &vec![None; self.decoder.layers.len()], padding)
    }

    /// Reads `input_ids` `[batch, source]`; `tokens` says where the real ones of each sequence lie.
    pub fn encode(&self, input_ids: Tensor<2, Int>, tokens: Vec<Range<usize>>) -> Encoded {
        let [_, seq] = input_ids.dims();
        let mut cx = Context::bidirectional(tokens.clone(), seq, input_ids.device());
        Encoded {
            hidden_states: self.encoder.forward(input_ids, &mut cx),
            tokens,
        }
    }

    /// Lets the sequences of `cache` look at what has been read.
    pub fn attend_to(&self, encoded: &Encoded, cache: &mut Cache) {
        let layers = self.decoder.layers.iter().filter_map(L::cross_attention);
        let layers = layers.map(|layer| layer.keys_and_values(encoded.hidden_states.clone()));
        cache.set_source(layers.collect(), encoded.tokens.clone());
    }

    /// The decoder's hidden states `[batch, seq, hidden_size]`; the tokens `[batch, seq]` are appended to `cache`.
    pub fn decode(&self, input_ids: Tensor<2, Int>, cache: &mut Cache) -> Tensor<3> {
        let [_, seq] = input_ids.dims();
        let mut cx = Context::new(cache, seq, input_ids.device());
        let x = self.decoder.forward(input_ids, &mut cx);
        cache.advance(seq);
        x
    }
}

/// The layer that makes logits.
#[derive(Module, Debug)]
pub struct LmHead {
    /// `[vocab_size, hidden_size]`.
    pub linear: Linear,
    /// Factor of the hidden states before that.
    pub scale: f64,
}

/// An encoder-decoder with the layer that makes logits.
#[derive(Module, Debug)]
pub struct Seq2SeqDecoder<L: Seq2SeqLayer> {
    /// Both halves.
    pub model: EncoderDecoder<L>,
    /// Makes logits.
    pub lm_head: LmHead,
}

impl<L: Seq2SeqLayer> Seq2SeqDecoder<L> {
    /// Logits `[batch, seq or 1, vocab_size]`; the tokens `[batch, seq]` are appended to `cache`.
    pub fn forward(&self, input_ids: Tensor<2, Int>, cache: &mut Cache, logits_for: LogitsFor) -> Tensor<3> {
        let mut x = self.model.decode(input_ids, cache);
        if logits_for == LogitsFor::Last {
            let seq = x.dims()[1];
            x = x.narrow(1, seq - 1, 1);
        }
        if self.lm_head.scale != 1.0 {
            x = x * self.lm_head.scale;
        }
        self.lm_head.linear.forward(x)
    }

    /// Size of the vocabulary that it writes with.
    pub fn vocab_size(&self) -> usize {
        self.lm_head.linear.out_features()
    }

    /// Size of the vocabulary that it reads.
    pub fn source_vocab_size(&self) -> usize {
        self.model.encoder.embed_tokens.weight.shape()[0]
    }
}

/// Tables that a checkpoint may store once, or once under each of their names.
pub struct TiedTables<'a> {
    w: &'a Weights,
    loaded: Vec<(String, Embedding)>,
}

impl<'a> TiedTables<'a> {
    /// Tables at the places below `w`.
    pub fn new(w: &'a Weights) -> Self {
        Self {
            w,
            loaded: Vec::new(),
        }
    }

    /// The table `[rows, width]` at its `own` place, or at the first of the places `tied` to it that the checkpoint has.
    /// One that is stored several times is held once.
    ///
    /// # Errors
    /// Where no place has it.
    pub fn load(&mut self, own: &str, tied: &[&str], rows: usize, width: usize) -> Result<Embedding> {
        let stored = |place: &&str| self.w.is_stored(&format!("{place}.weight"));
        let place = std::iter::once(own).chain(tied.iter().copied()).find(stored);
        let place = place.unwrap_or(tied.first().unwrap_or(&own));
        let same = |(loaded, _): &&(String, Embedding)| {
            loaded == place
                || self
                    .w
                    .same(&format!("{loaded}.weight"), &format!("{place}.weight"))
        };
        if let Some((_, table)) = self.loaded.iter().find(same) {
            return Ok(table.clone());
        }
        let table = Embedding::load(&self.w.pp(place), rows, width)?;
        self.loaded.push((place.to_string(), table.clone()));
        Ok(table)
    }
}

/// A bias of logits that is stored beside the model as `[1, vocab_size]`; none where the checkpoint has none.
///
/// # Errors
/// Where it has another shape.
pub fn load_logits_bias(w: &Weights, name: &str, vocab_size: usize) -> Result<Option<Param<Tensor<1>>>> {
    if !w.is_stored(name) {
        return Ok(None);
    }
    let bias = w.param::<2>(name, [1, vocab_size], Init::Zeros)?;
    Ok(Some(Param::initialized(
        bias.id,
        bias.val().reshape([vocab_size]),
    )))
}
