//! The list of architectures.

use std::ops::Range;

use burn::module::Module;
use burn::tensor::{Device, Int, Tensor};
use oxiformers_nn::seq2seq::{Encoded, Reader};
use oxiformers_nn::{
    Backbone, Cache, CacheKind, Decoder, EncoderInputs, EncoderOutput, Error, Head, LogitsFor,
    Seq2SeqDecoder, Weights,
};
use serde_json::Value;

use crate::{Architecture, EncoderArchitecture, Seq2SeqArchitecture, Task};

/// Which halves a model has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// It continues texts.
    Decoder,
    /// It reads a text and writes another.
    EncoderDecoder,
    /// It reads texts.
    Encoder,
}

impl Kind {
    fn is_no(self, wanted: &str) -> Error {
        let name = match self {
            Self::Decoder => "a decoder",
            Self::EncoderDecoder => "an encoder-decoder",
            Self::Encoder => "an encoder",
        };
        Error::config("model_type", format!("is that of {name}, which is no {wanted}"))
    }
}

macro_rules! architectures {
    (
        decoders { $($(#[$doc:meta])* $variant:ident($module:ident) = $($model_type:literal)|+;)+ }
        encoder_decoders { $($(#[$s_doc:meta])* $s_variant:ident($s_module:ident) = $($s_model_type:literal)|+;)+ }
        encoders { $($(#[$e_doc:meta])* $e_variant:ident($e_module:ident) = $($e_model_type:literal)|+;)+ }
    ) => {
        /// The configuration of any architecture.
        #[derive(Debug, Clone)]
        pub enum AnyConfig {
            $($(#[$doc])* $variant(crate::$module::Config),)+
            $($(#[$s_doc])* $s_variant(crate::$s_module::Config),)+
            $($(#[$e_doc])* $e_variant(crate::$e_module::Config),)+
        }

        /// A decoder of any architecture.
        #[derive(Module, Debug)]
        pub enum AnyDecoder {
            $($(#[$doc])* $variant(Decoder<<crate::$module::Config as Architecture>::Layer>),)+
        }

        /// An encoder-decoder of any architecture.
        #[derive(Module, Debug)]
        pub enum AnySeq2Seq {
            $($(#[$s_doc])* $s_variant(Seq2SeqDecoder<<crate::$s_module::Config as Seq2SeqArchitecture>::Layer>),)+
        }

        /// An encoder of any architecture, or an encoder-decoder that judges texts as encoders do.
        #[derive(Module, Debug)]
        pub enum AnyEncoder {
            $($(#[$e_doc])* $e_variant(<crate::$e_module::Config as EncoderArchitecture>::Model),)+
            $($(#[$s_doc])* $s_variant(Reader<<crate::$s_module::Config as Seq2SeqArchitecture>::Layer>),)+
        }

        /// Every `model_type` that can be loaded.
        pub const MODEL_TYPES: &[&str] = &[$($($model_type),+,)+ $($($s_model_type),+,)+ $($($e_model_type),+),+];

        impl AnyConfig {
            /// Reads the configuration of `model_type`; `None` where it is unknown.
            pub fn from_json(model_type: &str, json: Value) -> Option<serde_json::Result<Self>> {
                match model_type {
                    $($($model_type)|+ => Some(serde_json::from_value(json).map(Self::$variant)),)+
                    $($($s_model_type)|+ => Some(serde_json::from_value(json).map(Self::$s_variant)),)+
                    $($($e_model_type)|+ => Some(serde_json::from_value(json).map(Self::$e_variant)),)+
                    _ => None,
                }
            }

            /// Builds a decoder.
            pub fn load(&self, w: &Weights) -> oxiformers_nn::Result<AnyDecoder> {
                match self {
                    $(Self::$variant(config) => config.load(w).map(AnyDecoder::$variant),)+
                    _ => Err(self.kind().is_no("causal language model")),
                }
            }

            /// Builds an encoder-decoder.
            pub fn load_seq2seq(&self, w: &Weights) -> oxiformers_nn::Result<AnySeq2Seq> {
                match self {
                    $(Self::$s_variant(config) => config.load(w).map(AnySeq2Seq::$s_variant),)+
                    _ => Err(self.kind().is_no("encoder-decoder")),
                }
            }

            /// Builds an encoder for a task.
            pub fn load_encoder(&self, task: Task, w: &Weights) -> oxiformers_nn::Result<AnyEncoder> {
                match self {
                    $(Self::$e_variant(config) => config.load(w).map(AnyEncoder::$e_variant),)+
                    $(Self::$s_variant(config) => config.reader(task, w).map(AnyEncoder::$s_variant),)+
                    _ => Err(self.kind().is_no("encoder")),
                }
            }

            /// Builds the head of an encoder: see [`EncoderArchitecture::head`].
            pub fn load_head(
                &self,
                task: Task,
                w: &Weights,
                encoder: &AnyEncoder,
                labels: usize,
            ) -> oxiformers_nn::Result<Option<Head>> {
                match (self, encoder) {
                    $((Self::$e_variant(config), AnyEncoder::$e_variant(model)) => {
                        config.head(task, w, model, labels)
                    })+
                    $((Self::$s_variant(config), _) => config.head(task, w, labels),)+
                    _ => Ok(None),
                }
            }

            /// See [`EncoderArchitecture::prepare`].
            pub fn prepare(
                &self,
                task: Task,
                inputs: &EncoderInputs,
            ) -> oxiformers_nn::Result<Option<EncoderInputs>> {
                match self {
                    $(Self::$e_variant(config) => config.prepare(task, inputs),)+
                    _ => Ok(None),
                }
            }

            /// See [`EncoderArchitecture::batch_group`].
            pub fn batch_group(&self, length: usize) -> usize {
                match self {
                    $(Self::$e_variant(config) => config.batch_group(length),)+
                    _ => 0,
                }
            }

            /// Which halves it has.
            pub fn kind(&self) -> Kind {
                match self {
                    $(Self::$variant(_) => Kind::Decoder,)+
                    $(Self::$s_variant(_) => Kind::EncoderDecoder,)+
                    $(Self::$e_variant(_) => Kind::Encoder,)+
                }
            }

            /// The typed configuration as JSON: fields that were not given have the architecture's defaults.
            pub fn to_json(&self) -> serde_json::Result<Value> {
                match self {
                    $(Self::$variant(config) => serde_json::to_value(config),)+
                    $(Self::$s_variant(config) => serde_json::to_value(config),)+
                    $(Self::$e_variant(config) => serde_json::to_value(config),)+
                }
            }

            /// See [`Architecture::BASE`].
            pub fn base(&self) -> &'static str {
                match self {
                    $(Self::$variant(_) => <crate::$module::Config as Architecture>::BASE,)+
                    $(Self::$s_variant(_) => <crate::$s_module::Config as Seq2SeqArchitecture>::BASE,)+
                    $(Self::$e_variant(_) => <crate::$e_module::Config as EncoderArchitecture>::BASE,)+
                }
            }

            /// See [`Architecture::IGNORED`].
            pub fn ignored(&self) -> &'static [&'static str] {
                match self {
                    $(Self::$variant(_) => <crate::$module::Config as Architecture>::IGNORED,)+
                    $(Self::$s_variant(_) => <crate::$s_module::Config as Seq2SeqArchitecture>::IGNORED,)+
                    $(Self::$e_variant(_) => <crate::$e_module::Config as EncoderArchitecture>::IGNORED,)+
                }
            }

            /// See [`Architecture::max_position_embeddings`].
            pub fn max_position_embeddings(&self) -> Option<usize> {
                match self {
                    $(Self::$variant(config) => config.max_position_embeddings(),)+
                    $(Self::$s_variant(config) => Seq2SeqArchitecture::max_position_embeddings(config),)+
                    $(Self::$e_variant(config) => EncoderArchitecture::max_position_embeddings(config),)+
                }
            }
        }

        impl AnyDecoder {
            /// Size of the vocabulary.
            pub fn vocab_size(&self) -> usize {
                match self { $(Self::$variant(model) => model.vocab_size(),)+ }
            }

            /// See [`Decoder::new_cache`].
            pub fn new_cache(&self, kind: CacheKind, padding: Vec<usize>) -> Cache {
                match self { $(Self::$variant(model) => model.new_cache(kind, padding),)+ }
            }

            /// See [`Decoder::hidden_states`].
            pub fn hidden_states(&self, input_ids: Tensor<2, Int>, cache: &mut Cache) -> Tensor<3> {
                match self { $(Self::$variant(model) => model.hidden_states(input_ids, cache),)+ }
            }

            /// Number of layers.
            pub fn num_layers(&self) -> usize {
                match self { $(Self::$variant(model) => model.num_layers(),)+ }
            }

            /// See [`Decoder::embed`].
            pub fn embed(&self, input_ids: Tensor<2, Int>) -> Tensor<3> {
                match self { $(Self::$variant(model) => model.embed(input_ids),)+ }
            }

            /// See [`Decoder::run_layer`].
            pub fn run_layer(&self, index: usize, x: Tensor<3>) -> Tensor<3> {
                match self { $(Self::$variant(model) => model.run_layer(index, x),)+ }
            }

            /// See [`Decoder::forward`].
            pub fn forward(&self, input_ids: Tensor<2, Int>, cache: &mut Cache, logits_for: LogitsFor) -> Tensor<3> {
                match self { $(Self::$variant(model) => model.forward(input_ids, cache, logits_for),)+ }
            }

            /// See [`Decoder::logits`].
            pub fn logits(&self, hidden_states: Tensor<3>) -> Tensor<3> {
                match self { $(Self::$variant(model) => model.logits(hidden_states),)+ }
            }
        }

        impl Backbone for AnyEncoder {
            fn forward(&self, inputs: &EncoderInputs, device: &Device) -> oxiformers_nn::Result<EncoderOutput> {
                match self {
                    $(Self::$e_variant(model) => model.forward(inputs, device),)+
                    $(Self::$s_variant(model) => model.forward(inputs, device),)+
                }
            }
        }

        impl AnySeq2Seq {
            /// Size of the vocabulary that it writes with.
            pub fn vocab_size(&self) -> usize {
                match self { $(Self::$s_variant(model) => model.vocab_size(),)+ }
            }

            /// Size of the vocabulary that it reads.
            pub fn source_vocab_size(&self) -> usize {
                match self { $(Self::$s_variant(model) => model.source_vocab_size(),)+ }
            }

            /// See [`EncoderDecoder::new_cache`](oxiformers_nn::EncoderDecoder::new_cache).
            pub fn new_cache(&self, kind: CacheKind, padding: Vec<usize>) -> Cache {
                match self { $(Self::$s_variant(model) => model.model.new_cache(kind, padding),)+ }
            }

            /// See [`EncoderDecoder::encode`](oxiformers_nn::EncoderDecoder::encode).
            pub fn encode(&self, input_ids: Tensor<2, Int>, tokens: Vec<Range<usize>>) -> Encoded {
                match self { $(Self::$s_variant(model) => model.model.encode(input_ids, tokens),)+ }
            }

            /// See [`EncoderDecoder::attend_to`](oxiformers_nn::EncoderDecoder::attend_to).
            pub fn attend_to(&self, encoded: &Encoded, cache: &mut Cache) {
                match self { $(Self::$s_variant(model) => model.model.attend_to(encoded, cache),)+ }
            }

            /// See [`Seq2SeqDecoder::forward`].
            pub fn forward(&self, input_ids: Tensor<2, Int>, cache: &mut Cache, logits_for: LogitsFor) -> Tensor<3> {
                match self { $(Self::$s_variant(model) => model.forward(input_ids, cache, logits_for),)+ }
            }
        }
    };
}

architectures! {
    decoders {
        /// BLOOM.
        Bloom(bloom) = "bloom";
        /// Command R.
        Cohere(cohere) = "cohere";
        /// DeepSeek-V3 and R1.
        DeepseekV3(deepseek_v3) = "deepseek_v3";
        /// Falcon.
        Falcon(falcon) = "falcon";
        /// Gemma.
        Gemma(gemma) = "gemma";
        /// Gemma 2.
        Gemma2(gemma2) = "gemma2";
        /// Gemma 3's language model.
        Gemma3Text(gemma3_text) = "gemma3_text";
        /// GPT-2.
        Gpt2(gpt2) = "gpt2";
        /// GPT-NeoX and Pythia.
        GptNeoX(gpt_neox) = "gpt_neox";
        /// gpt-oss.
        GptOss(gpt_oss) = "gpt_oss";
        /// GPT-J.
        GptJ(gptj) = "gptj";
        /// Granite.
        Granite(granite) = "granite";
        /// Llama.
        Llama(llama) = "llama";
        /// Mistral.
        Mistral(mistral) = "mistral";
        /// Mixtral.
        Mixtral(mixtral) = "mixtral";
        /// MPT.
        Mpt(mpt) = "mpt";
        /// OLMo 2.
        Olmo2(olmo2) = "olmo2";
        /// OPT.
        Opt(opt) = "opt";
        /// Phi-1 and Phi-2.
        Phi(phi) = "phi";
        /// Phi-3 and Phi-4.
        Phi3(phi3) = "phi3";
        /// Qwen2 and Qwen2.5.
        Qwen2(qwen2) = "qwen2";
        /// Qwen1.5-MoE and Qwen2-MoE.
        Qwen2Moe(qwen2_moe) = "qwen2_moe";
        /// Qwen3.
        Qwen3(qwen3) = "qwen3";
        /// Qwen3-MoE.
        Qwen3Moe(qwen3_moe) = "qwen3_moe";
        /// SmolLM3.
        SmolLm3(smollm3) = "smollm3";
        /// StableLM.
        StableLm(stablelm) = "stablelm";
        /// StarCoder2.
        StarCoder2(starcoder2) = "starcoder2";
    }
    encoder_decoders {
        /// BART.
        Bart(bart) = "bart";
        /// M2M100 and NLLB.
        M2M100(m2m_100) = "m2m_100";
        /// Marian, of OPUS-MT.
        Marian(marian) = "marian";
        /// mBART.
        MBart(mbart) = "mbart";
        /// mT5.
        Mt5(mt5) = "mt5";
        /// PEGASUS.
        Pegasus(pegasus) = "pegasus";
        /// PLBART.
        PlBart(plbart) = "plbart";
        /// T5, T5 1.1 and Flan-T5.
        T5(t5) = "t5";
        /// UMT5.
        Umt5(umt5) = "umt5";
    }
    encoders {
        /// ALBERT.
        Albert(albert) = "albert";
        /// BERT.
        Bert(bert) = "bert";
        /// BigBird.
        BigBird(big_bird) = "big_bird";
        /// DeBERTa-v2 and v3.
        DebertaV2(deberta_v2) = "deberta-v2";
        /// DistilBERT.
        DistilBert(distilbert) = "distilbert";
        /// ELECTRA.
        Electra(electra) = "electra";
        /// LayoutLM.
        LayoutLm(layoutlm) = "layoutlm";
        /// Longformer.
        Longformer(longformer) = "longformer";
        /// ModernBERT.
        ModernBert(modernbert) = "modernbert";
        /// MPNet.
        MpNet(mpnet) = "mpnet";
        /// Nomic Embed.
        NomicBert(nomic_bert) = "nomic_bert";
        /// RoBERTa, XLM-RoBERTa and CamemBERT.
        Roberta(roberta) = "roberta" | "xlm-roberta" | "camembert";
        /// TAPAS.
        Tapas(tapas) = "tapas";
    }
}
