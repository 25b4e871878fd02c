//! What the tests of operators share.

use burn::tensor::{Tensor, TensorData};

/// Numbers between -1 and 1 that look random.
pub(crate) fn noise<const D: usize>(seed: u32, shape: [usize; D]) -> Tensor<D> {
    let mut state = seed ^ 0x9e37_79b9;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    let values: Vec<f32> = (0..shape.iter().product()).map(|_| next()).collect();
    Tensor::from_data(TensorData::new(values, shape), &burn::tensor::Device::flex())
}

/// The same tensor with gradients, which takes the reference of an operator: so do all operators of this thread from now
/// on.
pub(crate) fn tracked<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    crate::autodiff::REFERENCE.set(true);
    Tensor::from_data(x.into_data(), &burn::tensor::Device::flex().autodiff())
}

/// The largest absolute difference.
pub(crate) fn worst<const D: usize>(a: Tensor<D>, b: Tensor<D>) -> f32 {
    assert_eq!(a.dims(), b.dims());
    let (a, b) = (a.into_data(), b.into_data());
    (a.iter::<f32>().zip(b.iter::<f32>()))
        .map(|(a, b)| (a - b).abs())
        .fold(0.0, |worst, x| if x.is_nan() { x } else { worst.max(x) })
}
