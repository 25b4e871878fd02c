//! What a quantization scheme is: how a matrix becomes tensors of a checkpoint, and those a matrix that is multiplied.

use std::fmt::Debug;
use std::ops::Range;
use std::sync::Arc;

use oxiformers_hub::checkpoint::{DType, TensorInfo, TensorView};
use oxiformers_kernels::PackedMatrix;

/// One way to store a matrix with few bits a value.
///
/// A checkpoint holds a quantized module as several tensors, whose names are the module's, such as
/// `model.layers.0.mlp.up_proj`, with different endings, such as `.weight` and `.weight.absmax`.
///
/// Functions that fail say why, as the end of a sentence that begins with the name of the module or tensor.
pub trait Scheme: Debug + Send + Sync {
    /// What the scheme is called, such as `nf4`.
    fn name(&self) -> &str;

    /// All endings that tensors of a module may have. Tensors that belong to a module however it is stored, such as
    /// `.bias`, are none of them.
    fn endings(&self) -> &[&str];

    /// Whether these tensors are a module of this scheme: others may have tensors of the same names, as one that was left
    /// as it was has its `.weight`.
    fn is_stored(&self, parts: &Parts) -> bool;

    /// The matrix `[out_features, in_features]` that tensors of a checkpoint stand for. Its values are those that the
    /// scheme's original library dequantizes to.
    ///
    /// # Errors
    /// What is wrong with which tensor.
    fn load(&self, parts: &Parts, shape: [usize; 2]) -> Result<Arc<dyn PackedMatrix>, String>;

    /// The tensors that a matrix `[out_features, in_features]` whose values are stored as `dtype` becomes, with endings
    /// as names.
    ///
    /// # Errors
    /// Why the scheme cannot hold such a matrix.
    fn plan(&self, shape: [usize; 2], dtype: DType) -> Result<Plan, String>;

    /// Quantizes a matrix, as the scheme's original library does.
    ///
    /// # Errors
    /// Where the values are not all finite, or the scheme needs more than them, such as calibration.
    fn quantize(&self, matrix: &Dense) -> Result<Parts, String>;

    /// What is done with the activations that a module is multiplied with.
    fn input(&self) -> Input {
        Input::default()
    }

    /// Pairs of endings of tensors that hold many matrices, one after the other in their first dimension, and the
    /// endings of a single module: experts that are stored together.
    fn stacked_endings(&self) -> &[(&str, &str)] {
        &[]
    }
}

/// What is done with activations before they are multiplied.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Input {
    /// Whether they become whole numbers of 8 bits with a scale for each token.
    pub int8: bool,
    /// The epsilon of an RMS norm before that, whose weight `.rms_norm.weight` the module has.
    pub norm: Option<f64>,
}

/// The tensors of a module, by their endings.
#[derive(Debug, Clone, Default)]
pub struct Parts(Vec<(String, TensorView)>);

impl Parts {
    /// Adds a tensor.
    pub fn push(&mut self, ending: &str, view: TensorView) {
        self.0.push((ending.to_string(), view));
    }

    /// A tensor of values, little-endian.
    pub fn push_values<const N: usize, T: Copy>(
        &mut self,
        ending: &str,
        dtype: DType,
        shape: &[usize],
        values: &[T],
        bytes: impl Fn(T) -> [u8; N],
    ) {
        let mut data = Vec::with_capacity(N * values.len());
        values
            .iter()
            .for_each(|value| data.extend_from_slice(&bytes(*value)));
        let view = TensorView {
            dtype,
            shape: shape.to_vec(),
            data: data.into(),
        };
        self.push(ending, view);
    }

    /// The tensor with an ending, if it is there.
    pub fn get(&self, ending: &str) -> Option<&TensorView> {
        self.0
            .iter()
            .find(|(name, _)| name == ending)
            .map(|(_, view)| view)
    }

    /// The tensor with an ending.
    ///
    /// # Errors
    /// Where it is not there.
    pub fn need(&self, ending: &str) -> Result<&TensorView, String> {
        self.get(ending)
            .ok_or_else(|| format!("the tensor that ends in `{ending}` is missing"))
    }

    /// The tensor with an ending, its type and shape checked.
    ///
    /// # Errors
    /// Where it is not there, or is another.
    pub fn expect(&self, ending: &str, dtypes: &[DType], shape: &[usize]) -> Result<&TensorView, String> {
        let view = self.need(ending)?;
        if view.shape != shape || !dtypes.contains(&view.dtype) {
            let dtypes: Vec<_> = dtypes.iter().map(|dtype| dtype.name()).collect();
            return Err(format!(
                "`{ending}` is {} {:?}, expected {} {shape:?}",
                view.dtype.name(),
                view.shape,
                dtypes.join(" or ")
            ));
        }
        Ok(view)
    }

    /// All endings and tensors.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &TensorView)> {
        self.0.iter().map(|(ending, view)| (ending.as_str(), view))
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Bytes of all tensors.
    pub fn num_bytes(&self) -> usize {
        self.0.iter().map(|(_, view)| view.data.len()).sum()
    }
}

/// The tensors that a module becomes; their names are endings.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Plan {
    /// Those whose size is known before.
    pub tensors: Vec<TensorInfo>,
    /// Vectors of bytes that may become shorter.
    pub late: Vec<TensorInfo>,
}

impl Plan {
    /// Adds a tensor.
    #[must_use]
    pub fn with(mut self, ending: &str, dtype: DType, shape: &[usize]) -> Self {
        self.tensors.push(TensorInfo {
            name: ending.to_string(),
            dtype,
            shape: shape.to_vec(),
        });
        self
    }

    /// Adds a vector of at most so many bytes.
    #[must_use]
    pub fn with_late(mut self, ending: &str, most: usize) -> Self {
        self.late.push(TensorInfo {
            name: ending.to_string(),
            dtype: DType::U8,
            shape: vec![most],
        });
        self
    }

    /// Bytes of all tensors, at most.
    pub fn num_bytes(&self) -> usize {
        let all = self.tensors.iter().chain(&self.late);
        all.map(|info| info.dtype.num_bytes(&info.shape).unwrap_or(0))
            .sum()
    }
}

/// A matrix that is to be quantized.
#[derive(Debug, Clone, Copy)]
pub struct Dense<'a> {
    /// Its values.
    pub matrix: &'a dyn PackedMatrix,
    /// The float type that they are stored in; some schemes store scales in it.
    pub dtype: DType,
}

impl Dense<'_> {
    /// `[out_features, in_features]`.
    pub fn shape(&self) -> [usize; 2] {
        self.matrix.shape()
    }

    /// Calls `take` with the values of all rows, some rows at a time.
    ///
    /// # Errors
    /// Names the first value that is infinite or no number; those of `take`.
    pub fn for_rows(
        &self,
        mut take: impl FnMut(Range<usize>, &[f32]) -> Result<(), String>,
    ) -> Result<(), String> {
        let [rows, cols] = self.shape();
        let step = (PIECE / cols.max(1)).max(1);
        let mut values = Vec::new();
        for first in (0..rows).step_by(step) {
            let part = first..rows.min(first + step);
            values.clear();
            values.resize(part.len() * cols, 0.0);
            self.matrix.dequantize_rows(part.clone(), &mut values);
            if let Some(at) = values.iter().position(|value| !value.is_finite()) {
                return Err(format!(
                    "row {}, column {} is {}: only finite values can be quantized",
                    first + at / cols,
                    at % cols,
                    values[at]
                ));
            }
            take(part, &values)?;
        }
        Ok(())
    }
}

/// Values that are widened at a time.
const PIECE: usize = 1 << 22;
