//! An adapter: its configuration, its tensors, and what it makes of the modules of a model.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use burn::module::{Param, ParamId};
use burn::tensor::{Device, Tensor, TensorData};
use oxiformers_hub::ModelFiles;
use oxiformers_hub::checkpoint::{Checkpoint, DType, TensorView};
use oxiformers_nn::adapter::{Ia3, Lora, LoraEmbedding, Part, Saved, Vera};
use oxiformers_nn::linear::Matrix;
use oxiformers_nn::weights::to_f32;
use oxiformers_nn::{
    Activation, Error as NnError, Linear, Prompt, PromptEncoder, PromptKind, PromptValues,
    Result as NnResult, Role, SurveyedMatrix, Switch, Target, TargetKind, Weights,
};
use serde_json::Value;

use crate::config::{AdapterConfig, Bias, CONFIG_FILE, InitLora, LoraConfig, Method, PromptConfig};
use crate::error::{Error, Result};
use crate::linalg;
use crate::random::Mt19937;

/// What PEFT writes before the names of modules.
pub(crate) const PREFIX: &str = "base_model.model.";
/// The same for what belongs to no module.
pub(crate) const SHORT_PREFIX: &str = "base_model.";
/// What the virtual tokens are stored as.
const PROMPT: &str = "prompt_embeddings";
/// What the parameters are called that make virtual tokens while they are trained.
const ENCODER: &str = "prompt_encoder.";
const EMBEDDING: &str = "embedding.weight";

/// What PEFT calls a part of a layer that makes virtual tokens, of which activations stand in every second place.
fn layer_name(method: &Method, index: usize, last: &str) -> String {
    let layers = match method {
        Method::PrefixTuning(_) => "transform",
        _ => "mlp_head",
    };
    format!("{layers}.{}.{last}", 2 * index)
}

/// Tensors by their names: shapes and values.
type Stored = BTreeMap<String, (Vec<usize>, Vec<f32>)>;

/// An adapter that was read from its files.
#[derive(Debug)]
pub struct Adapter {
    config: AdapterConfig,
    /// By their names without PEFT's prefix.
    tensors: BTreeMap<String, TensorView>,
    used: Mutex<BTreeSet<String>>,
    switch: Arc<Switch>,
    trained: bool,
    /// Where it begins anew: the seed of its parameters.
    fresh: Option<u64>,
    /// VeRA's random matrices, which all modules share.
    projections: Mutex<Option<[Tensor<2>; 2]>>,
    /// The most outputs and inputs of the modules that VeRA adapts, as far as they are known.
    widest: Mutex<[Option<usize>; 2]>,
    params: Mutex<Vec<(ParamId, String)>>,
}

/// Values on their way to a tensor.
#[derive(Debug, Clone)]
struct Values {
    values: Vec<f32>,
    shape: [usize; 2],
}

impl Values {
    fn new(values: Vec<f32>, shape: [usize; 2]) -> Self {
        Self { values, shape }
    }

    fn map(mut self, f: impl Fn(f32) -> f32) -> Self {
        self.values.iter_mut().for_each(|x| *x = f(*x));
        self
    }

    fn data(self) -> TensorData {
        TensorData::new(self.values, self.shape)
    }

    fn tensor(self, w: &Weights) -> Tensor<2> {
        Tensor::from_data(self.data(), w.device())
    }
}

impl Adapter {
    /// Reads an adapter; `name` is what it is called here.
    ///
    /// # Errors
    /// A file, a field or a tensor that does not fit.
    pub fn from_files(files: &ModelFiles, name: &str) -> Result<Self> {
        let config = AdapterConfig::from_files(files)?;
        Ok(Self::new(config, tensors(files)?, name))
    }

    /// Whether a folder is an adapter's and no model's.
    pub fn is_adapter(files: &ModelFiles) -> bool {
        files.contains(CONFIG_FILE) && !files.contains("config.json") && files.gguf().is_none()
    }

    /// The base model that its configuration names, with the revision if there is one.
    ///
    /// # Errors
    /// Where it names none.
    pub fn base_model(&self) -> Result<String> {
        let name = self
            .config
            .base_model_name_or_path
            .as_deref()
            .filter(|name| !name.is_empty());
        let name = name.ok_or_else(|| {
            Error::Refused(format!(
                "{}: `base_model_name_or_path` names no model; load that, with this as its adapter",
                self.switch.name()
            ))
        })?;
        Ok(match &self.config.revision {
            Some(revision) => format!("{name}@{revision}"),
            None => name.to_string(),
        })
    }

    /// The files that say how texts are read and answered.
    pub const TEXT_FILES: [&str; 9] = [
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "vocab.txt",
        "merges.txt",
        "chat_template.jinja",
        "chat_template.json",
    ];

    /// The tensors of its file, given what was trained with it by the names of parameters: shapes and values.
    pub fn trained_tensors(&self, trained: Stored) -> BTreeMap<String, TensorView> {
        let view = |(shape, values): (Vec<usize>, Vec<f32>)| TensorView {
            dtype: DType::F32,
            shape,
            data: values
                .iter()
                .flat_map(|x| x.to_le_bytes())
                .collect::<Vec<u8>>()
                .into(),
        };
        let mut trained = trained;
        if let Some(values) = self.encoded_prompt(&trained) {
            trained.retain(|name, _| !name.contains(ENCODER));
            trained.insert(format!("{PREFIX}{PROMPT}"), values);
        }
        if let Some(projections) = self.saved_projections() {
            trained.extend(projections);
        }
        let (own, others): (Vec<_>, Vec<_>) = trained
            .into_iter()
            .partition(|(name, _)| name.starts_with(PREFIX));
        // The adapter's copy of a parameter counts, where the model has it too.
        let short = |name: String| name.strip_prefix(PREFIX).map_or(name.clone(), str::to_string);
        let tensors = others.into_iter().chain(own);
        let mut out: BTreeMap<_, _> = self.tensors.clone();
        out.extend(tensors.map(|(name, tensor)| (short(name), view(tensor))));
        out
    }

    /// The files of the base model with those of the adapter's folder that say how texts are read and answered, as
    /// tokenizers with more tokens or another chat template.
    pub fn over(base: &ModelFiles, folder: &ModelFiles) -> ModelFiles {
        base.overlaid(folder, |name| Self::TEXT_FILES.contains(&name))
    }

    /// From its configuration and its tensors, whose names are those of the file without `base_model.model.`.
    pub fn new(config: AdapterConfig, tensors: BTreeMap<String, TensorView>, name: &str) -> Self {
        Self {
            config,
            tensors,
            used: Mutex::default(),
            switch: Arc::new(Switch::new(name)),
            trained: false,
            fresh: None,
            projections: Mutex::default(),
            widest: Mutex::default(),
            params: Mutex::default(),
        }
    }

    /// An adapter that begins anew, to be trained: its parameters come into being as PEFT initializes them, for the modules
    /// that its configuration names, while a model loads.
    ///
    /// # Errors
    /// A configuration of a kind that is not trained here, or that names no modules.
    pub fn fresh(config: AdapterConfig, name: &str, seed: u64) -> Result<Self> {
        let no_modules = config
            .targets()
            .is_some_and(|targets| targets.target_modules.is_none());
        if no_modules {
            return Err(Error::Refused(format!(
                "{name}: `target_modules` names no modules to adapt"
            )));
        }
        match &config.method {
            Method::Lora(_) | Method::Ia3(_) | Method::Vera(_) => {}
            Method::PromptTuning(prompt) | Method::PTuning(prompt) | Method::PrefixTuning(prompt) => {
                let known = [
                    ("prompt_tuning_init", "RANDOM"),
                    ("encoder_reparameterization_type", "MLP"),
                ];
                for (field, known) in known {
                    let given = prompt.other.get(field).and_then(Value::as_str);
                    if let Some(given) = given.filter(|given| *given != known) {
                        return Err(Error::Refused(format!(
                            "{name}: `{field}` is {given}; a prompt begins here with {known} only"
                        )));
                    }
                }
            }
        }
        Ok(Self {
            trained: true,
            fresh: Some(seed),
            ..Self::new(config, BTreeMap::new(), name)
        })
    }

    /// The same adapter, whose parameters want gradients.
    #[must_use]
    pub fn trained(mut self) -> Self {
        self.trained = true;
        self
    }

    /// Its configuration.
    pub fn config(&self) -> &AdapterConfig {
        &self.config
    }

    /// Its tensors, by their names without `base_model.model.`.
    pub fn tensors(&self) -> &BTreeMap<String, TensorView> {
        &self.tensors
    }

    /// Whether it takes part, and how much.
    pub fn switch(&self) -> &Arc<Switch> {
        &self.switch
    }

    fn wrong(&self, message: impl Into<String>) -> NnError {
        NnError::Adapter {
            adapter: self.switch.name().to_string(),
            message: message.into(),
        }
    }

    /// The tensor of a module that it has under one of the module's names.
    fn find<'a>(&'a self, names: &[&str], ending: &str) -> Option<(&'a str, &'a TensorView)> {
        names.iter().find_map(|name| {
            let (name, view) = self.tensors.get_key_value(&format!("{name}{ending}"))?;
            lock(&self.used).insert(name.clone());
            Some((name.as_str(), view))
        })
    }

    /// The parameter that a tensor is, which is to have that shape.
    fn param<const D: usize>(
        &self,
        w: &Weights,
        found: (&str, &TensorView),
        shape: [usize; D],
    ) -> NnResult<Param<Tensor<D>>> {
        self.param_that(w, found, shape, self.trained)
    }

    fn param_that<const D: usize>(
        &self,
        w: &Weights,
        (name, view): (&str, &TensorView),
        shape: [usize; D],
        trained: bool,
    ) -> NnResult<Param<Tensor<D>>> {
        // DoRA's magnitudes were once a table of one column.
        let same = view.shape == shape || (D == 1 && view.shape.iter().product::<usize>() == shape[0]);
        if !same {
            return Err(self.wrong(format!(
                "the tensor `{name}` has the shape {:?}, the model's module wants {shape:?}",
                view.shape
            )));
        }
        let values = to_f32(view).map_err(|reason| {
            self.wrong(format!(
                "the tensor `{name}` is stored as {}, which {reason}",
                view.dtype.name()
            ))
        })?;
        Ok(self.make(w, name.to_string(), TensorData::new(values, shape), trained))
    }

    fn make<const D: usize>(
        &self,
        w: &Weights,
        name: String,
        values: TensorData,
        trained: bool,
    ) -> Param<Tensor<D>> {
        let param = w.adapter_param(format!("{PREFIX}{name}"), values, trained);
        if trained {
            lock(&self.params).push((param.id, name));
        }
        param
    }

    /// The parameters that it made of the model that was loaded last and that are trained, with the names that their tensors
    /// have in the file but for `base_model.model.`. Biases and norms of the model itself that are trained with it are not
    /// among them.
    pub fn parameters(&self) -> Vec<(ParamId, String)> {
        lock(&self.params).clone()
    }

    /// The rank of a pair of matrices, `a` `[r, ..]` and `b` `[.., r]`.
    fn rank(&self, a: (&str, &TensorView), b: (&str, &TensorView)) -> NnResult<usize> {
        match (a.1.shape.as_slice(), b.1.shape.as_slice()) {
            ([rank, _], [_, other]) if rank == other && *rank > 0 => Ok(*rank),
            (first, second) => Err(self.wrong(format!(
                "the tensors `{}` {first:?} and `{}` {second:?} have no rank in common",
                a.0, b.0
            ))),
        }
    }

    fn lora(&self, target: &Target, w: &Weights) -> NnResult<Option<Part>> {
        let Method::Lora(config) = &self.config.method else {
            return Ok(None);
        };
        if self.fresh.is_some() {
            return self.fresh_lora(config, target, w);
        }
        let names = target.names.as_slice();
        let embedding = target.kind == TargetKind::Embedding;
        let endings = if embedding {
            [".lora_embedding_A", ".lora_embedding_B"]
        } else {
            [".lora_A.weight", ".lora_B.weight"]
        };
        let [Some(a), Some(b)] = endings.map(|ending| self.find(names, ending)) else {
            return Ok(None);
        };
        let module = a.0.strip_suffix(endings[0]).unwrap_or(a.0);
        let rank = self.rank(a, b)?;
        let scaling = config
            .scaling(module, rank)
            .map_err(|message| self.wrong(message))?;
        let [rows, cols] = target.matrix.shape();
        let magnitude = self.find(names, ".lora_magnitude_vector");
        let magnitude = magnitude.or_else(|| self.find(names, ".lora_magnitude_vector.weight"));
        let magnitude = match magnitude {
            Some(found) => Some(self.param(w, found, [if embedding { cols } else { rows }])?),
            None if config.use_dora => {
                return Err(self.wrong(format!("the tensor `{module}.lora_magnitude_vector` is missing")));
            }
            None => None,
        };
        if embedding {
            let (a, b) = (self.param(w, a, [rank, rows])?, self.param(w, b, [cols, rank])?);
            let mut part = LoraEmbedding::new(a, b, scaling);
            part.magnitude = magnitude;
            return Ok(Some(Part::LoraEmbedding(part)));
        }
        let (a, b) = (self.param(w, a, [rank, cols])?, self.param(w, b, [rows, rank])?);
        let mut part = Lora::new(a, b, scaling);
        part.magnitude = magnitude;
        part.dropout = config.lora_dropout;
        if let Some(found) = self.find(names, ".lora_B.bias") {
            part.bias = Some(self.param(w, found, [rows])?);
        }
        if let Some([first_a, first_b]) = self.beginning(config, target, rank, scaling)? {
            // The product is the same whatever the scaling.
            part.taken = Some([first_a, first_b.map(|x| x * scaling as f32)].map(|part| part.tensor(w)));
        }
        Ok(Some(Part::Lora(part)))
    }

    /// The matrices `[a, b]` with which an adapter begins that is a part of the weight itself, which has it no longer.
    fn beginning(
        &self,
        config: &LoraConfig,
        target: &Target,
        rank: usize,
        scaling: f64,
    ) -> NnResult<Option<[Values; 2]>> {
        let InitLora::Named(name) = &config.init_lora_weights else {
            return Ok(None);
        };
        let [rows, cols] = target.matrix.shape();
        let pissa = name == "pissa" || name.starts_with("pissa_niter_");
        if !pissa && name != "olora" {
            return match name.as_str() {
                "gaussian" | "eva" | "orthogonal" | "mica" => Ok(None),
                _ => Err(self.wrong(format!(
                    "`init_lora_weights` is {name}, which changes the base model in a way that is not known here; save the \
                     adapter with `path_initial_model_for_weight_conversion`"
                ))),
            };
        }
        if config.use_dora {
            return Err(self.wrong(format!(
                "`use_dora` with `init_lora_weights` {name} is not supported"
            )));
        }
        let weight = target.matrix.values(0..rows, &Device::flex()).into_data();
        let weight: Vec<f32> = weight.iter::<f32>().collect();
        if rank > rows.min(cols) {
            return Err(self.wrong(format!(
                "`{}` [{rows}, {cols}] has no rank of {rank}",
                target.name()
            )));
        }
        let (mut a, mut b) = (vec![0.0; rank * cols], vec![0.0; rows * rank]);
        if pissa {
            let found = linalg::svd(&weight, [rows, cols], rank);
            for (i, s) in found.s.iter().enumerate() {
                let root = (s / scaling).max(0.0).sqrt();
                let row = &found.vt[i * cols..][..cols];
                a[i * cols..][..cols]
                    .iter_mut()
                    .zip(row)
                    .for_each(|(a, x)| *a = (root * x) as f32);
                (0..rows).for_each(|row| b[row * rank + i] = (root * found.u[row * rank + i]) as f32);
            }
        } else {
            let q = linalg::orthonormal(&weight, [rows, cols], rank);
            for (i, q) in q.iter().enumerate() {
                for (row, x) in q.iter().enumerate() {
                    b[row * rank + i] = *x as f32;
                    let weight = &weight[row * cols..][..cols];
                    a[i * cols..][..cols]
                        .iter_mut()
                        .zip(weight)
                        .for_each(|(a, w)| *a += *x as f32 * w);
                }
            }
        }
        Ok(Some([Values::new(a, [rank, cols]), Values::new(b, [rows, rank])]))
    }

    fn fresh_lora(&self, config: &LoraConfig, target: &Target, w: &Weights) -> NnResult<Option<Part>> {
        if !self.targets(target)? {
            return Ok(None);
        }
        let wrong = |message: String| self.wrong(message);
        let name = target.name();
        let rank = config.rank(name).map_err(wrong)?;
        let scaling = config.scaling(name, rank).map_err(wrong)?;
        let [rows, cols] = target.matrix.shape();
        let normal = |ending: &str, shape: [usize; 2], std: f32| {
            let values = self
                .generator(&format!("{name}{ending}"))
                .normal(shape[0] * shape[1], std);
            Values::new(values, shape)
        };
        if target.kind == TargetKind::Embedding {
            if config.use_dora {
                return Err(self.wrong(format!(
                    "`use_dora`: `{name}` is a table; these are not trained so here"
                )));
            }
            let a = Values::new(vec![0.0; rank * rows], [rank, rows]);
            let b = normal(".lora_embedding_B", [cols, rank], 1.0);
            let part = LoraEmbedding::new(
                self.fresh_param(w, name, ".lora_embedding_A", a),
                self.fresh_param(w, name, ".lora_embedding_B", b),
                scaling,
            );
            return Ok(Some(Part::LoraEmbedding(part)));
        }
        let beginning = self.beginning(config, target, rank, scaling)?;
        let uniform = |ending: &str, shape: [usize; 2]| {
            // Kaiming's with a slope of the root of 5, as linear layers begin.
            let bound = 1.0 / (shape[1].max(1) as f32).sqrt();
            let values =
                self.generator(&format!("{name}{ending}"))
                    .uniform(shape[0] * shape[1], -bound, bound);
            Values::new(values, shape)
        };
        let (a_shape, b_shape) = ([rank, cols], [rows, rank]);
        let zeros = || Values::new(vec![0.0; rows * rank], b_shape);
        let [a, b] = match (&beginning, &config.init_lora_weights) {
            (Some(both), _) => both.clone(),
            (None, InitLora::Default(true)) => [uniform(".lora_A", a_shape), zeros()],
            (None, InitLora::Default(false)) => [uniform(".lora_A", a_shape), uniform(".lora_B", b_shape)],
            (None, InitLora::Named(name)) if name == "gaussian" => {
                [normal(".lora_A", a_shape, 1.0 / rank.max(1) as f32), zeros()]
            }
            (None, InitLora::Named(name)) => {
                return Err(self.wrong(format!(
                    "`init_lora_weights` is {name}, with which nothing begins here"
                )));
            }
        };
        let mut part = Lora::new(
            self.fresh_param(w, name, ".lora_A.weight", a.clone()),
            self.fresh_param(w, name, ".lora_B.weight", b.clone()),
            scaling,
        );
        part.taken = beginning.map(|[a, b]| [a, b.map(|x| x * scaling as f32)].map(|part| part.tensor(w)));
        part.dropout = config.lora_dropout;
        if config.lora_bias {
            let values = TensorData::new(vec![0.0f32; rows], [rows]);
            part.bias = Some(self.make(w, format!("{name}.lora_B.bias"), values, true));
        }
        if config.use_dora {
            let device = Device::flex();
            let of = |values: Values| Tensor::<2>::from_data(values.data(), &device);
            let norms = target.matrix.row_norms(of(a), of(b), scaling).into_data();
            part.magnitude = Some(self.make(w, format!("{name}.lora_magnitude_vector"), norms, true));
        }
        Ok(Some(Part::Lora(part)))
    }

    fn fresh_param(&self, w: &Weights, module: &str, ending: &str, values: Values) -> Param<Tensor<2>> {
        self.make(w, format!("{module}{ending}"), values.data(), self.trained)
    }

    /// Whether a fresh adapter has a part of a module.
    fn targets(&self, target: &Target) -> NnResult<bool> {
        let Some(targets) = self.config.targets() else {
            return Ok(false);
        };
        let task = self.config.task_type.as_deref();
        targets
            .contains(target.name(), target.kind, task)
            .map_err(|message| self.wrong(message))
    }

    /// The generator of a fresh parameter: whatever else there is, it gives the same.
    fn generator(&self, name: &str) -> Mt19937 {
        let seed = self.fresh.unwrap_or(0);
        // FNV-1a.
        let hash = name.bytes().fold(0xcbf2_9ce4_8422_2325u64 ^ seed, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        });
        Mt19937::new(hash ^ (hash >> 32))
    }

    fn ia3(&self, target: &Target, w: &Weights) -> NnResult<Option<Part>> {
        let Method::Ia3(config) = &self.config.method else {
            return Ok(None);
        };
        let [rows, cols] = target.matrix.shape();
        if self.fresh.is_some() {
            if !self.targets(target)? || target.kind == TargetKind::Embedding {
                return Ok(None);
            }
            let name = target.name();
            let is_feedforward = config
                .is_feedforward(name)
                .map_err(|message| self.wrong(message))?;
            let shape = if is_feedforward { [1, cols] } else { [rows, 1] };
            let ones = Values::new(vec![1.0; shape[0] * shape[1]], shape);
            return Ok(Some(Part::Ia3(Ia3 {
                ia3_l: self.fresh_param(w, name, ".ia3_l", ones),
                is_feedforward,
            })));
        }
        let Some(found) = self.find(&target.names, ".ia3_l") else {
            return Ok(None);
        };
        let is_feedforward = found.1.shape == [1, cols];
        let shape = if is_feedforward { [1, cols] } else { [rows, 1] };
        Ok(Some(Part::Ia3(Ia3 {
            ia3_l: self.param(w, found, shape)?,
            is_feedforward,
        })))
    }

    fn vera(&self, target: &Target, w: &Weights) -> NnResult<Option<Part>> {
        let Method::Vera(config) = &self.config.method else {
            return Ok(None);
        };
        let names = target.names.as_slice();
        let [rows, cols] = target.matrix.shape();
        let endings = [".vera_lambda_d", ".vera_lambda_b"];
        let begins = self.fresh.is_some() && target.kind != TargetKind::Embedding && self.targets(target)?;
        let vectors = endings.map(|ending| self.find(names, ending));
        if !begins && vectors.iter().any(Option::is_none) {
            return Ok(None);
        }
        let [vera_a, vera_b] = self.projections(w)?;
        let ([rank, width], [height, other]) = (vera_a.dims(), vera_b.dims());
        if rank != other || width < cols || height < rows {
            return Err(self.wrong(format!(
                "`vera_A` [{rank}, {width}] and `vera_B` [{height}, {other}] are no projections for `{}` [{rows}, {cols}]",
                target.name()
            )));
        }
        let vector = |found: Option<(&str, &TensorView)>, ending: &str, size: usize, value: f64| match found {
            Some(found) => self.param(w, found, [size]),
            None => {
                let values = TensorData::new(vec![value as f32; size], [size]);
                Ok(self.make(w, format!("{}{ending}", target.name()), values, self.trained))
            }
        };
        let [d, b] = vectors;
        Ok(Some(Part::Vera(Vera {
            vera_a,
            vera_b,
            lambda_d: vector(d, endings[0], rank, config.d_initial)?,
            lambda_b: vector(b, endings[1], rows, 0.0)?,
            dropout: config.vera_dropout,
        })))
    }

    /// VeRA's matrices.
    fn projections(&self, w: &Weights) -> NnResult<[Tensor<2>; 2]> {
        let mut kept = lock(&self.projections);
        if let Some(both) = &*kept {
            return Ok(both.clone());
        }
        if let Method::Vera(config) = &self.config.method
            && (!config.save_projection || self.fresh.is_some())
            && !self.tensors.contains_key("vera_A")
        {
            let both = self.drawn_projections(config, w)?;
            *kept = Some(both.clone());
            return Ok(both);
        }
        let of = |name: &str| {
            let (name, view) = self
                .find(&[name], "")
                .ok_or_else(|| self.wrong(format!("the tensor `{SHORT_PREFIX}{name}` is missing")))?;
            let [rows, cols] = view.shape[..] else {
                return Err(self.wrong(format!("the tensor `{name}` has the shape {:?}", view.shape)));
            };
            let values = to_f32(view).map_err(|reason| self.wrong(format!("`{name}` {reason}")))?;
            Ok(Tensor::from_data(
                TensorData::new(values, [rows, cols]),
                w.device(),
            ))
        };
        let both = [of("vera_A")?, of("vera_B")?];
        *kept = Some(both.clone());
        Ok(both)
    }

    /// VeRA's matrices where they are not stored: PyTorch's generator draws the same again.
    fn drawn_projections(&self, config: &crate::config::VeraConfig, w: &Weights) -> NnResult<[Tensor<2>; 2]> {
        // As large as the largest module in either direction, which has this many outputs and, as far as the adapter says,
        // who knows how many inputs.
        let outputs = self
            .tensors
            .iter()
            .filter(|(name, _)| name.ends_with(".vera_lambda_b"));
        let [widest_rows, widest_cols] = *lock(&self.widest);
        let rows = outputs
            .filter_map(|(_, view)| view.shape.first().copied())
            .chain(widest_rows)
            .max()
            .unwrap_or(0);
        let cols = widest_cols.ok_or_else(|| {
            self.wrong(format!(
                "`{SHORT_PREFIX}vera_A` is not stored; say how wide the model's widest adapted module is, or save the adapter \
                 with `save_projection`"
            ))
        })?;
        let mut generator = Mt19937::new(config.projection_prng_key);
        let mut draw = |shape: [usize; 2]| {
            let bound = 3f64.sqrt() * (2f64.sqrt() / (shape[1].max(1) as f64).sqrt());
            let values = generator.uniform(shape[0] * shape[1], -bound as f32, bound as f32);
            Values::new(values, shape).tensor(w)
        };
        let first = draw([config.r, cols]);
        Ok([first, draw([rows, config.r])])
    }

    /// Says how many inputs the widest module has that is adapted. VeRA adapters need it that do not store their random
    /// matrices.
    #[must_use]
    pub fn with_widest(self, inputs: usize) -> Self {
        lock(&self.widest)[1] = Some(inputs);
        self
    }

    /// Whether it has to know all modules that it adapts before a model is loaded with it: to be
    /// [measured](Self::measure) on a survey of the model. VeRA's matrices are as large as the largest module.
    pub fn begins_with_a_survey(&self) -> bool {
        self.fresh.is_some() && matches!(self.config.method, Method::Vera(_))
    }

    /// Takes note of how large the modules are that it adapts.
    ///
    /// # Errors
    /// A pattern of the configuration that is none.
    pub fn measure(&self, matrices: &[SurveyedMatrix]) -> Result<()> {
        let Some(targets) = self.config.targets() else {
            return Ok(());
        };
        let task = self.config.task_type.as_deref();
        let mut widest = [None; 2];
        for matrix in matrices {
            let kind = match matrix.role {
                Role::Linear | Role::Expert => TargetKind::Linear,
                Role::Conv1d => TargetKind::Conv1d,
                Role::Output => TargetKind::Output,
                Role::Kept => TargetKind::Embedding,
            };
            let adapts = targets.contains(matrix.module(), kind, task);
            let adapts =
                adapts.map_err(|message| Error::Refused(format!("{}: {message}", self.switch.name())))?;
            if adapts {
                for (most, size) in widest.iter_mut().zip(matrix.shape) {
                    *most = Some(most.unwrap_or(0).max(size));
                }
            }
        }
        *lock(&self.widest) = widest;
        Ok(())
    }

    /// VeRA's matrices, where a fresh adapter stores them.
    fn saved_projections(&self) -> Option<Stored> {
        match &self.config.method {
            Method::Vera(config) if config.save_projection && self.fresh.is_some() => {}
            _ => return None,
        }
        let both = lock(&self.projections).clone()?;
        let stored = |(name, tensor): (&str, Tensor<2>)| {
            let shape = tensor.dims().to_vec();
            (
                format!("{PREFIX}{name}"),
                (shape, tensor.into_data().iter::<f32>().collect()),
            )
        };
        Some(["vera_A", "vera_B"].into_iter().zip(both).map(stored).collect())
    }

    /// The virtual tokens that a fresh adapter's encoder makes of what was trained.
    fn encoded_prompt(&self, trained: &Stored) -> Option<(Vec<usize>, Vec<f32>)> {
        let tensor = |name: &str| trained.get(&format!("{PREFIX}{ENCODER}{name}"));
        let device = Device::flex();
        let matrix = |name: &str| {
            let (shape, values) = tensor(name)?;
            let [rows, cols] = shape[..] else { return None };
            let data = TensorData::new(values.clone(), [rows, cols]);
            Some(Param::initialized(
                ParamId::new(),
                Tensor::<2>::from_data(data, &device),
            ))
        };
        let embedding = matrix(EMBEDDING)?;
        let (_, act) = self.encoder_layers()?;
        let mut layers = Vec::new();
        while let Some(weight) = matrix(&layer_name(&self.config.method, layers.len(), "weight")) {
            let (shape, values) = tensor(&layer_name(&self.config.method, layers.len(), "bias"))?;
            let data = TensorData::new(values.clone(), [shape[0]]);
            let bias = Param::initialized(ParamId::new(), Tensor::<1>::from_data(data, &device));
            layers.push(Linear {
                weight: Matrix::dense(weight),
                bias: Some(bias),
            });
        }
        let values = PromptEncoder {
            embedding,
            layers,
            act,
        }
        .forward();
        Some((values.dims().to_vec(), values.into_data().iter::<f32>().collect()))
    }

    /// How many layers a fresh prompt's encoder has, and what is between them; none where the tokens are learned as they
    /// are.
    fn encoder_layers(&self) -> Option<(usize, Activation)> {
        match &self.config.method {
            Method::PTuning(_) => Some((3, Activation::Relu)),
            Method::PrefixTuning(config) => {
                let projects = config.other.get("prefix_projection").and_then(Value::as_bool);
                (projects == Some(true)).then_some((2, Activation::Tanh))
            }
            _ => None,
        }
    }

    /// A fresh prompt of so many values for each token, which an encoder makes.
    fn fresh_encoder(
        &self,
        config: &PromptConfig,
        outputs: usize,
        w: &Weights,
    ) -> NnResult<Option<PromptEncoder>> {
        let Some((count, act)) = self.encoder_layers() else {
            return Ok(None);
        };
        let width = config.token_dim.unwrap_or(outputs);
        let hidden = config.other.get("encoder_hidden_size").and_then(Value::as_u64);
        let hidden = hidden.map_or(width, |hidden| hidden as usize);
        if hidden == 0 || width == 0 {
            return Err(self.wrong("`encoder_hidden_size` and `token_dim` cannot be 0"));
        }
        let name = |name: &str| format!("{ENCODER}{name}");
        let table = [config.num_virtual_tokens, width];
        let values = self.generator(&name(EMBEDDING)).normal(table[0] * table[1], 1.0);
        let embedding = self.make(w, name(EMBEDDING), TensorData::new(values, table), true);
        let mut layers = Vec::new();
        let mut inputs = width;
        for index in 0..count {
            let outputs = if index + 1 == count { outputs } else { hidden };
            // As PyTorch's linear layers begin.
            let bound = 1.0 / (inputs as f32).sqrt();
            let draw = |name: &str, count| self.generator(name).uniform(count, -bound, bound);
            let [weight, bias] =
                ["weight", "bias"].map(|last| name(&layer_name(&self.config.method, index, last)));
            let values = TensorData::new(draw(&weight, outputs * inputs), [outputs, inputs]);
            let of_bias = TensorData::new(draw(&bias, outputs), [outputs]);
            layers.push(Linear {
                weight: Matrix::dense(self.make(w, weight, values, true)),
                bias: Some(self.make(w, bias, of_bias, true)),
            });
            inputs = outputs;
        }
        Ok(Some(PromptEncoder {
            embedding,
            layers,
            act,
        }))
    }

    /// A module that it brings whole.
    fn saved(&self, target: &Target, w: &Weights) -> NnResult<Option<Part>> {
        if self.fresh.is_some() {
            return Ok(self.fresh_saved(target, w));
        }
        let Some((name, view)) = self.find(&target.names, ".weight") else {
            return Ok(None);
        };
        let shape = target.matrix.shape();
        let turned = target.kind == TargetKind::Conv1d;
        let expected = if turned { [shape[1], shape[0]] } else { shape };
        // Beside a table that is adapted, the table itself may be saved, too; that is not trained.
        let module = name.strip_suffix(".weight").unwrap_or(name);
        let trained = self.trained && self.config.targets().is_some_and(|targets| targets.saves(module));
        let mut weight = self.param_that(w, (name, view), expected, trained)?;
        if turned {
            weight = weight.map(Tensor::transpose);
        }
        let bias = match self.find(&target.names, ".bias") {
            Some(found) => Some(self.param_that(w, found, [shape[0]], trained)?),
            None => None,
        };
        Ok(Some(Part::Saved(Saved {
            weight: Matrix::dense(weight),
            bias,
        })))
    }
}

impl Adapter {
    /// A copy of a module, to be trained.
    fn fresh_saved(&self, target: &Target, w: &Weights) -> Option<Part> {
        let name = target.name();
        if !self.config.targets().is_some_and(|targets| targets.saves(name)) {
            return None;
        }
        let rows = target.matrix.shape()[0];
        let values = target.matrix.values(0..rows, &Device::flex()).into_data();
        let weight = self.make(w, format!("{name}.weight"), values, true);
        let bias = target.bias.map(|bias| {
            let values = bias.val().into_data();
            self.make(w, format!("{name}.bias"), values, true)
        });
        Some(Part::Saved(Saved {
            weight: Matrix::dense(weight),
            bias,
        }))
    }

    /// Whether a fresh adapter trains the model's own parameter `name`, which is no matrix.
    fn trains_own(&self, name: &str) -> bool {
        let Some(targets) = self.config.targets() else {
            return false;
        };
        let (module, last) = name.rsplit_once('.').unwrap_or(("", name));
        if targets.saves(module) {
            return true;
        }
        let bias = match &self.config.method {
            Method::Lora(config) => config.bias,
            Method::Vera(config) => config.bias,
            _ => Bias::None,
        };
        last == "bias"
            && match bias {
                Bias::None => false,
                Bias::All => true,
                Bias::LoraOnly => {
                    let task = self.config.task_type.as_deref();
                    targets
                        .contains(module, TargetKind::Linear, task)
                        .unwrap_or(false)
                }
            }
    }
}

impl oxiformers_nn::Adapter for Adapter {
    fn switch(&self) -> &Arc<Switch> {
        &self.switch
    }

    fn parts(&self, target: &Target, w: &Weights) -> NnResult<Vec<Part>> {
        let own = match &self.config.method {
            Method::Lora(_) => self.lora(target, w)?,
            Method::Ia3(_) => self.ia3(target, w)?,
            Method::Vera(_) => self.vera(target, w)?,
            Method::PromptTuning(_) | Method::PTuning(_) | Method::PrefixTuning(_) => None,
        };
        Ok(self.saved(target, w)?.into_iter().chain(own).collect())
    }

    fn prompt(&self, width: usize, layers: usize, w: &Weights) -> NnResult<Option<Prompt>> {
        let (config, prefix) = match &self.config.method {
            Method::PromptTuning(config) | Method::PTuning(config) => (config, false),
            Method::PrefixTuning(config) => (config, true),
            _ => return Ok(None),
        };
        let (kind, columns) = match prefix {
            false => (PromptKind::Embeddings, width),
            true => {
                let heads = config.num_attention_heads.filter(|heads| *heads > 0);
                let (Some(heads), Some(token_dim)) = (heads, config.token_dim) else {
                    return Err(
                        self.wrong("`num_attention_heads` and `token_dim` are needed, as PEFT writes them")
                    );
                };
                (
                    PromptKind::KeysAndValues { layers, heads },
                    2 * layers * token_dim,
                )
            }
        };
        let shape = [config.num_virtual_tokens, columns];
        let values = match (self.fresh.is_some(), self.find(&[PROMPT], "")) {
            (true, _) => match self.fresh_encoder(config, columns, w)? {
                Some(encoder) => PromptValues::Encoded(encoder),
                None => {
                    let values = self.generator(PROMPT).normal(shape[0] * shape[1], 1.0);
                    let values = TensorData::new(values, shape);
                    PromptValues::Stored(self.make(w, PROMPT.to_string(), values, true))
                }
            },
            (false, Some(found)) => PromptValues::Stored(self.param(w, found, shape)?),
            (false, None) => return Err(self.wrong(format!("the tensor `{PROMPT}` is missing"))),
        };
        Ok(Some(Prompt::new(values, kind, self.switch.clone())))
    }

    fn replacement(&self, names: &[&str], stored: bool) -> Option<TensorView> {
        let (name, view) = names.iter().find_map(|name| self.tensors.get_key_value(*name))?;
        // What belongs to a matrix takes the place of the checkpoint's where that has none. Else it is a part of it, which
        // can be switched off.
        let module = name.rsplit_once('.').map_or("", |(module, _)| module);
        let weight = self.tensors.get(&format!("{module}.weight"));
        if stored && weight.is_some_and(|weight| weight.shape.len() == 2) {
            return None;
        }
        lock(&self.used).insert(name.clone());
        Some(view.clone())
    }

    fn trains(&self, names: &[&str]) -> bool {
        if self.fresh.is_some() {
            return names.first().is_some_and(|name| self.trains_own(name));
        }
        self.trained && names.iter().any(|name| self.tensors.contains_key(*name))
    }

    fn shape_of(&self, name: &str) -> Option<Vec<usize>> {
        self.tensors.get(name).map(|view| view.shape.clone())
    }

    fn finish(&self) -> NnResult<()> {
        let used = lock(&self.used);
        let left: Vec<_> = self.tensors.keys().filter(|name| !used.contains(*name)).collect();
        match left.as_slice() {
            [] => Ok(()),
            [first, ..] => Err(self.wrong(format!(
                "the model has no module for {} of its {} tensors, such as `{first}`; is it an adapter of another model?",
                left.len(),
                self.tensors.len()
            ))),
        }
    }
}

/// The tensors of an adapter's file, by their names without PEFT's prefix.
///
/// # Errors
/// Where there is no file, or it cannot be read.
pub fn tensors(files: &ModelFiles) -> Result<BTreeMap<String, TensorView>> {
    let mut bytes = None;
    for (file, name) in [
        ("adapter_model.safetensors", "model.safetensors"),
        ("adapter_model.bin", "pytorch_model.bin"),
    ] {
        if let Some(found) = files.get(file)? {
            bytes = Some((name.to_string(), found));
            break;
        }
    }
    let bytes = bytes.ok_or_else(|| Error::Tensor {
        place: files.name().to_string(),
        name: "adapter_model.safetensors".to_string(),
        message: "is no file here".to_string(),
    })?;
    let checkpoint = Checkpoint::open(&ModelFiles::from_memory(files.name(), [bytes]))?;
    let names: Vec<String> = checkpoint.tensors().map(|info| info.name.clone()).collect();
    let tensor = |name: String| {
        let view = checkpoint.tensor(&name)?;
        let short = name
            .strip_prefix(PREFIX)
            .or_else(|| name.strip_prefix(SHORT_PREFIX));
        // The wrapped module of one that is adapted.
        let short = short.unwrap_or(&name).replace(".base_layer.", ".");
        Ok((short, view))
    };
    // With `bias` all, PEFT writes those of modules that are saved once more, as they are called inside of it.
    let inside = |name: &String| name.contains(".original_module.") || name.contains(".modules_to_save.");
    names
        .into_iter()
        .filter(|name| !inside(name))
        .map(tensor)
        .collect()
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
