//! Methods by the names that people give them.

use serde_json::json;

use crate::QuantizationConfig;
use crate::awq::AwqConfig;
use crate::bitnet::BitNetQuantConfig;
use crate::bitsandbytes::BitsAndBytesConfig;
use crate::compressed_tensors::CompressedTensorsConfig;
use crate::config::{ConfigError, Method};
use crate::fp8::FineGrainedFP8Config;
use crate::gptq::GptqConfig;
use crate::hqq::HqqConfig;

/// What can be said of a method besides its name.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct MethodOptions {
    /// Values that share a scale.
    pub block_size: Option<usize>,
    /// Whether scales are quantized, too.
    pub double_quant: bool,
    /// Bits of a code.
    pub bits: Option<u32>,
    /// Columns that share a scale, or -1 for whole rows.
    pub group_size: Option<i64>,
    /// Whether the zero point is the middle of the codes.
    pub sym: Option<bool>,
    /// See [`GptqOptions`](crate::calibrate::GptqOptions).
    pub desc_act: bool,
    /// See [`GptqOptions`](crate::calibrate::GptqOptions).
    pub act_group_aware: Option<bool>,
    /// See [`GptqOptions`](crate::calibrate::GptqOptions).
    pub static_groups: bool,
    /// See [`GptqConfig`].
    pub true_sequential: Option<bool>,
    /// See [`GptqOptions`](crate::calibrate::GptqOptions).
    pub damp_percent: Option<f32>,
    /// See [`AffineOptions`](crate::calibrate::AffineOptions).
    pub mse: Option<f32>,
}

/// The names that [`QuantizationConfig::named`] knows.
pub const NAMES: &[&str] = &[
    "int8", "nf4", "fp4", "gptq", "awq", "hqq", "bitnet", "fp8", "w4a16", "w8a16",
];

impl QuantizationConfig {
    /// The configuration of a method by its name: one of [`NAMES`].
    ///
    /// # Errors
    /// A name that is none of them, or an option that the method does not have.
    pub fn named(name: &str, options: &MethodOptions) -> Result<Self, ConfigError> {
        let config = match name {
            "int8" => {
                options.allow(name, &[])?;
                check(BitsAndBytesConfig {
                    load_in_8bit: true,
                    ..BitsAndBytesConfig::default()
                })?
            }
            "nf4" | "fp4" => {
                options.allow(name, &["--block-size", "--double-quant"])?;
                check(BitsAndBytesConfig {
                    load_in_4bit: true,
                    bnb_4bit_quant_type: name.to_string(),
                    bnb_4bit_use_double_quant: options.double_quant,
                    blocksize: options.block_size.unwrap_or(64),
                    ..BitsAndBytesConfig::default()
                })?
            }
            "gptq" => {
                options.allow(name, GPTQ)?;
                check(options.gptq())?
            }
            "awq" => {
                options.allow(name, &["--bits", "--group-size"])?;
                let usual = AwqConfig::default();
                check(AwqConfig {
                    bits: options.bits.unwrap_or(usual.bits),
                    group_size: options.group_size.unwrap_or(usual.group_size),
                    ..usual
                })?
            }
            "hqq" => {
                options.allow(name, &["--bits", "--group-size"])?;
                let group_size = usize::try_from(options.group_size.unwrap_or(64)).ok();
                check(HqqConfig::new(options.bits.unwrap_or(4), group_size))?
            }
            "bitnet" => {
                options.allow(name, &[])?;
                check(BitNetQuantConfig::default())?
            }
            "w4a16" | "w8a16" => {
                options.allow(name, &["--block-size"])?;
                check(match name {
                    "w4a16" => CompressedTensorsConfig::packed(4, Some(options.block_size.unwrap_or(128))),
                    _ => CompressedTensorsConfig::packed(8, options.block_size),
                })?
            }
            "fp8" => {
                options.allow(name, &["--block-size"])?;
                let block = options.block_size.unwrap_or(128);
                check(FineGrainedFP8Config {
                    // One scale for all.
                    weight_block_size: (block > 0).then_some([block; 2]),
                    ..FineGrainedFP8Config::default()
                })?
            }
            _ => {
                return Err(ConfigError(format!(
                    "`{name}` is no method; it is one of {}",
                    NAMES.join(", ")
                )));
            }
        };
        Ok(config)
    }
}

fn check<M: Method + Into<QuantizationConfig>>(config: M) -> Result<QuantizationConfig, ConfigError> {
    config.validate().map_err(ConfigError)?;
    Ok(config.into())
}

/// What can be said of GPTQ.
const GPTQ: &[&str] = &[
    "--bits",
    "--group-size",
    "--sym",
    "--desc-act",
    "--act-group-aware",
    "--static-groups",
    "--true-sequential",
    "--damp-percent",
    "--mse",
];

impl MethodOptions {
    fn gptq(&self) -> GptqConfig {
        let usual = GptqConfig::default();
        let sym = self.sym.unwrap_or(usual.sym);
        // The first format has no room for the zero point 0.
        let format = if sym { "gptq" } else { "gptq_v2" };
        GptqConfig {
            bits: self.bits.unwrap_or(usual.bits),
            group_size: self.group_size.unwrap_or(usual.group_size),
            damp_percent: self.damp_percent.unwrap_or(usual.damp_percent),
            desc_act: self.desc_act,
            act_group_aware: self.act_group_aware.unwrap_or(!self.desc_act),
            static_groups: self.static_groups,
            sym,
            mse: self.mse.unwrap_or(usual.mse),
            true_sequential: self.true_sequential.unwrap_or(usual.true_sequential),
            checkpoint_format: Some(format.to_string()),
            format: Some(format.to_string()),
            meta: json!({ "quantizer": [concat!("oxiformers:", env!("CARGO_PKG_VERSION"))] }),
            ..usual
        }
    }

    /// Refuses options that a method does not have.
    fn allow(&self, name: &str, known: &[&str]) -> Result<(), ConfigError> {
        let given = [
            ("--block-size", self.block_size.is_some()),
            ("--double-quant", self.double_quant),
            ("--bits", self.bits.is_some()),
            ("--group-size", self.group_size.is_some()),
            ("--sym", self.sym.is_some()),
            ("--desc-act", self.desc_act),
            ("--act-group-aware", self.act_group_aware.is_some()),
            ("--static-groups", self.static_groups),
            ("--true-sequential", self.true_sequential.is_some()),
            ("--damp-percent", self.damp_percent.is_some()),
            ("--mse", self.mse.is_some()),
        ];
        match given
            .iter()
            .find(|(option, given)| *given && !known.contains(option))
        {
            Some((option, _)) => Err(ConfigError(format!("{name} has no {option}"))),
            None => Ok(()),
        }
    }
}
