//! Where parameters come from: a checkpoint, or an initializer.

use std::collections::BTreeSet;
use std::fmt::Display;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use burn::module::{Param, ParamId};
use burn::tensor::{Device, FloatDType, Shape, Tensor, TensorData};
use oxiformers_hub::checkpoint::{Checkpoint, DType, TensorView};
use oxiformers_kernels::threads;
pub use oxiformers_quant::to_f32;
use oxiformers_quant::{PackedMatrix, Recipe};

use crate::adapter::AdapterLayer;
use crate::cache::CachePrecision;
use crate::init::{Normal, normal};
use crate::linear::{Matrix, Observer};
use crate::parameters::{Kind, Parameter, Parameters, Slot};
use crate::prompt::Prompt;
use crate::survey::Survey;
use crate::ternary::Lambda;
use crate::{Adapter, Error, Result, Target, TargetKind};

/// Named tensors of one model.
///
/// [`Checkpoint`] is the plain one; a source that renames or cuts tensors (as for GGUF) wraps it.
pub trait TensorSource: Send + Sync {
    /// What to call it in messages.
    fn origin(&self) -> String;
    /// All names.
    fn names(&self) -> Vec<String>;
    /// Whether the tensor is there.
    fn contains(&self, name: &str) -> bool;
    /// The stored tensor.
    fn tensor(&self, name: &str) -> oxiformers_hub::Result<TensorView>;
    /// Whether every matrix is stored as `[out_features, in_features]`, even where the original checkpoint has
    /// it the other way round.
    fn rows_are_outputs(&self) -> bool {
        false
    }
}

impl TensorSource for Checkpoint {
    fn origin(&self) -> String {
        self.name().to_string()
    }

    fn names(&self) -> Vec<String> {
        self.tensors().map(|info| info.name.clone()).collect()
    }

    fn contains(&self, name: &str) -> bool {
        self.info(name).is_some()
    }

    fn tensor(&self, name: &str) -> oxiformers_hub::Result<TensorView> {
        Checkpoint::tensor(self, name)
    }
}

/// How a parameter starts where there is no checkpoint.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Init {
    /// Normal with mean 0 and the model's `initializer_range`.
    Normal,
    /// All zeros.
    Zeros,
    /// All ones.
    Ones,
}

/// How parameters are held.
#[derive(Debug, Clone)]
pub struct LoadOptions {
    /// Where they live.
    pub device: Device,
    /// Their float type; `None` keeps matrices as stored (packed or 16-bit) where the device multiplies
    /// with them directly, and computes in f32.
    pub dtype: Option<FloatDType>,
    /// Who sees the inputs of linear layers, for calibration.
    pub observer: Option<Arc<dyn Observer>>,
    /// What matrices of linear layers become that are not stored quantized. Matrices are quantized one after the other:
    /// no two are in memory as floats. Where the device does not multiply with them so, or `dtype` is given, they get
    /// the values that quantization leaves.
    pub quantization: Option<Arc<Recipe>>,
    /// How far the forward pass quantizes, where a model is trained for a [quantization](Self::quantization) that can be
    /// trained so: its matrices keep their values, and gradients pass straight through to them.
    pub straight_through: Option<Lambda>,
    /// Who is told which matrices a model is made of. What is loaded with it can be described, but not run.
    pub survey: Option<Arc<Survey>>,
    /// Adapters, in the order in which they are applied. Where there are any, the model's own parameters are not trained,
    /// and on the CPU its matrices stay packed under autodiff, too.
    pub adapters: Vec<Arc<dyn Adapter>>,
    /// Who is told which parameters a model has, for training: those that it [trains](Parameters::trains) are held as
    /// dense tensors.
    pub parameters: Option<Arc<Parameters>>,
    /// Whether heads that a checkpoint lacks are initialized; it is an error else.
    pub new_heads: bool,
    /// Whether heads of another shape than the configuration says are initialized anew, such as those for other labels.
    pub ignore_mismatched_sizes: bool,
    /// Seed of what is initialized. The values of a tensor depend on this and its name alone.
    pub seed: u64,
    /// Whether adapters are merged into the weights, which are floats then. They cannot be switched any more.
    pub merge_adapters: bool,
    /// Whether output layers that are stored as floats are held in 8 bits (GGUF's Q8_0), where the device multiplies with
    /// these: half of the bytes to read for each token, which is most of them where other layers have few bits. Tables that
    /// output layers share stay as they are, and are only looked up then.
    pub quantize_output: bool,
}

impl Default for LoadOptions {
    fn default() -> Self {
        Self {
            device: Device::flex(),
            dtype: None,
            observer: None,
            quantization: None,
            straight_through: None,
            survey: None,
            adapters: Vec::new(),
            parameters: None,
            new_heads: false,
            ignore_mismatched_sizes: false,
            seed: 0,
            merge_adapters: false,
            quantize_output: false,
        }
    }
}

/// A place in a checkpoint, from which layers take their parameters.
///
/// It remembers what was taken, so that [`finish`](Self::finish) can name what was left over.
#[derive(Clone)]
pub struct Weights {
    pub(crate) shared: Arc<Shared>,
    prefix: String,
    role: Role,
    /// Linear layers that are kept, too, by the last components of their names.
    kept: &'static [&'static str],
    /// What the parameters here belong to.
    kind: Kind,
    /// Whether a model here has no layer that makes logits.
    pub(crate) without_output: bool,
    /// Standard deviation of what is initialized here, where that is not the model's `initializer_range`.
    std: Option<f64>,
    /// The row of a table here that stands for nothing.
    padding: Option<usize>,
}

/// What a tensor of that name is initialized with.
type Distribution = dyn Fn(&str) -> Option<Normal> + Send + Sync;

pub(crate) struct Shared {
    pub(crate) source: Option<Box<dyn TensorSource>>,
    pub(crate) options: LoadOptions,
    /// How modules are stored that are not stored as they are.
    pub(crate) stored_as: Option<Recipe>,
    initializer_range: f64,
    /// How the tensors are initialized that have a distribution of their own.
    distribution: Option<Box<Distribution>>,
    /// The row of padding in the tables of tokens.
    padding_idx: Option<usize>,
    base_prefix: String,
    pub(crate) used: Mutex<BTreeSet<String>>,
    params: Mutex<Vec<(ParamId, String)>>,
    /// What the checkpoint lacked, and was initialized.
    new: Mutex<Vec<String>>,
    /// What is sure to be multiplied with, in the order of loading.
    products: Mutex<Vec<Weak<dyn PackedMatrix>>>,
    /// Whether one of these is held in fewer than 32 bits a value.
    narrow: AtomicBool,
    /// What quantization comes to.
    pub(crate) fitting: Mutex<Fitting>,
}

/// Whether a method of quantization has something to do.
#[derive(Default)]
pub(crate) struct Fitting {
    /// Whether a matrix becomes quantized.
    pub some: bool,
    /// The first whose shape does not fit.
    pub misfit: Option<(String, [usize; 2])>,
}

/// What matrices are for, as far as it matters to quantization.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// A linear layer's weight.
    Linear,
    /// One that checkpoints store as `[in_features, out_features]`.
    Conv1d,
    /// The weight of the layer that makes logits.
    Output,
    /// The weight of an expert: a part of one tensor, where Transformers has no linear layers.
    Expert,
    /// Tables that are looked up, routers of experts, and whatever else Transformers has no linear layer for.
    Kept,
}

impl Weights {
    /// Parameters of a checkpoint. A name that begins with `base_prefix` is also found without it, as in
    /// checkpoints that were saved from the base model alone.
    pub fn new(source: impl TensorSource + 'static, base_prefix: &str, options: LoadOptions) -> Self {
        Self::build(Some(Box::new(source)), base_prefix, options, 0.0)
    }

    /// Fresh parameters: those of [`Init::Normal`] by the seed of `options` and their names.
    pub fn init(options: LoadOptions, initializer_range: f64) -> Self {
        Self::build(None, "", options, initializer_range)
    }

    /// The same checkpoint, whose new heads have this standard deviation.
    #[must_use]
    pub fn initialized_with(mut self, initializer_range: f64) -> Self {
        if let Some(shared) = Arc::get_mut(&mut self.shared) {
            shared.initializer_range = initializer_range;
        }
        self
    }

    /// The same checkpoint, where tensors that `distribution` gives one by their whole names are initialized so.
    #[must_use]
    pub fn distributed(
        mut self,
        distribution: impl Fn(&str) -> Option<Normal> + Send + Sync + 'static,
    ) -> Self {
        if let Some(shared) = Arc::get_mut(&mut self.shared) {
            shared.distribution = Some(Box::new(distribution));
        }
        self
    }

    /// The same checkpoint, in whose [tables of tokens](crate::Embedding::load_tokens) the row `padding_idx` stands for
    /// nothing.
    #[must_use]
    pub fn padded_with(mut self, padding_idx: Option<usize>) -> Self {
        if let Some(shared) = Arc::get_mut(&mut self.shared) {
            shared.padding_idx = padding_idx;
        }
        self
    }

    /// The row of padding in tables of tokens.
    pub(crate) fn padding_idx(&self) -> Option<usize> {
        self.shared.padding_idx
    }

    /// The same checkpoint, whose modules are stored as its configuration says.
    #[must_use]
    pub fn stored_as(mut self, recipe: Option<&Recipe>) -> Self {
        if let (Some(recipe), Some(shared)) = (recipe, Arc::get_mut(&mut self.shared)) {
            if recipe.on_load() {
                shared.options.quantization = Some(Arc::new(recipe.clone()));
            } else {
                shared.stored_as = Some(recipe.clone());
            }
        }
        self
    }

    fn build(
        source: Option<Box<dyn TensorSource>>,
        base_prefix: &str,
        options: LoadOptions,
        initializer_range: f64,
    ) -> Self {
        let base_prefix = if base_prefix.is_empty() {
            String::new()
        } else {
            format!("{base_prefix}.")
        };
        Self {
            shared: Arc::new(Shared {
                source,
                options,
                stored_as: None,
                initializer_range,
                distribution: None,
                padding_idx: None,
                base_prefix,
                used: Mutex::default(),
                params: Mutex::default(),
                new: Mutex::default(),
                products: Mutex::default(),
                narrow: AtomicBool::new(false),
                fitting: Mutex::default(),
            }),
            prefix: String::new(),
            role: Role::Linear,
            kept: &[],
            kind: Kind::Other,
            without_output: false,
            std: None,
            padding: None,
        }
    }

    /// The place `name` below this one.
    pub fn pp(&self, name: impl Display) -> Self {
        Self {
            prefix: self.full(&name.to_string()),
            ..self.clone()
        }
    }

    /// The same place, where linear layers whose names end with one of `names` are kept: Transformers never quantizes them.
    #[must_use]
    pub fn keeping(&self, names: &'static [&'static str]) -> Self {
        Self {
            kept: names,
            ..self.clone()
        }
    }

    /// The place of that whole name.
    pub(crate) fn at(&self, prefix: String) -> Self {
        Self {
            prefix,
            ..self.clone()
        }
    }

    /// What a matrix here is for.
    pub(crate) fn role_of(&self, module: &str) -> Role {
        match module.rsplit('.').next() {
            Some(last) if self.kept.contains(&last) => Role::Kept,
            _ => self.role,
        }
    }

    /// The same place, whose matrices are for something else than linear layers.
    #[must_use]
    pub fn with_role(&self, role: Role) -> Self {
        Self { role, ..self.clone() }
    }

    /// The same place, whose parameters belong to something that optimizers treat in its own way.
    #[must_use]
    pub fn with_kind(&self, kind: Kind) -> Self {
        Self { kind, ..self.clone() }
    }

    /// The same place, for a decoder without the layer that makes logits: another head stands on it.
    #[must_use]
    pub fn without_output(&self) -> Self {
        Self {
            without_output: true,
            ..self.clone()
        }
    }

    /// The same place, where what is initialized has a standard deviation of its own.
    #[must_use]
    pub fn with_std(&self, std: f64) -> Self {
        Self {
            std: Some(std),
            ..self.clone()
        }
    }

    /// The same place, where the row `padding` of what is initialized is 0.
    pub(crate) fn with_padding(&self, padding: Option<usize>) -> Self {
        Self {
            padding,
            ..self.clone()
        }
    }

    /// Where parameters live.
    pub fn device(&self) -> &Device {
        &self.shared.options.device
    }

    /// Whether a tensor of this name is stored here. Fresh parameters have every name.
    pub fn contains(&self, name: &str) -> bool {
        self.shared.source.is_none() || self.is_stored(name)
    }

    /// Like [`contains`](Self::contains), but false for fresh parameters: for forms of a checkpoint that
    /// only some files have.
    pub fn is_stored(&self, name: &str) -> bool {
        let full = self.full(name);
        self.stored(&full).is_some() || self.find_module(&full).is_some()
    }

    /// Whether both names are stored, with the same shape and values; the second one is then known.
    pub fn same(&self, name: &str, other: &str) -> bool {
        let view = |name: &str| {
            let full = self.full(name);
            let stored = self.stored(&full)?;
            let view = self.shared.source.as_ref()?.tensor(stored).ok()?;
            Some((stored.to_string(), view))
        };
        let (Some((_, first)), Some((stored, second))) = (view(name), view(other)) else {
            return false;
        };
        let same = first.dtype == second.dtype && first.shape == second.shape && first.data == second.data;
        if same {
            lock(&self.shared.used).insert(stored);
        }
        same
    }

    /// A dense parameter of the given shape.
    pub fn param<const D: usize>(
        &self,
        name: &str,
        shape: [usize; D],
        init: Init,
    ) -> Result<Param<Tensor<D>>> {
        self.param_as(name, name, shape, init)
    }

    /// A parameter that is stored under an old name, and is saved under the one that it has now.
    ///
    /// # Errors
    /// As [`param`](Self::param).
    pub fn param_as<const D: usize>(
        &self,
        stored: &str,
        name: &str,
        shape: [usize; D],
        init: Init,
    ) -> Result<Param<Tensor<D>>> {
        let full = self.full(stored);
        let tensor = match self.take(&full, &shape)? {
            Some(view) => self.dense(&full, &view)?,
            None => self.fresh(&full, shape, init),
        };
        self.renamed(&full, name);
        let full = self.full(name);
        Ok(self.register(&full, &Slot::whole(&full, &shape), tensor))
    }

    /// A parameter whose values are a part of the stored tensor `slot`, the name of which is relative to this place. `name`
    /// is what it is called here.
    ///
    /// # Errors
    /// As [`param`](Self::param).
    pub fn param_of<const D: usize>(
        &self,
        name: &str,
        slot: Slot,
        shape: [usize; D],
        init: Init,
    ) -> Result<Param<Tensor<D>>> {
        let slot = Slot {
            tensor: self.full(&slot.tensor),
            ..slot
        };
        let full = self.full(name);
        let tensor = match self.take(&slot.tensor, &slot.shape)? {
            Some(view) => {
                let values = slot.gather(&shape, &self.values(&slot.tensor, &view)?);
                self.cast(Tensor::from_data(TensorData::new(values, shape), self.device()))
            }
            None => self.fresh(&full, shape, init),
        };
        Ok(self.register(&full, &slot, tensor))
    }

    /// Values that are stored with a model and never trained.
    ///
    /// # Errors
    /// As [`param`](Self::param).
    pub fn buffer<const D: usize>(
        &self,
        name: &str,
        shape: [usize; D],
        init: Init,
    ) -> Result<Param<Tensor<D>>> {
        let full = self.full(name);
        let tensor = match self.take(&full, &shape)? {
            Some(view) => self.dense(&full, &view)?,
            None => self.fresh(&full, shape, init),
        };
        Ok(Param::initialized(ParamId::new(), tensor))
    }

    /// Takes note that what is stored as `full` is called `name` from now on.
    fn renamed(&self, full: &str, name: &str) {
        if let Some(parameters) = self.shared.options.parameters.as_ref()
            && full != self.full(name)
        {
            parameters.rename(full, &self.full(name));
        }
    }

    /// A parameter of an adapter, whose whole name is `name`; `trained` says whether it wants gradients.
    pub fn adapter_param<const D: usize>(
        &self,
        name: String,
        values: TensorData,
        trained: bool,
    ) -> Param<Tensor<D>> {
        let tensor = Tensor::from_data(values, self.device());
        let trained = trained && tensor.is_autodiff();
        let id = ParamId::new();
        lock(&self.shared.params).push((id, name.clone()));
        let slot = Slot::whole(&name, &tensor.dims());
        if trained && let Some(parameters) = &self.shared.options.parameters {
            parameters.add(Parameter {
                id,
                name,
                shape: slot.shape.clone(),
                slot,
                kind: Kind::Other,
            });
        }
        Param::initialized(id, tensor).set_require_grad(trained)
    }

    /// The matrix and the bias of the module at this place with the parts that adapters have of it: beside the matrix, or
    /// merged into it.
    pub(crate) fn adapt(
        &self,
        matrix: Matrix,
        bias: Option<Param<Tensor<1>>>,
        kind: TargetKind,
    ) -> Result<(Matrix, Option<Param<Tensor<1>>>)> {
        let options = &self.shared.options;
        if options.adapters.is_empty() || options.survey.is_some() {
            return Ok((matrix, bias));
        }
        let target = Target {
            names: self.names_of(&self.prefix),
            kind,
            matrix: &matrix,
            bias: bias.as_ref(),
        };
        let layers = self.adapter_layers(&target)?;
        let matrix = matrix.with_adapters(layers);
        if !options.merge_adapters || matrix.adapters().is_empty() {
            return Ok((matrix, bias));
        }
        let (weight, bias) = matrix.merged(bias.map(|bias| bias.val()), self.device());
        let full = self.full("weight");
        let shape = weight.dims().to_vec();
        let view = TensorView {
            dtype: DType::F32,
            shape,
            data: weight.into_data().convert::<f32>().bytes().to_vec().into(),
        };
        // Nothing of it is trained.
        let bias = bias.map(|bias| Param::initialized(ParamId::new(), bias));
        let slot = Slot::whole(&full, &view.shape);
        Ok((self.matrix_from(&full, slot, view)?, bias))
    }

    /// Whether adapters become part of the weights.
    pub(crate) fn merges_adapters(&self) -> bool {
        self.shared.options.merge_adapters && !self.shared.options.adapters.is_empty()
    }

    /// The virtual tokens that adapters bring.
    pub(crate) fn prompts(&self, width: usize, layers: usize) -> Result<Vec<Prompt>> {
        let options = &self.shared.options;
        if options.survey.is_some() {
            return Ok(Vec::new());
        }
        let prompts = options
            .adapters
            .iter()
            .map(|adapter| adapter.prompt(width, layers, self));
        prompts.filter_map(Result::transpose).collect()
    }

    /// The parts that adapters have of a module, in their order.
    ///
    /// # Errors
    /// An adapter that does not fit the module.
    pub fn adapter_layers(&self, target: &Target) -> Result<Vec<AdapterLayer>> {
        let mut layers = Vec::new();
        for adapter in &self.shared.options.adapters {
            let layer = |part| AdapterLayer {
                part,
                switch: adapter.switch().clone(),
            };
            layers.extend(adapter.parts(target, self)?.into_iter().map(layer));
        }
        Ok(layers)
    }

    /// What adapters may take a layer here for.
    pub(crate) fn target_kind(&self) -> TargetKind {
        match self.role_of(&self.prefix) {
            Role::Output => TargetKind::Output,
            Role::Kept => TargetKind::Kept,
            _ => TargetKind::Linear,
        }
    }

    /// Both names of `full`: with and without the base model's.
    fn names_of<'a>(&self, full: &'a str) -> Vec<&'a str> {
        let base = self.shared.base_prefix.as_str();
        let short = full.strip_prefix(base).filter(|_| !base.is_empty());
        std::iter::once(full).chain(short).collect()
    }

    /// What an adapter has in the place of the checkpoint's `full`.
    fn replacement(&self, full: &str) -> Option<TensorView> {
        let adapters = &self.shared.options.adapters;
        if adapters.is_empty() {
            return None;
        }
        let (names, stored) = (
            self.names_of(full),
            self.stored(full).is_some() || self.find_module(full).is_some(),
        );
        adapters
            .iter()
            .rev()
            .find_map(|adapter| adapter.replacement(&names, stored))
    }

    /// Takes note that the matrix is no mere table: there will be products with it.
    pub(crate) fn will_multiply(&self, matrix: &Matrix) {
        let Some(packed) = matrix.as_packed() else {
            return;
        };
        let [rows, cols] = packed.shape();
        if packed.num_bytes() < 4 * rows * cols {
            self.shared.narrow.store(true, Ordering::Relaxed);
        }
        lock(&self.shared.products).push(Arc::downgrade(packed));
    }

    /// What a cache keeps keys and values as beside the weights that were loaded: half precision where some of them are
    /// multiplied as they are, in fewer than 32 bits.
    pub fn cache_precision(&self) -> CachePrecision {
        match self.shared.narrow.load(Ordering::Relaxed) {
            true => CachePrecision::F16,
            false => CachePrecision::Full,
        }
    }

    /// Regroups the packed matrices of linear layers for products, in the background where there are threads: what else
    /// there is to do before the first product takes its time, too. A product does not wait for others' matrices.
    pub fn prepare(&self) {
        let products = std::mem::take(&mut *lock(&self.shared.products));
        if products.is_empty() {
            return;
        }
        threads::in_background(move || {
            for matrix in products {
                // The model may be gone.
                if let Some(matrix) = matrix.upgrade() {
                    matrix.form();
                }
            }
        });
    }

    /// A matrix `[out_features, in_features]`, kept packed where the device can multiply with it so.
    pub fn matrix(&self, name: &str, shape: [usize; 2]) -> Result<Matrix> {
        let full = self.full(name);
        if let Some(matrix) = self.stored_module(&full, shape)? {
            return Ok(matrix);
        }
        let slot = Slot::whole(&full, &shape);
        match self.take(&full, &shape)? {
            Some(view) => self.matrix_from(&full, slot, view),
            None => self.fresh_matrix(&full, &slot, shape),
        }
    }

    /// A matrix stored as `[in_features, out_features]`; `shape` is `[out_features, in_features]`.
    pub fn matrix_transposed(&self, name: &str, [out_features, in_features]: [usize; 2]) -> Result<Matrix> {
        let turned = self.with_role(match self.role {
            Role::Linear => Role::Conv1d,
            role => role,
        });
        turned.matrix_turned(name, [out_features, in_features])
    }

    fn matrix_turned(&self, name: &str, [out_features, in_features]: [usize; 2]) -> Result<Matrix> {
        let source = self.shared.source.as_ref();
        let turned = source.is_some_and(|source| source.rows_are_outputs());
        let shape = [out_features, in_features];
        let full = self.full(name);
        let slot = Slot::transposed(&full, shape);
        if let Some(matrix) = self.stored_module(&full, shape)? {
            return Ok(matrix);
        }
        let stored = if turned {
            shape
        } else {
            [in_features, out_features]
        };
        let Some(mut view) = self.take(&full, &stored)? else {
            return self.fresh_matrix(&full, &slot, shape);
        };
        if turned {
            return self.matrix_from(&full, slot, view);
        }
        if self.shared.options.survey.is_some() {
            // Nobody looks at the values.
            view.shape = shape.to_vec();
            return self.matrix_from(&full, slot, view);
        }
        // Copied once into the order that the multiplication reads.
        let values = self.values(&full, &view)?;
        let values = TensorData::new(values, [in_features, out_features]);
        let values = Tensor::<2>::from_data(values, &Device::flex())
            .transpose()
            .into_data();
        let turned = TensorView {
            dtype: DType::F32,
            shape: shape.to_vec(),
            data: values.bytes().to_vec().into(),
        };
        self.matrix_stored_as(&full, slot, turned, view.dtype)
    }

    /// `shape[0]` matrices `[shape[1], shape[2]]` that are stored as one tensor.
    pub fn matrices(&self, name: &str, shape: [usize; 3]) -> Result<Vec<Matrix>> {
        let full = self.full(name);
        if let Some(matrices) = self.stored_stack(&full, shape)? {
            return Ok(matrices);
        }
        let slot = |i| Slot::part(&full, i, &shape);
        let Some(view) = self.take(&full, &shape)? else {
            let fresh = |i| self.fresh_matrix(&format!("{full}.{i}"), &slot(i), [shape[1], shape[2]]);
            return (0..shape[0]).map(fresh).collect();
        };
        let size = view.data.len() / shape[0].max(1);
        (0..shape[0])
            .map(|i| {
                let data = view.data.slice(i * size..(i + 1) * size);
                let part = TensorView {
                    dtype: view.dtype,
                    shape: vec![shape[1], shape[2]],
                    data,
                };
                self.matrix_from(&format!("{full}.{i}"), slot(i), part)
            })
            .collect()
    }

    /// A stored tensor as it is, for forms that only one architecture has; its shape is checked.
    ///
    /// # Errors
    /// Where it is not stored (fresh parameters are not, either), or has another shape.
    pub fn view(&self, name: &str, shape: &[usize]) -> Result<TensorView> {
        let full = self.full(name);
        self.take(&full, shape)?.ok_or(Error::MissingTensor {
            origin: "fresh parameters".to_string(),
            name: full,
        })
    }

    /// A matrix made of stored values, kept packed where the device can multiply with it so. `name` is what
    /// the parameter is called here, `slot` where its values stand; the name of the tensor is relative to this place.
    pub fn matrix_of(&self, name: &str, slot: Slot, view: TensorView) -> Result<Matrix> {
        let tensor = self.full(&slot.tensor);
        self.matrix_from(&self.full(name), Slot { tensor, ..slot }, view)
    }

    /// The same for fresh parameters.
    pub fn fresh_matrix_of(&self, name: &str, slot: Slot, shape: [usize; 2]) -> Result<Matrix> {
        let tensor = self.full(&slot.tensor);
        self.fresh_matrix(&self.full(name), &Slot { tensor, ..slot }, shape)
    }

    fn fresh_matrix(&self, full: &str, slot: &Slot, shape: [usize; 2]) -> Result<Matrix> {
        self.dense_matrix(full, slot, self.fresh(full, shape, Init::Normal))
    }

    /// Marks stored tensors as known, though nothing is made of them.
    pub fn ignore(&self, known: impl Fn(&str) -> bool) {
        if let Some(source) = &self.shared.source {
            lock(&self.shared.used).extend(source.names().into_iter().filter(|name| known(name)));
        }
    }

    /// Marks the stored tensor `name` as known, if there is one.
    pub fn ignore_one(&self, name: &str) {
        if let Some(stored) = self.stored(&self.full(name)) {
            lock(&self.shared.used).insert(stored.to_string());
        }
    }

    /// Names of all stored tensors.
    pub fn names(&self) -> Vec<String> {
        self.shared
            .source
            .as_ref()
            .map(|source| source.names())
            .unwrap_or_default()
    }

    /// Checks that every stored tensor was taken, and returns each parameter's name. Warns of what was initialized because
    /// the checkpoint lacks it.
    ///
    /// # Errors
    /// [`Error::LeftOver`] names the tensors that nothing was made of.
    pub fn finish(&self) -> Result<Vec<(ParamId, String)>> {
        if let Some(source) = &self.shared.source {
            let used = lock(&self.shared.used);
            let names: Vec<_> = source
                .names()
                .into_iter()
                .filter(|name| !used.contains(name))
                .collect();
            if !names.is_empty() {
                return Err(Error::LeftOver {
                    origin: source.origin(),
                    names,
                });
            }
        }
        if let Fitting {
            some: false,
            misfit: Some((full, shape)),
        } = &*lock(&self.shared.fitting)
        {
            let reason = format!(
                "no module is quantized: the method leaves matrices as they are whose shapes are no whole number of its \
                 blocks, such as {shape:?} of this one; use another method, or other blocks"
            );
            return Err(self.wrong(full, reason));
        }
        if self.shared.options.survey.is_none() {
            for adapter in &self.shared.options.adapters {
                adapter.finish()?;
            }
        }
        let new = std::mem::take(&mut *lock(&self.shared.new));
        if !new.is_empty() {
            tracing::warn!(
                "{}: some weights were not initialized from the checkpoint and are newly initialized: {}. You should \
                 probably train this model on a task to be able to use it for predictions.",
                self.origin(),
                new.join(", ")
            );
        }
        Ok(std::mem::take(&mut *lock(&self.shared.params)))
    }

    pub(crate) fn full(&self, name: &str) -> String {
        match (self.prefix.as_str(), name) {
            ("", name) => name.to_string(),
            (prefix, "") => prefix.to_string(),
            (prefix, name) => format!("{prefix}.{name}"),
        }
    }

    /// The name under which the source holds `full`.
    pub(crate) fn stored<'a>(&self, full: &'a str) -> Option<&'a str> {
        let source = self.shared.source.as_ref()?;
        if source.contains(full) {
            return Some(full);
        }
        let base = self.shared.base_prefix.as_str();
        let short = full.strip_prefix(base).filter(|_| !base.is_empty())?;
        source.contains(short).then_some(short)
    }

    /// The stored tensor, its shape checked; `None` for fresh parameters.
    fn take(&self, full: &str, shape: &[usize]) -> Result<Option<TensorView>> {
        let Some(source) = &self.shared.source else {
            return Ok(None);
        };
        if let Some(view) = self.replacement(full) {
            if let Some(stored) = self.stored(full) {
                lock(&self.shared.used).insert(stored.to_string());
            }
            return match view.shape == shape {
                true => Ok(Some(view)),
                false => Err(Error::Shape {
                    origin: "an adapter".to_string(),
                    name: full.to_string(),
                    found: view.shape,
                    expected: shape.to_vec(),
                }),
            };
        }
        let Some(stored) = self.stored(full) else {
            if self.shared.options.new_heads && self.is_of_a_head(full) {
                self.note_new(full);
                return Ok(None);
            }
            return Err(Error::MissingTensor {
                origin: source.origin(),
                name: full.to_string(),
            });
        };
        let view = source.tensor(stored)?;
        if view.shape != shape {
            if self.shared.options.ignore_mismatched_sizes && self.is_of_a_head(full) {
                lock(&self.shared.used).insert(stored.to_string());
                self.note_new(full);
                return Ok(None);
            }
            return Err(Error::Shape {
                origin: source.origin(),
                name: stored.to_string(),
                found: view.shape,
                expected: shape.to_vec(),
            });
        }
        lock(&self.shared.used).insert(stored.to_string());
        if let Some(parameters) = &self.shared.options.parameters {
            parameters.keep(full, &view);
        }
        Ok(Some(view))
    }

    /// Whether a tensor stands on the base model: what a checkpoint for another task lacks.
    fn is_of_a_head(&self, full: &str) -> bool {
        const HEADS: [&str; 9] = [
            "pooler",
            "classifier",
            "classification_head",
            "qa_outputs",
            "score",
            "lm_head",
            "predictions",
            "summary",
            "seq_relationship",
        ];
        let base = self.shared.base_prefix.as_str();
        (!base.is_empty() && !full.starts_with(base)) || HEADS.iter().any(|head| full.contains(head))
    }

    fn note_new(&self, full: &str) {
        lock(&self.shared.new).push(full.to_string());
        if let Some(parameters) = &self.shared.options.parameters {
            parameters.note_new(full);
        }
    }

    /// Whether the tensor `name` is trained: where there are adapters, as they say.
    fn is_trained(&self, name: &str) -> bool {
        let options = &self.shared.options;
        if !options.adapters.is_empty() {
            let names = self.names_of(name);
            return options.adapters.iter().any(|adapter| adapter.trains(&names));
        }
        let parameters = options.parameters.as_ref();
        parameters.is_some_and(|parameters| parameters.trains(name))
    }

    fn register<const D: usize>(&self, full: &str, slot: &Slot, tensor: Tensor<D>) -> Param<Tensor<D>> {
        let id = ParamId::new();
        lock(&self.shared.params).push((id, full.to_string()));
        if !self.is_trained(full) {
            self.keep_fresh(slot, &tensor);
            return Param::initialized(id, tensor);
        }
        if let Some(parameters) = &self.shared.options.parameters {
            parameters.add(Parameter {
                id,
                name: full.to_string(),
                shape: tensor.dims().to_vec(),
                slot: slot.clone(),
                kind: self.kind,
            });
        }
        Param::initialized(id, tensor).set_require_grad(true)
    }

    /// Keeps what was initialized and is not trained, so that it is saved.
    fn keep_fresh<const D: usize>(&self, slot: &Slot, tensor: &Tensor<D>) {
        let Some(parameters) = &self.shared.options.parameters else {
            return;
        };
        if !parameters.keeps(&slot.tensor) && slot.is_whole(&tensor.dims()) {
            let data = tensor.clone().into_data().convert::<f32>();
            let view = TensorView {
                dtype: DType::F32,
                shape: slot.shape.clone(),
                data: data.bytes().to_vec().into(),
            };
            parameters.keep(&slot.tensor, &view);
        }
    }

    fn fresh<const D: usize>(&self, full: &str, shape: [usize; D], init: Init) -> Tensor<D> {
        let device = self.device();
        let own = self.shared.distribution.as_ref().and_then(|of| of(full));
        let tensor = match (own, init) {
            (None, Init::Zeros) => Tensor::zeros(shape, device),
            (None, Init::Ones) => Tensor::ones(shape, device),
            (own, _) => {
                let std = self.std.unwrap_or(self.shared.initializer_range);
                let distribution = own.unwrap_or(Normal::new(std));
                let count = shape.iter().product();
                let mut values = normal(self.shared.options.seed, full, distribution, count);
                let width = shape[1..].iter().product::<usize>().max(1);
                // Those with a distribution of their own have it in all rows.
                let padding = self.padding.filter(|_| own.is_none());
                if let Some(row) = padding.and_then(|row| values.chunks_mut(width).nth(row)) {
                    row.fill(0.0);
                }
                Tensor::from_data(TensorData::new(values, shape), device)
            }
        };
        self.cast(tensor)
    }

    fn cast<const D: usize>(&self, tensor: Tensor<D>) -> Tensor<D> {
        match self.shared.options.dtype {
            Some(dtype) => tensor.cast(dtype),
            None => tensor,
        }
    }

    fn matrix_from(&self, full: &str, slot: Slot, view: TensorView) -> Result<Matrix> {
        let dtype = view.dtype;
        self.matrix_stored_as(full, slot, view, dtype)
    }

    /// A matrix of values that the checkpoint has as `dtype`.
    fn matrix_stored_as(&self, full: &str, slot: Slot, view: TensorView, dtype: DType) -> Result<Matrix> {
        let ternary = self.trains(full)?.is_some();
        if !ternary && let Some(matrix) = self.quantized(full, &view, dtype)? {
            return Ok(matrix);
        }
        if !ternary
            && self.packs()
            && !(self.is_trained(full) && self.shared.options.adapters.is_empty())
            && let Some(packed) = oxiformers_quant::pack(&view)
        {
            return self.packed_matrix(full.to_string(), packed);
        }
        let tensor = self.dense(full, &view)?;
        self.dense_matrix(full, &slot, tensor)
    }

    /// A matrix in a form that is multiplied so where the device can.
    pub(crate) fn packed_matrix(&self, full: String, packed: Arc<dyn PackedMatrix>) -> Result<Matrix> {
        if let Some(survey) = &self.shared.options.survey {
            let stored = self.stored(&full).map(str::to_string);
            let role = self.role_of(crate::quantized::module_of(&full));
            survey.note(full.clone(), stored, role, packed.as_ref());
        }
        if self.packs() {
            let observer = self.shared.options.observer.as_ref();
            return Ok(Matrix::packed(packed).observed(&full, observer));
        }
        let [rows, columns] = packed.shape();
        let mut values = vec![0.0; rows * columns];
        packed.dequantize_rows(0..rows, &mut values);
        let data = TensorData::new(values, [rows, columns]);
        let values = self.cast(Tensor::from_data(data, self.device()));
        let values = Param::initialized(ParamId::new(), values);
        let observer = self.shared.options.observer.as_ref();
        Ok(Matrix::dense(values).observed(&full, observer))
    }

    fn dense_matrix(&self, full: &str, slot: &Slot, tensor: Tensor<2>) -> Result<Matrix> {
        let observer = self.shared.options.observer.as_ref();
        let values = match self.shared.options.adapters.is_empty() {
            true => self.register(full, slot, tensor),
            // What is trained of it is a copy.
            false => Param::initialized(ParamId::new(), tensor),
        };
        self.trained(full, Matrix::dense(values).observed(full, observer))
    }

    /// Whether matrices are kept in a form that products on the CPU read.
    pub(crate) fn packs(&self) -> bool {
        let options = &self.shared.options;
        let flex = Device::flex();
        // Where only adapters are trained, nothing else needs to be floats.
        let frozen = !options.adapters.is_empty() && options.device == flex.clone().autodiff();
        options.dtype.is_none() && (options.device == flex || frozen)
    }

    fn dense<const D: usize>(&self, name: &str, view: &TensorView) -> Result<Tensor<D>> {
        let values = self.values(name, view)?;
        let data = TensorData::new(values, Shape::from(view.shape.clone()));
        Ok(self.cast(Tensor::from_data(data, self.device())))
    }

    fn values(&self, name: &str, view: &TensorView) -> Result<Vec<f32>> {
        to_f32(view).map_err(|reason| Error::Dtype {
            origin: self.origin(),
            name: name.to_string(),
            dtype: format!("{:?}", view.dtype),
            reason,
        })
    }

    /// What to call the checkpoint in messages.
    pub(crate) fn origin(&self) -> String {
        let source = self.shared.source.as_ref();
        source.map(|source| source.origin()).unwrap_or_default()
    }
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing that runs under these locks can leave the data half-changed.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Linear;

    #[derive(Debug, Default)]
    struct Shapes(Mutex<Vec<(String, [usize; 2])>>);

    impl Observer for Shapes {
        fn observe(&self, name: &str, x: Tensor<2>) {
            lock(&self.0).push((name.to_string(), x.dims()));
        }
    }

    #[test]
    fn an_observer_sees_the_input_of_every_product() {
        let shapes = Arc::new(Shapes::default());
        let options = LoadOptions {
            observer: Some(shapes.clone()),
            ..LoadOptions::default()
        };
        let w = Weights::init(options, 0.5);
        let layer = |name: &str, from, to| Linear::load(&w.pp(name), from, to, true).unwrap();
        let (a, b, c) = (layer("a", 6, 4), layer("b", 4, 5), layer("c", 6, 7));
        let x = Tensor::<3>::ones([2, 3, 6], &Device::flex());
        let apart = b.forward(a.forward_act(x.clone(), crate::Activation::Gelu));
        Linear::forward_all([&a, &c], x.clone());
        let fused = Linear::feed_forward([&a, &b], x, crate::Activation::Gelu);
        assert_eq!(apart.into_data(), fused.into_data());
        let seen = lock(&shapes.0);
        let seen: Vec<_> = seen.iter().map(|(name, shape)| (name.as_str(), *shape)).collect();
        let (a, b) = (("a.weight", [6, 6]), ("b.weight", [6, 4]));
        assert_eq!(seen, [a, b, a, ("c.weight", [6, 6]), a, b]);
    }
}
