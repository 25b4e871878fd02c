//! The settings of bitsandbytes: LLM.int8(), NF4 and FP4.

use std::sync::Arc;

use oxiformers_hub::checkpoint::DType;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::Scheme;
use crate::bnb_4bit::{Bnb4bit, QuantType};
use crate::config::Method;
use crate::llm_int8::LlmInt8;

/// `BitsAndBytesConfig`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default)]
#[allow(missing_docs)]
pub struct BitsAndBytesConfig {
    pub load_in_8bit: bool,
    pub load_in_4bit: bool,
    pub llm_int8_threshold: f64,
    pub llm_int8_skip_modules: Option<Vec<String>>,
    pub llm_int8_enable_fp32_cpu_offload: bool,
    pub llm_int8_has_fp16_weight: bool,
    pub bnb_4bit_compute_dtype: String,
    pub bnb_4bit_quant_type: String,
    pub bnb_4bit_use_double_quant: bool,
    pub bnb_4bit_quant_storage: String,
    /// Values that share a scale. Stored modules say their own; the configuration has no such field.
    #[serde(skip)]
    pub blocksize: usize,
    /// Fields that nothing is known of.
    #[serde(flatten)]
    pub rest: Map<String, Value>,
}

impl Default for BitsAndBytesConfig {
    fn default() -> Self {
        Self {
            load_in_8bit: false,
            load_in_4bit: false,
            llm_int8_threshold: 6.0,
            llm_int8_skip_modules: None,
            llm_int8_enable_fp32_cpu_offload: false,
            llm_int8_has_fp16_weight: false,
            bnb_4bit_compute_dtype: "float32".to_string(),
            bnb_4bit_quant_type: "fp4".to_string(),
            bnb_4bit_use_double_quant: false,
            bnb_4bit_quant_storage: "uint8".to_string(),
            blocksize: 64,
            rest: Map::new(),
        }
    }
}

impl BitsAndBytesConfig {
    fn four_bits(&self) -> Result<Bnb4bit, String> {
        Ok(Bnb4bit {
            quant_type: QuantType::from_name(&self.bnb_4bit_quant_type)?,
            blocksize: self.blocksize,
            double_quant: self.bnb_4bit_use_double_quant,
            storage: storage(&self.bnb_4bit_quant_storage)?,
        })
    }
}

/// The types in which codes of 4 bits may be stored.
fn storage(name: &str) -> Result<DType, String> {
    Ok(match name {
        "uint8" => DType::U8,
        "int8" => DType::I8,
        "float16" => DType::F16,
        "bfloat16" => DType::BF16,
        "float32" => DType::F32,
        "float64" => DType::F64,
        _ => {
            return Err(format!(
                "`bnb_4bit_quant_storage` is {name:?}; it is one of uint8, int8, float16, bfloat16, float32, float64"
            ));
        }
    })
}

impl Method for BitsAndBytesConfig {
    fn validate(&self) -> Result<(), String> {
        if self.load_in_4bit == self.load_in_8bit {
            return Err("one of `load_in_4bit` and `load_in_8bit` must be true, and only one".to_string());
        }
        self.four_bits()?.validate()
    }

    fn stored(&self) -> Vec<Arc<dyn Scheme>> {
        let mut schemes: Vec<Arc<dyn Scheme>> = vec![Arc::new(LlmInt8)];
        schemes.extend(self.four_bits().map(|scheme| Arc::new(scheme) as _));
        schemes
    }

    fn scheme(&self, _module: &str) -> Result<Option<Arc<dyn Scheme>>, String> {
        Ok(Some(if self.load_in_8bit {
            Arc::new(LlmInt8)
        } else {
            Arc::new(self.four_bits()?)
        }))
    }

    fn skipped(&self) -> Option<&[String]> {
        self.llm_int8_skip_modules.as_deref()
    }

    fn skip(&mut self, modules: Vec<String>) {
        self.llm_int8_skip_modules = Some(modules);
    }
}
