//! Kinds of tokenizers. Files of the older formats do not say all about how text is prepared and what is put
//! around it; a model's class in Python does.

use oxiformers_hub::ModelFiles;
use serde_json::{Map, Value};

use super::config::Side;
use crate::Result;

/// What a tokenizer class in Python stands for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) enum Family {
    Albert,
    Barthez,
    Bert,
    BigBird,
    Blenderbot,
    ByT5,
    Camembert,
    Canine,
    Deberta,
    DebertaV2,
    DistilBert,
    FNet,
    Funnel,
    Gpt2,
    /// Llama, Gemma and others that pad at the left.
    Llama,
    M2M100,
    MBart,
    MBart50,
    MPNet,
    Marian,
    Nllb,
    PLBart,
    Pegasus,
    RemBert,
    Roberta,
    T5,
    Tapas,
    XGlm,
    XLNet,
    XlmRoberta,
    /// None of these: the file is all that is known.
    #[default]
    Other,
}

/// The class that a model's files name, without `Fast`, and its kind: `tokenizer_config.json`, then
/// `config.json`, there by name or by the model's type.
pub(super) fn of(files: &ModelFiles, settings: &Map<String, Value>) -> Result<(Option<String>, Family)> {
    let config: Map<String, Value> = files.json("config.json")?.unwrap_or_default();
    let text = |json: &Map<String, Value>, name: &str| json.get(name)?.as_str().map(str::to_owned);
    let class = text(settings, "tokenizer_class").or_else(|| text(&config, "tokenizer_class"));
    let class = class.map(|class| class.strip_suffix("Fast").unwrap_or(&class).to_owned());
    let family = class.as_deref().map_or(Family::Other, by_class);
    if family == Family::Other
        && let Some(model_type) = text(&config, "model_type")
    {
        return Ok((class, by_model_type(&model_type)));
    }
    Ok((class, family))
}

fn by_class(class: &str) -> Family {
    match class.strip_suffix("Tokenizer").unwrap_or(class) {
        "Albert" => Family::Albert,
        "Barthez" => Family::Barthez,
        "Bert" | "ConvBert" | "DPRContextEncoder" | "DPRQuestionEncoder" | "DPRReader" | "Electra"
        | "LayoutLM" | "Lxmert" | "MobileBert" | "Realm" | "RetriBert" | "SqueezeBert" => Family::Bert,
        "BigBird" => Family::BigBird,
        "Blenderbot" => Family::Blenderbot,
        "ByT5" => Family::ByT5,
        "Camembert" => Family::Camembert,
        "Canine" => Family::Canine,
        "Deberta" => Family::Deberta,
        "DebertaV2" => Family::DebertaV2,
        "DistilBert" => Family::DistilBert,
        "FNet" => Family::FNet,
        "Funnel" => Family::Funnel,
        "CodeGen" | "GPT2" => Family::Gpt2,
        "CodeLlama" | "Cohere" | "Gemma" | "Llama" => Family::Llama,
        "M2M100" => Family::M2M100,
        "MBart" => Family::MBart,
        "MBart50" => Family::MBart50,
        "MPNet" => Family::MPNet,
        "Marian" => Family::Marian,
        "Nllb" => Family::Nllb,
        "PLBart" => Family::PLBart,
        "Pegasus" => Family::Pegasus,
        "RemBert" => Family::RemBert,
        "Bart" | "LED" | "Longformer" | "Mvp" | "Roberta" => Family::Roberta,
        "MT5" | "T5" => Family::T5,
        "Tapas" => Family::Tapas,
        "XGLM" => Family::XGlm,
        "XLNet" => Family::XLNet,
        "XLMRoberta" => Family::XlmRoberta,
        _ => Family::Other,
    }
}

fn by_model_type(model_type: &str) -> Family {
    match model_type {
        "albert" | "yoso" => Family::Albert,
        "barthez" => Family::Barthez,
        "align" | "bert" | "blip" | "bros" | "chinese_clip" | "convbert" | "dpr" | "electra" | "ernie"
        | "flava" | "git" | "grounding-dino" | "layoutlm" | "lxmert" | "megatron-bert" | "mobilebert"
        | "mm-grounding-dino" | "nezha" | "nomic_bert" | "qdqbert" | "realm" | "retribert"
        | "squeezebert" | "tvp" | "vilt" | "visual_bert" => Family::Bert,
        "big_bird" => Family::BigBird,
        "blenderbot" => Family::Blenderbot,
        "byt5" => Family::ByT5,
        "camembert" => Family::Camembert,
        "canine" => Family::Canine,
        "deberta" => Family::Deberta,
        "deberta-v2" => Family::DebertaV2,
        "distilbert" => Family::DistilBert,
        "fnet" => Family::FNet,
        "funnel" => Family::Funnel,
        "codegen" | "gpt2" | "gpt_neo" | "gptj" | "opt" | "phi" | "starcoder2" => Family::Gpt2,
        "code_llama" | "cohere" | "cohere2" | "gemma" | "gemma2" | "gemma3" | "gemma3_text" | "llama"
        | "recurrent_gemma" | "t5gemma" => Family::Llama,
        "m2m_100" => Family::M2M100,
        "mbart" => Family::MBart,
        "mbart50" => Family::MBart50,
        "mpnet" => Family::MPNet,
        "marian" => Family::Marian,
        "nllb" | "nllb-moe" => Family::Nllb,
        "plbart" => Family::PLBart,
        "bigbird_pegasus" | "pegasus" | "pegasus_x" => Family::Pegasus,
        "rembert" => Family::RemBert,
        "bart"
        | "bridgetower"
        | "clap"
        | "data2vec-text"
        | "florence2"
        | "ibert"
        | "led"
        | "lilt"
        | "longformer"
        | "mega"
        | "mra"
        | "mvp"
        | "roberta"
        | "roberta-prelayernorm" => Family::Roberta,
        "mt5" | "musicgen" | "musicgen_melody" | "switch_transformers" | "t5" | "umt5" => Family::T5,
        "tapas" => Family::Tapas,
        "xglm" => Family::XGlm,
        "xlnet" => Family::XLNet,
        "gte" | "jina_embeddings_v3" | "metaclip_2" | "trocr" | "xlm-roberta" | "xlm-roberta-xl" | "xmod" => {
            Family::XlmRoberta
        }
        _ => Family::Other,
    }
}

impl Family {
    /// Special tokens by role, unless the files say so.
    pub fn special_tokens(self) -> &'static [(&'static str, &'static str)] {
        match self {
            Self::Bert | Self::DistilBert | Self::Tapas => &[
                ("unk_token", "[UNK]"),
                ("sep_token", "[SEP]"),
                ("pad_token", "[PAD]"),
                ("cls_token", "[CLS]"),
                ("mask_token", "[MASK]"),
            ],
            Self::Deberta | Self::DebertaV2 => &[
                ("bos_token", "[CLS]"),
                ("eos_token", "[SEP]"),
                ("unk_token", "[UNK]"),
                ("sep_token", "[SEP]"),
                ("pad_token", "[PAD]"),
                ("cls_token", "[CLS]"),
                ("mask_token", "[MASK]"),
            ],
            Self::Albert | Self::FNet | Self::RemBert => &[
                ("bos_token", "[CLS]"),
                ("eos_token", "[SEP]"),
                ("unk_token", "<unk>"),
                ("sep_token", "[SEP]"),
                ("pad_token", "<pad>"),
                ("cls_token", "[CLS]"),
                ("mask_token", "[MASK]"),
            ],
            Self::BigBird => &[
                ("bos_token", "<s>"),
                ("eos_token", "</s>"),
                ("unk_token", "<unk>"),
                ("sep_token", "[SEP]"),
                ("pad_token", "<pad>"),
                ("cls_token", "[CLS]"),
                ("mask_token", "[MASK]"),
            ],
            Self::Barthez
            | Self::Blenderbot
            | Self::Camembert
            | Self::MBart
            | Self::Nllb
            | Self::PLBart
            | Self::Roberta
            | Self::XlmRoberta => &[
                ("bos_token", "<s>"),
                ("eos_token", "</s>"),
                ("unk_token", "<unk>"),
                ("sep_token", "</s>"),
                ("pad_token", "<pad>"),
                ("cls_token", "<s>"),
                ("mask_token", "<mask>"),
            ],
            Self::MBart50 => &[
                ("eos_token", "</s>"),
                ("unk_token", "<unk>"),
                ("sep_token", "</s>"),
                ("pad_token", "<pad>"),
                ("cls_token", "<s>"),
                ("mask_token", "<mask>"),
            ],
            Self::MPNet => &[
                ("bos_token", "<s>"),
                ("eos_token", "</s>"),
                ("unk_token", "[UNK]"),
                ("sep_token", "</s>"),
                ("pad_token", "<pad>"),
                ("cls_token", "<s>"),
                ("mask_token", "<mask>"),
            ],
            Self::Funnel => &[
                ("bos_token", "<s>"),
                ("eos_token", "</s>"),
                ("unk_token", "<unk>"),
                ("sep_token", "<sep>"),
                ("pad_token", "<pad>"),
                ("cls_token", "<cls>"),
                ("mask_token", "<mask>"),
            ],
            Self::XLNet => &[
                ("bos_token", "<s>"),
                ("eos_token", "</s>"),
                ("unk_token", "<unk>"),
                ("sep_token", "<sep>"),
                ("pad_token", "<pad>"),
                ("cls_token", "<cls>"),
                ("mask_token", "<mask>"),
            ],
            Self::M2M100 => &[
                ("bos_token", "<s>"),
                ("eos_token", "</s>"),
                ("unk_token", "<unk>"),
                ("sep_token", "</s>"),
                ("pad_token", "<pad>"),
            ],
            Self::XGlm => &[
                ("bos_token", "<s>"),
                ("eos_token", "</s>"),
                ("unk_token", "<unk>"),
                ("sep_token", "</s>"),
                ("pad_token", "<pad>"),
                ("cls_token", "<s>"),
            ],
            Self::Pegasus => &[
                ("eos_token", "</s>"),
                ("unk_token", "<unk>"),
                ("pad_token", "<pad>"),
                ("mask_token", "<mask_2>"),
            ],
            Self::ByT5 | Self::Marian | Self::T5 => &[
                ("eos_token", "</s>"),
                ("unk_token", "<unk>"),
                ("pad_token", "<pad>"),
            ],
            Self::Gpt2 => &[
                ("bos_token", "<|endoftext|>"),
                ("eos_token", "<|endoftext|>"),
                ("unk_token", "<|endoftext|>"),
            ],
            // Code points without a character of their own.
            Self::Canine => &[
                ("bos_token", "\u{e000}"),
                ("eos_token", "\u{e001}"),
                ("sep_token", "\u{e001}"),
                ("pad_token", "\0"),
                ("cls_token", "\u{e000}"),
                ("mask_token", "\u{e003}"),
            ],
            Self::Llama | Self::Other => &[],
        }
    }

    /// Whether such tokenizers are written as a `vocab.txt`.
    pub fn has_word_pieces(self) -> bool {
        matches!(
            self,
            Self::Bert | Self::DistilBert | Self::Funnel | Self::MPNet | Self::Tapas
        )
    }

    /// Whether the mask takes the spaces before it, unless the files say so.
    pub fn mask_takes_spaces(self) -> bool {
        !matches!(
            self,
            Self::Bert | Self::DebertaV2 | Self::DistilBert | Self::Funnel | Self::Pegasus | Self::Tapas
        )
    }

    /// What the model takes, unless `tokenizer_config.json` says so.
    pub fn model_input_names(self) -> &'static [&'static str] {
        match self {
            Self::Bert => &["input_ids", "token_type_ids", "attention_mask"],
            Self::FNet => &["input_ids", "token_type_ids"],
            Self::Canine | Self::Deberta | Self::DebertaV2 | Self::Tapas => {
                &["input_ids", "attention_mask", "token_type_ids"]
            }
            _ => &["input_ids", "attention_mask"],
        }
    }

    /// Where rows are filled, unless `tokenizer_config.json` says so.
    pub fn padding_side(self) -> Side {
        match self {
            Self::Llama | Self::XLNet => Side::Left,
            _ => Side::Right,
        }
    }

    /// Token type of padding.
    pub fn pad_token_type_id(self) -> u32 {
        match self {
            Self::XLNet => 3,
            _ => 0,
        }
    }
}
