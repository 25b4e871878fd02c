//! From a trained model to a folder that Transformers loads, and this library too.

use std::io::Write;
use std::path::Path;

use oxiformers_hub::checkpoint::DType;
use oxiformers_hub::checkpoint::safetensors::MAX_SHARD_SIZE;
use oxiformers_hub::{Error as HubError, ModelFiles, OutputFile};
use oxiformers_nn::{Parameter, Parameters};
use serde_json::{Map, Value, json};

use crate::error::{Error, Result};
use crate::{AutoConfig, ProblemType};

/// Writes a model: its weights, `config.json`, and of `files` what belongs to a model besides these, such as its tokenizer.
/// `values` gives the values of each trainable parameter, row-major; they are stored as `dtype`. Weights come last, so that
/// a folder with weights is whole.
///
/// # Errors
/// A parameter without values; where the folder cannot be written to.
pub fn save_pretrained<'a>(
    folder: &Path,
    config: &Value,
    files: Option<&ModelFiles>,
    parameters: &Parameters,
    dtype: DType,
    values: impl Fn(&Parameter) -> Option<&'a [f32]>,
) -> Result<()> {
    std::fs::create_dir_all(folder).map_err(HubError::io(folder))?;
    if let Some(files) = files {
        copy_files(files, folder)?;
    }
    let mut config = config.clone();
    if let Some(config) = config.as_object_mut() {
        config.remove("torch_dtype");
        config.insert("dtype".to_string(), dtype_name(dtype).into());
    }
    write_file(folder, "config.json", format!("{config:#}\n").as_bytes())?;
    parameters
        .write(folder, dtype, MAX_SHARD_SIZE, values)
        .map_err(Error::of(&folder.display().to_string()))?;
    Ok(())
}

/// What `config.json` calls a float type.
fn dtype_name(dtype: DType) -> &'static str {
    match dtype {
        DType::BF16 => "bfloat16",
        DType::F16 => "float16",
        _ => "float32",
    }
}

/// Copies the files of a model that are neither weights nor `config.json`: tokenizer, templates, settings of generation and
/// processors, the modules of sentence-transformers.
///
/// # Errors
/// Where one cannot be read or written.
pub fn copy_files(files: &ModelFiles, folder: &Path) -> Result<(), HubError> {
    for name in files.names().filter(|name| belongs(name)) {
        if let Some(bytes) = files.get(name)? {
            write_file(folder, name, &bytes)?;
        }
    }
    Ok(())
}

fn belongs(name: &str) -> bool {
    const NAMES: [&str; 17] = [
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "vocab.txt",
        "merges.txt",
        "spm.model",
        "spiece.model",
        "sentencepiece.bpe.model",
        "tokenizer.model",
        "generation_config.json",
        "preprocessor_config.json",
        "processor_config.json",
        "chat_template.jinja",
        "chat_template.json",
        "modules.json",
    ];
    let sentence = name.starts_with("sentence_") && name.ends_with("_config.json");
    let folder = ["additional_chat_templates/", "1_Pooling/", "2_Normalize/"];
    NAMES.contains(&name) || sentence || folder.iter().any(|folder| name.starts_with(folder))
}

/// Writes a file that is there whole or not at all.
///
/// # Errors
/// Where it cannot be written.
pub fn write_file(folder: &Path, name: &str, bytes: &[u8]) -> Result<(), HubError> {
    let path = folder.join(name);
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent).map_err(HubError::io(parent))?;
    }
    let mut file = OutputFile::create(&path)?;
    file.write_all(bytes).map_err(HubError::io(&path))?;
    file.finish()
}

impl AutoConfig {
    /// The same model, whose class is that for a task, with these labels.
    ///
    /// # Errors
    /// As [`from_json`](Self::from_json).
    pub fn for_task(
        &self,
        class: &str,
        labels: Option<&[String]>,
        problem_type: Option<ProblemType>,
    ) -> Result<Self> {
        let mut json = self.json.clone();
        json["architectures"] = json!([format!("{}{class}", class_prefix(self))]);
        if let Some(labels) = labels {
            let ids = labels.iter().enumerate();
            let id2label: Map<_, _> = ids
                .clone()
                .map(|(id, label)| (id.to_string(), json!(label)))
                .collect();
            let label2id: Map<_, _> = ids.map(|(id, label)| (label.clone(), json!(id))).collect();
            json["id2label"] = Value::Object(id2label);
            json["label2id"] = Value::Object(label2id);
            if let Some(map) = json.as_object_mut() {
                map.remove("num_labels");
            }
        }
        if let Some(problem_type) = problem_type {
            json["problem_type"] = serde_json::to_value(problem_type).unwrap_or_default();
        }
        Self::from_json(json, "config")
    }
}

/// What the classes of an architecture begin with, such as `Bert`: as the checkpoint says, else by its `model_type`.
fn class_prefix(config: &AutoConfig) -> String {
    const ENDINGS: [&str; 5] = [
        "LMHeadModel",
        "EncoderModel",
        "DoubleHeadsModel",
        "MTModel",
        "Model",
    ];
    const NAMES: [(&str, &str); 24] = [
        ("gpt2", "GPT2"),
        ("gptj", "GPTJ"),
        ("gpt_neox", "GPTNeoX"),
        ("gpt_oss", "GptOss"),
        ("opt", "OPT"),
        ("mpt", "Mpt"),
        ("t5", "T5"),
        ("mt5", "MT5"),
        ("umt5", "UMT5"),
        ("mbart", "MBart"),
        ("m2m_100", "M2M100"),
        ("plbart", "PLBart"),
        ("deberta-v2", "DebertaV2"),
        ("distilbert", "DistilBert"),
        ("layoutlm", "LayoutLM"),
        ("modernbert", "ModernBert"),
        ("mpnet", "MPNet"),
        ("nomic_bert", "NomicBert"),
        ("xlm-roberta", "XLMRoberta"),
        ("stablelm", "StableLm"),
        ("smollm3", "SmolLM3"),
        ("gemma3_text", "Gemma3"),
        ("qwen2_moe", "Qwen2Moe"),
        ("qwen3_moe", "Qwen3Moe"),
    ];
    let class = config.json.pointer("/architectures/0").and_then(Value::as_str);
    if let Some(class) = class {
        let short = match class.find("For") {
            Some(at) => &class[..at],
            None => ENDINGS
                .iter()
                .find_map(|ending| class.strip_suffix(ending))
                .unwrap_or(class),
        };
        if !short.is_empty() {
            return short.to_string();
        }
    }
    if let Some((_, name)) = NAMES
        .iter()
        .find(|(model_type, _)| *model_type == config.model_type)
    {
        return (*name).to_string();
    }
    let capital = |part: &str| {
        let mut letters = part.chars();
        letters.next().map_or(String::new(), |first| {
            first.to_uppercase().collect::<String>() + letters.as_str()
        })
    };
    config.model_type.split(['_', '-']).map(capital).collect()
}
