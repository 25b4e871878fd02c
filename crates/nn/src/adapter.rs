//! Adapters: small parts beside the weights of a model, which stay as they are.
//!
//! While a model is loaded, each adapter of [`LoadOptions::adapters`](crate::LoadOptions::adapters) is asked for its part
//! of every linear layer and every table of embeddings. A part belongs to its matrix and is a Burn module like any other,
//! so that optimizers find its parameters. Whether it takes part is said at any time by its adapter's [`Switch`].

use std::fmt::Debug;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use burn::module::{Module, Param};
use burn::tensor::{Int, Tensor, TensorData};
use oxiformers_hub::checkpoint::TensorView;
use oxiformers_kernels::{Weight, linear, rows};

use crate::linear::Matrix;
use crate::prompt::Prompt;
use crate::weights::lock;
use crate::{Result, Weights, training};

/// What adds parts to a model while it is loaded. The formats of files are none of this crate's business.
pub trait Adapter: Debug + Send + Sync {
    /// Whether it takes part, and how much.
    fn switch(&self) -> &Arc<Switch>;

    /// Its parts of a module, none where it leaves it as it is. Parameters are made with [`Weights::adapter_param`].
    ///
    /// # Errors
    /// Where it does not fit the module.
    fn parts(&self, target: &Target, w: &Weights) -> Result<Vec<Part>>;

    /// Its virtual tokens for a decoder of that many layers whose embeddings have `width` values, if it has some.
    ///
    /// # Errors
    /// Where they do not fit the model.
    fn prompt(&self, width: usize, layers: usize, w: &Weights) -> Result<Option<Prompt>>;

    /// What takes the place of the checkpoint's tensor of one of these names, for as long as the model lives: a bias that
    /// was trained, for example, or a norm. `stored` says whether the checkpoint has it.
    fn replacement(&self, names: &[&str], stored: bool) -> Option<TensorView>;

    /// Whether the checkpoint's parameter of one of these names, no matrix, is trained with the adapter.
    fn trains(&self, names: &[&str]) -> bool;

    /// Type and shape of a tensor of this name that it brings.
    fn shape_of(&self, name: &str) -> Option<Vec<usize>>;

    /// Checks that the model had a place for all of it.
    ///
    /// # Errors
    /// Names what there was no place for.
    fn finish(&self) -> Result<()>;
}

/// A module that an adapter may have a part of.
#[derive(Debug)]
pub struct Target<'a> {
    /// Its whole name, such as `model.layers.0.self_attn.q_proj`, and perhaps the name without the base model's.
    pub names: Vec<&'a str>,
    /// What it is.
    pub kind: TargetKind,
    /// Its weight.
    pub matrix: &'a Matrix,
    /// Its bias.
    pub bias: Option<&'a Param<Tensor<1>>>,
}

impl Target<'_> {
    /// Its whole name.
    pub fn name(&self) -> &str {
        self.names.first().copied().unwrap_or_default()
    }
}

/// What a module is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TargetKind {
    /// A linear layer.
    Linear,
    /// One that checkpoints store as `[in_features, out_features]`.
    Conv1d,
    /// The layer that makes logits of hidden states.
    Output,
    /// A router of experts, or another linear layer that is never quantized.
    Kept,
    /// A table of embeddings.
    Embedding,
}

/// Whether an adapter takes part, and with which weight. All its parts share it, and it can be set while the model is in
/// use.
#[derive(Debug)]
pub struct Switch {
    name: String,
    on: AtomicBool,
    /// Bits of an f32.
    weight: AtomicU32,
}

impl Switch {
    /// An adapter of this name that takes part with weight 1.
    pub fn new(name: &str) -> Self {
        Self {
            name: name.to_string(),
            on: AtomicBool::new(true),
            weight: AtomicU32::new(1f32.to_bits()),
        }
    }

    /// The adapter's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether it takes part.
    pub fn is_on(&self) -> bool {
        self.on.load(Ordering::Relaxed)
    }

    /// Lets it take part, or not.
    pub fn set(&self, on: bool) {
        self.on.store(on, Ordering::Relaxed);
    }

    /// What its contribution is multiplied by.
    pub fn weight(&self) -> f64 {
        f32::from_bits(self.weight.load(Ordering::Relaxed)).into()
    }

    /// Sets what its contribution is multiplied by. It applies to LoRA and VeRA, whose parts are added; others take part
    /// wholly or not at all.
    pub fn set_weight(&self, weight: f32) {
        self.weight.store(weight.to_bits(), Ordering::Relaxed);
    }
}

/// An adapter's part of one matrix, and its switch.
#[derive(Module, Debug)]
pub struct AdapterLayer {
    pub(crate) part: Part,
    #[module(skip)]
    pub(crate) switch: Arc<Switch>,
}

/// What an adapter does at one matrix.
#[derive(Module, Debug)]
pub enum Part {
    /// A product of low rank is added.
    Lora(Lora),
    /// A product of low rank is added to a table.
    LoraEmbedding(LoraEmbedding),
    /// Inputs or outputs are scaled.
    Ia3(Ia3),
    /// A product of low rank is added of which vectors are the module's own.
    Vera(Vera),
    /// Another module takes its place.
    Saved(Saved),
}

impl AdapterLayer {
    /// Whether it takes part now.
    fn is_on(&self) -> bool {
        self.switch.is_on()
    }
}

/// LoRA (Hu et al., 2021): `B · A · x` times a scaling is added to a layer's output. With magnitudes it is DoRA (Liu et
/// al., 2024).
#[derive(Module, Debug)]
pub struct Lora {
    /// `[r, in_features]`.
    pub lora_a: Param<Tensor<2>>,
    /// `[out_features, r]`.
    pub lora_b: Param<Tensor<2>>,
    /// Added to the product before it is scaled: `[out_features]`.
    pub bias: Option<Param<Tensor<1>>>,
    /// DoRA's lengths of the rows of the adapted weight: `[out_features]`.
    pub magnitude: Option<Param<Tensor<1>>>,
    /// `lora_alpha / r`, or over the root of `r`.
    pub scaling: f64,
    /// Part of the inputs that are left out in training.
    pub dropout: f64,
    /// What the weight is without, as `[a, b]` `[r, in_features]` and `[out_features, r]`: where the adapter began as a part
    /// of the weight itself, which that has no longer (PiSSA, Meng et al., 2024).
    pub taken: Option<[Tensor<2>; 2]>,
    #[module(skip)]
    norms: Norms,
}

/// The lengths of the rows of a weight with an adapter of a scaling, which only change in training.
#[derive(Debug, Default)]
struct Norms(Mutex<Option<(f64, Tensor<1>)>>);

impl Clone for Norms {
    /// A module's clone may be trained on: it finds its own.
    fn clone(&self) -> Self {
        Self::default()
    }
}

impl Norms {
    fn of(&self, scaling: f64, keep: bool, compute: impl FnOnce() -> Tensor<1>) -> Tensor<1> {
        if !keep {
            return compute();
        }
        let mut kept = lock(&self.0);
        match &*kept {
            Some((of, norms)) if *of == scaling => norms.clone(),
            _ => {
                let norms = compute();
                *kept = Some((scaling, norms.clone()));
                norms
            }
        }
    }
}

impl Lora {
    /// Without a bias of its own, magnitudes or dropout.
    pub fn new(lora_a: Param<Tensor<2>>, lora_b: Param<Tensor<2>>, scaling: f64) -> Self {
        Self {
            lora_a,
            lora_b,
            bias: None,
            magnitude: None,
            scaling,
            dropout: 0.0,
            taken: None,
            norms: Norms::default(),
        }
    }

    /// `y`, what `base` and those before made of `x`, with this part; `bias` is what `base` added.
    fn forward<const D: usize>(
        &self,
        x: Tensor<D>,
        y: Tensor<D>,
        bias: Option<Tensor<1>>,
        weight: f64,
        base: &Matrix,
    ) -> Tensor<D> {
        let scaling = self.scaling * weight;
        let y = match &self.taken {
            Some([a, b]) => y - product(product(x.clone(), a.clone(), None), b.clone(), None),
            None => y,
        };
        let drops = self.dropout > 0.0 && training::drops_for_adapters();
        let x = training::adapter(x, self.dropout);
        let bias_b = self.bias.as_ref().map(Param::val);
        let low = product(x.clone(), self.lora_a.val(), None);
        let delta = product(low, self.lora_b.val(), bias_b) * scaling;
        let Some(magnitude) = &self.magnitude else {
            return y + delta;
        };
        let magnitude = magnitude.val();
        let norms = self.norms.of(scaling, !magnitude.is_autodiff(), || {
            base.row_norms(
                training::constant(self.lora_a.val()),
                training::constant(self.lora_b.val()),
                scaling,
            )
        });
        let factor = (magnitude / norms).unsqueeze::<D>();
        // Without dropout, the layer's own output is at hand.
        let plain = match (drops, bias) {
            (true, _) => base.linear_alone(x),
            (false, Some(bias)) => y.clone() - bias.unsqueeze(),
            (false, None) => y.clone(),
        };
        y + plain * (factor.clone() - 1.0) + delta * factor
    }
}

/// LoRA of a table: `(B · A)ᵀ` times a scaling is added to it.
#[derive(Module, Debug)]
pub struct LoraEmbedding {
    /// `[r, num_embeddings]`.
    pub lora_embedding_a: Param<Tensor<2>>,
    /// `[embedding_dim, r]`.
    pub lora_embedding_b: Param<Tensor<2>>,
    /// DoRA's lengths of the columns of the adapted table: `[embedding_dim]`.
    pub magnitude: Option<Param<Tensor<1>>>,
    /// `lora_alpha / r`, or over the root of `r`.
    pub scaling: f64,
    #[module(skip)]
    norms: Norms,
}

impl LoraEmbedding {
    /// Without magnitudes.
    pub fn new(a: Param<Tensor<2>>, b: Param<Tensor<2>>, scaling: f64) -> Self {
        Self {
            lora_embedding_a: a,
            lora_embedding_b: b,
            magnitude: None,
            scaling,
            norms: Norms::default(),
        }
    }

    /// The rows `y` `[n, embedding_dim]` of `ids` with this part.
    fn forward(&self, ids: Tensor<1, Int>, y: Tensor<2>, weight: f64, base: &Matrix) -> Tensor<2> {
        let scaling = self.scaling * weight;
        let (a, b) = (self.lora_embedding_a.val(), self.lora_embedding_b.val());
        let low = rows(a.transpose(), ids, base.padding());
        let delta = product(low, b, None) * scaling;
        let Some(magnitude) = &self.magnitude else {
            return y + delta;
        };
        (y + delta) * self.factor(magnitude.val(), scaling, base)
    }

    /// DoRA's factors of the columns: `[1, embedding_dim]`.
    fn factor(&self, magnitude: Tensor<1>, scaling: f64, base: &Matrix) -> Tensor<2> {
        let (a, b) = (
            training::constant(self.lora_embedding_a.val()),
            training::constant(self.lora_embedding_b.val()),
        );
        let norms = self.norms.of(scaling, !magnitude.is_autodiff(), || {
            let table = base.values(0..base.shape()[0], &a.device());
            let sum = table + a.transpose().matmul(b.transpose()) * scaling;
            sum.square().sum_dim(0).sqrt().squeeze_dim(0)
        });
        (magnitude / norms).unsqueeze()
    }
}

/// (IA)³ (Liu et al., 2022): a vector scales what a layer gets or what it gives.
#[derive(Module, Debug)]
pub struct Ia3 {
    /// `[1, in_features]` for the inputs, `[out_features, 1]` for the outputs.
    pub ia3_l: Param<Tensor<2>>,
    /// Whether the inputs are scaled.
    pub is_feedforward: bool,
}

impl Ia3 {
    fn scale<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        x * self.ia3_l.val().flatten::<1>(0, 1).unsqueeze()
    }
}

/// VeRA (Kopiczko et al., 2024): `b · (B · (d · (A · x)))` is added, where `A` and `B` are random and all modules share
/// them, and the vectors `b` and `d` are a module's own.
#[derive(Module, Debug)]
pub struct Vera {
    /// `[r, in_features or more]`; no parameter.
    pub vera_a: Tensor<2>,
    /// `[out_features or more, r]`; no parameter.
    pub vera_b: Tensor<2>,
    /// `[r]`.
    pub lambda_d: Param<Tensor<1>>,
    /// `[out_features]`.
    pub lambda_b: Param<Tensor<1>>,
    /// Part of the inputs that are left out in training.
    pub dropout: f64,
}

impl Vera {
    fn forward<const D: usize>(&self, x: Tensor<D>, y: Tensor<D>, weight: f64) -> Tensor<D> {
        let (in_features, out_features) = (x.dims()[D - 1], y.dims()[D - 1]);
        let x = training::adapter(x, self.dropout);
        let low = product(x, self.vera_a.clone().narrow(1, 0, in_features), None);
        let low = low * self.lambda_d.val().unsqueeze();
        let delta = product(low, self.vera_b.clone().narrow(0, 0, out_features), None);
        y + delta * self.lambda_b.val().unsqueeze() * weight
    }
}

/// A whole module that an adapter brings: PEFT's `modules_to_save`.
#[derive(Module, Debug)]
pub struct Saved {
    /// `[out_features, in_features]`.
    pub weight: Matrix,
    /// `[out_features]`; none where the module has none, or keeps its own.
    pub bias: Option<Param<Tensor<1>>>,
}

/// `x · Wᵀ + b` with the weights of an adapter, in their precision, back in that of `x`.
fn product<const D: usize>(x: Tensor<D>, weight: Tensor<2>, bias: Option<Tensor<1>>) -> Tensor<D> {
    let (dtype, own) = (x.dtype(), weight.dtype());
    let x = if dtype == own { x } else { x.cast(own) };
    let y = linear(x, (Weight::Dense(weight), bias), None);
    if dtype == own { y } else { y.cast(dtype) }
}

/// The parts of all adapters of a matrix, as far as they take part now.
pub(crate) struct Active<'a>(&'a [AdapterLayer]);

impl<'a> Active<'a> {
    /// None where no adapter takes part.
    pub(crate) fn of(layers: &'a [AdapterLayer]) -> Option<Self> {
        layers.iter().any(AdapterLayer::is_on).then_some(Self(layers))
    }

    fn parts(&self) -> impl Iterator<Item = (&'a Part, f64)> {
        let on = self.0.iter().filter(|layer| layer.is_on());
        on.map(|layer| (&layer.part, layer.switch.weight()))
    }

    /// The module that takes the place of the base's: that of the adapter that came last.
    pub(crate) fn saved(&self) -> Option<&'a Saved> {
        let saved = self.parts().filter_map(|(part, _)| match part {
            Part::Saved(saved) => Some(saved),
            _ => None,
        });
        saved.last()
    }

    /// Whether the base's own product is another one than without adapters.
    pub(crate) fn changes_product(&self) -> bool {
        self.parts().any(|(part, _)| match part {
            Part::Saved(_) => true,
            Part::Ia3(ia3) => ia3.is_feedforward,
            _ => false,
        })
    }

    /// What the base is to multiply instead of `x`.
    pub(crate) fn before<const D: usize>(&self, mut x: Tensor<D>) -> Tensor<D> {
        for (part, _) in self.parts() {
            if let Part::Ia3(ia3) = part
                && ia3.is_feedforward
            {
                x = ia3.scale(x);
            }
        }
        x
    }

    /// What becomes of `y`, which `base` made of `x`.
    pub(crate) fn after<const D: usize>(
        &self,
        x: &Tensor<D>,
        mut y: Tensor<D>,
        bias: Option<&Tensor<1>>,
        base: &Matrix,
    ) -> Tensor<D> {
        for (part, weight) in self.parts() {
            y = match part {
                Part::Lora(lora) => lora.forward(x.clone(), y, bias.cloned(), weight, base),
                Part::Vera(vera) => vera.forward(x.clone(), y, weight),
                Part::Ia3(ia3) if !ia3.is_feedforward => ia3.scale(y),
                _ => y,
            };
        }
        y
    }

    /// What becomes of the rows `y` of a table.
    pub(crate) fn after_rows(&self, ids: &Tensor<1, Int>, mut y: Tensor<2>, base: &Matrix) -> Tensor<2> {
        for (part, weight) in self.parts() {
            if let Part::LoraEmbedding(lora) = part {
                y = lora.forward(ids.clone(), y, weight, base);
            }
        }
        y
    }
}

/// `w` and its bias with the part, which was made for `base`, in them.
fn merge_into(
    part: &Part,
    weight: f64,
    base: &Matrix,
    w: Tensor<2>,
    bias: Option<Tensor<1>>,
) -> (Tensor<2>, Option<Tensor<1>>) {
    // Rows and columns that the part scales.
    let of_rows = |factor: Tensor<1>| factor.unsqueeze_dim::<2>(1);
    match part {
        Part::Saved(_) => (w, bias),
        Part::Ia3(ia3) if ia3.is_feedforward => (w, bias),
        Part::Ia3(ia3) => {
            let factor = ia3.ia3_l.val().flatten::<1>(0, 1);
            (w * of_rows(factor.clone()), bias.map(|bias| bias * factor))
        }
        Part::Vera(vera) => {
            let [rows, cols] = w.dims();
            let a = vera.vera_a.clone().narrow(1, 0, cols) * of_rows(vera.lambda_d.val());
            let b = vera.vera_b.clone().narrow(0, 0, rows) * of_rows(vera.lambda_b.val());
            (w + b.matmul(a) * weight, bias)
        }
        Part::LoraEmbedding(lora) => {
            let scaling = lora.scaling * weight;
            let (a, b) = (lora.lora_embedding_a.val(), lora.lora_embedding_b.val());
            let w = w + a.transpose().matmul(b.transpose()) * scaling;
            match &lora.magnitude {
                Some(magnitude) => (w * lora.factor(magnitude.val(), scaling, base), bias),
                None => (w, bias),
            }
        }
        Part::Lora(lora) => {
            let scaling = lora.scaling * weight;
            let (a, b) = (lora.lora_a.val(), lora.lora_b.val());
            let w = match &lora.taken {
                Some([a, b]) => w - b.clone().matmul(a.clone()),
                None => w,
            };
            let mut w = w + b.clone().matmul(a.clone()) * scaling;
            let mut added = lora.bias.as_ref().map(|bias| bias.val() * scaling);
            if let Some(magnitude) = &lora.magnitude {
                let factor = magnitude.val() / base.row_norms(a, b, scaling);
                w = w * of_rows(factor.clone());
                added = added.map(|added| added * factor);
            }
            let bias = match (bias, added) {
                (Some(bias), Some(added)) => Some(bias + added),
                (bias, added) => bias.or(added),
            };
            (w, bias)
        }
    }
}

/// Values that are widened at a time.
const PIECE: usize = 1 << 22;

impl Matrix {
    /// The weight `[out_features, in_features]` and the bias that give the same without the adapters that take part now:
    /// PEFT's `merge_and_unload`. `bias` is what the module has.
    pub fn merged(
        &self,
        bias: Option<Tensor<1>>,
        device: &burn::tensor::Device,
    ) -> (Tensor<2>, Option<Tensor<1>>) {
        let active = Active(self.adapters());
        let (base, bias) = match active.saved() {
            Some(saved) => (&saved.weight, saved.bias.as_ref().map(Param::val).or(bias)),
            None => (self, bias),
        };
        let mut w = base.values(0..base.shape()[0], device);
        for (part, _) in active.parts() {
            if let Part::Ia3(ia3) = part
                && ia3.is_feedforward
            {
                w = ia3.scale(w);
            }
        }
        active.parts().fold((w, bias), |(w, bias), (part, weight)| {
            merge_into(part, weight, base, w, bias)
        })
    }

    /// Rows as a dense tensor `[rows.len(), in_features]` on a device.
    pub fn values(&self, rows: Range<usize>, device: &burn::tensor::Device) -> Tensor<2> {
        let [_, cols] = self.shape();
        match (self.as_packed(), self.as_dense()) {
            (Some(packed), _) => {
                let mut values = vec![0.0f32; rows.len() * cols];
                packed.dequantize_rows(rows.clone(), &mut values);
                Tensor::from_data(TensorData::new(values, [rows.len(), cols]), device)
            }
            (None, Some(dense)) => training::constant(dense.val()).slice([rows, 0..cols]),
            (None, None) => Tensor::zeros([0, 0], device),
        }
    }

    /// The lengths of the rows of `W + scaling · b · a`: `[out_features]`. They are constants to gradients.
    pub fn row_norms(&self, a: Tensor<2>, b: Tensor<2>, scaling: f64) -> Tensor<1> {
        let [rows, cols] = self.shape();
        let device = a.device();
        let step = (PIECE / cols.max(1)).max(1);
        let pieces = (0..rows).step_by(step).map(|first| {
            let part = first..rows.min(first + step);
            let delta = b.clone().slice([part.clone(), 0..b.dims()[1]]).matmul(a.clone()) * scaling;
            let sum = self.values(part, &device).cast(delta.dtype()) + delta;
            sum.square().sum_dim(1).sqrt().squeeze_dim::<1>(1)
        });
        Tensor::cat(pieces.collect(), 0)
    }
}
