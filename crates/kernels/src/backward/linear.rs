//! Products with weights.

use std::sync::{Arc, Mutex, PoisonError};

use burn::backend::DispatchTensor;
use burn::backend::flex::FlexTensor;
use burn::tensor::Tensor;

use super::activation::{derivative, gated_gradients};
use super::{column_sums, tensor, values_mut};
use crate::activation::Activation;
use crate::autodiff::{Tape, open};
use crate::dense::{self, Left, add_product, product};
use crate::flex;
use crate::linear::{Layer, Weight, linears, reference};
use crate::packed::PackedMatrix;
use crate::threads::for_each_chunk;

/// A weight whose gradients are asked for.
#[derive(Clone)]
enum Matrix {
    Dense(FlexTensor),
    Packed(Arc<dyn PackedMatrix>),
}

/// A layer before its tensors are opened.
struct Parts {
    weight: Stored,
    bias: Option<DispatchTensor>,
}

enum Stored {
    Dense(DispatchTensor),
    Packed(Arc<dyn PackedMatrix>),
}

impl Parts {
    fn new((weight, bias): Layer) -> Self {
        let weight = match weight {
            Weight::Dense(weight) => Stored::Dense(weight.into_dispatch()),
            Weight::Packed(matrix) => Stored::Packed(matrix),
        };
        let bias = bias.map(Tensor::into_dispatch);
        Self { weight, bias }
    }

    fn back(self) -> Layer {
        let weight = match self.weight {
            Stored::Dense(weight) => Weight::Dense(Tensor::from_dispatch(weight)),
            Stored::Packed(matrix) => Weight::Packed(matrix),
        };
        (weight, self.bias.map(Tensor::from_dispatch))
    }

    fn tensors(&self) -> impl Iterator<Item = &DispatchTensor> + Clone {
        let weight = match &self.weight {
            Stored::Dense(weight) => Some(weight),
            Stored::Packed(_) => None,
        };
        weight.into_iter().chain(&self.bias)
    }

    /// The weight, whose gradient has this place, and the bias, whose gradient has the next.
    fn open<const N: usize>(self, tape: &mut Tape<N>, place: usize) -> (Matrix, Option<FlexTensor>) {
        let weight = match self.weight {
            Stored::Dense(weight) => Matrix::Dense(flex::contiguous(tape.open(place, weight))),
            Stored::Packed(matrix) => Matrix::Packed(matrix),
        };
        (weight, self.bias.map(|bias| tape.open(place + 1, bias)))
    }
}

/// `x`, whose gradient has place 0, and the layers, each with two places; or all of it back.
#[allow(clippy::type_complexity)]
fn open_layers<const D: usize, const L: usize, const N: usize>(
    x: Tensor<D>,
    layers: [Layer; L],
) -> Result<(FlexTensor, [(Matrix, Option<FlexTensor>); L], Tape<N>), (Tensor<D>, [Layer; L])> {
    let (x, layers) = (x.into_dispatch(), layers.map(Parts::new));
    let tensors = [&x].into_iter().chain(layers.iter().flat_map(Parts::tensors));
    let Some(mut tape) = Tape::over(tensors) else {
        return Err((Tensor::from_dispatch(x), layers.map(Parts::back)));
    };
    let x = flex::contiguous(tape.open(0, x));
    let mut place = 1;
    let layers = layers.map(|layer| {
        place += 2;
        layer.open(&mut tape, place - 2)
    });
    Ok((x, layers, tape))
}

impl Matrix {
    fn shape(&self) -> [usize; 2] {
        match self {
            Self::Dense(x) => std::array::from_fn(|i| x.layout().shape()[i]),
            Self::Packed(matrix) => matrix.shape(),
        }
    }

    /// What the product with `x` `[rows, in_features]` is, bias included.
    fn forward(&self, x: FlexTensor, bias: Option<FlexTensor>) -> FlexTensor {
        let weight = match self {
            Self::Dense(x) => Weight::Dense(flex::wrap(x.clone())),
            Self::Packed(matrix) => Weight::Packed(matrix.clone()),
        };
        let x = flex::wrap::<2>(x);
        let [y] = linears(x, [(weight, bias.map(flex::wrap))], None);
        flex::inner(y.into_dispatch())
    }

    /// The gradient `[rows, in_features]` of the input: `dy · W`, added to `sum` if there is one.
    fn of_input(&self, dy: &[f32], sum: Option<Vec<f32>>) -> Vec<f32> {
        let [out_features, in_features] = self.shape();
        let dy = Left::new(dy, out_features);
        match self {
            Self::Dense(weight) => {
                let weight = dense::Weight::Turned(flex::values(weight), [in_features, out_features]);
                match sum {
                    Some(sum) => add_product(sum, dy, weight),
                    None => product(dy, weight),
                }
            }
            Self::Packed(matrix) => {
                // Some rows at a time: there is never a whole matrix of floats.
                let mut sum = sum;
                let mut tile = Vec::new();
                for first in (0..out_features).step_by(TILE) {
                    let rows = first..out_features.min(first + TILE);
                    tile.resize(rows.len() * in_features, 0.0);
                    for_each_chunk(&mut tile, ROWS_OF_A_TASK * in_features, |index, to| {
                        let first = rows.start + index * ROWS_OF_A_TASK;
                        matrix.dequantize_rows(first..first + to.len() / in_features.max(1), to);
                    });
                    let weight = dense::Weight::Turned(&tile, [in_features, rows.len()]);
                    let dy = dy.part(rows);
                    sum = Some(match sum {
                        Some(sum) => add_product(sum, dy, weight),
                        None => product(dy, weight),
                    });
                }
                sum.unwrap_or_default()
            }
        }
    }

    /// The gradient `[out_features, in_features]` of the weight: `dyᵀ · x`.
    fn of_weight(&self, dy: &[f32], x: &[f32]) -> FlexTensor {
        let [out_features, in_features] = self.shape();
        let rows = dy.len() / out_features.max(1);
        let x = dense::Weight::Turned(x, [in_features, rows]);
        let values = product(Left::turned(dy, out_features), x);
        tensor(values, &[out_features, in_features])
    }
}

/// Rows of a packed matrix that are widened at a time, and by a task.
const TILE: usize = 384;
const ROWS_OF_A_TASK: usize = 16;

fn of_bias(dy: &[f32], out_features: usize) -> FlexTensor {
    tensor(column_sums(dy, out_features), &[out_features])
}

/// The gradient of an input that several layers share: each adds its own, instead of making a tensor of it.
type Shared = Arc<Mutex<Option<Vec<f32>>>>;

/// [`linears`] of several layers.
pub(crate) fn several<const D: usize, const N: usize>(
    x: Tensor<D>,
    layers: [Layer; N],
    act: Option<Activation>,
) -> Result<[Tensor<D>; N], (Tensor<D>, [Layer; N])> {
    let dims = x.dims();
    let (x, tape) = match open([x.into_dispatch()]) {
        Ok(([x], tape)) => (x, tape),
        Err([x]) => return Err((Tensor::from_dispatch(x), layers)),
    };
    let sum = Shared::default();
    let own = sum.clone();
    let x: Tensor<D> = tape.record(x, move |_, _| {
        let sum = own.lock().unwrap_or_else(PoisonError::into_inner).take();
        [sum.map(|values| tensor(values, &dims))]
    });
    let each = |layer| match one(x.clone(), layer, act, Some(sum.clone())) {
        Ok(y) => y,
        Err((x, layer)) => reference(x, layer, act),
    };
    Ok(layers.map(each))
}

/// [`linear`](crate::linear()) of one layer.
pub(crate) fn linear<const D: usize>(
    x: Tensor<D>,
    layer: Layer,
    act: Option<Activation>,
) -> Result<Tensor<D>, (Tensor<D>, Layer)> {
    one(x, layer, act, None)
}

fn one<const D: usize>(
    x: Tensor<D>,
    layer: Layer,
    act: Option<Activation>,
    shared: Option<Shared>,
) -> Result<Tensor<D>, (Tensor<D>, Layer)> {
    let mut dims = x.dims();
    let in_features = dims[D - 1];
    let back = |(x, [layer]): (_, [_; 1])| (x, layer);
    let (x, [(weight, bias)], tape) = open_layers::<D, 1, 3>(x, [layer]).map_err(back)?;
    let [out_features, _] = weight.shape();
    let rows = dims[..D - 1].iter().product::<usize>();
    let x = x.reshape([rows, in_features].into());
    let y = weight.forward(x.clone(), bias);
    let of_x = dims;
    dims[D - 1] = out_features;
    let y = tape.record(y.reshape(dims.into()), move |dy, wanted| {
        let dy = flex::contiguous(dy);
        let dy = flex::values(&dy);
        [
            wanted[0].then(|| match &shared {
                Some(shared) => {
                    let mut sum = shared.lock().unwrap_or_else(PoisonError::into_inner);
                    *sum = Some(weight.of_input(dy, sum.take()));
                    // Only says that there is one.
                    tensor(vec![0.0], &[1])
                }
                None => tensor(weight.of_input(dy, None), &of_x),
            }),
            wanted[1].then(|| weight.of_weight(dy, flex::values(&x))),
            wanted[2].then(|| of_bias(dy, out_features)),
        ]
    });
    Ok(match act {
        Some(act) => act.forward(y),
        None => y,
    })
}

/// [`feed_forward`](crate::feed_forward()). What is between the layers is kept as it is before the activation, which is
/// computed again in the backward pass.
#[allow(clippy::type_complexity)]
pub(crate) fn feed_forward<const D: usize>(
    x: Tensor<D>,
    layers: [Layer; 2],
    act: Activation,
) -> Result<Tensor<D>, (Tensor<D>, [Layer; 2])> {
    let mut dims = x.dims();
    let in_features = dims[D - 1];
    let (x, [(first, b1), (second, b2)], tape) = open_layers::<D, 2, 5>(x, layers)?;
    let [out_features, inner] = second.shape();
    let rows = dims[..D - 1].iter().product::<usize>();
    let x = x.reshape([rows, in_features].into());
    let before = first.forward(x.clone(), b1);
    let between =
        move |before: &FlexTensor| flex::inner(act.forward(flex::wrap::<2>(before.clone())).into_dispatch());
    let y = second.forward(between(&before), b2);
    let of_x = dims;
    dims[D - 1] = out_features;
    Ok(tape.record(y.reshape(dims.into()), move |dy, wanted| {
        let dy = flex::contiguous(dy);
        let dy = flex::values(&dy);
        let of_w2 = wanted[3].then(|| second.of_weight(dy, flex::values(&between(&before))));
        let of_b2 = wanted[4].then(|| of_bias(dy, out_features));
        let mut inside = second.of_input(dy, None);
        derivative(act, flex::values(&before), &mut inside);
        [
            wanted[0].then(|| tensor(first.of_input(&inside, None), &of_x)),
            wanted[1].then(|| first.of_weight(&inside, flex::values(&x))),
            wanted[2].then(|| of_bias(&inside, inner)),
            of_w2,
            of_b2,
        ]
    }))
}

/// [`gated_feed_forward`](crate::gated_feed_forward()). What the first two layers make is kept; what is made of it is
/// computed again in the backward pass.
#[allow(clippy::type_complexity)]
pub(crate) fn gated_feed_forward<const D: usize>(
    x: Tensor<D>,
    layers: [Layer; 3],
    act: Activation,
) -> Result<Tensor<D>, (Tensor<D>, [Layer; 3])> {
    let mut dims = x.dims();
    let in_features = dims[D - 1];
    let (x, layers, tape) = open_layers::<D, 3, 7>(x, layers)?;
    let [(first, b1), (second, b2), (third, b3)] = layers;
    let [out_features, inner] = third.shape();
    let rows = dims[..D - 1].iter().product::<usize>();
    let x = x.reshape([rows, in_features].into());
    let (gate, up) = (first.forward(x.clone(), b1), second.forward(x.clone(), b2));
    let between = move |gate: &FlexTensor, up: &FlexTensor| {
        let [gate, up] = [gate, up].map(|x| flex::wrap::<2>(x.clone()));
        flex::inner(act.gated(gate, up).into_dispatch())
    };
    let y = third.forward(between(&gate, &up), b3);
    let of_x = dims;
    dims[D - 1] = out_features;
    Ok(tape.record(y.reshape(dims.into()), move |dy, wanted| {
        let (mut gate, dy) = (gate, flex::contiguous(dy));
        let dy = flex::values(&dy);
        let of_w3 = wanted[5].then(|| third.of_weight(dy, flex::values(&between(&gate, &up))));
        let of_b3 = wanted[6].then(|| of_bias(dy, out_features));
        let mut of_up = third.of_input(dy, None);
        gated_gradients(act, values_mut(&mut gate), flex::values(&up), &mut of_up);
        let (of_gate, x) = (flex::values(&gate), flex::values(&x));
        [
            wanted[0].then(|| {
                let sum = first.of_input(of_gate, None);
                tensor(second.of_input(&of_up, Some(sum)), &of_x)
            }),
            wanted[1].then(|| first.of_weight(of_gate, x)),
            wanted[2].then(|| of_bias(of_gate, inner)),
            wanted[3].then(|| second.of_weight(&of_up, x)),
            wanted[4].then(|| of_bias(&of_up, inner)),
            of_w3,
            of_b3,
        ]
    }))
}
