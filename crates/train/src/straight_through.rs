//! Models whose weights will be ternary, trained straight through what quantization does.

use std::path::Path;

use oxiformers_hub::ModelFiles;
use oxiformers_hub::checkpoint::safetensors::MAX_SHARD_SIZE;
use oxiformers_models::nn::Lambda;
use oxiformers_models::nn::Parameters;
use oxiformers_models::nn::quant::Recipe;
use oxiformers_models::quantize::QuantizePlan;

use crate::checkpoint::{Saver, ValuesOf};
use crate::{Callback, Error, Event, ModelSaver, Result, TrainerState, TrainingArguments};

/// Sets how far the forward pass quantizes: from not at all to wholly over the first steps.
pub struct LambdaWarmup {
    /// The number that all layers follow.
    pub lambda: Lambda,
    /// Steps until it is 1; 0 for 1 from the start.
    pub steps: usize,
}

impl Callback for LambdaWarmup {
    fn on_event(&mut self, event: &Event, state: &TrainerState, _: &TrainingArguments) -> Result<()> {
        match event {
            // Of the next step.
            Event::Begin(_) | Event::Step { .. } => {
                self.lambda.warm_up(state.global_step as usize, self.steps);
            }
            // As it is saved.
            Event::End { .. } => self.lambda.set(1.0),
            _ => {}
        }
        Ok(())
    }
}

/// Saves a model with the weights packed that it was trained for.
pub struct PackedSaver {
    /// What writes it with the values that learn.
    pub dense: ModelSaver,
    /// What its weights become.
    pub recipe: Recipe,
}

impl Saver for PackedSaver {
    fn save(&self, folder: &Path, parameters: &Parameters, values: ValuesOf) -> Result<()> {
        // Beside what is written, and gone in the end.
        let dense = folder.join(".dense.part");
        self.dense.save(&dense, parameters, values)?;
        let packed = ModelFiles::from_dir(&dense)
            .map_err(Error::from)
            .and_then(|files| {
                let plan = QuantizePlan::new(&files, self.recipe.clone(), None);
                let written = plan.and_then(|plan| plan.write(folder, MAX_SHARD_SIZE, |_| true));
                written.map_err(|error| Error::checkpoint(folder, error))
            });
        let removed = std::fs::remove_dir_all(&dense).map_err(Error::io(&dense));
        packed.and(removed)
    }
}
