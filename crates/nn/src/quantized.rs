//! Modules that are stored quantized, or become so while they are loaded.

use std::sync::Arc;

use oxiformers_hub::checkpoint::gguf::GgmlType;
use oxiformers_hub::checkpoint::{DType, TensorView};
use oxiformers_quant::ggml::GgmlMatrix;
use oxiformers_quant::{Dense, Parts, Scheme};

use crate::linear::{Input, Matrix};
use crate::weights::{Role, lock};
use crate::{Error, Result, RmsNorm, Weights};

/// A module in a checkpoint.
pub(crate) struct Found {
    scheme: Arc<dyn Scheme>,
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
    pub(crate) fn find_module(&self, full: &str) -> Option<Found> {
        let module = module_of(full);
        self.schemes(module).into_iter().find_map(|scheme| {
            let endings = scheme.endings().iter().map(|ending| (*ending, *ending));
            let found = self.collect(&scheme, module, endings)?;
            scheme.is_stored(&found.parts).then_some(found)
        })
    }

    /// The schemes by which a module may be stored.
    fn schemes(&self, module: &str) -> Vec<Arc<dyn Scheme>> {
        let recipe = self.shared.stored_as.as_ref();
        recipe.map_or(Vec::new(), |recipe| recipe.stored(module))
    }

    /// The tensors of `module` with endings, under other endings.
    fn collect<'b>(
        &self,
        scheme: &Arc<dyn Scheme>,
        module: &str,
        endings: impl Iterator<Item = (&'b str, &'b str)>,
    ) -> Option<Found> {
        let source = self.shared.source.as_ref()?;
        let (mut parts, mut names) = (Parts::default(), Vec::new());
        for (ending, name) in endings {
            let full = format!("{module}{ending}");
            if let Some(stored) = self.stored(&full) {
                parts.push(name, source.tensor(stored).ok()?);
                names.push(stored.to_string());
            }
        }
        Some(Found {
            scheme: scheme.clone(),
            parts,
            names,
        })
    }

    /// The matrix `full`, if it is stored by a scheme.
    pub(crate) fn stored_module(&self, full: &str, shape: [usize; 2]) -> Result<Option<Matrix>> {
        let Some(Found { scheme, parts, names }) = self.find_module(full) else {
            return Ok(None);
        };
        let packed = scheme
            .load(&parts, shape)
            .map_err(|reason| self.wrong(full, reason))?;
        self.keep_parts(&names)?;
        lock(&self.shared.used).extend(names);
        let matrix = self.packed_matrix(full.to_string(), packed)?;
        self.with_input(full, matrix, scheme.as_ref()).map(Some)
    }

    /// Keeps the tensors of a module that is never trained, so that they are saved with what is.
    fn keep_parts(&self, names: &[String]) -> Result<()> {
        if let (Some(parameters), Some(source)) = (&self.shared.options.parameters, &self.shared.source) {
            for name in names {
                parameters.keep(name, &source.tensor(name)?);
            }
        }
        Ok(())
    }

    /// A matrix of a scheme, with what the scheme does with its inputs.
    fn with_input(&self, full: &str, matrix: Matrix, scheme: &dyn Scheme) -> Result<Matrix> {
        let input = self.input_of(full, matrix.shape()[1], scheme)?;
        // Products with what is packed quantize activations themselves.
        let int8 = input.int8 && !matrix.as_packed().is_some_and(|packed| packed.takes_int8());
        if !int8 && input.norm.is_none() {
            return Ok(matrix);
        }
        Ok(matrix.with_input(Input { int8, ..input }))
    }

    fn input_of(&self, full: &str, in_features: usize, scheme: &dyn Scheme) -> Result<Input> {
        let input = scheme.input();
        let norm = match input.norm {
            Some(eps) => {
                let place = self.at(format!("{}.rms_norm", module_of(full)));
                Some(RmsNorm::load(&place, in_features, eps)?)
            }
            None => None,
        };
        Ok(Input {
            norm,
            int8: input.int8,
            straight_through: None,
        })
    }

    /// A dense matrix, which training quantizes where it is to become one of a scheme that can be trained so.
    pub(crate) fn trained(&self, full: &str, matrix: Matrix) -> Result<Matrix> {
        let (Some(lambda), Some(scheme)) = (self.shared.options.straight_through.clone(), self.trains(full)?)
        else {
            return Ok(matrix);
        };
        let input = self.input_of(full, matrix.shape()[1], scheme.as_ref())?;
        Ok(matrix.with_input(Input {
            straight_through: Some(lambda),
            ..input
        }))
    }

    /// The scheme that a matrix is trained for.
    pub(crate) fn trains(&self, full: &str) -> Result<Option<Arc<dyn Scheme>>> {
        if self.shared.options.straight_through.is_none() {
            return Ok(None);
        }
        let scheme = self.becomes(full)?;
        Ok(scheme.filter(|scheme| scheme.is_trainable()))
    }

    /// The scheme that a matrix is to become.
    fn becomes(&self, full: &str) -> Result<Option<Arc<dyn Scheme>>> {
        let (module, recipe) = (module_of(full), self.shared.options.quantization.as_ref());
        let role = self.role_of(module);
        match recipe {
            Some(recipe) if role != Role::Kept => recipe
                .scheme(module, role == Role::Output)
                .map_err(|error| Error::config("quantization_config", error.0)),
            _ => Ok(None),
        }
    }

    /// The matrices `full`, if they are stored together by a scheme.
    pub(crate) fn stored_stack(&self, full: &str, shape: [usize; 3]) -> Result<Option<Vec<Matrix>>> {
        let [count, rows, columns] = shape;
        for scheme in self.schemes(module_of(full)) {
            let endings = scheme.stacked_endings();
            let Some(found) = self.collect(&scheme, module_of(full), endings.iter().copied()) else {
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
            self.keep_parts(&found.names)?;
            lock(&self.shared.used).extend(found.names);
            return Ok(Some(matrices));
        }
        Ok(None)
    }

    /// The matrix that stored floats become, if they are to be quantized. `dtype` is how the checkpoint has them.
    pub(crate) fn quantized(&self, full: &str, view: &TensorView, dtype: DType) -> Result<Option<Matrix>> {
        let (Some(scheme), Some(matrix)) = (self.becomes(full)?, oxiformers_quant::pack(view)) else {
            return Ok(None);
        };
        let shape = matrix.shape();
        let mut fitting = lock(&self.shared.fitting);
        if !scheme.takes(shape) {
            fitting.misfit.get_or_insert_with(|| (full.to_string(), shape));
            return Ok(None);
        }
        fitting.some = true;
        drop(fitting);
        if let Some(survey) = &self.shared.options.survey {
            let plan = scheme
                .plan(shape, dtype)
                .map_err(|reason| self.wrong(full, reason))?;
            let matrix = self.packed_matrix(full.to_string(), matrix)?;
            survey.becomes(scheme.name(), plan.num_bytes());
            return Ok(Some(matrix));
        }
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
        // The codes are no file's, from which they could be read again: nothing of them is held twice.
        let packed = match self.packs() {
            true => packed.regrouped().unwrap_or(packed),
            false => packed,
        };
        let matrix = self.packed_matrix(full.to_string(), packed)?;
        self.with_input(full, matrix, scheme.as_ref()).map(Some)
    }

    /// The matrix of the output layer at `self`, which there will be products with: in 8 bits if so wanted, and if it was
    /// floats.
    pub(crate) fn output(&self, mut matrix: Matrix) -> Result<Matrix> {
        let options = &self.shared.options;
        let wanted = options.quantize_output && options.survey.is_none();
        if let Some(floats) = matrix
            .as_packed()
            .filter(|packed| wanted && is_float(packed.scheme()))
        {
            let narrowed = GgmlMatrix::narrowed(GgmlType::Q8_0, floats.as_ref());
            let narrowed = narrowed.map_err(|error| self.wrong(&self.full("weight"), error.to_string()))?;
            if let Some(narrowed) = narrowed {
                matrix = matrix.stored_as(Arc::new(narrowed));
            }
        }
        self.will_multiply(&matrix);
        Ok(matrix)
    }

    pub(crate) fn wrong(&self, full: &str, reason: String) -> Error {
        Error::Quantization {
            origin: self.origin(),
            module: module_of(full).to_string(),
            reason,
        }
    }
}

/// Whether a matrix of this [scheme](oxiformers_quant::PackedMatrix::scheme) is made of floats as they are.
fn is_float(scheme: &str) -> bool {
    matches!(scheme, "F32" | "F16" | "BF16")
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
