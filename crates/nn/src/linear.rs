//! The linear layer over dense or packed weights.

use std::ops::Range;
use std::sync::Arc;

use burn::module::{Module, Param, ParamId};
use burn::tensor::{Device, Int, Tensor};
use oxiformers_kernels::{
    Activation, PackedMatrix, Weight, feed_forward, gated_feed_forward, int8_activations, linear, linears,
};

use crate::adapter::{Active, AdapterLayer};
use crate::{Error, Init, Lambda, Result, RmsNorm, TargetKind, Weights};

/// Sees what linear layers multiply their weights with: how calibration (importance matrices, GPTQ, AWQ, …) learns
/// about activations.
///
/// Given with [`LoadOptions::observer`](crate::LoadOptions::observer), it is called before each product of the loaded
/// model, with the weight's whole name, such as `model.layers.0.self_attn.q_proj.weight`, and the rows of its input
/// `x` `[rows, in_features]`, in the order of the tokens. Experts that are stored as one tensor have the name of that
/// tensor and their number (`….experts.down_proj.3`), and see the tokens that chose them. Rows that are looked up in a
/// table of embeddings are no products. Layers that share an input (queries, keys and values) are called with the same
/// tensor one after the other, before any of them is computed.
pub trait Observer: std::fmt::Debug + Send + Sync {
    /// Takes note of an input.
    fn observe(&self, name: &str, x: Tensor<2>);
}

/// The name by which an observer knows a matrix.
#[derive(Debug, Clone)]
struct Observed {
    name: String,
    observer: Arc<dyn Observer>,
}

/// A weight matrix `[out_features, in_features]`, dense or packed; nobody above can tell which.
#[derive(Module, Debug)]
pub struct Matrix {
    /// Dense values, the trainable form.
    dense: Option<Param<Tensor<2>>>,
    /// Values in their storage format.
    #[module(skip)]
    packed: Option<Arc<dyn PackedMatrix>>,
    /// Who sees its inputs.
    #[module(skip)]
    observed: Option<Observed>,
    /// What is done with its inputs first.
    input: Option<Input>,
    /// Parts of adapters.
    adapters: Vec<AdapterLayer>,
    /// The row that learns nothing when it is looked up.
    #[module(skip)]
    padding: Option<usize>,
}

/// What is done with activations before they are multiplied, in some schemes of quantization.
#[derive(Module, Debug)]
pub struct Input {
    /// They are normalized.
    pub norm: Option<RmsNorm>,
    /// They become whole numbers of 8 bits with a scale for each token, where the product does not see to it.
    pub int8: bool,
    /// Both, they and the dense weight, are quantized only for the forward pass, and so far.
    #[module(skip)]
    pub straight_through: Option<Lambda>,
}

impl Input {
    fn apply<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        let x = match &self.norm {
            Some(norm) => norm.forward(x),
            None => x,
        };
        match &self.straight_through {
            Some(lambda) => lambda.activations(x),
            None if self.int8 => int8_activations(x),
            None => x,
        }
    }
}

impl Matrix {
    /// A dense matrix.
    pub fn dense(values: Param<Tensor<2>>) -> Self {
        Self {
            dense: Some(values),
            packed: None,
            observed: None,
            input: None,
            adapters: Vec::new(),
            padding: None,
        }
    }

    /// A matrix in its storage format.
    pub fn packed(matrix: Arc<dyn PackedMatrix>) -> Self {
        Self {
            dense: None,
            packed: Some(matrix),
            observed: None,
            input: None,
            adapters: Vec::new(),
            padding: None,
        }
    }

    /// The same matrix in another storage format.
    #[must_use]
    pub(crate) fn stored_as(mut self, matrix: Arc<dyn PackedMatrix>) -> Self {
        self.packed = Some(matrix);
        self
    }

    /// The same matrix, whose inputs `observer` sees under `name`.
    #[must_use]
    pub fn observed(mut self, name: &str, observer: Option<&Arc<dyn Observer>>) -> Self {
        self.observed = observer.map(|observer| Observed {
            name: name.to_string(),
            observer: observer.clone(),
        });
        self
    }

    /// The same matrix, with whose inputs something is done first.
    #[must_use]
    pub fn with_input(mut self, input: Input) -> Self {
        self.input = Some(input);
        self
    }

    /// The same matrix with the parts of adapters instead of those that it has.
    #[must_use]
    pub fn with_adapters(mut self, adapters: Vec<AdapterLayer>) -> Self {
        self.adapters = adapters;
        self
    }

    /// The same matrix, whose row `padding` learns nothing when it is looked up: PyTorch's `padding_idx`.
    #[must_use]
    pub fn with_padding(mut self, padding: Option<usize>) -> Self {
        self.padding = padding;
        self
    }

    /// The row that learns nothing when it is looked up.
    pub(crate) fn padding(&self) -> Option<usize> {
        self.padding
    }

    /// Its input, as it is multiplied.
    fn prepare<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        match &self.input {
            Some(input) => input.apply(x),
            None => x,
        }
    }

    /// A dense weight, as the forward pass has it.
    fn trained(&self, dense: Tensor<2>) -> Tensor<2> {
        let input = self.input.as_ref();
        match input.and_then(|input| input.straight_through.as_ref()) {
            Some(lambda) => lambda.weights(dense),
            None => dense,
        }
    }

    /// `[out_features, in_features]`.
    pub fn shape(&self) -> [usize; 2] {
        match (&self.packed, &self.dense) {
            (Some(packed), _) => packed.shape(),
            (None, Some(dense)) => dense.val().dims(),
            (None, None) => [0, 0],
        }
    }

    /// Which parameter it is, if it is one.
    pub fn param_id(&self) -> Option<ParamId> {
        self.dense.as_ref().map(|dense| dense.id)
    }

    /// What is done with its inputs first.
    pub fn input(&self) -> Option<&Input> {
        self.input.as_ref()
    }

    /// The matrix in its storage format, if it is held so.
    pub(crate) fn as_packed(&self) -> Option<&Arc<dyn PackedMatrix>> {
        self.packed.as_ref()
    }

    /// Parts of adapters.
    pub(crate) fn adapters(&self) -> &[AdapterLayer] {
        &self.adapters
    }

    /// Its values, if they are held as floats.
    pub fn as_dense(&self) -> Option<&Param<Tensor<2>>> {
        self.dense.as_ref()
    }

    /// What a product with `x` reads.
    fn weight<const D: usize>(&self, x: &Tensor<D>) -> Weight {
        if let Some(Observed { name, observer }) = &self.observed {
            let in_features = x.dims()[D - 1];
            let rows = x.dims().iter().product::<usize>() / in_features.max(1);
            observer.observe(name, x.clone().reshape([rows, in_features]));
        }
        match (&self.packed, &self.dense) {
            (Some(packed), _) => Weight::Packed(packed.clone()),
            (None, Some(dense)) => Weight::Dense(self.trained(dense.val())),
            (None, None) => Weight::Dense(Tensor::zeros([0, 0], &Device::flex())),
        }
    }

    /// `x · Wᵀ + bias`: `[.., in_features]` to `[.., out_features]`.
    pub fn linear<const D: usize>(&self, x: Tensor<D>, bias: Option<Tensor<1>>) -> Tensor<D> {
        self.apply(x, bias, None)
    }

    fn apply<const D: usize>(
        &self,
        x: Tensor<D>,
        bias: Option<Tensor<1>>,
        act: Option<Activation>,
    ) -> Tensor<D> {
        let Some(active) = Active::of(&self.adapters) else {
            let weight = self.weight(&x);
            return linear(self.prepare(x), (weight, bias), act);
        };
        let (base, bias) = match active.saved() {
            Some(saved) => (&saved.weight, saved.bias.as_ref().map(Param::val).or(bias)),
            None => (self, bias),
        };
        let scaled = active.before(x.clone());
        let operand = (base.weight(&scaled), bias.clone());
        let y = linear(base.prepare(scaled), operand, None);
        let y = active.after(&x, y, bias.as_ref(), base);
        act.map_or(y.clone(), |act| act.forward(y))
    }

    /// `x · Wᵀ` without adapters.
    pub(crate) fn linear_alone<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        let weight = self.weight(&x);
        linear(self.prepare(x), (weight, None), None)
    }

    /// The rows `ids` as a dense tensor `[ids.len(), in_features]`.
    pub fn rows(&self, ids: Tensor<1, Int>) -> Tensor<2> {
        let Some(active) = Active::of(&self.adapters) else {
            return self.rows_alone(ids);
        };
        let base = active.saved().map_or(self, |saved| &saved.weight);
        let y = base.rows_alone(ids.clone());
        active.after_rows(&ids, y, base)
    }

    fn rows_alone(&self, ids: Tensor<1, Int>) -> Tensor<2> {
        match (&self.packed, &self.dense) {
            (Some(packed), _) => oxiformers_kernels::packed_rows(ids, packed),
            (None, Some(dense)) => oxiformers_kernels::rows(dense.val(), ids, self.padding),
            (None, None) => Tensor::zeros([0, 0], &ids.device()),
        }
    }
}

/// `y = x · Wᵀ + b`.
#[derive(Module, Debug)]
pub struct Linear {
    /// `[out_features, in_features]`.
    pub weight: Matrix,
    /// `[out_features]`.
    pub bias: Option<Param<Tensor<1>>>,
}

impl Linear {
    /// Loads `weight` `[out_features, in_features]`, and `bias` where there is one.
    pub fn load(w: &Weights, in_features: usize, out_features: usize, bias: bool) -> Result<Self> {
        let weight = w.matrix("weight", [out_features, in_features])?;
        w.will_multiply(&weight);
        let bias = if bias {
            Some(w.param("bias", [out_features], Init::Zeros)?)
        } else {
            None
        };
        let (weight, bias) = w.adapt(weight, bias, w.target_kind())?;
        Ok(Self { weight, bias })
    }

    /// Loads a layer whose checkpoint stores the weight as `[in_features, out_features]`, as the
    /// `Conv1D` layers of GPT-2 do.
    pub fn load_conv1d(w: &Weights, in_features: usize, out_features: usize) -> Result<Self> {
        let weight = w.matrix_transposed("weight", [out_features, in_features])?;
        w.will_multiply(&weight);
        let bias = Some(w.param("bias", [out_features], Init::Zeros)?);
        let (weight, bias) = w.adapt(weight, bias, TargetKind::Conv1d)?;
        Ok(Self { weight, bias })
    }

    /// A layer that shares its weight, such as an output layer tied to the embedding.
    pub fn from_matrix(weight: Matrix) -> Self {
        Self { weight, bias: None }
    }

    /// `[.., in_features]` to `[.., out_features]`.
    pub fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        self.apply(x, None)
    }

    /// The same with an activation function applied to the result.
    pub fn forward_act<const D: usize>(&self, x: Tensor<D>, act: Activation) -> Tensor<D> {
        self.apply(x, Some(act))
    }

    fn apply<const D: usize>(&self, x: Tensor<D>, act: Option<Activation>) -> Tensor<D> {
        self.weight.apply(x, self.bias.as_ref().map(Param::val), act)
    }

    /// Several layers over the same input, at once where their weights allow it.
    pub fn forward_all<const D: usize, const N: usize>(layers: [&Self; N], x: Tensor<D>) -> [Tensor<D>; N] {
        let active = layers.map(|layer| Active::of(&layer.weight.adapters));
        let apart = active.iter().flatten().any(Active::changes_product);
        if apart || layers.iter().any(|layer| layer.weight.input.is_some()) {
            return layers.map(|layer| layer.forward(x.clone()));
        }
        let operands = layers.map(|layer| layer.operand(&x));
        if active.iter().all(Option::is_none) {
            return linears(x, operands, None);
        }
        let biases = operands.each_ref().map(|(_, bias)| bias.clone());
        let mut of = layers.iter().zip(active).zip(biases);
        linears(x.clone(), operands, None).map(|y| match of.next() {
            Some(((layer, Some(active)), bias)) => active.after(&x, y, bias.as_ref(), &layer.weight),
            _ => y,
        })
    }

    /// `second(act(first(x)))`: `[.., in_features]` to `[.., out_features]`.
    pub fn feed_forward<const D: usize>(layers: [&Self; 2], x: Tensor<D>, act: Activation) -> Tensor<D> {
        let [first, second] = layers;
        let changed =
            |layer: &&Self| layer.weight.input.is_some() || Active::of(&layer.weight.adapters).is_some();
        let changed = layers.iter().any(changed);
        if second.weight.observed.is_some() || changed {
            // What is between the two is only known where they are computed one by one.
            return second.forward(first.forward_act(x, act));
        }
        let operands = layers.map(|layer| layer.operand(&x));
        feed_forward(x, operands, act)
    }

    /// `down(act(gate(x)) · up(x))`: `[.., in_features]` to `[.., out_features]`.
    pub fn gated_feed_forward<const D: usize>(
        layers: [&Self; 3],
        x: Tensor<D>,
        act: Activation,
    ) -> Tensor<D> {
        let [gate, up, down] = layers;
        let changed =
            |layer: &&Self| layer.weight.input.is_some() || Active::of(&layer.weight.adapters).is_some();
        if down.weight.observed.is_some() || layers.iter().any(changed) {
            let [gate, up] = Self::forward_all([gate, up], x);
            return down.forward(act.gated(gate, up));
        }
        let operands = layers.map(|layer| layer.operand(&x));
        gated_feed_forward(x, operands, act)
    }

    fn operand<const D: usize>(&self, x: &Tensor<D>) -> (Weight, Option<Tensor<1>>) {
        (self.weight.weight(x), self.bias.as_ref().map(Param::val))
    }

    /// Number of output features.
    pub fn out_features(&self) -> usize {
        self.weight.shape()[0]
    }
}

/// Checks that `part` lies within `whole` rows; used where fused weights are cut.
pub fn check_rows(name: &str, part: &Range<usize>, whole: usize) -> Result<()> {
    if part.start <= part.end && part.end <= whole {
        return Ok(());
    }
    Err(Error::config(
        name,
        format!("rows {part:?} are outside of the {whole} rows stored"),
    ))
}
