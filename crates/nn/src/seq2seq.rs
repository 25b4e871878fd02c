//! The frame that encoder-decoders share: the encoder reads a source as a whole, and the decoder writes, looking at it.
//! To judge a text instead of writing one, the decoder is given the text itself ([`Reader`]).

use std::fmt::Debug;
use std::ops::Range;

use burn::module::{Module, Param};
use burn::tensor::{Device, Int, Tensor};

use crate::{
    Backbone, Cache, CacheKind, Context, CrossAttention, DecoderLayer, Embedding, EncoderInputs,
    EncoderOutput, Error, Init, Linear, LogitsFor, Result, Stack, Weights,
};

/// A layer of either half.
pub trait Seq2SeqLayer: DecoderLayer {
    /// Attention to what the encoder has read; the encoder's own layers have none.
    fn cross_attention(&self) -> Option<&CrossAttention>;
}

/// One half of an encoder-decoder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Half {
    /// It reads.
    Encoder,
    /// It writes.
    Decoder,
}

impl Half {
    /// What checkpoints call it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Encoder => "encoder",
            Self::Decoder => "decoder",
        }
    }

    /// The other one.
    pub fn other(self) -> Self {
        match self {
            Self::Encoder => Self::Decoder,
            Self::Decoder => Self::Encoder,
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
            hidden_states: self.encoder.forward(input_ids, &mut cx, false).last_hidden_state,
            tokens,
        }
    }

    /// Lets the sequences of `cache` look at what has been read.
    pub fn attend_to(&self, encoded: &Encoded, cache: &mut Cache) {
        let layers = self.decoder.layers.iter().filter_map(L::cross_attention);
        let layers = layers.map(|layer| layer.keys_and_values(encoded.hidden_states.clone()));
        cache.set_source(layers.collect(), encoded.tokens.clone());
    }

    /// The decoder's hidden states, with `keep` of every layer; the tokens `[batch, seq]` are appended to `cache`.
    pub fn decode(&self, input_ids: Tensor<2, Int>, cache: &mut Cache, keep: bool) -> EncoderOutput {
        self.decoder.append(input_ids, cache, keep)
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
        let mut x = self.model.decode(input_ids, cache, false).last_hidden_state;
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

/// What stands before a text that is given to the decoder one place to the right.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ShiftRight {
    /// A token.
    After(u32),
    /// The last token of the text that is not `pad`: the language, in mBART.
    Around {
        /// The padding token.
        pad: u32,
    },
}

impl ShiftRight {
    /// The text one place to the right.
    fn row(self, ids: &[u32]) -> Vec<u32> {
        let first = match self {
            Self::After(id) => Some(id),
            Self::Around { pad } => {
                // Counted, as if all padding came after the text.
                let tokens = ids.iter().filter(|id| **id != pad).count();
                ids.get(tokens.max(1) - 1).copied()
            }
        };
        first
            .into_iter()
            .chain(ids.iter().copied())
            .take(ids.len())
            .collect()
    }
}

/// An encoder-decoder that judges texts instead of writing.
#[derive(Module, Debug)]
pub struct Reader<L: Seq2SeqLayer> {
    halves: Halves<L>,
    #[module(skip)]
    max_position_embeddings: Option<usize>,
    #[module(skip)]
    shift: Option<ShiftRight>,
}

/// Which halves read.
#[derive(Module, Debug)]
enum Halves<L: Seq2SeqLayer> {
    Encoder(Stack<L>),
    Both(EncoderDecoder<L>),
}

impl<L: Seq2SeqLayer> Reader<L> {
    /// The encoder alone reads.
    pub fn encoder(encoder: Stack<L>, max_position_embeddings: Option<usize>) -> Self {
        Self {
            halves: Halves::Encoder(encoder),
            max_position_embeddings,
            shift: None,
        }
    }

    /// The encoder reads the text, and then the decoder, looking at what the encoder made of it, once more.
    pub fn both(model: EncoderDecoder<L>, shift: ShiftRight, max_position_embeddings: Option<usize>) -> Self {
        Self {
            halves: Halves::Both(model),
            max_position_embeddings,
            shift: Some(shift),
        }
    }
}

impl<L: Seq2SeqLayer> Backbone for Reader<L> {
    fn forward(&self, inputs: &EncoderInputs, device: &Device) -> Result<EncoderOutput> {
        let [batch, seq] = inputs.dims();
        if let Some(most) = self.max_position_embeddings.filter(|most| seq > *most) {
            let message =
                format!("a sequence of {seq} tokens, but the model was made for {most}; truncate it");
            return Err(Error::input("input_ids", message));
        }
        let keep = inputs.output_hidden_states;
        let vocab_size = |half: &Stack<L>| half.embed_tokens.weight.shape()[0];
        match &self.halves {
            Halves::Encoder(encoder) => {
                let ids = inputs.ids(vocab_size(encoder), device)?;
                Ok(encoder.forward(ids, &mut inputs.context(device), keep))
            }
            Halves::Both(model) => {
                let ids = inputs.ids(vocab_size(&model.encoder), device)?;
                let shift = |ids: &Vec<u32>| self.shift.map_or(ids.clone(), |shift| shift.row(ids));
                let targets: Vec<_> = inputs.input_ids.iter().map(shift).collect();
                let targets = inputs.tensor("input_ids", &targets, vocab_size(&model.decoder), device)?;
                let mut cache = model.new_cache(CacheKind::Dynamic, vec![0; batch]);
                model.attend_to(&model.encode(ids, inputs.tokens.clone()), &mut cache);
                Ok(model.decode(targets, &mut cache, keep))
            }
        }
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

    /// A place below that of the tables.
    pub fn at(&self, place: &str) -> Weights {
        self.w.pp(place)
    }

    /// The table `[rows, width]` at its `own` place, or at the first of the places `tied` to it that the checkpoint has.
    /// One that is stored several times is held once, and one that nothing is made of may be stored.
    ///
    /// # Errors
    /// Where no place has it.
    pub fn load(&mut self, own: &str, tied: &[&str], rows: usize, width: usize) -> Result<Embedding> {
        let table = self.load_alone(own, tied, rows, width)?;
        match own {
            // It becomes a linear layer, which has adapters of another kind.
            "lm_head" => Ok(table),
            own => table.adapted(&self.w.pp(own)),
        }
    }

    fn load_alone(&mut self, own: &str, tied: &[&str], rows: usize, width: usize) -> Result<Embedding> {
        for place in tied {
            self.w.pp(place).ignore_one("weight");
        }
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
        // The rows of an output layer alone are no inputs.
        let padding = (place != "lm_head").then(|| self.w.padding_idx()).flatten();
        let table = Embedding::load_padded(&self.w.pp(place), rows, width, padding)?;
        self.loaded.push((place.to_string(), table.clone()));
        Ok(table)
    }
}

/// A bias of logits that is stored beside the model as `[1, vocab_size]`; none where the checkpoint has none. It is not
/// trained.
///
/// # Errors
/// Where it has another shape.
pub fn load_logits_bias(w: &Weights, name: &str, vocab_size: usize) -> Result<Option<Param<Tensor<1>>>> {
    if !w.is_stored(name) {
        return Ok(None);
    }
    let bias = w.buffer::<2>(name, [1, vocab_size], Init::Zeros)?;
    Ok(Some(Param::initialized(
        bias.id,
        bias.val().reshape([vocab_size]),
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_one_place_to_the_right() {
        assert_eq!(ShiftRight::After(9).row(&[5, 6, 2]), [9, 5, 6]);
        assert_eq!(ShiftRight::Around { pad: 1 }.row(&[5, 6, 2, 1]), [2, 5, 6, 2]);
        assert_eq!(ShiftRight::Around { pad: 1 }.row(&[1, 1]), [1, 1]);
        assert!(ShiftRight::After(9).row(&[]).is_empty());
    }
}
