//! The way from a tensor to the numbers behind it, for kernels of the CPU.

use burn::backend::flex::FlexTensor;
use burn::backend::{BackendTensor, DispatchAutodiffContext, DispatchTensor, DispatchTensorKind};
use burn::tensor::kind::Basic;
use burn::tensor::{Bytes, DType, Device, Element, Shape, Tensor, TensorData};
use bytemuck::Pod;

use crate::flash::View;
use crate::threads::{for_each_chunk, pieces};

/// Whether a kernel may read the values: f32 on the CPU, and no gradient is tracked. On other devices, under
/// autodiff and while a graph is captured, operators are made of tensor operations.
pub(crate) fn is_plain(x: &DispatchTensor) -> bool {
    x.autodiff == DispatchAutodiffContext::Disabled
        && matches!(&x.kind, DispatchTensorKind::Flex(BackendTensor::Float(x)) if x.dtype() == DType::F32)
}

/// The tensors behind `tensors`, or these back if one of them is not [plain](is_plain).
pub(crate) fn plain<const N: usize>(
    tensors: [DispatchTensor; N],
) -> Result<[FlexTensor; N], [DispatchTensor; N]> {
    if tensors.iter().all(is_plain) {
        Ok(tensors.map(inner))
    } else {
        Err(tensors)
    }
}

/// The tensor behind a [plain](is_plain) one.
pub(crate) fn inner(x: DispatchTensor) -> FlexTensor {
    match x.kind {
        DispatchTensorKind::Flex(x) => x.float(),
        #[allow(unreachable_patterns)]
        _ => unreachable!("asked for the values of a tensor that is elsewhere"),
    }
}

/// The CPU's form of a [plain](is_plain) tensor, or the tensor back.
pub(crate) fn unwrap<const D: usize>(x: Tensor<D>) -> Result<FlexTensor, Tensor<D>> {
    plain([x.into_dispatch()])
        .map(|[x]| x)
        .map_err(|[x]| Tensor::from_dispatch(x))
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

/// Zeros of the kind of `like`, on its device. On the CPU they take no memory before something is written to them.
pub fn zeros_like<const D: usize, K: Basic>(like: &Tensor<D, K>, shape: [usize; D]) -> Tensor<D, K> {
    let options = (&like.device(), like.dtype());
    let bytes = shape.iter().product::<usize>() * like.dtype().size();
    if *options.0 != Device::flex() || !bytes.is_multiple_of(size_of::<u128>()) {
        return Tensor::zeros(shape, options);
    }
    // The engine's own are copied to where it wants them to lie: at multiples of so many bytes.
    let zeros = Bytes::from_elems(vec![0u128; bytes / size_of::<u128>()]);
    Tensor::from_data(TensorData::from_bytes(zeros, shape, like.dtype()), options)
}

/// The same values one after the other.
pub(crate) fn contiguous(x: FlexTensor) -> FlexTensor {
    if x.is_contiguous() { x } else { x.to_contiguous() }
}

/// The values of a [contiguous] tensor.
pub(crate) fn values(x: &FlexTensor) -> &[f32] {
    let start = x.layout().start_offset();
    &x.storage::<f32>()[start..start + x.layout().num_elements()]
}

/// Work on fewer values is not handed to another thread.
const SMALL: usize = 1 << 13;

/// Changes the values of `x` in chunks that are multiples of `row` long: in place where nobody else holds them.
/// `change` gets where a chunk begins.
pub(crate) fn change(x: FlexTensor, row: usize, change: impl Fn(usize, &mut [f32]) + Sync) -> FlexTensor {
    let mut x = contiguous(x);
    let (start, len) = (x.layout().start_offset(), x.layout().num_elements());
    let run = |values: &mut [f32]| {
        if len < SMALL {
            return change(0, values);
        }
        let (_, rows) = pieces(len / row.max(1), (SMALL / 8).div_ceil(row.max(1)));
        for_each_chunk(values, rows * row, |index, chunk| {
            change(index * rows * row, chunk)
        });
    };
    if let Some(values) = x.try_storage_mut::<f32>() {
        run(&mut values[start..start + len]);
        return x;
    }
    let mut changed = values(&x).to_vec();
    run(&mut changed);
    FlexTensor::from_data(TensorData::new(changed, x.layout().shape().clone()))
}

/// `x` with a dense last dimension and no negative strides.
pub(crate) fn dense_rows(x: FlexTensor) -> FlexTensor {
    let layout = x.layout();
    let dense = layout.strides().last() == Some(&1) || layout.shape().last() == Some(&1);
    if dense && layout.strides().iter().all(|stride| *stride >= 0) {
        x
    } else {
        x.to_contiguous()
    }
}

/// The tensor behind one of `dtype` on the CPU that no gradient is tracked for.
pub(crate) fn of_dtype(x: DispatchTensor, dtype: DType) -> Option<FlexTensor> {
    let plain = x.autodiff == DispatchAutodiffContext::Disabled;
    match x.kind {
        DispatchTensorKind::Flex(BackendTensor::Float(x) | BackendTensor::Int(x)) => {
            (plain && x.dtype() == dtype).then_some(x)
        }
        #[allow(unreachable_patterns)]
        _ => None,
    }
}

/// Where the rows of a tensor of four dimensions with [dense rows](dense_rows) lie.
pub(crate) fn view(x: &FlexTensor) -> View<'_> {
    view_of(x)
}

/// Those of values of another type.
pub(crate) fn view_of<E: Element + Pod>(x: &FlexTensor) -> View<'_, E> {
    let layout = x.layout();
    let (shape, strides) = (layout.shape(), layout.strides());
    View {
        values: x.storage::<E>().get(layout.start_offset()..).unwrap_or(&[]),
        dims: std::array::from_fn(|i| shape[i]),
        strides: std::array::from_fn(|i| strides[i] as usize),
    }
}
