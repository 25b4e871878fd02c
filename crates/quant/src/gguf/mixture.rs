//! Which tensor of a model gets which type: more bits for what suffers most from few.
//!
//! The choices are those of llama.cpp's quantizer, so that a file type means the same everywhere.

use std::cmp::Ordering;

use oxiformers_hub::checkpoint::gguf::{GgmlType, Metadata};
use oxiformers_hub::checkpoint::{DType, TensorInfo};

macro_rules! file_types {
    ($($name:ident = $number:literal, $base:expr;)+) => {
        /// What a whole file is called after: the type of most of its tensors, and how much the others differ.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        #[allow(non_camel_case_types, missing_docs)]
        pub enum FileType {
            $($name,)+
        }

        impl FileType {
            /// All of them.
            pub const ALL: &[Self] = &[$(Self::$name),+];

            /// Its name.
            pub fn name(self) -> &'static str {
                match self {
                    $(Self::$name => stringify!($name),)+
                }
            }

            /// The number in `general.file_type`.
            pub fn number(self) -> u32 {
                match self {
                    $(Self::$name => $number,)+
                }
            }

            /// The type of most tensors.
            pub fn base(self) -> DType {
                match self {
                    $(Self::$name => $base,)+
                }
            }
        }
    };
}

file_types! {
    F32 = 0, DType::F32;
    F16 = 1, DType::F16;
    BF16 = 32, DType::BF16;
    Q4_0 = 2, DType::Ggml(GgmlType::Q4_0);
    Q4_1 = 3, DType::Ggml(GgmlType::Q4_1);
    Q5_0 = 8, DType::Ggml(GgmlType::Q5_0);
    Q5_1 = 9, DType::Ggml(GgmlType::Q5_1);
    Q8_0 = 7, DType::Ggml(GgmlType::Q8_0);
    Q2_K = 10, DType::Ggml(GgmlType::Q2_K);
    Q3_K_S = 11, DType::Ggml(GgmlType::Q3_K);
    Q3_K_M = 12, DType::Ggml(GgmlType::Q3_K);
    Q3_K_L = 13, DType::Ggml(GgmlType::Q3_K);
    Q4_K_S = 14, DType::Ggml(GgmlType::Q4_K);
    Q4_K_M = 15, DType::Ggml(GgmlType::Q4_K);
    Q5_K_S = 16, DType::Ggml(GgmlType::Q5_K);
    Q5_K_M = 17, DType::Ggml(GgmlType::Q5_K);
    Q6_K = 18, DType::Ggml(GgmlType::Q6_K);
    IQ4_NL = 25, DType::Ggml(GgmlType::IQ4_NL);
    IQ4_XS = 30, DType::Ggml(GgmlType::IQ4_XS);
    TQ1_0 = 36, DType::Ggml(GgmlType::TQ1_0);
    TQ2_0 = 37, DType::Ggml(GgmlType::TQ2_0);
    MXFP4_MOE = 38, DType::Ggml(GgmlType::MXFP4);
}

impl std::str::FromStr for FileType {
    type Err = String;

    /// Upper or lower case; `Q3_K`, `Q4_K` and `Q5_K` mean the medium mixtures.
    fn from_str(name: &str) -> Result<Self, String> {
        let upper = name.to_ascii_uppercase();
        let found = Self::ALL.iter().find(|ty| {
            let whole = ty.name();
            whole == upper || whole.strip_suffix("_M") == Some(&upper)
        });
        found.copied().ok_or_else(|| {
            let names: Vec<_> = Self::ALL.iter().map(|ty| ty.name()).collect();
            format!(
                "`{name}` is no type of GGUF file that can be written; it is one of {}",
                names.join(", ")
            )
        })
    }
}

/// What a tensor does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    Output,
    Embedding,
    /// Values, alone or together with queries and keys.
    Values,
    Qkv,
    Keys,
    AttentionOutput,
    Down,
    /// Anything else, feed-forward layers upwards among them.
    Other,
}

impl Role {
    fn of(name: &str) -> Self {
        let contains = |part| name.contains(part);
        match name {
            "output.weight" => Self::Output,
            "token_embd.weight" | "per_layer_token_embd.weight" => Self::Embedding,
            _ if contains("attn_qkv.weight") => Self::Qkv,
            _ if contains("attn_kv_b.weight") || contains("attn_v.weight") => Self::Values,
            _ if contains("attn_k.weight") => Self::Keys,
            _ if contains("attn_output.weight") => Self::AttentionOutput,
            _ if contains("ffn_down") => Self::Down,
            _ => Self::Other,
        }
    }
}

/// Whether a tensor is narrowed at all: matrices are, but for small ones that matter much.
fn narrows(info: &TensorInfo) -> bool {
    const KEPT: &[&str] = &[
        "_norm.weight",
        "ffn_gate_inp.weight",
        "position_embd",
        "token_types",
        "altup",
        "laurel",
        "per_layer_model_proj",
        "attn_rel_b.weight",
        "ssm_conv1d",
        "shortconv.conv.weight",
        "indexer.k_proj.weight",
        "indexer.q_proj.weight",
        "time_mix_first",
        "time_mix_w1.weight",
        "time_mix_w2.weight",
        "time_mix_v1.weight",
        "time_mix_v2.weight",
        "time_mix_a1.weight",
        "time_mix_a2.weight",
        "time_mix_g1.weight",
        "time_mix_g2.weight",
        "time_mix_decay_w1.weight",
        "time_mix_decay_w2.weight",
        "time_mix_lerp_fused",
        "ffn_gate_tid2eid.weight",
    ];
    let matrix = info.shape.iter().filter(|dim| **dim > 1).count() > 1 && info.shape.len() > 1;
    matrix && info.name.ends_with("weight") && !KEPT.iter().any(|part| info.name.contains(part))
}

/// The layer whose tensor it is.
fn layer(name: &str) -> Option<usize> {
    name.strip_prefix("blk.")?.split('.').next()?.parse().ok()
}

/// By layers, those that belong to none first, then by name.
pub(super) fn order(a: &TensorInfo, b: &TensorInfo) -> Ordering {
    (layer(&a.name), &a.name).cmp(&(layer(&b.name), &b.name))
}

/// Each tensor's type in a file of the type `ty`; the tensors are those of a whole model, in [order].
pub(super) fn types(ty: FileType, metadata: &Metadata, tensors: &[&TensorInfo]) -> Vec<DType> {
    let DType::Ggml(base) = ty.base() else {
        let plain = |info: &&TensorInfo| if narrows(info) { ty.base() } else { info.dtype };
        return tensors.iter().map(plain).collect();
    };
    let mut choice = Choice::new(ty, base, metadata, tensors);
    let choose = |info: &&TensorInfo| {
        if narrows(info) {
            fitting(choice.of(info), info.shape.last().copied().unwrap_or(0))
        } else {
            info.dtype
        }
    };
    tensors.iter().map(choose).collect()
}

/// The type, or one of smaller blocks where `columns` are no whole number of its blocks.
fn fitting(ty: GgmlType, columns: usize) -> DType {
    use GgmlType::*;
    let fits = |ty: GgmlType| columns.is_multiple_of(ty.block_size());
    let smaller = match ty {
        _ if fits(ty) => ty,
        IQ4_XS => IQ4_NL,
        Q2_K | Q3_K | TQ1_0 | TQ2_0 => Q4_0,
        Q4_K => Q5_0,
        Q5_K => Q5_1,
        Q6_K => Q8_0,
        other => other,
    };
    if fits(smaller) {
        DType::Ggml(smaller)
    } else {
        DType::F16
    }
}

/// What the choice depends on, and how far it has come.
struct Choice {
    ty: FileType,
    base: GgmlType,
    falcon: bool,
    /// Llama 2 70B and its like: eight heads share their values.
    shares_values: bool,
    layers: usize,
    grouped: bool,
    experts: u64,
    tied: bool,
    /// Tensors that make values, all and so far.
    values: (usize, usize),
    down: usize,
}

impl Choice {
    fn new(ty: FileType, base: GgmlType, metadata: &Metadata, tensors: &[&TensorInfo]) -> Self {
        let architecture = metadata.get_str("general.architecture").unwrap_or_default();
        let number = |key: &str| metadata.get_u64(&format!("{architecture}.{key}"));
        let layers = number("block_count").unwrap_or(0) as usize;
        let heads = number("attention.head_count").unwrap_or(0);
        let kv_heads = number("attention.head_count_kv").unwrap_or(heads);
        let roles = || tensors.iter().map(|info| Role::of(&info.name));
        let large = match architecture {
            "llama" => heads != kv_heads,
            "qwen2" | "deci" | "olmo" => true,
            _ => false,
        };
        Self {
            ty,
            base,
            falcon: architecture == "falcon",
            shares_values: layers == 80 && large,
            layers,
            grouped: heads.checked_div(kv_heads).unwrap_or(0) >= 4,
            experts: number("expert_count").unwrap_or(0),
            tied: !roles().any(|role| role == Role::Output),
            values: (
                roles()
                    .filter(|role| matches!(role, Role::Values | Role::Qkv))
                    .count(),
                0,
            ),
            down: 0,
        }
    }

    fn of(&mut self, info: &TensorInfo) -> GgmlType {
        use FileType as F;
        use GgmlType::*;
        let (role, base) = (Role::of(&info.name), self.base);
        match role {
            Role::Output | Role::Embedding if role == Role::Output || self.tied => {
                let columns = info.shape.last().copied().unwrap_or(0);
                if self.ty == F::MXFP4_MOE || self.falcon || !columns.is_multiple_of(base.block_size()) {
                    Q8_0
                } else if base == Q8_0 {
                    base
                } else {
                    Q6_K
                }
            }
            _ if self.ty == F::MXFP4_MOE => {
                let experts = info.shape.len() > 2 && info.shape[0] > 1;
                if experts { MXFP4 } else { Q8_0 }
            }
            Role::Embedding if matches!(self.ty, F::TQ1_0 | F::TQ2_0) => Q4_K,
            Role::Values | Role::Qkv => self.of_values(),
            Role::Keys if self.experts == 8 => Q8_0,
            Role::Down => self.of_down(info),
            Role::AttentionOutput => self.of_attention_output(),
            _ => base,
        }
    }

    fn of_values(&mut self) -> GgmlType {
        use FileType as F;
        use GgmlType::*;
        let (all, index) = self.values;
        self.values.1 += 1;
        let ty = match self.ty {
            F::Q2_K => {
                if self.grouped {
                    Q4_K
                } else {
                    Q3_K
                }
            }
            F::Q3_K_M => {
                if index < 2 {
                    Q5_K
                } else {
                    Q4_K
                }
            }
            F::Q3_K_L => Q5_K,
            F::IQ4_NL | F::IQ4_XS if self.grouped => Q5_K,
            F::Q4_K_M | F::Q5_K_M if needs_more(index, all) => Q6_K,
            F::Q4_K_S if index < 4 => Q5_K,
            _ => self.base,
        };
        match ty {
            _ if self.experts == 8 => Q8_0,
            Q3_K | Q4_K if self.shares_values => Q5_K,
            ty => ty,
        }
    }

    fn of_down(&mut self, info: &TensorInfo) -> GgmlType {
        use FileType as F;
        use GgmlType::*;
        // Experts do not follow one another by layers.
        let index = if self.experts > 1 {
            layer(&info.name).unwrap_or(0)
        } else {
            self.down
        };
        self.down += 1;
        let (layers, more) = (self.layers, needs_more(index, self.layers));
        match self.ty {
            F::Q2_K => Q3_K,
            F::Q3_K_M if index < layers / 16 => Q5_K,
            F::Q3_K_M if !self.falcon || more => Q4_K,
            F::Q3_K_L => {
                if self.falcon {
                    Q4_K
                } else {
                    Q5_K
                }
            }
            F::Q4_K_M if self.falcon && index < layers / 16 => Q6_K,
            F::Q4_K_M if self.falcon && more => Q5_K,
            F::Q4_K_M | F::Q5_K_M if more && !(self.falcon && self.ty == F::Q4_K_M) => Q6_K,
            F::IQ4_NL | F::IQ4_XS if index < layers / 8 => Q5_K,
            F::Q4_K_S if !self.falcon && index < layers / 8 => Q5_K,
            _ => self.base,
        }
    }

    fn of_attention_output(&self) -> GgmlType {
        use FileType as F;
        use GgmlType::*;
        let few = matches!(self.base, Q2_K | Q3_K | Q4_K | IQ4_NL | IQ4_XS) && self.ty != F::Q3_K_L;
        match self.ty {
            F::Q3_K_L if self.falcon => Q4_K,
            _ if self.falcon => self.base,
            _ if self.experts == 8 => {
                if few {
                    Q5_K
                } else {
                    self.base
                }
            }
            F::Q2_K => Q3_K,
            F::Q3_K_M => Q4_K,
            F::Q3_K_L => Q5_K,
            _ => self.base,
        }
    }
}

/// The first and last eighth of the layers, and every third between.
fn needs_more(index: usize, layers: usize) -> bool {
    let eighth = layers / 8;
    index < eighth || index >= 7 * layers / 8 || (index - eighth) % 3 == 2
}
