//! Quantization that looks at what a model multiplies its weights with: layer by layer, each layer over all texts.
//!
//! A model is loaded anew for every step. That costs nearly nothing, because weights stay where they are until a product
//! needs them, so only one layer is in memory beside the texts' hidden states; and it needs no second definition of any
//! model: an observer learns which linear layers there are, in which order they run, and what they are given. Layers
//! that are done are loaded in the form in which they will be stored.

use std::collections::BTreeMap;
use std::sync::Arc;

use burn::tensor::{Device, Int, Tensor, TensorData};
use oxiformers_hub::ModelFiles;
use oxiformers_hub::checkpoint::{Checkpoint, TensorView};
use oxiformers_nn::quant::{Parts, QuantizationConfig, Recipe};
use oxiformers_nn::{LoadOptions, Observer, Role, SurveyedMatrix, TensorSource, Weights};
use serde::{Deserialize, Serialize};

use crate::quantize::{self, survey};
use crate::registry::AnyDecoder;
use crate::{AutoConfig, Error, gguf};

mod awq;
mod gptq;
mod inputs;
mod overlay;
mod run;

use inputs::Inputs;
use overlay::Overlay;
pub use run::run;

/// What keeps a model from being calibrated.
#[derive(Debug, thiserror::Error)]
pub enum CalibrationError {
    /// The model cannot be loaded.
    #[error(transparent)]
    Model(#[from] Error),
    /// A matrix cannot be quantized.
    #[error("{model}: `{module}`: {reason}")]
    Module {
        /// The model.
        model: String,
        /// The module.
        module: String,
        /// What is wrong.
        reason: String,
    },
    /// The method needs no calibration, or none that is known.
    #[error("the method `{0}` is not calibrated")]
    Method(&'static str),
    /// There is not enough text.
    #[error(
        "the calibration text has {tokens} tokens, one sample takes {seq_len}; give a longer text, or shorter samples"
    )]
    TooShort {
        /// Tokens of the text.
        tokens: usize,
        /// Tokens of a sample.
        seq_len: usize,
    },
    /// It was asked to end.
    #[error("interrupted")]
    Interrupted,
}

type Result<T> = std::result::Result<T, CalibrationError>;

/// How far calibration is: parts of a layer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Progress {
    /// The layer.
    pub layer: usize,
    /// Number of layers.
    pub layers: usize,
    /// How much of the layer is done, from 0 to 1.
    pub done: f32,
}

/// What happened to a module.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ModuleReport {
    /// Its name.
    pub module: String,
    /// Inputs seen.
    pub rows: usize,
    /// What the method estimates the squared error of the outputs to be; of rounding to nearest, nothing.
    pub loss: Option<f64>,
    /// What there is to say about it, such as more damping than was asked for.
    pub note: Option<String>,
}

/// A layer that is done.
#[derive(Debug, Default)]
pub struct LayerResult {
    /// Tensors that are new, or have new values.
    pub tensors: Vec<(String, TensorView)>,
    /// Tensors that are gone.
    pub removed: Vec<String>,
    /// Its modules.
    pub modules: Vec<ModuleReport>,
}

/// A model that is being quantized.
pub struct Calibration {
    model: String,
    config: AutoConfig,
    method: QuantizationConfig,
    overlay: Overlay,
    /// Where the base model stands in the names of the checkpoint.
    base: &'static str,
    /// The matrices that are quantized, by what the model calls them.
    matrices: BTreeMap<String, SurveyedMatrix>,
    /// What the next layer gets, sample by sample.
    hidden: Vec<Tensor<3>>,
    layers: usize,
    layer: usize,
}

impl Calibration {
    /// Begins with a decoder's files. `recipe` says how modules are quantized and which are not; `samples` are tokens of
    /// real texts.
    ///
    /// # Errors
    /// Where the model cannot be loaded, or the method is none that is calibrated.
    pub fn new(files: &ModelFiles, recipe: &Recipe, samples: &[Vec<i32>]) -> Result<Self> {
        if !recipe.config.is_calibrated() {
            return Err(CalibrationError::Method(recipe.config.method()));
        }
        let model = files.name().to_string();
        let checkpoint = Checkpoint::open(files).map_err(Error::from)?;
        let config = AutoConfig::from_files(files)?;
        let (base, source): (_, Arc<dyn TensorSource>) = if checkpoint.gguf().is_some() {
            ("", Arc::new(gguf::Source::new(checkpoint, &config, &model)?))
        } else {
            (config.architecture.base(), Arc::new(checkpoint))
        };
        if let Some(stored) = &config.quantization {
            let reason = format!(
                "is quantized already, with {}; begin with the original",
                stored.method()
            );
            return Err(CalibrationError::Module {
                model,
                module: "config.json".to_string(),
                reason,
            });
        }
        let mut calibration = Self {
            model,
            config,
            method: recipe.config.clone(),
            overlay: Overlay::new(source),
            base,
            matrices: BTreeMap::new(),
            hidden: Vec::new(),
            layers: 0,
            layer: 0,
        };
        let name = recipe.config.method();
        for matrix in survey(files)? {
            let scheme = quantize::scheme_of(recipe, &matrix);
            let scheme = scheme.map_err(|error| calibration.wrong(matrix.module(), error.to_string()))?;
            if scheme.is_some_and(|scheme| scheme.name() == name) {
                calibration.matrices.insert(matrix.name.clone(), matrix);
            }
        }
        let decoder = calibration.load(None)?;
        calibration.layers = decoder.num_layers();
        calibration.hidden = samples
            .iter()
            .map(|ids| {
                let ids = TensorData::new(ids.clone(), [1, ids.len()]);
                decoder.embed(Tensor::<2, Int>::from_data(ids, &Device::flex()))
            })
            .collect();
        Ok(calibration)
    }

    /// Number of layers.
    pub fn num_layers(&self) -> usize {
        self.layers
    }

    /// The configuration of the model.
    pub fn config(&self) -> &AutoConfig {
        &self.config
    }

    /// The checkpoint, with the tensors of the layers that are done.
    pub fn source(&self) -> &dyn TensorSource {
        &self.overlay
    }

    fn load(&self, observer: Option<Arc<dyn Observer>>) -> Result<AnyDecoder> {
        let options = LoadOptions {
            observer,
            ..LoadOptions::default()
        };
        let weights = Weights::new(self.overlay.clone(), self.base, options).stored_as(Some(&self.method));
        Ok(self
            .config
            .architecture
            .load(&weights)
            .map_err(Error::of(&self.model))?)
    }

    fn wrong(&self, module: &str, reason: String) -> CalibrationError {
        CalibrationError::Module {
            model: self.model.clone(),
            module: module.to_string(),
            reason,
        }
    }

    /// Quantizes the next layer. `progress` is told how far it is; where it returns false, calibration ends.
    ///
    /// What it returns is stored wherever the caller likes, and given to [`advance`](Self::advance).
    ///
    /// # Errors
    /// Names the module and what is wrong with it; [`CalibrationError::Interrupted`].
    pub fn quantize_layer(&self, progress: &mut dyn FnMut(Progress) -> bool) -> Result<LayerResult> {
        let mut tell = |done: f32| {
            let told = progress(Progress {
                layer: self.layer,
                layers: self.layers,
                done,
            });
            if told {
                Ok(())
            } else {
                Err(CalibrationError::Interrupted)
            }
        };
        tell(0.0)?;
        let before = self.overlay.snapshot();
        let result = match &self.method {
            QuantizationConfig::Gptq(config) => gptq::layer(self, config, &mut tell),
            QuantizationConfig::Awq(config) => awq::layer(self, config, &mut tell),
            other => Err(CalibrationError::Method(other.method())),
        };
        if result.is_err() {
            self.overlay.restore(before);
        }
        result
    }

    /// Takes a layer that is done, as [`quantize_layer`](Self::quantize_layer) returned it or from where it was stored,
    /// and computes what the next layer gets.
    ///
    /// # Errors
    /// Where the layer cannot be loaded from these tensors; [`CalibrationError::Interrupted`].
    pub fn advance(
        &mut self,
        tensors: Vec<(String, TensorView)>,
        removed: &[String],
        progress: &mut dyn FnMut(Progress) -> bool,
    ) -> Result<()> {
        removed.iter().for_each(|name| self.overlay.remove(name));
        for (name, view) in tensors {
            self.overlay.set(&name, view);
        }
        let (layer, layers) = (self.layer, self.layers);
        if layer + 1 < layers {
            let decoder = self.load(None)?;
            for hidden in &mut self.hidden {
                if !progress(Progress {
                    layer,
                    layers,
                    done: 1.0,
                }) {
                    return Err(CalibrationError::Interrupted);
                }
                *hidden = decoder.run_layer(layer, hidden.clone());
            }
        }
        self.layer += 1;
        Ok(())
    }

    /// The weights of the running layer, in the order in which they are multiplied; those that must be known before
    /// others are quantized come in earlier lists.
    fn stages(&self, sequential: bool) -> Result<Vec<Vec<String>>> {
        let names = Arc::new(Inputs::names());
        let decoder = self.load(Some(names.clone()))?;
        if let Some(sample) = self.hidden.first() {
            names.begin();
            decoder.run_layer(self.layer, sample.clone());
        }
        let order = names.order();
        let Some(prefix) = order.first().and_then(|name| layer_prefix(name)) else {
            return Ok(Vec::new());
        };
        let mut stages: Vec<Vec<String>> = Vec::new();
        let mut stage_of: BTreeMap<String, usize> = BTreeMap::new();
        for name in &order {
            let together = names.together(name);
            let known = together
                .iter()
                .chain([name])
                .find_map(|name| stage_of.get(&template(name)).copied());
            let stage = known.unwrap_or(stages.len());
            if stage == stages.len() {
                stages.push(Vec::new());
            }
            stage_of.entry(template(name)).or_insert(stage);
        }
        // Experts that no token of the first sample chose belong to the others.
        for name in self.matrices.keys().filter(|name| name.starts_with(&prefix)) {
            if let Some(stage) = stage_of.get(&template(name)) {
                stages[*stage].push(name.clone());
            } else {
                stages.push(vec![name.clone()]);
            }
        }
        stages.retain(|stage| !stage.is_empty());
        if !sequential && stages.len() > 1 {
            stages = vec![stages.concat()];
        }
        Ok(stages)
    }

    /// What the running layer multiplies some weights with, over all samples.
    fn inputs(&self, wanted: &[String], tell: &mut dyn FnMut(f32) -> Result<()>) -> Result<Arc<Inputs>> {
        let inputs = Arc::new(Inputs::sums(wanted.iter().cloned().collect()));
        let decoder = self.load(Some(inputs.clone()))?;
        loop {
            for (at, hidden) in self.hidden.iter().enumerate() {
                tell(at as f32 / self.hidden.len() as f32)?;
                inputs.begin();
                decoder.run_layer(self.layer, hidden.clone());
            }
            if !inputs.again() {
                return Ok(inputs);
            }
        }
    }

    /// Whether the checkpoint stores a matrix as `[in_features, out_features]`.
    fn is_turned(&self, matrix: &SurveyedMatrix) -> bool {
        matrix.role == Role::Conv1d && !self.overlay.rows_are_outputs()
    }

    /// The values of a matrix, row-major `[out_features, in_features]`.
    fn values(&self, matrix: &SurveyedMatrix) -> Result<Vec<f32>> {
        let failed = |reason: String| self.wrong(matrix.module(), reason);
        let stored = matrix
            .stored
            .as_deref()
            .ok_or_else(|| failed("is no tensor of its own".to_string()))?;
        let view = self.overlay.tensor(stored).map_err(Error::from)?;
        let dtype = view.dtype.name();
        let packed = oxiformers_nn::quant::pack(&view)
            .ok_or_else(|| failed(format!("is stored as {dtype}, which cannot be read as numbers")))?;
        let [rows, columns] = packed.shape();
        let mut values = vec![0.0; rows * columns];
        packed.dequantize_rows(0..rows, &mut values);
        oxiformers_hub::release(&view.data);
        if self.is_turned(matrix) {
            values = quantize::transposed(&values, [rows, columns]);
        }
        Ok(values)
    }

    /// Puts what a matrix became into its place.
    fn put(&self, matrix: &SurveyedMatrix, parts: &Parts, result: &mut LayerResult) {
        let Some(stored) = &matrix.stored else { return };
        let module = stored.strip_suffix(".weight").unwrap_or(stored);
        self.overlay.remove(stored);
        result.removed.push(stored.clone());
        for (ending, view) in parts.iter() {
            let name = format!("{module}{ending}");
            self.overlay.set(&name, view.clone());
            result.tensors.push((name, view.clone()));
        }
    }
}

/// The beginning of the names of a layer's tensors: up to the first number.
fn layer_prefix(name: &str) -> Option<String> {
    let mut prefix = String::new();
    for component in name.split('.') {
        prefix.push_str(component);
        prefix.push('.');
        if is_number(component) {
            return Some(prefix);
        }
    }
    None
}

/// A name without its numbers: the same for all experts.
fn template(name: &str) -> String {
    let each = name
        .split('.')
        .map(|component| if is_number(component) { "*" } else { component });
    each.collect::<Vec<_>>().join(".")
}

fn is_number(component: &str) -> bool {
    !component.is_empty() && component.bytes().all(|byte| byte.is_ascii_digit())
}

/// Cuts `count` samples of `seq_len` tokens out of a text, evenly; fewer where the text is shorter.
///
/// # Errors
/// [`CalibrationError::TooShort`] where there is not a single one.
pub fn samples(ids: &[i32], seq_len: usize, count: usize) -> Result<Vec<Vec<i32>>> {
    let most = ids.len() / seq_len.max(1);
    if most == 0 || count == 0 {
        return Err(CalibrationError::TooShort {
            tokens: ids.len(),
            seq_len,
        });
    }
    let count = count.min(most);
    let starts = (0..count).map(|at| at * most / count * seq_len);
    Ok(starts.map(|start| ids[start..start + seq_len].to_vec()).collect())
}
