//! GGUF files of other types.

use std::io::Write;

use oxiformers_hub::Error as HubError;
use oxiformers_hub::checkpoint::gguf::{Pairs, write};
use oxiformers_hub::checkpoint::{Checkpoint, DType, TensorInfo, TensorView};
use oxiformers_kernels::ggml::{self, QuantizeError};

mod mixture;

pub use mixture::FileType;

/// What keeps a file from being written.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The checkpoint cannot be read, or the file not be written.
    #[error(transparent)]
    Hub(#[from] HubError),
    /// The checkpoint is no GGUF.
    #[error("{0}: is no GGUF; only GGUF files can be quantized to other GGUF types")]
    NoGguf(String),
    /// A tensor's values cannot be narrowed.
    #[error("{origin}: `{name}`: {reason}")]
    Tensor {
        /// The checkpoint.
        origin: String,
        /// Name of the tensor.
        name: String,
        /// What is wrong with it.
        reason: String,
    },
    /// It was asked to end.
    #[error("interrupted; nothing was written")]
    Interrupted,
}

/// A file that is to be written: the types of its tensors are known, and so is its size.
pub struct Plan {
    checkpoint: Checkpoint,
    pairs: Pairs,
    tensors: Vec<TensorInfo>,
}

impl Plan {
    /// Plans a file of the type `ty` with the tensors of a GGUF; `overrides` are pairs of a part of a name and the
    /// type that tensors with it get instead.
    ///
    /// # Errors
    /// Where the checkpoint is no GGUF.
    pub fn new(checkpoint: Checkpoint, ty: FileType, overrides: &[(String, DType)]) -> Result<Self, Error> {
        let Some(metadata) = checkpoint.gguf() else {
            return Err(Error::NoGguf(checkpoint.name().to_string()));
        };
        let mut infos: Vec<&TensorInfo> = checkpoint.tensors().collect();
        infos.sort_by(|a, b| mixture::order(a, b));
        let types = mixture::types(ty, metadata, &infos);
        let mut tensors = Vec::with_capacity(infos.len());
        for (info, chosen) in infos.into_iter().zip(types) {
            let other = overrides
                .iter()
                .find(|(part, _)| info.name.contains(part.as_str()));
            let dtype = other.map_or(chosen, |(_, dtype)| *dtype);
            if dtype.num_bytes(&info.shape).is_none() {
                let reason = format!(
                    "rows of {:?} values are no whole blocks of {}",
                    info.shape.last(),
                    dtype.name()
                );
                return Err(Error::tensor(&checkpoint, &info.name, reason));
            }
            tensors.push(TensorInfo {
                dtype,
                ..info.clone()
            });
        }
        let mut pairs = Pairs::of(metadata);
        // The version of ggml's block formats.
        pairs.set("general.quantization_version", 2u32);
        pairs.set("general.file_type", ty.number());
        for key in ["split.no", "split.count", "split.tensors.count"] {
            pairs.remove(key);
        }
        Ok(Self {
            checkpoint,
            pairs,
            tensors,
        })
    }

    /// The tensors as they will be stored, in the order of the file.
    pub fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    /// Bytes of all tensors.
    pub fn num_bytes(&self) -> usize {
        let size = |info: &TensorInfo| info.dtype.num_bytes(&info.shape).unwrap_or(0);
        self.tensors.iter().map(size).sum()
    }

    /// Writes the file, a piece of a tensor in memory at a time. `progress` is told how many bytes of tensors were
    /// written; where it returns false, writing ends.
    ///
    /// # Errors
    /// Where values cannot be narrowed (infinities, for example), or `out` cannot be written to; [`Error::Interrupted`].
    pub fn write(
        &self,
        out: &mut impl Write,
        file: &str,
        mut progress: impl FnMut(usize) -> bool,
    ) -> Result<(), Error> {
        write(out, file, &self.pairs, &self.tensors, |index, out| {
            let info = &self.tensors[index];
            let view = self.checkpoint.tensor(&info.name)?;
            let failed = |reason: String| Error::tensor(&self.checkpoint, &info.name, reason);
            let mut put = |bytes: &[u8]| {
                out.write_all(bytes).map_err(HubError::io(file))?;
                if progress(bytes.len()) {
                    Ok(())
                } else {
                    Err(Error::Interrupted)
                }
            };
            if view.dtype == info.dtype {
                put(&view.data)?;
            } else {
                narrow(&view, info.dtype, &failed, &mut put)?;
            }
            oxiformers_hub::release(&view.data);
            Ok(())
        })
    }
}

impl Error {
    fn tensor(checkpoint: &Checkpoint, name: &str, reason: String) -> Self {
        Self::Tensor {
            origin: checkpoint.name().to_string(),
            name: name.to_string(),
            reason,
        }
    }
}

/// Values of a piece that is narrowed at a time.
const PIECE: usize = 1 << 22;

/// Narrows rows, many at a time.
fn narrow(
    view: &TensorView,
    dtype: DType,
    failed: &dyn Fn(String) -> Error,
    put: &mut dyn FnMut(&[u8]) -> Result<(), Error>,
) -> Result<(), Error> {
    let columns = view.shape.last().copied().unwrap_or(1);
    let rows = view.shape.iter().product::<usize>() / columns.max(1);
    let matrix = TensorView {
        shape: vec![rows, columns],
        ..view.clone()
    };
    let matrix = crate::pack(&matrix)
        .ok_or_else(|| failed(format!("{} cannot be read as numbers", view.dtype.name())))?;
    let step = (PIECE / columns.max(1)).max(1);
    let (mut values, mut bytes) = (Vec::new(), Vec::new());
    for first in (0..rows).step_by(step) {
        let part = first..rows.min(first + step);
        values.resize(part.len() * columns, 0.0);
        matrix.dequantize_rows(part, &mut values);
        match dtype {
            DType::Ggml(ty) => {
                bytes.resize(values.len() / ty.block_size() * ty.type_size(), 0);
                let done = ggml::quantize(ty, &values, columns, None, &mut bytes);
                done.map_err(|error: QuantizeError| failed(error.below(first).to_string()))?;
            }
            DType::F32 => store(&values, &mut bytes, f32::to_le_bytes),
            DType::F16 => store(&values, &mut bytes, |value| {
                half::f16::from_f32(value).to_le_bytes()
            }),
            DType::BF16 => store(&values, &mut bytes, |value| {
                half::bf16::from_f32(value).to_le_bytes()
            }),
            other => {
                return Err(failed(format!(
                    "{} is no type that values are narrowed to",
                    other.name()
                )));
            }
        }
        put(&bytes)?;
    }
    Ok(())
}

fn store<const N: usize>(values: &[f32], bytes: &mut Vec<u8>, narrow: impl Fn(f32) -> [u8; N]) {
    bytes.clear();
    bytes.extend(values.iter().flat_map(|value| narrow(*value)));
}
