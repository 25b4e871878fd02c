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
/// layers that PEFT adapts in models of that type where it says no `target_modules`.
///
/// # Errors
/// A field that makes no sense.
pub fn from_recipe(
    fields: &Map<String, Value>,
    task: TaskName,
    model_type: &str,
    base: &str,
    seed: u64,
) -> Result<Adapter> {
    let mut fields = fields.clone();
    let mut otherwise = |name: &str, value: Value| {
        if fields.get(name).is_none_or(Value::is_null) {
            fields.insert(name.to_string(), value);
        }
    };
    otherwise("peft_type", "LORA".into());
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
    if let Some(targets) = oxiformers_peft::config::default_targets(model_type) {
        otherwise("target_modules", json!(targets));
    }
    let config = AdapterConfig::from_json(Value::Object(fields), "model.adapter")?;
    Ok(Adapter::fresh(config, "default", seed)?)
}
