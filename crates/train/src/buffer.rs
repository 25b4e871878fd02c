//! Values of a parameter where an optimizer changes them: in the tensor itself where that lies on the CPU.

use burn::backend::flex::FlexTensor;
use burn::backend::{BackendTensor, DispatchAutodiffContext, DispatchTensor, DispatchTensorKind};
use burn::tensor::{DType, FloatDType, Shape, Tensor, TensorData};

use crate::{Error, Result};

/// f32 values on the CPU.
#[derive(Debug, Clone)]
pub struct Buffer(FlexTensor);

impl Buffer {
    /// The values of a tensor, which are not copied where they lie on the CPU as f32, one after the other.
    ///
    /// # Errors
    /// [`Error::Device`] where they cannot be read.
    pub async fn new(tensor: Tensor<1>) -> Result<Self> {
        let tensor = match plain(tensor) {
            Ok(values) => return Ok(Self(values)),
            Err(tensor) => tensor,
        };
        let data = tensor.cast(FloatDType::F32).into_data_async().await;
        let data = data.map_err(|error| Error::Device(format!("{error:?}")))?;
        Ok(Self(FlexTensor::from_data(data.convert::<f32>())))
    }

    /// Values in memory.
    pub fn from_vec(values: Vec<f32>) -> Self {
        let count = values.len();
        Self(FlexTensor::from_data(TensorData::new(
            values,
            Shape::from([count]),
        )))
    }

    /// The values.
    pub fn values(&self) -> &[f32] {
        let start = self.0.layout().start_offset();
        &self.0.storage::<f32>()[start..start + self.0.layout().num_elements()]
    }

    /// The values, to be changed in place; they are copied where somebody else holds them.
    pub fn values_mut(&mut self) -> &mut [f32] {
        let (start, len) = (self.0.layout().start_offset(), self.0.layout().num_elements());
        if self.0.try_storage_mut::<f32>().is_none() {
            *self = Self::from_vec(self.values().to_vec());
            return self.0.storage_mut::<f32>();
        }
        &mut self.0.storage_mut::<f32>()[start..start + len]
    }

    /// The tensor.
    pub fn into_tensor(self) -> Tensor<1> {
        Tensor::from_dispatch(DispatchTensor {
            kind: DispatchTensorKind::Flex(BackendTensor::Float(self.0)),
            autodiff: DispatchAutodiffContext::Disabled,
        })
    }
}

/// Values on the device and in the float type of a tensor.
pub fn like(tensor: &Tensor<1>, values: &[f32]) -> Tensor<1> {
    let data = TensorData::new(values.to_vec(), [values.len()]);
    let device = tensor.device();
    match tensor.dtype() {
        DType::F32 => Tensor::from_data(data, &device),
        dtype => Tensor::<1>::from_data(data, &device).cast(dtype),
    }
}

/// The CPU's form of a tensor of f32, or the tensor back.
fn plain(tensor: Tensor<1>) -> Result<FlexTensor, Tensor<1>> {
    let tensor = tensor.inner().into_dispatch();
    match tensor.kind {
        DispatchTensorKind::Flex(BackendTensor::Float(x)) if x.dtype() == DType::F32 => {
            Ok(if x.is_contiguous() { x } else { x.to_contiguous() })
        }
        kind => Err(Tensor::from_dispatch(DispatchTensor {
            kind,
            autodiff: tensor.autodiff,
        })),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::Device;

    #[test]
    fn values_are_changed_in_place_where_nobody_else_holds_them() {
        let tensor = Tensor::<1>::from_floats([1.0, 2.0, 3.0, 4.0], &Device::flex());
        let mut buffer = futures::executor::block_on(Buffer::new(tensor)).expect("values");
        let before = buffer.values().as_ptr();
        buffer.values_mut()[1] = 7.0;
        assert_eq!(buffer.values().as_ptr(), before);
        let shared = buffer.clone();
        buffer.values_mut()[1] = 8.0;
        assert_eq!((shared.values()[1], buffer.values()[1]), (7.0, 8.0));
        let tensor = buffer.into_tensor().slice([1..3]);
        let part = futures::executor::block_on(Buffer::new(tensor)).expect("values");
        assert_eq!(part.values(), [8.0, 3.0]);
    }
}
