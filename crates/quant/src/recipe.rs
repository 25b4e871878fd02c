//! Which modules of a model are quantized, and how.

use std::sync::Arc;

use serde_json::{Value, json};

use crate::config::{ConfigError, matches};
use crate::{QuantizationConfig, Scheme};

/// A method for all modules, and exceptions.
#[derive(Debug, Clone)]
pub struct Recipe {
    /// The method.
    pub config: QuantizationConfig,
    /// What modules whose names match get instead: another method, or nothing. The first that matches counts, and counts
    /// before what [`config`](Self::config) leaves out.
    pub overrides: Vec<(String, Option<QuantizationConfig>)>,
}

impl From<QuantizationConfig> for Recipe {
    fn from(config: QuantizationConfig) -> Self {
        Self {
            config,
            overrides: Vec::new(),
        }
    }
}

/// What the exceptions are called in a `quantization_config`. Python knows nothing of them.
const OVERRIDES: &str = "overrides";

impl Recipe {
    /// The `quantization_config` of a whole `config.json`, if it has one: that of a method as Python writes it, and
    /// where modules are stored by another one, a list `overrides` of objects `{"pattern": …, "config": …}`.
    ///
    /// # Errors
    /// As [`QuantizationConfig::from_json`], and for exceptions that are not of this form.
    pub fn of_model(config: &Value) -> Result<Option<Self>, ConfigError> {
        let Some(mut json) = config
            .get("quantization_config")
            .filter(|value| !value.is_null())
            .cloned()
        else {
            return Ok(None);
        };
        let overrides = json.as_object_mut().and_then(|fields| fields.remove(OVERRIDES));
        let wrong = || {
            ConfigError(format!(
                "`{OVERRIDES}` is no list of objects with a `pattern` and a `config`"
            ))
        };
        let mut recipe = Self::from(QuantizationConfig::from_json(&json)?);
        for each in overrides.as_ref().map_or(Ok(&[][..]), |all| {
            all.as_array().map(Vec::as_slice).ok_or_else(wrong)
        })? {
            let pattern = each.get("pattern").and_then(Value::as_str).ok_or_else(wrong)?;
            matches(pattern, "").map_err(ConfigError)?;
            let config = match each.get("config") {
                None | Some(Value::Null) => None,
                Some(config) => Some(QuantizationConfig::from_json(config)?),
            };
            recipe.overrides.push((pattern.to_string(), config));
        }
        Ok(Some(recipe))
    }

    /// The JSON to be written to a `config.json`.
    pub fn to_json(&self) -> Value {
        let mut json = self.config.to_json();
        let overrides = self.overrides.iter().map(|(pattern, config)| {
            let config = config.as_ref().map(QuantizationConfig::to_json);
            json!({"pattern": pattern, "config": config})
        });
        if !self.overrides.is_empty() {
            json[OVERRIDES] = overrides.collect();
        }
        json
    }

    /// Says of modules that stay as they are what the method has to say so: Python's libraries know it then, too.
    pub fn name_kept(&mut self) {
        let kept = self.overrides.iter().filter(|(_, config)| config.is_none());
        let kept: Vec<String> = kept.map(|(pattern, _)| pattern.clone()).collect();
        if kept.is_empty() {
            return;
        }
        let mut all = self.config.skipped().unwrap_or_default().to_vec();
        all.extend(kept);
        self.config.skip(all);
        if self.overrides.iter().all(|(_, config)| config.is_none()) {
            self.overrides.clear();
        }
    }

    /// The schemes by which a module may be stored.
    pub fn stored(&self, module: &str) -> Vec<Arc<dyn Scheme>> {
        let fits = |pattern: &str| matches(pattern, module).unwrap_or(false);
        match self.overrides.iter().find(|(pattern, _)| fits(pattern)) {
            Some((_, Some(config))) => config.stored(),
            Some((_, None)) => Vec::new(),
            None => self.config.stored(),
        }
    }

    /// Whether checkpoints hold floats that are quantized while they are loaded.
    pub fn on_load(&self) -> bool {
        self.config.on_load()
    }

    /// The scheme that a module (`model.layers.0.mlp.up_proj`) becomes; `None` where it stays as it is. Patterns are
    /// Transformers': see [`matches()`]. `makes_logits` says that it is an output layer.
    ///
    /// # Errors
    /// A pattern that is no regular expression, or a method that cannot quantize.
    pub fn scheme(&self, module: &str, makes_logits: bool) -> Result<Option<Arc<dyn Scheme>>, ConfigError> {
        for (pattern, config) in &self.overrides {
            if matches(pattern, module).map_err(ConfigError)? {
                return match config {
                    Some(config) => config.scheme(module, false),
                    None => Ok(None),
                };
            }
        }
        self.config.scheme(module, makes_logits)
    }
}
