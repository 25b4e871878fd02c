//! Adapters as PEFT reads them.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;

use oxiformers_hub::checkpoint::{DType, TensorView};
use oxiformers_hub::{Error as HubError, OutputFile};
use safetensors::tensor::{Dtype, TensorView as Stored, serialize};
use serde_json::Value;

use crate::adapter::{PREFIX, SHORT_PREFIX};
use crate::config::{AdapterConfig, CONFIG_FILE, Method};
use crate::error::{Error, Result};

/// Name of the file with the tensors.
pub const WEIGHTS_FILE: &str = "adapter_model.safetensors";

/// Writes `adapter_config.json` and `adapter_model.safetensors` into a folder, each whole or not at all. The names of the
/// tensors are without `base_model.model.`, as an [`Adapter`](crate::Adapter) has them.
///
/// # Errors
/// Where the folder cannot be written to, or a tensor has a type that the format does not know.
pub fn save(folder: &Path, config: &AdapterConfig, tensors: &BTreeMap<String, TensorView>) -> Result<()> {
    std::fs::create_dir_all(folder).map_err(HubError::io(folder))?;
    let mut stored = Vec::with_capacity(tensors.len());
    for (name, view) in tensors {
        let wrong = |message: String| Error::Tensor {
            place: folder.display().to_string(),
            name: name.clone(),
            message,
        };
        let dtype = match view.dtype {
            DType::F32 => Dtype::F32,
            DType::F16 => Dtype::F16,
            DType::BF16 => Dtype::BF16,
            other => {
                return Err(wrong(format!(
                    "is {}, which adapters are not stored as",
                    other.name()
                )));
            }
        };
        let tensor =
            Stored::new(dtype, view.shape.clone(), &view.data).map_err(|error| wrong(error.to_string()))?;
        stored.push((file_name(name, tensors), tensor));
    }
    let metadata = [("format".to_string(), "pt".to_string())].into();
    let bytes = serialize(stored, Some(metadata)).map_err(|error| Error::Refused(error.to_string()))?;
    write(&folder.join(WEIGHTS_FILE), &bytes)?;
    write(
        &folder.join(CONFIG_FILE),
        format!("{:#}\n", config.to_json()?).as_bytes(),
    )
}

fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut file = OutputFile::create(path)?;
    file.write_all(bytes).map_err(HubError::io(path))?;
    Ok(file.finish()?)
}

/// What PEFT calls a tensor in the file: the weight and the bias of a module that is adapted are those of what it wraps.
fn file_name(name: &str, tensors: &BTreeMap<String, TensorView>) -> String {
    match name {
        "prompt_embeddings" => return name.to_string(),
        "vera_A" | "vera_B" => return format!("{SHORT_PREFIX}{name}"),
        _ => {}
    }
    const PARTS: [&str; 4] = [".lora_A.weight", ".lora_embedding_A", ".ia3_l", ".vera_lambda_b"];
    if let Some((module, last @ ("weight" | "bias"))) = name.rsplit_once('.')
        && PARTS
            .iter()
            .any(|part| tensors.contains_key(&format!("{module}{part}")))
    {
        return format!("{PREFIX}{module}.base_layer.{last}");
    }
    format!("{PREFIX}{name}")
}

impl AdapterConfig {
    /// The contents of `adapter_config.json`.
    ///
    /// # Errors
    /// Where a number cannot be written as JSON.
    pub fn to_json(&self) -> Result<Value> {
        let wrong = |error: serde_json::Error| Error::Refused(format!("{CONFIG_FILE}: {error}"));
        let mut json = serde_json::to_value(self).map_err(wrong)?;
        if let Some(map) = json.as_object_mut() {
            if matches!(self.method, Method::Vera(_))
                && map.get("bias").is_some_and(|bias| bias == "lora_only")
            {
                map.insert("bias".to_string(), "vera_only".into());
            }
            if let Some(alpha) = map.get("lora_alpha").and_then(Value::as_f64)
                && alpha.fract() == 0.0
            {
                // As Python writes it.
                map.insert("lora_alpha".to_string(), (alpha as i64).into());
            }
            map.sort_keys();
        }
        Ok(json)
    }
}
