//! The way from a tensor to the numbers behind it, for kernels of the CPU.

use burn::backend::flex::FlexTensor;
use burn::backend::{BackendTensor, DispatchAutodiffContext, DispatchTensor, DispatchTensorKind};
use burn::tensor::{DType, Shape, Tensor, TensorData};

/// The CPU's form of an f32 tensor that no gradient is tracked for, or the tensor back: on other devices, under
/// autodiff and while a graph is captured, operators are made of tensor operations.
pub(crate) fn unwrap<const D: usize>(x: Tensor<D>) -> Result<FlexTensor, Tensor<D>> {
    match x.into_dispatch() {
        DispatchTensor {
            kind: DispatchTensorKind::Flex(BackendTensor::Float(x)),
            ..
        } if x.dtype() == DType::F32 => Ok(x),
        other => Err(Tensor::from_dispatch(other)),
    }
}

/// A tensor of the CPU.
pub(crate) fn wrap<const D: usize>(x: FlexTensor) -> Tensor<D> {
    Tensor::from_dispatch(DispatchTensor {
        kind: DispatchTensorKind::Flex(BackendTensor::Float(x)),
        autodiff: DispatchAutodiffContext::Disabled,
    })
}

/// A tensor of new values.
pub(crate) fn tensor<const D: usize>(values: Vec<f32>, shape: [usize; D]) -> Tensor<D> {
    wrap(FlexTensor::from_data(TensorData::new(values, Shape::from(shape))))
}
