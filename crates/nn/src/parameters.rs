//! What a model learns: its parameters, their names in the checkpoint, and where in a stored tensor they lie.
//!
//! A [`Parameters`] given with [`LoadOptions::parameters`](crate::LoadOptions::parameters) is filled while a model loads.
//! Gradients, the state of optimizers and what is saved are so known by the names that Transformers gives them, whatever
//! the model makes of a tensor: [`take`] takes the trainable values (and gradients) out of a model, [`put`] puts them back,
//! and [`Parameters::write`] writes them as they were stored.

use std::any::Any;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Mutex;

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param, ParamId};
use burn::tensor::{Gradients, Tensor};
use oxiformers_hub::checkpoint::TensorView;

use crate::weights::lock;

/// Where the values of a parameter lie within a tensor of the checkpoint: the value `[i, j, …]` of the parameter is the one
/// at `offset + i · strides[0] + j · strides[1] + …`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Slot {
    /// Name of the tensor.
    pub tensor: String,
    /// Shape of the tensor.
    pub shape: Vec<usize>,
    /// Place of the first value.
    pub offset: usize,
    /// Steps between values, one for each dimension of the parameter.
    pub strides: Vec<usize>,
}

impl Slot {
    /// All of the tensor `name`, as it is stored.
    pub fn whole(name: impl Into<String>, shape: &[usize]) -> Self {
        Self {
            tensor: name.into(),
            shape: shape.to_vec(),
            offset: 0,
            strides: row_major(shape),
        }
    }

    /// All of the tensor `name` `[columns, rows]`, as `[rows, columns]`.
    pub fn transposed(name: impl Into<String>, [rows, columns]: [usize; 2]) -> Self {
        Self {
            tensor: name.into(),
            shape: vec![columns, rows],
            offset: 0,
            strides: vec![1, rows],
        }
    }

    /// The part `index` of the tensor `name` along its first dimension.
    pub fn part(name: impl Into<String>, index: usize, shape: &[usize]) -> Self {
        let strides = row_major(shape);
        Self {
            tensor: name.into(),
            shape: shape.to_vec(),
            offset: index * strides.first().copied().unwrap_or(0),
            strides: strides.into_iter().skip(1).collect(),
        }
    }

    /// Whether a parameter of that `shape` is the whole tensor, value by value.
    pub fn is_whole(&self, shape: &[usize]) -> bool {
        let count = |shape: &[usize]| shape.iter().product::<usize>();
        self.offset == 0 && self.strides == row_major(shape) && count(shape) == count(&self.shape)
    }

    /// Calls `f` with the place of each value of a parameter of that `shape`, in order.
    fn each(&self, shape: &[usize], mut f: impl FnMut(usize)) {
        let Some((last, outer)) = shape.split_last() else {
            return f(self.offset);
        };
        let step = self.strides.last().copied().unwrap_or(1);
        let rows = outer.iter().product::<usize>();
        let mut index = vec![0; outer.len()];
        for _ in 0..rows {
            let start: usize = (index.iter().zip(&self.strides))
                .map(|(i, stride)| i * stride)
                .sum();
            (0..*last).for_each(|i| f(self.offset + start + i * step));
            for (i, size) in index.iter_mut().zip(outer).rev() {
                *i += 1;
                if *i < *size {
                    break;
                }
                *i = 0;
            }
        }
    }

    /// The values of a parameter of that `shape`, of those of the tensor; 0 where there are none.
    pub fn gather(&self, shape: &[usize], stored: &[f32]) -> Vec<f32> {
        let mut values = Vec::with_capacity(shape.iter().product());
        self.each(shape, |at| values.push(stored.get(at).copied().unwrap_or(0.0)));
        values
    }

    /// Puts the values of a parameter of that `shape` among those of the tensor.
    pub fn scatter(&self, shape: &[usize], values: &[f32], stored: &mut [f32]) {
        let mut values = values.iter();
        self.each(shape, |at| {
            if let (Some(place), Some(value)) = (stored.get_mut(at), values.next()) {
                *place = *value;
            }
        });
    }
}

/// The strides of values that stand one after the other.
fn row_major(shape: &[usize]) -> Vec<usize> {
    (0..shape.len())
        .map(|axis| shape[axis + 1..].iter().product())
        .collect()
}

/// What kind of module a parameter belongs to, as far as optimizers care.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Kind {
    /// Any other.
    #[default]
    Other,
    /// `torch.nn.LayerNorm`, whose weights never decay.
    LayerNorm,
    /// `torch.nn.Embedding`, whose moments the 8-bit optimizer keeps in 32 bits.
    Embedding,
}

/// A trainable tensor of a model.
#[derive(Debug, Clone, PartialEq)]
pub struct Parameter {
    /// How Burn knows it.
    pub id: ParamId,
    /// Its name: that of the tensor, and a number where it is one of several parts of a tensor.
    pub name: String,
    /// Its shape here.
    pub shape: Vec<usize>,
    /// Where it stands in the checkpoint.
    pub slot: Slot,
    /// What it belongs to.
    pub kind: Kind,
}

impl Parameter {
    /// Number of values.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether it has no values.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Tensors of a checkpoint by their names: their shapes and values.
pub type Stored = BTreeMap<String, (Vec<usize>, Vec<f32>)>;

/// Says by its name whether a tensor is trained.
type Chosen = Box<dyn Fn(&str) -> bool + Send + Sync>;

/// The parameters of a model: filled while it loads.
#[derive(Default)]
pub struct Parameters {
    /// `None`: all are.
    chosen: Option<Chosen>,
    found: Mutex<Found>,
}

#[derive(Debug, Default)]
struct Found {
    trainable: Vec<Parameter>,
    /// Other tensors of the model, as they are stored.
    frozen: BTreeMap<String, TensorView>,
    /// Those that the checkpoint did not have.
    new: Vec<String>,
}

impl std::fmt::Debug for Parameters {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Parameters")
            .field("found", &self.found)
            .finish_non_exhaustive()
    }
}

impl Parameters {
    /// Every parameter is trained.
    pub fn all() -> Self {
        Self::default()
    }

    /// Those are trained whose names `chosen` says yes to. The others are held as without training: packed where the
    /// device multiplies so, and saved as they were stored.
    pub fn only(chosen: impl Fn(&str) -> bool + Send + Sync + 'static) -> Self {
        Self {
            chosen: Some(Box::new(chosen)),
            ..Self::default()
        }
    }

    /// Whether the tensor `name` is trained.
    pub fn trains(&self, name: &str) -> bool {
        self.chosen.as_ref().is_none_or(|chosen| chosen(name))
    }

    /// Takes note of a trainable parameter. Layers that are not loaded from a checkpoint, such as adapters, call it
    /// themselves.
    pub fn add(&self, parameter: Parameter) {
        let mut found = lock(&self.found);
        found.frozen.remove(&parameter.slot.tensor);
        found.trainable.push(parameter);
    }

    pub(crate) fn keep(&self, name: &str, view: &TensorView) {
        lock(&self.found).frozen.insert(name.to_string(), view.clone());
    }

    /// Whether a tensor is kept that is not trained.
    pub(crate) fn keeps(&self, name: &str) -> bool {
        lock(&self.found).frozen.contains_key(name)
    }

    pub(crate) fn rename(&self, from: &str, to: &str) {
        let frozen = &mut lock(&self.found).frozen;
        if let Some(view) = frozen.remove(from) {
            frozen.insert(to.to_string(), view);
        }
    }

    pub(crate) fn note_new(&self, name: &str) {
        lock(&self.found).new.push(name.to_string());
    }

    /// The trainable parameters, in the order of loading.
    pub fn trainable(&self) -> Vec<Parameter> {
        lock(&self.found).trainable.clone()
    }

    /// The tensors that are not trained, as they are stored.
    pub fn frozen(&self) -> BTreeMap<String, TensorView> {
        lock(&self.found).frozen.clone()
    }

    /// Names of tensors that the checkpoint did not have and that were initialized.
    pub fn newly_initialized(&self) -> Vec<String> {
        lock(&self.found).new.clone()
    }

    /// How many values are trained, and how many there are in all.
    pub fn count(&self) -> (usize, usize) {
        let found = lock(&self.found);
        let trainable: usize = found.trainable.iter().map(Parameter::len).sum();
        let frozen = found
            .frozen
            .values()
            .map(|view| view.shape.iter().product::<usize>());
        (trainable, trainable + frozen.sum::<usize>())
    }

    /// The tensors of a checkpoint of the model, whose trainable values are `values` (row-major, of each parameter's
    /// shape): what each tensor is called, its shape and values.
    ///
    /// # Errors
    /// Names a parameter that `values` lacks, or has in another size.
    pub fn stored<'a>(&self, values: impl Fn(&Parameter) -> Option<&'a [f32]>) -> crate::Result<Stored> {
        let mut tensors = Stored::new();
        for parameter in &lock(&self.found).trainable {
            let values = values(parameter).filter(|values| values.len() == parameter.len());
            let values = values.ok_or_else(|| {
                crate::Error::input(&parameter.name, "has no values, or as many as another parameter")
            })?;
            let slot = &parameter.slot;
            if slot.is_whole(&parameter.shape) {
                tensors.insert(slot.tensor.clone(), (slot.shape.clone(), values.to_vec()));
                continue;
            }
            let (_, stored) = (tensors.entry(slot.tensor.clone()))
                .or_insert_with(|| (slot.shape.clone(), vec![0.0; slot.shape.iter().product()]));
            slot.scatter(&parameter.shape, values, stored);
        }
        Ok(tensors)
    }

    /// Writes a checkpoint of the model into `folder`, trained values as `dtype`, the others as they were stored. Returns
    /// the names of the files.
    ///
    /// # Errors
    /// As [`stored`](Self::stored), and where the folder cannot be written to; nothing is changed then.
    #[cfg(not(target_arch = "wasm32"))]
    pub fn write<'a>(
        &self,
        folder: &std::path::Path,
        dtype: oxiformers_hub::checkpoint::DType,
        max_shard_size: u64,
        values: impl Fn(&Parameter) -> Option<&'a [f32]>,
    ) -> crate::Result<Vec<String>> {
        use oxiformers_hub::checkpoint::safetensors::Writer;
        use oxiformers_hub::checkpoint::{DType, TensorInfo};

        let (trained, frozen) = (self.stored(values)?, self.frozen());
        let info = |(name, dtype, shape): (&String, DType, &Vec<usize>)| TensorInfo {
            name: name.clone(),
            dtype,
            shape: shape.clone(),
        };
        let mut infos: Vec<TensorInfo> = (trained.iter())
            .map(|(name, (shape, _))| info((name, dtype, shape)))
            .chain(
                frozen
                    .iter()
                    .map(|(name, view)| info((name, view.dtype, &view.shape))),
            )
            .collect();
        infos.sort_by(|a, b| a.name.cmp(&b.name));
        let mut writer = Writer::create(folder, &infos, &[], max_shard_size)?;
        for (name, (_, values)) in &trained {
            let bytes = oxiformers_quant::values::from_f32(values, dtype)
                .map_err(|reason| crate::Error::input("dtype", reason))?;
            writer.write_bytes(name, &bytes)?;
        }
        for (name, view) in &frozen {
            writer.write_bytes(name, &view.data)?;
        }
        Ok(writer.finish()?)
    }
}

/// Values of parameters that were taken out of a model, flat.
pub type Values = HashMap<ParamId, Tensor<1>>;

/// Takes the values of the parameters `ids` out of a model, without their autodiff association, and where there are
/// `gradients` these too. What is left in the model are empty tensors, so that nobody but the caller holds the values and
/// they can be changed in place; [`put`] puts them back. A tied parameter is taken once. A parameter without a gradient
/// took no part in the loss.
pub fn take<M: Module>(
    model: M,
    ids: &HashSet<ParamId>,
    gradients: Option<Gradients>,
) -> (M, Values, Values) {
    let mut taker = Taker {
        ids,
        gradients,
        values: Values::new(),
        grads: Values::new(),
    };
    let model = model.map(&mut taker);
    (model, taker.values, taker.grads)
}

struct Taker<'a> {
    ids: &'a HashSet<ParamId>,
    gradients: Option<Gradients>,
    values: Values,
    grads: Values,
}

impl ModuleMapper for Taker<'_> {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        if !self.ids.contains(&param.id) {
            return param;
        }
        let (id, tensor, mapper) = param.consume();
        let empty = Tensor::empty([0; D], &tensor.device().without_autodiff());
        if !self.values.contains_key(&id) {
            let count = tensor.shape().num_elements();
            let grad = self
                .gradients
                .as_mut()
                .and_then(|gradients| tensor.grad_remove(gradients));
            if let Some(grad) = grad {
                self.grads.insert(id, grad.reshape([count]));
            }
            self.values.insert(id, tensor.inner().reshape([count]));
        }
        Param::from_mapped_value(id, empty, mapper)
    }
}

/// Puts values back where [`take`] took them, with the shapes that `parameters` say. With `track`, their gradients are
/// computed from then on.
pub fn put<M: Module>(model: M, parameters: &[Parameter], values: &Values, track: bool) -> M {
    let shapes = parameters
        .iter()
        .map(|parameter| (parameter.id, parameter.shape.as_slice()));
    let mut putter = Putter {
        shapes: shapes.collect(),
        values,
        track,
        done: HashMap::new(),
    };
    model.map(&mut putter)
}

struct Putter<'a> {
    shapes: HashMap<ParamId, &'a [usize]>,
    values: &'a Values,
    track: bool,
    /// What was put: one leaf of the graph for each parameter, however often it appears.
    done: HashMap<ParamId, Box<dyn Any>>,
}

impl ModuleMapper for Putter<'_> {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let (Some(shape), Some(value)) = (self.shapes.get(&param.id), self.values.get(&param.id)) else {
            return param;
        };
        let Ok(shape) = <[usize; D]>::try_from(*shape) else {
            return param;
        };
        let (id, _, mapper) = param.consume();
        let done = self.done.entry(id).or_insert_with(|| {
            let tensor: Tensor<D> = value.clone().reshape(shape);
            Box::new(match self.track {
                true => tensor.autodiff().require_grad(),
                false => tensor,
            })
        });
        match done.downcast_ref::<Tensor<D>>() {
            Some(tensor) => Param::from_mapped_value(id, tensor.clone(), mapper),
            None => Param::from_mapped_value(id, value.clone().reshape(shape), mapper),
        }
    }
}

/// The values of the parameters `ids`, which stay in the model.
pub fn values<M: Module>(model: &M, ids: &HashSet<ParamId>) -> Values {
    struct Reader<'a> {
        ids: &'a HashSet<ParamId>,
        values: Values,
    }
    impl ModuleVisitor for Reader<'_> {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            if self.ids.contains(&param.id) && !self.values.contains_key(&param.id) {
                let tensor = param.val().inner();
                let count = tensor.shape().num_elements();
                self.values.insert(param.id, tensor.reshape([count]));
            }
        }
    }
    let mut reader = Reader {
        ids,
        values: Values::new(),
    };
    model.visit(&mut reader);
    reader.values
}
