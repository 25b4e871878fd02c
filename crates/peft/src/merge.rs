//! Adapters merged into the weights of their model: a folder of the model that needs them no longer.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io::Write;
use std::path::Path;
use std::sync::Arc;

use burn::module::{Param, ParamId};
use burn::tensor::{Device, Tensor, TensorData};
use oxiformers_hub::checkpoint::safetensors::{MAX_SHARD_SIZE, Writer};
use oxiformers_hub::checkpoint::{Checkpoint, DType, TensorInfo, TensorView};
use oxiformers_hub::{Error as HubError, ModelFiles, OutputFile};
use oxiformers_models::quantize::survey;
use oxiformers_models::{AutoConfig, gguf};
use oxiformers_nn::linear::Matrix;
use oxiformers_nn::quant::values::from_f32;
use oxiformers_nn::weights::to_f32;
use oxiformers_nn::{LoadOptions, Role, SurveyedMatrix, Target, TargetKind, TensorSource, Weights};
use serde_json::Value;

use crate::adapter::Adapter;
use crate::combine::view;
use crate::error::{Error, Result};

/// Layers that make logits, and may share the table of embeddings.
const HEADS: [&str; 2] = ["lm_head", "embed_out"];

/// A module that changes.
struct Change {
    /// Without `.weight`.
    name: String,
    /// The tensor that it is made of.
    source: String,
    kind: TargetKind,
    shape: [usize; 2],
}

/// Writes a folder of the model with `adapters` in its weights, one tensor in memory at a time. `dtype` is the float type of
/// what changes; without it, that which is stored. Where the layer that makes logits shares the table of embeddings and one
/// of the two changes, both are written. Returns how many tensors changed; `go_on` is asked now and then, and nothing is left
/// where it says no.
///
/// # Errors
/// A model that is quantized or has no place for an adapter; a folder that cannot be written to.
pub fn merge(
    files: &ModelFiles,
    adapters: &[Arc<Adapter>],
    folder: &Path,
    dtype: Option<DType>,
    go_on: impl Fn() -> bool,
) -> Result<usize> {
    if adapters.is_empty() {
        return Err(Error::Refused("there are no adapters to merge".to_string()));
    }
    let config = AutoConfig::from_files(files)?;
    if let Some(stored) = &config.quantization {
        return Err(Error::Refused(format!(
            "{}: is quantized with {}; merge into the model that it was made of, and quantize that",
            files.name(),
            stored.config.method()
        )));
    }
    let model = files.name().to_string();
    let checkpoint = Checkpoint::open(files)?;
    let infos: Vec<String> = checkpoint.tensors().map(|info| info.name.clone()).collect();
    let (source, names): (Box<dyn TensorSource>, Vec<String>) = match checkpoint.gguf() {
        Some(_) => {
            let source = gguf::Source::new(checkpoint, &config, &model)?;
            let names = source.names_in_order(infos.iter().map(String::as_str));
            (Box::new(source), names)
        }
        None => (Box::new(checkpoint), infos),
    };
    let matrices = survey(files)?;
    let work = Work {
        base: config.architecture.base(),
        rows_are_outputs: source.rows_are_outputs(),
        source,
        adapters,
        dtype,
    };
    let mut json = config.json.clone();
    let changes = work.changes(&names, &matrices, &mut json)?;
    work.write(&names, &changes, folder, &go_on)?;
    for name in files
        .names()
        .filter(|name| *name != "config.json" && !is_weights(name))
    {
        if let Some(bytes) = files.get(name)? {
            write_file(folder, name, &bytes)?;
        }
    }
    write_file(folder, "config.json", format!("{json:#}\n").as_bytes())?;
    Ok(changes.len())
}

struct Work<'a> {
    base: &'static str,
    source: Box<dyn TensorSource>,
    rows_are_outputs: bool,
    adapters: &'a [Arc<Adapter>],
    dtype: Option<DType>,
}

impl Work<'_> {
    /// Modules that adapters change, by what their weights are called.
    fn changes(
        &self,
        names: &[String],
        matrices: &[SurveyedMatrix],
        json: &mut Value,
    ) -> Result<BTreeMap<String, Change>> {
        let mut changes = BTreeMap::new();
        let mut found = BTreeSet::new();
        for matrix in matrices {
            let Some(stored) = &matrix.stored else { continue };
            let module = matrix.module();
            let Some(kind) = self.kind(module, matrix.role, &mut found) else {
                continue;
            };
            let change = Change {
                name: module.to_string(),
                source: stored.clone(),
                kind,
                shape: matrix.shape,
            };
            changes.insert(stored.clone(), change);
        }
        let tied = json
            .get("tie_word_embeddings")
            .and_then(Value::as_bool)
            .unwrap_or(true);
        let has_head = names
            .iter()
            .any(|name| HEADS.iter().any(|head| *name == format!("{head}.weight")));
        let table = matrices
            .iter()
            .find(|matrix| matrix.role == Role::Kept && matrix.stored.is_some());
        if let (true, false, Some(table)) = (tied, has_head, table) {
            let head = HEADS
                .iter()
                .find(|head| self.kind(head, Role::Output, &mut found).is_some());
            let of_table = table
                .stored
                .as_ref()
                .filter(|stored| changes.contains_key(*stored));
            if head.is_some() || of_table.is_some() {
                let head = head.copied().unwrap_or(HEADS[0]);
                let change = Change {
                    name: head.to_string(),
                    source: table.stored.clone().unwrap_or_default(),
                    kind: TargetKind::Output,
                    shape: table.shape,
                };
                changes.insert(format!("{head}.weight"), change);
                json["tie_word_embeddings"] = false.into();
            }
        }
        self.check(names, &found)?;
        Ok(changes)
    }

    /// What a module is to the adapters, if one of them changes it.
    fn kind(&self, module: &str, role: Role, found: &mut BTreeSet<String>) -> Option<TargetKind> {
        let mut kind = None;
        for name in self.names_of(module) {
            for adapter in self.adapters {
                let of = |ending: &str| adapter.tensors().contains_key(&format!("{name}{ending}"));
                if of(".lora_embedding_A") {
                    kind = Some(TargetKind::Embedding);
                } else if [".lora_A.weight", ".ia3_l", ".vera_lambda_b", ".weight"]
                    .iter()
                    .any(|ending| of(ending))
                {
                    kind = kind.or(Some(match role {
                        Role::Conv1d => TargetKind::Conv1d,
                        Role::Output => TargetKind::Output,
                        Role::Kept => TargetKind::Embedding,
                        Role::Linear | Role::Expert => TargetKind::Linear,
                    }));
                } else {
                    continue;
                }
                found.insert(name.to_string());
            }
        }
        kind
    }

    /// Checks that the model has a place for every tensor of the adapters.
    fn check(&self, names: &[String], modules: &BTreeSet<String>) -> Result<()> {
        for adapter in self.adapters {
            for tensor in adapter.tensors().keys() {
                let of_module = modules.iter().any(|module| {
                    tensor
                        .strip_prefix(module.as_str())
                        .is_some_and(|rest| rest.starts_with('.'))
                });
                let own = self.names_of(tensor).iter().any(|name| names.contains(name));
                // Heads that the model lacks.
                let new =
                    !tensor.contains(".lora_") && (tensor.ends_with(".weight") || tensor.ends_with(".bias"));
                if !of_module && !own && !new && !tensor.starts_with("vera_") {
                    return Err(Error::Refused(format!(
                        "{}: the model has no module for `{tensor}`; is it an adapter of another model? Virtual tokens cannot \
                         be merged",
                        adapter.switch().name()
                    )));
                }
            }
        }
        Ok(())
    }

    /// A name with and without the base model's.
    fn names_of(&self, name: &str) -> Vec<String> {
        let prefix = format!("{}.", self.base);
        match name.strip_prefix(&prefix) {
            Some(short) => vec![name.to_string(), short.to_string()],
            None => vec![name.to_string(), format!("{prefix}{name}")],
        }
    }

    /// The weight, stored as it is, and the bias that a module has with the adapters.
    fn merged(&self, change: &Change) -> Result<(Tensor<2>, Option<Tensor<1>>)> {
        let read = |name: &str| -> Result<Vec<f32>> {
            let view = self.source.tensor(name)?;
            to_f32(&view).map_err(|reason| Error::Refused(format!("`{name}` {reason}")))
        };
        let device = Device::flex();
        let [rows, cols] = change.shape;
        let turned = change.kind == TargetKind::Conv1d && !self.rows_are_outputs;
        let stored = if turned { [cols, rows] } else { [rows, cols] };
        let weight = Tensor::<2>::from_data(TensorData::new(read(&change.source)?, stored), &device);
        let weight = if turned { weight.transpose() } else { weight };
        let bias_name = change
            .source
            .strip_suffix(".weight")
            .map(|module| format!("{module}.bias"));
        let bias = match bias_name.filter(|name| self.source.contains(name)) {
            Some(name) => {
                let values = read(&name)?;
                let count = values.len();
                Some(Tensor::<1>::from_data(TensorData::new(values, [count]), &device))
            }
            None => None,
        };
        let bias = bias.map(|bias| Param::initialized(ParamId::new(), bias));
        // As a model would load it.
        let options = LoadOptions {
            adapters: self.adapters.iter().map(|adapter| adapter.clone() as _).collect(),
            ..LoadOptions::default()
        };
        let w = Weights::init(options, 0.0);
        let matrix = Matrix::dense(Param::initialized(ParamId::new(), weight));
        let names = self.names_of(&change.name);
        let target = Target {
            names: names.iter().map(String::as_str).collect(),
            kind: change.kind,
            matrix: &matrix,
            bias: bias.as_ref(),
        };
        let matrix = matrix.clone().with_adapters(w.adapter_layers(&target)?);
        let (weight, bias) = matrix.merged(bias.map(|bias| bias.val()), &device);
        let weight = if turned { weight.transpose() } else { weight };
        Ok((weight, bias))
    }

    /// The float type of a tensor that changes.
    fn dtype_of(&self, stored: DType) -> DType {
        match (self.dtype, stored) {
            (Some(dtype), _) => dtype,
            (None, DType::Ggml(_)) => DType::F16,
            (None, stored) => stored,
        }
    }

    fn write(
        &self,
        names: &[String],
        changes: &BTreeMap<String, Change>,
        folder: &Path,
        go_on: &impl Fn() -> bool,
    ) -> Result<()> {
        let mut infos = Vec::new();
        // What is written beside the changed weights: biases, and what adapters bring.
        let mut beside: HashMap<String, TensorView> = HashMap::new();
        for adapter in self.adapters {
            for (tensor, view) in adapter.tensors() {
                let adapted = [".lora_", ".ia3_l", ".vera_", "vera_"]
                    .iter()
                    .any(|part| tensor.contains(part));
                let stored = self
                    .names_of(tensor)
                    .into_iter()
                    .find(|name| names.contains(name));
                let name = stored.unwrap_or_else(|| tensor.clone());
                if !adapted
                    && !changes.contains_key(&name)
                    && !changes
                        .values()
                        .any(|change| name == format!("{}.weight", change.name))
                {
                    beside.insert(name, view.clone());
                }
            }
        }
        let mut biases = Vec::new();
        for (name, change) in changes {
            let bias = name
                .strip_suffix(".weight")
                .map(|module| format!("{module}.bias"))
                .unwrap_or_default();
            let (_, merged) = if self.changes_bias(change) {
                self.merged(change)?
            } else {
                continue;
            };
            if let Some(merged) = merged {
                let values: Vec<f32> = merged.into_data().iter::<f32>().collect();
                let count = values.len();
                beside.insert(bias.clone(), view(values, [count]));
                biases.push(bias);
            }
        }
        for name in names {
            let view = self.source.tensor(name)?;
            let (dtype, shape) = match (changes.get(name), beside.get(name)) {
                (Some(_), _) => (self.dtype_of(view.dtype), view.shape),
                (None, Some(other)) => (self.dtype_of(view.dtype), other.shape.clone()),
                (None, None) => (
                    if matches!(view.dtype, DType::Ggml(_)) {
                        DType::F16
                    } else {
                        view.dtype
                    },
                    view.shape,
                ),
            };
            infos.push(TensorInfo {
                name: name.clone(),
                dtype,
                shape,
            });
        }
        let new = |name: &String| !names.contains(name);
        for (name, change) in changes.iter().filter(|(name, _)| new(name)) {
            let stored = self.source.tensor(&change.source)?.dtype;
            infos.push(TensorInfo {
                name: name.clone(),
                dtype: self.dtype_of(stored),
                shape: change.shape.to_vec(),
            });
        }
        let mut added: Vec<_> = beside.iter().filter(|(name, _)| new(name)).collect();
        added.sort_by_key(|(name, _)| *name);
        for (name, view) in added {
            infos.push(TensorInfo {
                name: name.clone(),
                dtype: self.dtype.unwrap_or(DType::F32),
                shape: view.shape.clone(),
            });
        }
        let mut writer = Writer::create(folder, &infos, &[], MAX_SHARD_SIZE)?;
        for info in &infos {
            let refused = |reason: String| Error::Refused(format!("`{}`: {reason}", info.name));
            let values = if let Some(change) = changes.get(&info.name) {
                let (weight, _) = self.merged(change)?;
                weight.into_data().iter::<f32>().collect()
            } else if let Some(view) = beside.get(&info.name) {
                to_f32(view).map_err(refused)?
            } else {
                let view = self.source.tensor(&info.name)?;
                if view.dtype == info.dtype {
                    writer.write_bytes(&info.name, &view.data)?;
                    continue;
                }
                to_f32(&view).map_err(refused)?
            };
            if let Some(at) = values.iter().position(|x: &f32| !x.is_finite()) {
                return Err(refused(format!(
                    "value {at} is not finite; the adapter seems to be broken"
                )));
            }
            writer.write_bytes(&info.name, &from_f32(&values, info.dtype).map_err(refused)?)?;
            if !go_on() {
                return Err(Error::Refused("interrupted; nothing was written".to_string()));
            }
        }
        writer.finish()?;
        Ok(())
    }

    /// Whether adapters change a module's bias.
    fn changes_bias(&self, change: &Change) -> bool {
        let names = self.names_of(&change.name);
        self.adapters.iter().any(|adapter| {
            let of = |ending: &str| {
                names
                    .iter()
                    .find_map(|name| adapter.tensors().get(&format!("{name}{ending}")))
            };
            of(".lora_B.bias").is_some()
                || of(".ia3_l").is_some_and(|view| view.shape.last() == Some(&1))
                || (of(".weight").is_some() && of(".bias").is_some())
        })
    }
}

/// Whether a file holds weights, in whatever format, or what belongs to an adapter.
fn is_weights(name: &str) -> bool {
    const WEIGHTS: [&str; 12] = [
        ".safetensors",
        ".bin",
        ".gguf",
        ".pt",
        ".pth",
        ".ckpt",
        ".h5",
        ".msgpack",
        ".onnx",
        ".onnx_data",
        ".index.json",
        "adapter_config.json",
    ];
    WEIGHTS.iter().any(|ending| name.ends_with(ending))
}

fn write_file(folder: &Path, name: &str, bytes: &[u8]) -> Result<()> {
    let path = folder.join(name);
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent).map_err(HubError::io(parent))?;
    }
    let mut file = OutputFile::create(&path)?;
    file.write_all(bytes).map_err(HubError::io(&path))?;
    Ok(file.finish()?)
}
