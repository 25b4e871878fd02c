//! Modules that are stored quantized, or become so while they are loaded.

use std::sync::Arc;

use oxiformers_hub::checkpoint::{DType, TensorView};
use oxiformers_quant::{self as quant, Dense, Parts, Scheme};

use crate::linear::{Input, Matrix};
use crate::weights::{Role, lock};
use crate::{Error, Result, RmsNorm, Weights};

/// A module in a checkpoint.
pub(crate) struct Found<'a> {
    scheme: &'a Arc<dyn Scheme>,
    parts: Parts,
    /// The names of the tensors.
    names: Vec<String>,
}

/// The module that a weight belongs to.
pub(crate) fn module_of(full: &str) -> &str {
    full.strip_suffix(".weight").unwrap_or(full)
}

impl Weights {
    /// The tensors that stand for the matrix `full` where it is stored by a scheme.
    pub(crate) fn find_module(&self, full: &str) -> Option<Found<'_>> {
        let module = module_of(full);
        self.shared.schemes.iter().find_map(|scheme| {
            let endings = scheme.endings().iter().map(|ending| (*ending, *ending));
            let found = self.collect(scheme, module, endings)?;
            scheme.is_stored(&found.parts).then_some(found)
        })
    }

    /// The tensors of `module` with endings, under other endings.
    fn collect<'a, 'b>(
        &'a self,
        scheme: &'a Arc<dyn Scheme>,
        module: &str,
        endings: impl Iterator<Item = (&'b str, &'b str)>,
    ) -> Option<Found<'a>> {
        let source = self.shared.source.as_ref()?;
        let (mut parts, mut names) = (Parts::default(), Vec::new());
        for (ending, name) in endings {
            let full = format!("{module}{ending}");
            if let Some(stored) = self.stored(&full) {
                parts.push(name, source.tensor(stored).ok()?);
                names.push(stored.to_string());
            }
        }
        Some(Found { scheme, parts, names })
    }

    /// The matrix `full`, if it is stored by a scheme.
    pub(crate) fn stored_module(&self, full: &str, shape: [usize; 2]) -> Result<Option<Matrix>> {
        let Some(Found { scheme, parts, names }) = self.find_module(full) else {
            return Ok(None);
        };
        let packed = scheme
            .load(&parts, shape)
            .map_err(|reason| self.wrong(full, reason))?;
        lock(&self.shared.used).extend(names);
        let matrix = self.packed_matrix(full.to_string(), packed)?;
        self.with_input(full, matrix, scheme.as_ref()).map(Some)
    }

    /// A matrix of a scheme, with what the scheme does with its inputs.
    fn with_input(&self, full: &str, matrix: Matrix, scheme: &dyn Scheme) -> Result<Matrix> {
        let input = scheme.input();
        if input == quant::scheme::Input::default() {
            return Ok(matrix);
        }
        let [_, in_features] = matrix.shape();
        let norm = match input.norm {
            Some(eps) => {
                let place = self.at(format!("{}.rms_norm", module_of(full)));
                Some(RmsNorm::load(&place, in_features, eps)?)
            }
            None => None,
        };
        Ok(matrix.with_input(Input {
            norm,
            int8: input.int8,
        }))
    }

    /// The matrices `full`, if they are stored together by a scheme.
    pub(crate) fn stored_stack(&self, full: &str, shape: [usize; 3]) -> Result<Option<Vec<Matrix>>> {
        let [count, rows, columns] = shape;
        for scheme in &self.shared.schemes {
            let endings = scheme.stacked_endings();
            let Some(found) = self.collect(scheme, module_of(full), endings.iter().copied()) else {
                continue;
            };
            if endings.is_empty() || !scheme.is_stored(&found.parts) {
                continue;
            }
            let matrices = (0..count).map(|index| {
                let name = format!("{full}.{index}");
                let part = slice(&found.parts, index, count).map_err(|reason| self.wrong(&name, reason))?;
                let packed = scheme.load(&part, [rows, columns]);
                let packed = packed.map_err(|reason| self.wrong(&name, reason))?;
                let matrix = self.packed_matrix(name.clone(), packed)?;
                self.with_input(&name, matrix, scheme.as_ref())
            });
            let matrices = matrices.collect::<Result<_>>()?;
            lock(&self.shared.used).extend(found.names);
            return Ok(Some(matrices));
        }
        Ok(None)
    }

    /// The matrix that stored floats become, if they are to be quantized. `dtype` is how the checkpoint has them.
    pub(crate) fn quantized(&self, full: &str, view: &TensorView, dtype: DType) -> Result<Option<Matrix>> {
        let Some(recipe) = self.shared.options.quantization.as_ref() else {
            return Ok(None);
        };
        let module = module_of(full);
        let role = self.role_of(module);
        if role == Role::Kept {
            return Ok(None);
        }
        let scheme = recipe
            .scheme(module, role == Role::Output)
            .map_err(|error| Error::config("quantization_config", error.0))?;
        let (Some(scheme), Some(matrix)) = (scheme, oxiformers_quant::pack(view)) else {
            return Ok(None);
        };
        let shape = matrix.shape();
        let dense = Dense {
            matrix: matrix.as_ref(),
            dtype,
        };
        let packed = scheme
            .quantize(&dense)
            .and_then(|parts| scheme.load(&parts, shape))
            .map_err(|reason| self.wrong(full, reason))?;
        drop(matrix);
        // It will hardly be read again.
        oxiformers_hub::release(&view.data);
        let matrix = self.packed_matrix(full.to_string(), packed)?;
        self.with_input(full, matrix, scheme.as_ref()).map(Some)
    }

    fn wrong(&self, full: &str, reason: String) -> Error {
        Error::Quantization {
            origin: self.origin(),
            module: module_of(full).to_string(),
            reason,
        }
    }
}

/// One of `count` matrices that are stored together.
fn slice(parts: &Parts, index: usize, count: usize) -> Result<Parts, String> {
    let mut part = Parts::default();
    for (ending, view) in parts.iter() {
        if view.shape.first() != Some(&count) {
            return Err(format!(
                "the tensor that stands for `{ending}` has the shape {:?}, the first is expected to be {count}",
                view.shape
            ));
        }
        let size = view.data.len() / count;
        part.push(
            ending,
            TensorView {
                dtype: view.dtype,
                shape: view.shape[1..].to_vec(),
                data: view.data.slice(index * size..(index + 1) * size),
            },
        );
    }
    Ok(part)
}
