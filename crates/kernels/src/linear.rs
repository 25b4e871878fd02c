//! Products with weights, dense or packed, with bias and activation.

use std::sync::Arc;

use burn::backend::flex::FlexTensor;
use burn::tensor::{Tensor, TensorData};

use crate::activation::Activation;
use crate::backward;
use crate::dense;
use crate::flex;
use crate::int8::{self, Int8Matrix};
use crate::packed::{Form, PackedMatrix};
use crate::threads::for_each_chunk;

/// A weight matrix `[out_features, in_features]`.
#[derive(Debug, Clone)]
pub enum Weight {
    /// A tensor.
    Dense(Tensor<2>),
    /// Kept in its storage format, on the CPU.
    Packed(Arc<dyn PackedMatrix>),
}

impl Weight {
    fn shape(&self) -> [usize; 2] {
        match self {
            Self::Dense(tensor) => tensor.dims(),
            Self::Packed(matrix) => matrix.shape(),
        }
    }
}

/// A weight and its bias `[out_features]`.
pub type Layer = (Weight, Option<Tensor<1>>);

/// `act(x · Wᵀ + b)` for `x` of shape `[.., in_features]`; the result is `[.., out_features]`.
pub fn linear<const D: usize>(x: Tensor<D>, layer: Layer, act: Option<Activation>) -> Tensor<D> {
    let [y] = linears(x, [layer], act);
    y
}

/// [`linear`] with several layers and the same `x`, at once.
///
/// On the CPU, weights with an [integer form](Form::Int8) are multiplied with activations that are quantized, those
/// with a [float form](Form::Float) or in a tensor as floats. Either way memory is read once in its packed form.
pub fn linears<const D: usize, const N: usize>(
    x: Tensor<D>,
    layers: [Layer; N],
    act: Option<Activation>,
) -> [Tensor<D>; N] {
    if !layers.iter().all(is_plain) {
        return elsewhere(x, layers, act);
    }
    match flex::unwrap(x) {
        Ok(x) => on_the_cpu(x, layers, act),
        Err(x) => elsewhere(x, layers, act),
    }
}

/// Where automatic differentiation knows some of the tensors, or they are on another device.
fn elsewhere<const D: usize, const N: usize>(
    x: Tensor<D>,
    layers: [Layer; N],
    act: Option<Activation>,
) -> [Tensor<D>; N] {
    let (x, layers) = match N {
        1 => (x, layers),
        _ => match backward::several(x, layers, act) {
            Ok(ys) => return ys,
            Err(others) => others,
        },
    };
    layers.map(|layer| match backward::linear(x.clone(), layer, act) {
        Ok(y) => y,
        Err((x, layer)) => reference(x, layer, act),
    })
}

/// A feed-forward block: one layer, the activation, and another layer; `[.., in_features]` to `[.., out_features]`.
pub fn feed_forward<const D: usize>(x: Tensor<D>, [first, second]: [Layer; 2], act: Activation) -> Tensor<D> {
    let (x, [first, second]) = match backward::feed_forward(x, [first, second], act) {
        Ok(y) => return y,
        Err(plain) => plain,
    };
    if !is_plain(&first) || !is_plain(&second) {
        return linear(linear(x, first, Some(act)), second, None);
    }
    let x = match flex::unwrap(x) {
        Ok(x) => flex::contiguous(x),
        Err(x) => return linear(linear(x, first, Some(act)), second, None),
    };
    let operands = [Operand::new(first.clone()), Operand::new(second.clone())];
    let [Some(a), Some(b)] = operands.each_ref().map(Operand::float) else {
        return linear(linear(flex::wrap(x), first, Some(act)), second, None);
    };
    let mut dims: [usize; D] = std::array::from_fn(|axis| x.layout().shape()[axis]);
    let out = dense::feed_forward(flex::values(&x), dims[D - 1], [a, b], act);
    dims[D - 1] = operands[1].out_features();
    flex::tensor(out, dims)
}

/// A gated feed-forward block (Shazeer, 2020): `down(act(gate(x)) · up(x))`; `[.., in_features]` to
/// `[.., out_features]`.
pub fn gated_feed_forward<const D: usize>(x: Tensor<D>, layers: [Layer; 3], act: Activation) -> Tensor<D> {
    match backward::gated_feed_forward(x, layers, act) {
        Ok(y) => y,
        Err((x, [gate, up, down])) => {
            let [gate, up] = linears(x, [gate, up], None);
            linear(act.gated(gate, up), down, None)
        }
    }
}

/// Whether a kernel may read the values.
fn is_plain((weight, bias): &Layer) -> bool {
    let weight = match weight {
        Weight::Dense(tensor) => flex::is_plain(&tensor.clone().into_dispatch()),
        Weight::Packed(_) => true,
    };
    let bias = bias.as_ref().map(|bias| bias.clone().into_dispatch());
    weight && bias.as_ref().is_none_or(flex::is_plain)
}

/// What is read of a layer.
struct Operand {
    weight: Source,
    bias: Option<FlexTensor>,
}

enum Source {
    Dense(FlexTensor, [usize; 2]),
    Packed(Arc<dyn PackedMatrix>),
}

impl Operand {
    fn new((weight, bias): Layer) -> Self {
        let values = |x| flex::contiguous(flex::inner(x));
        let shape = weight.shape();
        Self {
            weight: match weight {
                Weight::Dense(tensor) => Source::Dense(values(tensor.into_dispatch()), shape),
                Weight::Packed(matrix) => Source::Packed(matrix),
            },
            bias: bias.map(|bias| values(bias.into_dispatch())),
        }
    }

    fn bias(&self) -> Option<&[f32]> {
        self.bias.as_ref().map(flex::values)
    }

    fn out_features(&self) -> usize {
        match &self.weight {
            Source::Dense(_, [out_features, _]) => *out_features,
            Source::Packed(matrix) => matrix.shape()[0],
        }
    }

    fn takes_int8(&self) -> bool {
        matches!(&self.weight, Source::Packed(matrix) if matrix.takes_int8())
    }

    fn int8(&self) -> Option<&Int8Matrix> {
        match &self.weight {
            Source::Packed(matrix) => match matrix.form() {
                Form::Int8(matrix) => Some(matrix),
                Form::Float(_) => None,
            },
            Source::Dense(..) => None,
        }
    }

    fn float(&self) -> Option<dense::Layer<'_>> {
        let weight = match &self.weight {
            Source::Packed(matrix) => match matrix.form() {
                Form::Float(matrix) => dense::Weight::Packed(matrix),
                Form::Int8(_) => return None,
            },
            Source::Dense(values, shape) => dense::Weight::Plain(flex::values(values), *shape),
        };
        Some((weight, self.bias()))
    }
}

fn on_the_cpu<const D: usize, const N: usize>(
    x: FlexTensor,
    layers: [Layer; N],
    act: Option<Activation>,
) -> [Tensor<D>; N] {
    let x = flex::contiguous(x);
    let mut dims: [usize; D] = std::array::from_fn(|axis| x.layout().shape()[axis]);
    let (values, in_features) = (flex::values(&x), dims[D - 1]);
    let operands = layers.map(Operand::new);
    let outs = products(values, in_features, &operands, act);
    let mut outs = outs.into_iter().zip(&operands);
    std::array::from_fn(|_| {
        let (out, width) = outs
            .next()
            .map_or((Vec::new(), 0), |(out, operand)| (out, operand.out_features()));
        dims[D - 1] = width;
        flex::tensor(out, dims)
    })
}

/// `[rows, out_features]` for each operand.
fn products(x: &[f32], in_features: usize, operands: &[Operand], act: Option<Activation>) -> Vec<Vec<f32>> {
    let int8: Vec<_> = operands.iter().filter_map(Operand::int8).collect();
    let whole = operands.iter().filter(|operand| operand.takes_int8()).count();
    if int8.len() == operands.len() && [0, int8.len()].contains(&whole) {
        let matmul = if whole > 0 {
            int8::matmul_whole
        } else {
            int8::matmul
        };
        let mut outs = matmul(x, in_features, &int8);
        for (operand, out) in operands.iter().zip(&mut outs) {
            finish(out, operand, act);
        }
        return outs;
    }
    let float: Vec<_> = operands.iter().filter_map(Operand::float).collect();
    if float.len() == operands.len() {
        return dense::matmul(x, in_features, &float, act);
    }
    // One alone is of one kind.
    let one = |operand| products(x, in_features, std::slice::from_ref(operand), act);
    operands.iter().flat_map(one).collect()
}

/// Adds the bias and applies the activation.
fn finish(out: &mut [f32], operand: &Operand, act: Option<Activation>) {
    let width = operand.out_features().max(1);
    if operand.bias.is_none() && act.is_none() {
        return;
    }
    // So many values a task that handing over does not count.
    for_each_chunk(out, (1usize << 14).div_ceil(width) * width, |_, out| {
        if let Some(bias) = operand.bias() {
            for row in out.chunks_exact_mut(width) {
                for (out, bias) in row.iter_mut().zip(bias) {
                    *out += bias;
                }
            }
        }
        if let Some(act) = act {
            act.apply(out);
        }
    });
}

/// `x` `[.., size]`, each row of which becomes whole numbers from -128 to 127 times a scale: its largest absolute value,
/// 1e-5 at least, divided by 127 (Ma et al., "The era of 1-bit LLMs", 2024). Gradients pass straight through.
pub fn int8_activations<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    let plain = x.clone().detach();
    let scale = plain.clone().abs().max_dim(D - 1).clamp_min(1e-5).recip() * 127.0;
    let whole = (plain.clone() * scale.clone()).round().clamp(-128.0, 127.0) / scale;
    if x.is_autodiff() {
        whole + (x - plain)
    } else {
        whole
    }
}

/// [`linear`] of tensor operations, with widened weights on the device of `x`.
pub(crate) fn reference<const D: usize>(
    x: Tensor<D>,
    (weight, bias): Layer,
    act: Option<Activation>,
) -> Tensor<D> {
    let [out_features, in_features] = weight.shape();
    let x = match &weight {
        Weight::Packed(matrix) if matrix.takes_int8() => int8_activations(x),
        _ => x,
    };
    let weight = match weight {
        Weight::Dense(tensor) => tensor,
        Weight::Packed(matrix) => {
            let mut values = vec![0.0f32; out_features * in_features];
            matrix.dequantize_rows(0..out_features, &mut values);
            let values = TensorData::new(values, [out_features, in_features]).convert_dtype(x.dtype());
            Tensor::from_data(values, (&x.device(), x.dtype()))
        }
    };
    let mut dims = x.dims();
    let rows = dims.iter().product::<usize>() / in_features.max(1);
    let y = x.reshape([rows, in_features]).matmul(weight.transpose());
    dims[D - 1] = out_features;
    let mut y = y.reshape(dims);
    if let Some(bias) = bias {
        y = y + bias.unsqueeze();
    }
    match act {
        Some(act) => act.forward(y),
        None => y,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{noise, tracked, worst};

    #[test]
    fn feed_forward_like_the_reference() {
        let (a, b) = (noise(2, [50, 24]), noise(3, [30, 50]));
        let x = noise(1, [2, 9, 24]);
        let layers = |a: Tensor<2>, b: Tensor<2>| [(Weight::Dense(a), None), (Weight::Dense(b), None)];
        let tracked_layers = layers(tracked(a.clone()), tracked(b.clone()));
        let expected = feed_forward(tracked(x.clone()), tracked_layers, Activation::Gelu);
        assert!(worst(feed_forward(x, layers(a, b), Activation::Gelu), expected) < 1e-4);
    }

    #[test]
    fn like_the_reference() {
        for [rows, in_features, out_features] in [[1, 5, 7], [3, 64, 33], [40, 33, 20]] {
            let x = noise(1, [2, rows, in_features]);
            let weight = noise(2, [out_features, in_features]);
            for bias in [None, Some(noise(3, [out_features]))] {
                for act in [None, Some(Activation::Gelu)] {
                    let layer = (Weight::Dense(weight.clone()), bias.clone());
                    let slow = (Weight::Dense(tracked(weight.clone())), bias.clone().map(tracked));
                    let expected = linear(tracked(x.clone()), slow, act);
                    let [a, b] = linears(x.clone(), [layer.clone(), layer.clone()], act);
                    assert!(worst(a, expected.clone()) < 1e-4);
                    assert!(worst(b, expected.clone()) < 1e-4);
                    let turned = linear(x.clone().swap_dims(0, 1), layer, act);
                    assert!(worst(turned, expected.swap_dims(0, 1)) < 1e-4);
                }
            }
        }
    }
}
