//! Checkpoints: folders that hold all of a training, and are there whole or not at all.

use std::collections::HashMap;
use std::io::Write;
use std::path::{Path, PathBuf};

use oxiformers_hub::checkpoint::{Checkpoint, DType};
use oxiformers_hub::{ModelFiles, OutputFile};
use oxiformers_models::nn::quant::to_f32;
use oxiformers_models::nn::{Parameter, Parameters};
use oxiformers_models::save::save_pretrained;
use safetensors::tensor::TensorView as View;
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;

use crate::optim::{State, TensorView, state};
use crate::state::TrainerState;
use crate::{Error, Result};

/// Where a training is.
pub const TRAINER_STATE: &str = "trainer_state.json";
/// What the optimizer remembers.
pub const OPTIMIZER: &str = "optimizer.safetensors";
/// What the task remembers, if it does.
pub const TASK: &str = "task.safetensors";
/// The arguments that it was begun with.
pub const ARGUMENTS: &str = "training_args.json";
/// The values that learn, where the model's own file does not hold them as f32.
pub const MASTER_WEIGHTS: &str = "master_weights.safetensors";

/// The current values of a parameter, row-major.
pub type ValuesOf<'a> = &'a dyn Fn(&Parameter) -> Option<&'a [f32]>;

/// Writes what was trained: a model, or adapters beside one.
pub trait Saver: Send {
    /// Writes it into `folder` with everything that it takes to load it again.
    ///
    /// # Errors
    /// Where the folder cannot be written to.
    fn save(&self, folder: &Path, parameters: &Parameters, values: ValuesOf) -> Result<()>;

    /// Whether the files of [`save`](Self::save) are safetensors that hold every trained value as f32 by the name of its
    /// tensor; if so, their name. Checkpoints then need not store them again.
    fn exact_file(&self) -> Option<&'static str> {
        None
    }
}

/// Saves a whole model as Transformers does.
pub struct ModelSaver {
    /// Its `config.json`.
    pub config: Value,
    /// Where its tokenizer and other files are.
    pub files: Option<ModelFiles>,
    /// The float type of trained values.
    pub dtype: DType,
}

impl Saver for ModelSaver {
    fn save(&self, folder: &Path, parameters: &Parameters, values: ValuesOf) -> Result<()> {
        Ok(save_pretrained(
            folder,
            &self.config,
            self.files.as_ref(),
            parameters,
            self.dtype,
            values,
        )?)
    }

    fn exact_file(&self) -> Option<&'static str> {
        (self.dtype == DType::F32).then_some("model.safetensors")
    }
}

/// The folder of a step.
pub fn folder_name(step: u64) -> String {
    format!("checkpoint-{step}")
}

/// The step of a folder that is a whole checkpoint.
fn step_of(path: &Path) -> Option<u64> {
    let step = path
        .file_name()?
        .to_str()?
        .strip_prefix("checkpoint-")?
        .parse()
        .ok()?;
    path.join(TRAINER_STATE).is_file().then_some(step)
}

/// The checkpoints of an output folder, by step.
///
/// # Errors
/// Where the folder cannot be listed; one that is not there has none.
pub fn list(output: &Path) -> Result<Vec<(u64, PathBuf)>> {
    let entries = match std::fs::read_dir(output) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(Error::io(output)(error)),
    };
    let paths = entries.filter_map(|entry| Some(entry.ok()?.path()));
    let mut found: Vec<_> = paths.filter_map(|path| Some((step_of(&path)?, path))).collect();
    found.sort();
    Ok(found)
}

/// Removes what writers that were killed have left.
///
/// # Errors
/// Where it cannot be removed.
pub fn clean(output: &Path) -> Result<()> {
    let Ok(entries) = std::fs::read_dir(output) else {
        return Ok(());
    };
    for path in entries.filter_map(|entry| Some(entry.ok()?.path())) {
        let name = path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        if name.starts_with(".checkpoint-") && name.ends_with(".part") && path.is_dir() {
            std::fs::remove_dir_all(&path).map_err(Error::io(&path))?;
        }
    }
    Ok(())
}

/// What a checkpoint holds.
pub struct Contents<'a> {
    /// Where the training is.
    pub state: &'a TrainerState,
    /// The arguments.
    pub arguments: &'a Value,
    /// What the optimizer remembers.
    pub optimizer: State,
    /// What the task remembers.
    pub task: State,
}

/// Writes a checkpoint: beside its place, to the disk, and then into its place.
///
/// # Errors
/// Where the output folder cannot be written to; nothing is changed then.
pub fn write(
    output: &Path,
    contents: &Contents,
    saver: &dyn Saver,
    parameters: &Parameters,
    values: ValuesOf,
) -> Result<PathBuf> {
    let name = folder_name(contents.state.global_step);
    let (target, part) = (output.join(&name), output.join(format!(".{name}.part")));
    if part.exists() {
        std::fs::remove_dir_all(&part).map_err(Error::io(&part))?;
    }
    std::fs::create_dir_all(&part).map_err(Error::io(&part))?;
    saver.save(&part, parameters, values)?;
    if saver.exact_file().is_none() {
        write_tensors(&part.join(MASTER_WEIGHTS), masters(parameters, values)?)?;
    }
    write_tensors(
        &part.join(OPTIMIZER),
        contents.optimizer.clone().into_iter().collect(),
    )?;
    if !contents.task.is_empty() {
        write_tensors(&part.join(TASK), contents.task.clone().into_iter().collect())?;
    }
    write_json(&part.join(ARGUMENTS), contents.arguments)?;
    write_json(&part.join(TRAINER_STATE), contents.state)?;
    sync(&part);
    if target.exists() {
        // Of a training that was begun anew. A folder cannot take the place of another in one step.
        let old = output.join(format!(".{name}.old.part"));
        std::fs::rename(&target, &old).map_err(Error::io(&target))?;
        std::fs::rename(&part, &target).map_err(Error::io(&target))?;
        std::fs::remove_dir_all(&old).map_err(Error::io(&old))?;
    } else {
        std::fs::rename(&part, &target).map_err(Error::io(&target))?;
    }
    sync(output);
    Ok(target)
}

/// Brings the entries of a folder to the disk, where the system can.
fn sync(folder: &Path) {
    if let Ok(folder) = std::fs::File::open(folder) {
        let _ = folder.sync_all();
    }
}

/// Writes a file that is there whole or not at all.
///
/// # Errors
/// Where it cannot be written.
pub fn write_file(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut file = OutputFile::create(path)?;
    file.write_all(bytes).map_err(Error::io(path))?;
    Ok(file.finish()?)
}

fn write_json(path: &Path, value: &impl serde::Serialize) -> Result<()> {
    let mut text = serde_json::to_vec_pretty(value).map_err(|error| Error::checkpoint(path, error))?;
    text.push(b'\n');
    write_file(path, &text)
}

/// The trained values under the names of parameters.
fn masters(parameters: &Parameters, values: ValuesOf) -> Result<Vec<(String, TensorView)>> {
    let one = |parameter: &Parameter| {
        let values = values(parameter).ok_or_else(|| Error::state(&parameter.name, "has no values"))?;
        Ok((parameter.name.clone(), state::floats(values, &parameter.shape)))
    };
    parameters.trainable().iter().map(one).collect()
}

pub(crate) fn write_tensors(path: &Path, tensors: Vec<(String, TensorView)>) -> Result<()> {
    let wrong = |error: safetensors::SafeTensorError| Error::checkpoint(path, error);
    let dtype = |dtype| match dtype {
        state::DType::F32 => Dtype::F32,
        state::DType::I64 => Dtype::I64,
        state::DType::U8 => Dtype::U8,
    };
    let views: Result<Vec<_>, _> = (tensors.iter())
        .map(|(name, tensor)| {
            Ok((
                name,
                View::new(dtype(tensor.dtype), tensor.shape.clone(), &tensor.data)?,
            ))
        })
        .collect();
    let bytes = safetensors::serialize(views.map_err(wrong)?, None).map_err(wrong)?;
    write_file(path, &bytes)
}

pub(crate) fn read_tensors(path: &Path) -> Result<State> {
    let wrong = |error: safetensors::SafeTensorError| Error::checkpoint(path, error);
    let bytes = std::fs::read(path).map_err(Error::io(path))?;
    let tensors = SafeTensors::deserialize(&bytes).map_err(wrong)?;
    let one = |(name, view): (String, View)| {
        let dtype = match view.dtype() {
            Dtype::F32 => state::DType::F32,
            Dtype::I64 => state::DType::I64,
            Dtype::U8 => state::DType::U8,
            other => {
                return Err(Error::checkpoint(
                    path,
                    format!("`{name}` is {other:?}, which is in no state"),
                ));
            }
        };
        let (shape, data) = (view.shape().to_vec(), view.data().to_vec().into());
        Ok((name, TensorView { dtype, shape, data }))
    };
    tensors.tensors().into_iter().map(one).collect()
}

/// A checkpoint that was read.
pub struct Loaded {
    /// Where the training was.
    pub state: TrainerState,
    /// What the optimizer remembered.
    pub optimizer: State,
    /// What the task remembered.
    pub task: State,
    /// The values of each parameter, by its name.
    pub values: HashMap<String, Vec<f32>>,
}

/// Reads a checkpoint.
///
/// # Errors
/// Names the file that is missing, damaged, or of another model.
pub fn read(folder: &Path, saver: &dyn Saver, parameters: &Parameters) -> Result<Loaded> {
    let path = folder.join(TRAINER_STATE);
    let text = std::fs::read(&path).map_err(Error::io(&path))?;
    let state = serde_json::from_slice(&text).map_err(|error| Error::checkpoint(&path, error))?;
    let task = folder.join(TASK);
    Ok(Loaded {
        state,
        optimizer: read_tensors(&folder.join(OPTIMIZER))?,
        task: match task.is_file() {
            true => read_tensors(&task)?,
            false => State::default(),
        },
        values: read_values(folder, saver, parameters)?,
    })
}

/// Reads the trained values of a checkpoint, by the names of parameters.
///
/// # Errors
/// As [`read`].
pub fn read_values(
    folder: &Path,
    saver: &dyn Saver,
    parameters: &Parameters,
) -> Result<HashMap<String, Vec<f32>>> {
    let Some(file) = saver.exact_file() else {
        let path = folder.join(MASTER_WEIGHTS);
        let mut tensors = read_tensors(&path)?;
        let one = |parameter: &Parameter| {
            let tensor = tensors.remove(&parameter.name);
            let tensor =
                tensor.filter(|tensor| tensor.dtype == state::DType::F32 && tensor.shape == parameter.shape);
            let tensor = tensor.ok_or_else(|| {
                Error::checkpoint(
                    &path,
                    format!("has no `{}` of the shape {:?}", parameter.name, parameter.shape),
                )
            })?;
            Ok((parameter.name.clone(), state::to_floats(&tensor)))
        };
        return parameters.trainable().iter().map(one).collect();
    };
    // Shards, too, where a model is large.
    let files = if folder.join(file).is_file() {
        ModelFiles::from_file(&folder.join(file))?
    } else {
        ModelFiles::from_dir(folder)?
    };
    let checkpoint = Checkpoint::open(&files)?;
    let one = |parameter: &Parameter| {
        let slot = &parameter.slot;
        let wrong = |what: String| Error::checkpoint(folder, format!("`{}` {what}", slot.tensor));
        let view = checkpoint.tensor(&slot.tensor)?;
        if view.shape != slot.shape {
            return Err(wrong(format!(
                "has the shape {:?}, and the model's has {:?}",
                view.shape, slot.shape
            )));
        }
        let stored = to_f32(&view).map_err(wrong)?;
        Ok((parameter.name.clone(), slot.gather(&parameter.shape, &stored)))
    };
    parameters.trainable().iter().map(one).collect()
}

/// Removes the oldest checkpoints, so that at most `limit` are left; `best` and the newest stay.
///
/// # Errors
/// Where one cannot be removed.
pub fn rotate(output: &Path, limit: Option<usize>, best: Option<&Path>) -> Result<()> {
    let Some(limit) = limit else { return Ok(()) };
    let all = list(output)?;
    // The best one stays, and the newest to go on from: two, where the limit is one and they differ.
    let newest = all.last().map(|(_, path)| path.clone());
    let is_best = |path: &PathBuf| best.is_some_and(|best| best.file_name() == path.file_name());
    let mut left = all.len();
    for (_, path) in &all {
        if left <= limit.max(1) || Some(path) == newest.as_ref() || is_best(path) {
            continue;
        }
        // Out of sight first: a folder that is half removed is no checkpoint.
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let gone = output.join(format!(".{name}.old.part"));
        std::fs::rename(path, &gone).map_err(Error::io(path))?;
        std::fs::remove_dir_all(&gone).map_err(Error::io(&gone))?;
        left -= 1;
    }
    Ok(())
}
