//! Methods by the names that people give them.

use crate::QuantizationConfig;
use crate::bitnet::BitNetQuantConfig;
use crate::bitsandbytes::BitsAndBytesConfig;
use crate::compressed_tensors::CompressedTensorsConfig;
use crate::config::{ConfigError, Method};
use crate::fp8::FineGrainedFP8Config;
use crate::hqq::HqqConfig;

/// What can be said of a method besides its name.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct MethodOptions {
    /// Values that share a scale.
    pub block_size: Option<usize>,
    /// Whether scales are quantized, too.
    pub double_quant: bool,
}

/// The names that [`QuantizationConfig::named`] knows.
pub const NAMES: &[&str] = &["int8", "nf4", "fp4", "hqq", "bitnet", "fp8", "w4a16", "w8a16"];

impl QuantizationConfig {
    /// The configuration of a method by its name: one of [`NAMES`].
    ///
    /// # Errors
    /// A name that is none of them, or an option that the method does not have.
    pub fn named(name: &str, options: &MethodOptions) -> Result<Self, ConfigError> {
        let config = match name {
            "int8" => {
                options.refuse(name, ["--block-size", "--double-quant"])?;
                check(BitsAndBytesConfig {
                    load_in_8bit: true,
                    ..BitsAndBytesConfig::default()
                })?
            }
            "nf4" | "fp4" => check(BitsAndBytesConfig {
                load_in_4bit: true,
                bnb_4bit_quant_type: name.to_string(),
                bnb_4bit_use_double_quant: options.double_quant,
                blocksize: options.block_size.unwrap_or(64),
                ..BitsAndBytesConfig::default()
            })?,
            "hqq" => {
                options.refuse(name, ["--double-quant"])?;
                check(HqqConfig::new(4, Some(options.block_size.unwrap_or(64))))?
            }
            "bitnet" => {
                options.refuse(name, ["--block-size", "--double-quant"])?;
                check(BitNetQuantConfig::default())?
            }
            "w4a16" | "w8a16" => {
                options.refuse(name, ["--double-quant"])?;
                check(match name {
                    "w4a16" => CompressedTensorsConfig::packed(4, Some(options.block_size.unwrap_or(128))),
                    _ => CompressedTensorsConfig::packed(8, options.block_size),
                })?
            }
            "fp8" => {
                options.refuse(name, ["--double-quant"])?;
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

impl MethodOptions {
    /// Refuses options that a method does not have.
    fn refuse<const N: usize>(&self, name: &str, options: [&str; N]) -> Result<(), ConfigError> {
        let given = [
            ("--block-size", self.block_size.is_some()),
            ("--double-quant", self.double_quant),
        ];
        match given
            .iter()
            .find(|(option, given)| *given && options.contains(option))
        {
            Some((option, _)) => Err(ConfigError(format!("{name} has no {option}"))),
            None => Ok(()),
        }
    }
}
