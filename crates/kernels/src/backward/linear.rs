//! Products with weights.

use std::sync::{Arc, Mutex, PoisonError};

use burn::backend::DispatchTensor;
use burn::backend::flex::FlexTensor;
use burn::tensor::Tensor;

use super::activation::{derivative, gated_gradients};
use super::{column_sums, tensor, values_mut};
use crate::activation::Activation;
use crate::autodiff::open;
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

/// The tensors of a layer, and the matrix that is none.
type Parts = ([Option<DispatchTensor>; 2], Option<Arc<dyn PackedMatrix>>);

fn take_apart((weight, bias): Layer) -> Parts {
    let bias = bias.map(Tensor::into_dispatch);
    match weight {
        Weight::Dense(weight) => ([Some(weight.into_dispatch()), bias], None),
        Weight::Packed(matrix) => ([None, bias], Some(matrix)),
    }
}

fn put_together([weight, bias]: [Option<DispatchTensor>; 2], packed: Option<Arc<dyn PackedMatrix>>) -> Layer {
    let bias = bias.map(Tensor::from_dispatch);
    match (weight, packed) {
        (Some(weight), _) => (Weight::Dense(Tensor::from_dispatch(weight)), bias),
        (None, Some(matrix)) => (Weight::Packed(matrix), bias),
        (None, None) => unreachable!("a layer has a weight"),
    }
}

impl Matrix {
    fn new(dense: Option<FlexTensor>, packed: Option<Arc<dyn PackedMatrix>>) -> Self {
        match (dense, packed) {
            (Some(dense), _) => Self::Dense(flex::contiguous(dense)),
            (None, Some(packed)) => Self::Packed(packed),
            (None, None) => unreachable!("a layer has a weight"),
        }
    }

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
    let (x, tape) = match open([Some(x.into_dispatch())]) {
        Ok(([Some(x)], tape)) => (x, tape),
        Ok(_) => unreachable!("it was given"),
        Err([x]) => {
            let x = x.unwrap_or_else(|| unreachable!("it was given"));
            return Err((Tensor::from_dispatch(x), layers));
        }
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
    let (parts, packed) = take_apart(layer);
    let [weight, bias] = parts;
    let ([x, weight, bias], tape) = match open([Some(x.into_dispatch()), weight, bias]) {
        Ok((values, tape)) => (values, tape),
        Err([x, weight, bias]) => {
            let x = x
                .map(Tensor::from_dispatch)
                .unwrap_or_else(|| unreachable!("it was given"));
            return Err((x, put_together([weight, bias], packed)));
        }
    };
    let x = flex::contiguous(x.unwrap_or_else(|| unreachable!("it was given")));
    let weight = Matrix::new(weight, packed);
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
    [first, second]: [Layer; 2],
    act: Activation,
) -> Result<Tensor<D>, (Tensor<D>, [Layer; 2])> {
    let mut dims = x.dims();
    let in_features = dims[D - 1];
    let ([w1, b1], packed1) = take_apart(first);
    let ([w2, b2], packed2) = take_apart(second);
    let ([x, w1, b1, w2, b2], tape) = match open([Some(x.into_dispatch()), w1, b1, w2, b2]) {
        Ok((values, tape)) => (values, tape),
        Err([x, w1, b1, w2, b2]) => {
            let x = x
                .map(Tensor::from_dispatch)
                .unwrap_or_else(|| unreachable!("it was given"));
            let layers = [put_together([w1, b1], packed1), put_together([w2, b2], packed2)];
            return Err((x, layers));
        }
    };
    let x = flex::contiguous(x.unwrap_or_else(|| unreachable!("it was given")));
    let (first, second) = (Matrix::new(w1, packed1), Matrix::new(w2, packed2));
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
    [gate, up, down]: [Layer; 3],
    act: Activation,
) -> Result<Tensor<D>, (Tensor<D>, [Layer; 3])> {
    let mut dims = x.dims();
    let in_features = dims[D - 1];
    let ([w1, b1], packed1) = take_apart(gate);
    let ([w2, b2], packed2) = take_apart(up);
    let ([w3, b3], packed3) = take_apart(down);
    let ([x, w1, b1, w2, b2, w3, b3], tape) = match open([Some(x.into_dispatch()), w1, b1, w2, b2, w3, b3]) {
        Ok((values, tape)) => (values, tape),
        Err([x, w1, b1, w2, b2, w3, b3]) => {
            let x = x
                .map(Tensor::from_dispatch)
                .unwrap_or_else(|| unreachable!("it was given"));
            let layers = [
                put_together([w1, b1], packed1),
                put_together([w2, b2], packed2),
                put_together([w3, b3], packed3),
            ];
            return Err((x, layers));
        }
    };
    let x = flex::contiguous(x.unwrap_or_else(|| unreachable!("it was given")));
    let [first, second, third] =
        [(w1, packed1), (w2, packed2), (w3, packed3)].map(|(w, packed)| Matrix::new(w, packed));
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
