//! From a model to a folder of the same model with fewer bits per weight, as Python's libraries write and read it.

use std::collections::HashMap;
use std::io::Write;
use std::path::Path;
use std::sync::Arc;

use oxiformers_hub::checkpoint::safetensors::Writer;
use oxiformers_hub::checkpoint::{Checkpoint, DType, TensorInfo, TensorView};
use oxiformers_hub::{Error as HubError, ModelFiles, OutputFile};
use oxiformers_nn::quant::config::ConfigError;
use oxiformers_nn::quant::scheme::Plan;
use oxiformers_nn::quant::values::{from_f32, to_f32};
use oxiformers_nn::quant::{self, Dense, Recipe, Scheme};
use oxiformers_nn::{LoadOptions, Role, Survey, SurveyedMatrix, TensorSource};
use serde_json::Value;

use crate::error::{Error, Result};
use crate::registry::Kind;
use crate::{AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, Task, auto_encoder, gguf};

/// What keeps a model from being written.
#[derive(Debug, thiserror::Error)]
pub enum QuantizeError {
    /// The model cannot be loaded.
    #[error(transparent)]
    Model(#[from] Error),
    /// The checkpoint cannot be read, or a file not be written.
    #[error(transparent)]
    Hub(#[from] HubError),
    /// A module cannot be quantized, or the whole model.
    #[error("{model}: {reason}")]
    Refused {
        /// The model.
        model: String,
        /// The module, where it is one, and what is wrong.
        reason: String,
    },
    /// It was asked to end.
    #[error("interrupted; nothing was written")]
    Interrupted,
}

/// The matrices of a model, in the order in which it is built.
///
/// # Errors
/// As loading has them.
pub fn survey(files: &ModelFiles) -> Result<Vec<SurveyedMatrix>> {
    let survey = Arc::new(Survey::default());
    let options = LoadOptions {
        survey: Some(survey.clone()),
        ..LoadOptions::default()
    };
    let config = AutoConfig::from_files(files)?;
    match (config.architecture.kind(), auto_encoder::task_of(&config)) {
        (Kind::Decoder, _) => drop(AutoModelForCausalLM::from_files(files, &options)?),
        (Kind::EncoderDecoder, Task::Base) => drop(AutoModelForSeq2SeqLM::from_files(files, &options)?),
        (Kind::EncoderDecoder | Kind::Encoder, _) => auto_encoder::load_as_saved(files, &options)?,
    }
    Ok(survey.matrices())
}

/// The scheme that a matrix becomes, if it is one that is quantized.
///
/// Experts are left as they are where they share a tensor, and where Transformers would expect them to; GPTQ and AWQ,
/// whose libraries know every expert as linear layers, take those that have tensors of their own.
///
/// # Errors
/// As [`Recipe::scheme`].
pub(crate) fn scheme_of(
    recipe: &Recipe,
    matrix: &SurveyedMatrix,
) -> std::result::Result<Option<Arc<dyn Scheme>>, ConfigError> {
    let taken = match matrix.role {
        Role::Linear | Role::Conv1d | Role::Output => true,
        Role::Expert => recipe.config.is_calibrated(),
        Role::Kept => false,
    };
    if !taken || matrix.stored.is_none() {
        return Ok(None);
    }
    recipe.scheme(matrix.module(), matrix.role == Role::Output)
}

/// What becomes of a tensor.
enum Fate {
    /// It is stored as it is, but for its type, and its rows and columns.
    Kept { dtype: DType, turned: bool },
    /// It becomes the tensors of a scheme.
    Quantized {
        scheme: Arc<dyn Scheme>,
        shape: [usize; 2],
        /// The float type of its values.
        dtype: DType,
        turned: bool,
        plan: Plan,
    },
}

/// A tensor that is to be written.
struct Item {
    name: String,
    info: TensorInfo,
    fate: Fate,
}

/// What a module becomes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlannedTensor {
    /// The tensor that it is now.
    pub name: String,
    /// `nf4`, or the type that it keeps.
    pub scheme: String,
    /// `[out_features, in_features]`, or the shape that it keeps.
    pub shape: Vec<usize>,
    /// Bytes that it will take.
    pub num_bytes: usize,
}

/// A folder that is to be written: what becomes of each tensor is known, and so is its size.
pub struct QuantizePlan {
    model: String,
    files: ModelFiles,
    source: Box<dyn TensorSource>,
    config: Value,
    items: Vec<Item>,
}

impl QuantizePlan {
    /// Plans a folder of the model with the modules quantized that `recipe` chooses. `dtype` is the float type of other
    /// tensors; without it they keep theirs, and those in blocks of GGUF become half floats.
    ///
    /// # Errors
    /// A model that is quantized already, one that cannot be loaded, or a module that the scheme cannot hold.
    pub fn new(files: &ModelFiles, mut recipe: Recipe, dtype: Option<DType>) -> Result<Self, QuantizeError> {
        let model = files.name().to_string();
        let refused = |reason: String| QuantizeError::Refused {
            model: model.clone(),
            reason,
        };
        let config = AutoConfig::from_files(files)?;
        if let Some(stored) = &config.quantization {
            return Err(refused(format!(
                "is quantized already, with {}; quantize the original",
                stored.method()
            )));
        }
        let matrices = survey(files)?;
        say_what_is_kept(&mut recipe, &matrices);
        let checkpoint = Checkpoint::open(files)?;
        let infos: Vec<TensorInfo> = checkpoint.tensors().cloned().collect();
        let (source, names): (Box<dyn TensorSource>, Vec<String>) = match checkpoint.gguf() {
            Some(_) => {
                let source = gguf::Source::new(checkpoint, &config, &model)?;
                let names = source.names_in_order(infos.iter().map(|info| info.name.as_str()));
                (Box::new(source), names)
            }
            None => (
                Box::new(checkpoint),
                infos.into_iter().map(|info| info.name).collect(),
            ),
        };
        let matrices: HashMap<&str, &SurveyedMatrix> = matrices
            .iter()
            .filter_map(|matrix| Some((matrix.stored.as_deref()?, matrix)))
            .collect();
        let rows_are_outputs = source.rows_are_outputs();
        let mut items = Vec::with_capacity(names.len());
        for name in names {
            let view = source.tensor(&name)?;
            let matrix = matrices.get(name.as_str());
            let info = TensorInfo {
                name: name.clone(),
                dtype: view.dtype,
                shape: view.shape,
            };
            let kept = match (dtype, info.dtype) {
                (Some(dtype), DType::F32 | DType::F16 | DType::BF16 | DType::Ggml(_)) => dtype,
                (None, DType::Ggml(_)) => DType::F16,
                (_, stored) => stored,
            };
            let conv1d = matrix.is_some_and(|matrix| matrix.role == Role::Conv1d);
            let scheme = match matrix {
                Some(matrix) => scheme_of(&recipe, matrix).map_err(|error| refused(error.0))?,
                None => None,
            };
            let fate = match (scheme, matrix) {
                (Some(scheme), Some(matrix)) => {
                    let dtype = match info.dtype {
                        DType::Ggml(_) => kept,
                        dtype => dtype,
                    };
                    let plan = scheme.plan(matrix.shape, dtype);
                    let plan = plan.map_err(|reason| refused(format!("`{}`: {reason}", matrix.module())))?;
                    Fate::Quantized {
                        scheme,
                        shape: matrix.shape,
                        dtype,
                        turned: conv1d && !rows_are_outputs,
                        plan,
                    }
                }
                _ => Fate::Kept {
                    dtype: kept,
                    turned: conv1d && rows_are_outputs,
                },
            };
            items.push(Item { name, info, fate });
        }
        if !items
            .iter()
            .any(|item| matches!(item.fate, Fate::Quantized { .. }))
        {
            return Err(refused("no module is left to be quantized".to_string()));
        }
        let mut json = config.json;
        json["quantization_config"] = recipe.config.to_json();
        Ok(Self {
            model,
            files: files.clone(),
            source,
            config: json,
            items,
        })
    }

    /// What becomes of each tensor, in the order of the checkpoint.
    pub fn tensors(&self) -> impl Iterator<Item = PlannedTensor> {
        self.items.iter().map(|item| match &item.fate {
            Fate::Kept { dtype, .. } => PlannedTensor {
                name: item.name.clone(),
                scheme: dtype.name(),
                shape: item.info.shape.clone(),
                num_bytes: dtype.num_bytes(&item.info.shape).unwrap_or(0),
            },
            Fate::Quantized {
                scheme, shape, plan, ..
            } => PlannedTensor {
                name: item.name.clone(),
                scheme: scheme.name().to_string(),
                shape: shape.to_vec(),
                num_bytes: plan.num_bytes(),
            },
        })
    }

    /// Bytes of all tensors that are read: what progress counts.
    pub fn num_bytes_read(&self) -> usize {
        let size = |item: &Item| item.info.dtype.num_bytes(&item.info.shape).unwrap_or(0);
        self.items.iter().map(size).sum()
    }

    /// The `config.json` to be written.
    pub fn config(&self) -> &Value {
        &self.config
    }

    /// Writes the folder, a matrix in memory at a time: weights, `config.json`, and the other files of the model, such as
    /// its tokenizer, but for weights. `progress` is told how many bytes were read; where it returns false, writing ends,
    /// and nothing is left of it.
    ///
    /// # Errors
    /// Where values cannot be quantized (infinities, for example), or the folder cannot be written to;
    /// [`QuantizeError::Interrupted`].
    pub fn write(
        &self,
        folder: &Path,
        max_shard_size: u64,
        progress: impl FnMut(usize) -> bool,
    ) -> Result<(), QuantizeError> {
        self.write_calibrated(self.source.as_ref(), folder, max_shard_size, progress)
    }

    /// Like [`write`](Self::write), with tensors from `source`: of the modules that are quantized there, what they became,
    /// and of others the values that they have there.
    ///
    /// # Errors
    /// As [`write`](Self::write).
    pub fn write_calibrated(
        &self,
        source: &dyn TensorSource,
        folder: &Path,
        max_shard_size: u64,
        mut progress: impl FnMut(usize) -> bool,
    ) -> Result<(), QuantizeError> {
        let (mut tensors, mut late) = (Vec::new(), Vec::new());
        for item in &self.items {
            match &item.fate {
                Fate::Kept { dtype, turned } => tensors.push(TensorInfo {
                    name: item.name.clone(),
                    dtype: *dtype,
                    shape: turned_shape(&item.info.shape, *turned),
                }),
                Fate::Quantized { plan, .. } => {
                    let named = |info: &TensorInfo| TensorInfo {
                        name: format!("{}{}", module(&item.name), info.name),
                        ..info.clone()
                    };
                    tensors.extend(plan.tensors.iter().map(named));
                    late.extend(plan.late.iter().map(named));
                }
            }
        }
        let mut writer = Writer::create(folder, &tensors, &late, max_shard_size)?;
        for item in &self.items {
            let size = item.info.dtype.num_bytes(&item.info.shape).unwrap_or(0);
            if !self.write_done(&mut writer, item, source)? {
                let view = source.tensor(&item.name)?;
                let stored = view.data.clone();
                self.write_item(&mut writer, item, view)?;
                oxiformers_hub::release(&stored);
            }
            if !progress(size) {
                return Err(QuantizeError::Interrupted);
            }
        }
        for name in self.files.names().filter(|name| is_small(name)) {
            if let Some(bytes) = self.files.get(name)? {
                write_file(folder, name, &bytes)?;
            }
        }
        write_file(folder, "config.json", format!("{:#}\n", self.config).as_bytes())?;
        writer.finish()?;
        Ok(())
    }

    /// Writes a module that is quantized already; returns whether it is.
    fn write_done(
        &self,
        writer: &mut Writer,
        item: &Item,
        source: &dyn TensorSource,
    ) -> Result<bool, QuantizeError> {
        let Fate::Quantized { plan, .. } = &item.fate else {
            return Ok(false);
        };
        let named = |info: &TensorInfo| format!("{}{}", module(&item.name), info.name);
        if source.contains(&item.name) || !plan.tensors.iter().all(|info| source.contains(&named(info))) {
            return Ok(false);
        }
        for info in &plan.tensors {
            let view = source.tensor(&named(info))?;
            writer.write_bytes(&named(info), &view.data)?;
            oxiformers_hub::release(&view.data);
        }
        Ok(true)
    }

    fn write_item(&self, writer: &mut Writer, item: &Item, view: TensorView) -> Result<(), QuantizeError> {
        let refused = |reason: String| QuantizeError::Refused {
            model: self.model.clone(),
            reason: format!("`{}`: {reason}", item.name),
        };
        match &item.fate {
            Fate::Kept { dtype, turned } => {
                if *dtype == view.dtype && !turned {
                    writer.write_bytes(&item.name, &view.data)?;
                    return Ok(());
                }
                let mut values = to_f32(&view).map_err(refused)?;
                if let (true, [rows, columns]) = (turned, view.shape.as_slice()) {
                    values = transposed(&values, [*rows, *columns]);
                }
                let bytes = from_f32(&values, *dtype).map_err(refused)?;
                writer.write_bytes(&item.name, &bytes)?;
            }
            Fate::Quantized {
                scheme,
                shape: [rows, columns],
                dtype,
                turned,
                ..
            } => {
                let dtype = *dtype;
                let view = if *turned {
                    let values = to_f32(&view).map_err(refused)?;
                    let values = transposed(&values, [*columns, *rows]);
                    TensorView {
                        dtype: DType::F32,
                        shape: vec![*rows, *columns],
                        data: from_f32(&values, DType::F32).map_err(refused)?.into(),
                    }
                } else {
                    view
                };
                let matrix = quant::pack(&view)
                    .ok_or_else(|| refused(format!("{} cannot be read as numbers", view.dtype.name())))?;
                let dense = Dense {
                    matrix: matrix.as_ref(),
                    dtype,
                };
                let parts = scheme.quantize(&dense).map_err(refused)?;
                for (ending, part) in parts.iter() {
                    writer.write_bytes(&format!("{}{ending}", module(&item.name)), &part.data)?;
                }
            }
        }
        Ok(())
    }
}

fn module(name: &str) -> &str {
    name.strip_suffix(".weight").unwrap_or(name)
}

fn turned_shape(shape: &[usize], turned: bool) -> Vec<usize> {
    let shape = shape.iter().copied();
    if turned {
        shape.rev().collect()
    } else {
        shape.collect()
    }
}

pub(crate) fn transposed(values: &[f32], [rows, columns]: [usize; 2]) -> Vec<f32> {
    let column = |column: usize| values.iter().skip(column).step_by(columns.max(1)).take(rows);
    (0..columns).flat_map(column).copied().collect()
}

/// Where modules are left out by name, those that make logits are left out only if they are named, too: Transformers
/// would expect them quantized.
fn say_what_is_kept(recipe: &mut Recipe, matrices: &[SurveyedMatrix]) {
    let outputs = matrices.iter().filter(|matrix| matrix.role == Role::Output);
    recipe
        .config
        .keep_outputs(outputs.map(|matrix| matrix.module().to_string()).collect());
}

/// Whether a file belongs to a model besides its weights and `config.json`.
fn is_small(name: &str) -> bool {
    const WEIGHTS: [&str; 12] = [
        ".safetensors",
        ".gguf",
        ".bin",
        ".pt",
        ".pth",
        ".ckpt",
        ".h5",
        ".msgpack",
        ".onnx",
        ".onnx_data",
        ".tflite",
        ".index.json",
    ];
    name != "config.json" && !WEIGHTS.iter().any(|ending| name.ends_with(ending))
}

fn write_file(folder: &Path, name: &str, bytes: &[u8]) -> Result<(), HubError> {
    let path = folder.join(name);
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent).map_err(HubError::io(parent))?;
    }
    let mut file = OutputFile::create(&path)?;
    file.write_all(bytes).map_err(HubError::io(&path))?;
    file.finish()
}
