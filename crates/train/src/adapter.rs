//! Adapters as what is trained: how recipes say them, and how they are saved.

use std::path::Path;
use std::sync::Arc;

use oxiformers_hub::ModelFiles;
use oxiformers_models::nn::Parameters;
use oxiformers_peft::{Adapter, AdapterConfig, save};
use serde_json::{Map, Value, json};

use crate::checkpoint::{Saver, ValuesOf};
use crate::recipe::TaskName;
use crate::{Error, Result};

/// Saves an adapter as PEFT does, with the files of the tokenizer.
pub struct AdapterSaver {
    /// What is trained.
    pub adapter: Arc<Adapter>,
    /// Where the tokenizer is.
    pub files: ModelFiles,
}

impl Saver for AdapterSaver {
    fn save(&self, folder: &Path, parameters: &Parameters, values: ValuesOf) -> Result<()> {
        let tensors = self.adapter.trained_tensors(parameters.stored(values)?);
        let mut config = self.adapter.config().clone();
        config.inference_mode = true;
        save::save(folder, &config, &tensors)?;
        for name in Adapter::TEXT_FILES {
            if let Some(bytes) = self.files.get(name)? {
                std::fs::write(folder.join(name), &bytes).map_err(Error::io(folder))?;
            }
        }
        Ok(())
    }
}

/// The adapter that a recipe describes with the fields of `adapter_config.json`: LoRA where it says no `peft_type`, over the
/// layers that PEFT adapts in models of the type that `model` (a `config.json`) is of, where it says no `target_modules`.
/// Prompts learn what of their shape follows from the model.
///
/// # Errors
/// A field that makes no sense.
pub fn from_recipe(
    fields: &Map<String, Value>,
    task: TaskName,
    model: &Value,
    base: &str,
    seed: u64,
) -> Result<Adapter> {
    let mut fields = fields.clone();
    let kind = fields
        .get("peft_type")
        .and_then(Value::as_str)
        .unwrap_or("LORA")
        .to_string();
    let mut otherwise = |name: &str, value: Value| {
        if fields.get(name).is_none_or(Value::is_null) {
            fields.insert(name.to_string(), value);
        }
    };
    otherwise("peft_type", kind.as_str().into());
    otherwise("base_model_name_or_path", base.into());
    otherwise(
        "task_type",
        match task {
            TaskName::CausalLm
            | TaskName::Dpo
            | TaskName::Kto
            | TaskName::Orpo
            | TaskName::Grpo
            | TaskName::Distillation => "CAUSAL_LM".into(),
            TaskName::Seq2seqLm | TaskName::Denoising => "SEQ_2_SEQ_LM".into(),
            TaskName::TextClassification | TaskName::Reward => "SEQ_CLS".into(),
            TaskName::TokenClassification => "TOKEN_CLS".into(),
            TaskName::QuestionAnswering => "QUESTION_ANS".into(),
            TaskName::MaskedLm | TaskName::MultipleChoice => Value::Null,
        },
    );
    // Heads that are new are trained whole, as PEFT does for these tasks.
    match task {
        TaskName::TextClassification | TaskName::TokenClassification | TaskName::Reward => {
            otherwise("modules_to_save", json!(["classifier", "score"]));
        }
        TaskName::QuestionAnswering => otherwise("modules_to_save", json!(["qa_outputs"])),
        _ => {}
    }
    let model_type = model
        .get("model_type")
        .and_then(Value::as_str)
        .unwrap_or_default();
    match kind.as_str() {
        "PROMPT_TUNING" | "P_TUNING" | "PREFIX_TUNING" => {
            for (name, value) in prompt_shape(model, kind == "PREFIX_TUNING") {
                otherwise(name, value.into());
            }
        }
        _ => {
            if let Some(targets) = oxiformers_peft::config::default_targets(model_type) {
                otherwise("target_modules", json!(targets));
            }
        }
    }
    let config = AdapterConfig::from_json(Value::Object(fields), "model.adapter")?;
    Ok(Adapter::fresh(config, "default", seed)?)
}

/// The fields of a prompt's configuration that follow from the model, as PEFT fills them in.
fn prompt_shape(model: &Value, is_prefix: bool) -> Vec<(&'static str, u64)> {
    let number = |names: &[&str]| names.iter().find_map(|name| model.get(*name)?.as_u64());
    let width = number(&["hidden_size", "n_embd", "d_model"]);
    let heads = number(&["num_attention_heads", "n_head", "num_heads"]).filter(|heads| *heads > 0);
    let layers = number(&["num_hidden_layers", "num_layers", "n_layer"]);
    let (Some(width), Some(heads), Some(layers)) = (width, heads, layers) else {
        return Vec::new();
    };
    // A prefix is as wide as the keys and values of the model.
    let of_keys = number(&["num_key_value_heads"]).filter(|_| is_prefix);
    let (token_dim, heads) = match of_keys {
        Some(own) => (width / heads * own, own),
        None => (width, heads),
    };
    vec![
        ("token_dim", token_dim),
        ("num_attention_heads", heads),
        ("num_layers", layers),
        ("num_transformer_submodules", 1),
        ("encoder_hidden_size", token_dim),
    ]
}
