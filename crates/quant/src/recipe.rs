//! Which modules of a model are quantized, and how.

use std::sync::Arc;

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

impl Recipe {
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
