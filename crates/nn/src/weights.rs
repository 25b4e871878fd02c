//! Where parameters come from: a checkpoint, or an initializer.

use std::collections::BTreeSet;
use std::fmt::Display;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use burn::module::{Param, ParamId};
use burn::tensor::{Device, Distribution, FloatDType, Shape, Tensor, TensorData};
use oxiformers_hub::checkpoint::{Checkpoint, DType, TensorView};
use oxiformers_kernels::{PackedMatrix, ggml, threads};

use crate::linear::{Matrix, Observer};
use crate::{Error, Result};

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
}

impl Default for LoadOptions {
    fn default() -> Self {
        Self {
            device: Device::flex(),
            dtype: None,
            observer: None,
        }
    }
}

/// A place in a checkpoint, from which layers take their parameters.
///
/// It remembers what was taken, so that [`finish`](Self::finish) can name what was left over.
#[derive(Clone)]
pub struct Weights {
    shared: Arc<Shared>,
    prefix: String,
}

struct Shared {
    source: Option<Box<dyn TensorSource>>,
    options: LoadOptions,
    initializer_range: f64,
    base_prefix: String,
    used: Mutex<BTreeSet<String>>,
    params: Mutex<Vec<(ParamId, String)>>,
    /// What is sure to be multiplied with, in the order of loading.
    products: Mutex<Vec<Weak<dyn PackedMatrix>>>,
}

impl Weights {
    /// Parameters of a checkpoint. A name that begins with `base_prefix` is also found without it, as in
    /// checkpoints that were saved from the base model alone.
    pub fn new(source: impl TensorSource + 'static, base_prefix: &str, options: LoadOptions) -> Self {
        Self::build(Some(Box::new(source)), base_prefix, options, 0.0)
    }

    /// Fresh parameters. Seed the device first to make them reproducible.
    pub fn init(options: LoadOptions, initializer_range: f64) -> Self {
        Self::build(None, "", options, initializer_range)
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
                initializer_range,
                base_prefix,
                used: Mutex::default(),
                params: Mutex::default(),
                products: Mutex::default(),
            }),
            prefix: String::new(),
        }
    }

    /// The place `name` below this one.
    pub fn pp(&self, name: impl Display) -> Self {
        Self {
            shared: self.shared.clone(),
            prefix: self.full(&name.to_string()),
        }
    }

    /// Where parameters live.
    pub fn device(&self) -> &Device {
        &self.shared.options.device
    }

    /// Whether a tensor of this name is stored here. Fresh parameters have every name.
    pub fn contains(&self, name: &str) -> bool {
        self.shared.source.is_none() || self.stored(&self.full(name)).is_some()
    }

    /// Like [`contains`](Self::contains), but false for fresh parameters: for forms of a checkpoint that
    /// only some files have.
    pub fn is_stored(&self, name: &str) -> bool {
        self.stored(&self.full(name)).is_some()
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
        let full = self.full(name);
        let tensor = match self.take(&full, &shape)? {
            Some(view) => self.dense(&full, &view)?,
            None => self.fresh(shape, init),
        };
        Ok(self.register(full, tensor))
    }

    /// Takes note that the matrix is no mere table: there will be products with it.
    pub(crate) fn will_multiply(&self, matrix: &Matrix) {
        lock(&self.shared.products).extend(matrix.as_packed().map(Arc::downgrade));
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
        match self.take(&full, &shape)? {
            Some(view) => self.matrix_from(full, view),
            None => Ok(self.dense_matrix(full, self.fresh(shape, Init::Normal))),
        }
    }

    /// A matrix stored as `[in_features, out_features]`; `shape` is `[out_features, in_features]`.
    pub fn matrix_transposed(&self, name: &str, [out_features, in_features]: [usize; 2]) -> Result<Matrix> {
        if self
            .shared
            .source
            .as_ref()
            .is_some_and(|source| source.rows_are_outputs())
        {
            return self.matrix(name, [out_features, in_features]);
        }
        let full = self.full(name);
        let Some(view) = self.take(&full, &[in_features, out_features])? else {
            let fresh = self.fresh([out_features, in_features], Init::Normal);
            return Ok(self.dense_matrix(full, fresh));
        };
        // Copied once into the order that the multiplication reads.
        let data = self.dense::<2>(&full, &view)?.transpose().into_data();
        if self.packs() {
            let values = TensorView {
                dtype: DType::F32,
                shape: vec![out_features, in_features],
                data: data.bytes().to_vec().into(),
            };
            return self.matrix_from(full, values);
        }
        let tensor = Tensor::from_data(data, self.device());
        Ok(self.dense_matrix(full, tensor))
    }

    /// `shape[0]` matrices `[shape[1], shape[2]]` that are stored as one tensor.
    pub fn matrices(&self, name: &str, shape: [usize; 3]) -> Result<Vec<Matrix>> {
        let full = self.full(name);
        let Some(view) = self.take(&full, &shape)? else {
            return (0..shape[0])
                .map(|i| {
                    let fresh = self.fresh([shape[1], shape[2]], Init::Normal);
                    Ok(self.dense_matrix(format!("{full}.{i}"), fresh))
                })
                .collect();
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
                self.matrix_from(format!("{full}.{i}"), part)
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
    /// the parameter is called here.
    pub fn matrix_of(&self, name: &str, view: TensorView) -> Result<Matrix> {
        self.matrix_from(self.full(name), view)
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

    /// Checks that every stored tensor was taken, and returns each parameter's name.
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
        Ok(std::mem::take(&mut *lock(&self.shared.params)))
    }

    fn full(&self, name: &str) -> String {
        match (self.prefix.as_str(), name) {
            ("", name) => name.to_string(),
            (prefix, "") => prefix.to_string(),
            (prefix, name) => format!("{prefix}.{name}"),
        }
    }

    /// The name under which the source holds `full`.
    fn stored<'a>(&self, full: &'a str) -> Option<&'a str> {
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
        let Some(stored) = self.stored(full) else {
            return Err(Error::MissingTensor {
                origin: source.origin(),
                name: full.to_string(),
            });
        };
        let view = source.tensor(stored)?;
        if view.shape != shape {
            return Err(Error::Shape {
                origin: source.origin(),
                name: stored.to_string(),
                found: view.shape,
                expected: shape.to_vec(),
            });
        }
        lock(&self.shared.used).insert(stored.to_string());
        Ok(Some(view))
    }

    fn register<const D: usize>(&self, full: String, tensor: Tensor<D>) -> Param<Tensor<D>> {
        let id = ParamId::new();
        lock(&self.shared.params).push((id, full));
        Param::initialized(id, tensor)
    }

    fn fresh<const D: usize>(&self, shape: [usize; D], init: Init) -> Tensor<D> {
        let device = self.device();
        let tensor = match init {
            Init::Normal => Tensor::random(
                shape,
                Distribution::Normal(0.0, self.shared.initializer_range),
                device,
            ),
            Init::Zeros => Tensor::zeros(shape, device),
            Init::Ones => Tensor::ones(shape, device),
        };
        self.cast(tensor)
    }

    fn cast<const D: usize>(&self, tensor: Tensor<D>) -> Tensor<D> {
        match self.shared.options.dtype {
            Some(dtype) => tensor.cast(dtype),
            None => tensor,
        }
    }

    fn matrix_from(&self, full: String, view: TensorView) -> Result<Matrix> {
        if self.packs()
            && let Some(packed) = oxiformers_quant::pack(&view)
        {
            return Ok(Matrix::packed(packed).observed(&full, self.shared.options.observer.as_ref()));
        }
        let tensor = self.dense(&full, &view)?;
        Ok(self.dense_matrix(full, tensor))
    }

    fn dense_matrix(&self, full: String, tensor: Tensor<2>) -> Matrix {
        let observer = self.shared.options.observer.as_ref();
        Matrix::dense(self.register(full.clone(), tensor)).observed(&full, observer)
    }

    /// Whether matrices are kept in a form that products on the CPU read.
    fn packs(&self) -> bool {
        self.shared.options.dtype.is_none() && *self.device() == Device::flex()
    }

    fn dense<const D: usize>(&self, name: &str, view: &TensorView) -> Result<Tensor<D>> {
        let values = to_f32(view).map_err(|reason| Error::Dtype {
            origin: self
                .shared
                .source
                .as_ref()
                .map(|s| s.origin())
                .unwrap_or_default(),
            name: name.to_string(),
            dtype: format!("{:?}", view.dtype),
            reason,
        })?;
        let data = TensorData::new(values, Shape::from(view.shape.clone()));
        Ok(self.cast(Tensor::from_data(data, self.device())))
    }
}

/// Any stored float tensor as f32 values, row-major.
///
/// # Errors
/// Says why the type does not fit.
pub fn to_f32(view: &TensorView) -> Result<Vec<f32>, String> {
    fn each<const N: usize>(bytes: &[u8], f: impl Fn([u8; N]) -> f32) -> Vec<f32> {
        bytes.as_chunks::<N>().0.iter().map(|b| f(*b)).collect()
    }
    Ok(match view.dtype {
        DType::F32 => each(&view.data, f32::from_le_bytes),
        DType::F64 => each(&view.data, |b: [u8; 8]| f64::from_le_bytes(b) as f32),
        DType::F16 => each(&view.data, |b: [u8; 2]| half::f16::from_le_bytes(b).to_f32()),
        DType::BF16 => each(&view.data, |b: [u8; 2]| half::bf16::from_le_bytes(b).to_f32()),
        DType::Ggml(ty) => {
            let mut values = vec![0.0; view.shape.iter().product()];
            ggml::dequantize(ty, &view.data, &mut values).map_err(|error| error.to_string())?;
            values
        }
        _ => return Err("is no float type that parameters can have".to_string()),
    })
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
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
