//! Calibration from the first layer to the last, which goes on where it was stopped.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::Write;
use std::path::{Path, PathBuf};

use oxiformers_hub::checkpoint::safetensors::Writer;
use oxiformers_hub::checkpoint::{Checkpoint, TensorInfo, TensorView};
use oxiformers_hub::{Error as HubError, ModelFiles, OutputFile};
use oxiformers_nn::quant::Recipe;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{Calibration, LayerResult, ModuleReport, Progress, Result};
use crate::Error;

/// A folder in which layers that are done wait for the others.
struct Work<'a>(&'a Path);

/// What a layer's folder says besides its tensors.
#[derive(Serialize, Deserialize)]
struct LayerFile {
    removed: Vec<String>,
    modules: Vec<ModuleReport>,
}

const SETTINGS: &str = "settings.json";
const LAYER: &str = "layer.json";

/// Calibrates all layers of a decoder. What is done is kept in the folder `work`, and read from there when the same is
/// asked again; other things that lie there are removed. The caller removes the folder at the end.
///
/// `progress` is told how far it is; where it returns false, calibration ends, and nothing but the running layer is lost.
/// Returns the model, whose [`source`](Calibration::source) has the new tensors, and what there is to say of modules.
///
/// # Errors
/// As [`Calibration::new`] and [`Calibration::quantize_layer`], and where the folder cannot be written to.
pub fn run(
    files: &ModelFiles,
    recipe: &Recipe,
    samples: &[Vec<i32>],
    work: &Path,
    progress: &mut dyn FnMut(Progress) -> bool,
) -> Result<(Calibration, Vec<ModuleReport>)> {
    let mut calibration = Calibration::new(files, recipe, samples)?;
    let work = Work(work);
    work.open(&settings(files, recipe, samples)?)?;
    let mut modules = Vec::new();
    for layer in 0..calibration.num_layers() {
        let done = match work.read(layer)? {
            Some(done) => done,
            None => {
                let result = calibration.quantize_layer(progress)?;
                work.write(layer, &result)?;
                // From the file, so that memory is free again.
                work.read(layer)?.unwrap_or(result)
            }
        };
        modules.extend(done.modules);
        calibration.advance(done.tensors, &done.removed, progress)?;
    }
    Ok((calibration, modules))
}

/// What must be the same for layers to be used again.
fn settings(files: &ModelFiles, recipe: &Recipe, samples: &[Vec<i32>]) -> Result<Value> {
    let checkpoint = Checkpoint::open(files).map_err(Error::from)?;
    let mut model = DefaultHasher::new();
    for info in checkpoint.tensors() {
        (&info.name, info.dtype, &info.shape).hash(&mut model);
    }
    let mut text = DefaultHasher::new();
    samples.hash(&mut text);
    let overrides = recipe.overrides.iter().map(|(pattern, config)| {
        let config = config.as_ref().map(|config| config.to_json());
        json!({"pattern": pattern, "config": config})
    });
    Ok(json!({
        "model": files.name(),
        "tensors": format!("{:016x}", model.finish()),
        "quantization_config": recipe.config.to_json(),
        "overrides": overrides.collect::<Vec<_>>(),
        "samples": samples.len(),
        "text": format!("{:016x}", text.finish()),
        "version": env!("CARGO_PKG_VERSION"),
    }))
}

impl Work<'_> {
    /// Makes the folder one of these settings.
    fn open(&self, settings: &Value) -> Result<()> {
        let path = self.0.join(SETTINGS);
        let text = format!("{settings:#}\n");
        if std::fs::read(&path).is_ok_and(|found| found == text.as_bytes()) {
            return Ok(());
        }
        if self.0.exists() {
            std::fs::remove_dir_all(self.0).map_err(hub(self.0))?;
        }
        std::fs::create_dir_all(self.0).map_err(hub(self.0))?;
        write_file(&path, text.as_bytes())
    }

    fn folder(&self, layer: usize) -> PathBuf {
        self.0.join(format!("layer-{layer:04}"))
    }

    /// A layer that is done.
    fn read(&self, layer: usize) -> Result<Option<LayerResult>> {
        let folder = self.folder(layer);
        // Written last: where it is, everything is.
        let Ok(text) = std::fs::read(folder.join(LAYER)) else {
            return Ok(None);
        };
        let Ok(LayerFile { removed, modules }) = serde_json::from_slice(&text) else {
            return Ok(None);
        };
        let mut tensors = Vec::new();
        if folder.join(WEIGHTS).exists() {
            let files = ModelFiles::from_dir(&folder).map_err(Error::from)?;
            let checkpoint = Checkpoint::open(&files).map_err(Error::from)?;
            for info in checkpoint.tensors() {
                tensors.push((
                    info.name.clone(),
                    checkpoint.tensor(&info.name).map_err(Error::from)?,
                ));
            }
        }
        Ok(Some(LayerResult {
            tensors,
            removed,
            modules,
        }))
    }

    fn write(&self, layer: usize, result: &LayerResult) -> Result<()> {
        let folder = self.folder(layer);
        let LayerResult {
            tensors,
            removed,
            modules,
        } = result;
        std::fs::create_dir_all(&folder).map_err(hub(&folder))?;
        if !tensors.is_empty() {
            let info = |(name, view): &(String, TensorView)| TensorInfo {
                name: name.clone(),
                dtype: view.dtype,
                shape: view.shape.clone(),
            };
            let infos: Vec<_> = tensors.iter().map(info).collect();
            let mut writer = Writer::create(&folder, &infos, &[], u64::MAX).map_err(Error::from)?;
            for (name, view) in tensors {
                writer.write_bytes(name, &view.data).map_err(Error::from)?;
            }
            writer.finish().map_err(Error::from)?;
        }
        let file = LayerFile {
            removed: removed.clone(),
            modules: modules.clone(),
        };
        let path = folder.join(LAYER);
        let text = serde_json::to_vec(&file).map_err(|source| {
            Error::from(HubError::Json {
                file: path.display().to_string(),
                source,
            })
        })?;
        write_file(&path, &text)
    }
}

/// What [`Writer`] calls a single file.
const WEIGHTS: &str = "model.safetensors";

fn write_file(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut file = OutputFile::create(path).map_err(Error::from)?;
    file.write_all(bytes).map_err(hub(path))?;
    Ok(file.finish().map_err(Error::from)?)
}

fn hub(path: &Path) -> impl FnOnce(std::io::Error) -> Error {
    let path = path.to_path_buf();
    move |error| Error::from(HubError::io(path)(error))
}
