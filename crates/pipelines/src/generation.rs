//! What tasks that generate have in common: settings and batches.

use oxiformers_generate::{Generated, GenerationConfig, Generator};
use oxiformers_hub::ModelFiles;
use serde_json::{Map, Value};

use crate::texts::{Shape, in_batches};
use crate::{Error, Result};

/// The model's settings with a task's defaults for what the model's files do not set.
pub(crate) fn with_defaults(
    files: &ModelFiles,
    config: GenerationConfig,
    mut defaults: Map<String, Value>,
) -> Result<GenerationConfig> {
    let given: Option<Map<String, Value>> = files.json("generation_config.json")?;
    let given = match given {
        Some(given) => given,
        None => files.json("config.json")?.unwrap_or_default(),
    };
    let is_given = |name: &str| given.get(name).is_some_and(|value| !value.is_null());
    // A limit of either kind is a limit; 20 is what Transformers writes where there is none.
    if is_given("max_length") && given.get("max_length") != Some(&20.into()) {
        defaults.remove("max_new_tokens");
    }
    defaults.retain(|name, _| !is_given(name));
    changed(&config, &defaults)
}

/// Settings, changed by name.
pub(crate) fn changed(config: &GenerationConfig, changes: &Map<String, Value>) -> Result<GenerationConfig> {
    if changes.is_empty() {
        return Ok(config.clone());
    }
    let mut fields = match serde_json::to_value(config).map_err(Error::read_back)? {
        Value::Object(fields) => fields,
        _ => Map::new(),
    };
    if changes.contains_key("max_length") && !changes.contains_key("max_new_tokens") {
        fields.insert("max_new_tokens".to_string(), Value::Null);
    }
    for (name, value) in changes {
        match fields.get_mut(name) {
            Some(field) => *field = value.clone(),
            None => {
                let names = fields.keys().map(String::as_str).collect::<Vec<_>>().join(", ");
                let message = format!("is neither one of the task nor one of generation, which are {names}");
                return Err(Error::option(name, message));
            }
        }
    }
    Ok(GenerationConfig::from_json(fields, "options")?)
}

/// What is generated for each prompt, `batch_size` of similar length at a time.
pub(crate) async fn generate(
    generator: &Generator<'_>,
    prompts: &[Vec<u32>],
    batch_size: usize,
) -> Result<Vec<Vec<Generated>>> {
    let each = generator.config().num_return_sequences.max(1);
    let forward = async |batch: &[usize]| {
        let texts: Vec<Vec<u32>> = batch.iter().map(|index| prompts[*index].clone()).collect();
        let mut generated = generator.generate(&texts).await?.into_iter();
        let of_prompt = |_| generated.by_ref().take(each).collect();
        Ok(batch.iter().map(of_prompt).collect())
    };
    let shape = |prompt: &Vec<u32>| Shape {
        group: 0,
        length: prompt.len(),
    };
    in_batches(prompts, batch_size, usize::MAX, shape, forward).await
}
