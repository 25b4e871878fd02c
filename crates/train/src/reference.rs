//! The model before its training, which it is held to.

use std::path::Path;
use std::sync::Arc;

use burn::tensor::Tensor;
use oxiformers_data::Dataset;
use oxiformers_data::tasks::{Batch, Draw, IGNORED, Objective, Row, Targets};
use oxiformers_models::AutoModelForCausalLM;
use oxiformers_models::nn::{Parameter, Switch, parameters};

use crate::buffer::{Buffer, like};
use crate::loss::log_probs;
use crate::optim::State;
use crate::optim::state::{self, DType};
use crate::tasks::{logits, next_tokens, wrong_targets};
use crate::{Error, Result, checkpoint};

/// The model before its training.
#[derive(Debug)]
pub enum Reference {
    /// A model of its own. It shares its memory with the one that learns until that changes.
    Model(Box<AutoModelForCausalLM>),
    /// The model that learns, with its adapter switched off.
    Unadapted(Arc<Switch>),
    /// None is needed: what it says is known.
    Known,
}

impl Reference {
    /// What `model` is before its training, with the switch of its adapter if there is one.
    pub fn new(model: &AutoModelForCausalLM, adapter: Option<&Arc<Switch>>) -> Self {
        match adapter {
            Some(switch) => Self::Unadapted(switch.clone()),
            None => Self::Model(Box::new(model.without_autodiff())),
        }
    }

    /// What `judge` makes of the model as it was before, given the one that learns. No gradients are computed.
    ///
    /// # Errors
    /// Those of `judge`, and where what it says should be known.
    pub fn judge<T>(
        &self,
        model: &AutoModelForCausalLM,
        judge: impl FnOnce(&AutoModelForCausalLM) -> Result<T>,
    ) -> Result<T> {
        /// Switches the adapter on again, also where `judge` panics.
        struct On<'a>(&'a Switch);
        impl Drop for On<'_> {
            fn drop(&mut self) {
                self.0.set(true);
            }
        }
        match self {
            Self::Model(reference) => judge(reference),
            Self::Unadapted(switch) => {
                let _on = On(switch);
                switch.set(false);
                judge(&model.without_autodiff())
            }
            Self::Known => Err(Error::config(
                REF_LOGPS,
                "is missing in an example; the reference was dropped",
            )),
        }
    }
}

impl Reference {
    /// Makes a model of its own go a part `alpha` of the way to `model`, whose `trainable` parameters have changed.
    pub fn follow(&mut self, model: &AutoModelForCausalLM, trainable: &[Parameter], alpha: f64) {
        let Self::Model(reference) = self else { return };
        let ids = trainable.iter().map(|parameter| parameter.id).collect();
        let (own, mut new) = (
            parameters::values(reference.as_ref(), &ids),
            parameters::values(model, &ids),
        );
        let mixed = own.into_iter().filter_map(|(id, own)| {
            let new = new.remove(&id)?;
            Some((id, own * (1.0 - alpha) + new * alpha))
        });
        let mixed = mixed.collect();
        **reference = parameters::put((**reference).clone(), trainable, &mixed, false);
    }

    /// The values of a model of its own, by the names of parameters.
    ///
    /// # Errors
    /// Where they cannot be read from the device.
    pub async fn state(&self, trainable: &[Parameter]) -> Result<State> {
        let mut state = State::default();
        let Self::Model(reference) = self else {
            return Ok(state);
        };
        let ids = trainable.iter().map(|parameter| parameter.id).collect();
        let mut values = parameters::values(reference.as_ref(), &ids);
        for parameter in trainable {
            if let Some(tensor) = values.remove(&parameter.id) {
                let values = Buffer::new(tensor).await?;
                let tensor = state::floats(values.values(), &parameter.shape);
                state.insert(parameter.name.clone(), tensor);
            }
        }
        Ok(state)
    }

    /// Gives a model of its own the values of a [state](Self::state).
    ///
    /// # Errors
    /// Names a parameter that it lacks.
    pub fn load_state(&mut self, state: &State, trainable: &[Parameter]) -> Result<()> {
        let Self::Model(reference) = self else {
            return Ok(());
        };
        let ids = trainable.iter().map(|parameter| parameter.id).collect();
        let mut values = parameters::values(reference.as_ref(), &ids);
        for parameter in trainable {
            let tensor = (state.get(&parameter.name))
                .filter(|tensor| tensor.dtype == DType::F32 && tensor.shape == parameter.shape);
            let tensor =
                tensor.ok_or_else(|| Error::state(&parameter.name, "is missing in the reference"))?;
            if let Some(own) = values.get_mut(&parameter.id) {
                *own = like(own, &state::to_floats(tensor));
            }
        }
        **reference = parameters::put((**reference).clone(), trainable, &values, false);
        Ok(())
    }
}

/// The log-probability of every token of a batch, of which its labels are not [`IGNORED`], at the token before it:
/// `[batch, seq]`, 0 for all others. Logits are divided by `temperature`.
///
/// # Errors
/// Where the batch does not fit the model.
pub fn token_log_probs(model: &AutoModelForCausalLM, batch: &Batch, temperature: f64) -> Result<Tensor<2>> {
    let Targets::Tokens(labels) = &batch.labels else {
        return Err(wrong_targets("a preference"));
    };
    let mut logits = logits(model, batch)?;
    let [rows, seq, classes] = logits.dims();
    if temperature != 1.0 {
        logits = logits / temperature;
    }
    let targets = next_tokens(batch, labels);
    Ok(log_probs(logits.reshape([rows * seq, classes]), &targets)?.reshape([rows, seq]))
}

/// The log-probability of each row's labels: `[batch]`.
///
/// # Errors
/// Where the batch does not fit the model.
pub fn sequence_log_probs(model: &AutoModelForCausalLM, batch: &Batch) -> Result<Tensor<1>> {
    Ok(token_log_probs(model, batch, 1.0)?.sum_dim(1).reshape([-1]))
}

/// How many of each row's tokens are learned.
pub(crate) fn learned(batch: &Batch) -> Vec<f32> {
    let Targets::Tokens(labels) = &batch.labels else {
        return Vec::new();
    };
    let count = |labels: &Vec<i64>| labels.iter().filter(|label| **label != IGNORED).count() as f32;
    labels.iter().map(count).collect()
}

/// The column of what the reference says about an example.
pub const REF_LOGPS: &str = "ref_logps";

/// What the reference has said about the rows of a batch before: the first numbers of all rows, then the second, and so on.
pub(crate) fn known(rows: &[Row]) -> Option<Vec<f32>> {
    let of = |row: &Row| row.example.floats(REF_LOGPS).map(<[f32]>::to_vec);
    let known: Vec<Vec<f32>> = rows.iter().map(of).collect::<Option<_>>()?;
    let each = known.first()?.len();
    let numbers = (0..each).flat_map(|at| known.iter().filter_map(move |numbers| numbers.get(at).copied()));
    Some(numbers.collect())
}

/// `data` with the column [`REF_LOGPS`]: what `model` says about the rows of each example, in the order of a batch. It is
/// computed once and kept in `file`.
///
/// # Errors
/// Where a batch does not fit the model, or the file cannot be read or written.
pub async fn precompute(
    model: &AutoModelForCausalLM,
    objective: &dyn Objective,
    data: Dataset,
    batch_size: usize,
    file: &Path,
) -> Result<Dataset> {
    if file.is_file() {
        return Ok(data.with_computed(REF_LOGPS, read(file)?)?);
    }
    let model = model.without_autodiff();
    let draw = Draw { seed: 0, epoch: 0 };
    let mut all = Vec::new();
    let indices: Vec<u64> = (0..data.len()).collect();
    for indices in indices.chunks(batch_size.max(1)) {
        let row = |index: &u64| {
            let (index, example) = (*index, data.get(*index)?);
            Ok(Row { index, example })
        };
        let rows = indices.iter().map(row).collect::<Result<Vec<_>>>()?;
        let batch = objective.collate(&rows, draw);
        let numbers = sequence_log_probs(&model, &batch)?.into_data_async().await;
        let numbers = numbers.map_err(|error| Error::Device(format!("{error:?}")))?;
        let numbers: Vec<f32> = numbers.iter::<f32>().collect();
        // A batch has the first rows of all examples, then the second.
        all.extend((0..rows.len()).map(|at| numbers.iter().skip(at).step_by(rows.len()).copied().collect()));
    }
    write(file, &all)?;
    Ok(data.with_computed(REF_LOGPS, all)?)
}

fn write(file: &Path, numbers: &[Vec<f32>]) -> Result<()> {
    let shape = [numbers.len(), numbers.first().map_or(0, Vec::len)];
    let flat: Vec<f32> = numbers.iter().flatten().copied().collect();
    checkpoint::write_tensors(file, vec![(REF_LOGPS.to_string(), state::floats(&flat, &shape))])
}

fn read(file: &Path) -> Result<Vec<Vec<f32>>> {
    let mut tensors: State = checkpoint::read_tensors(file)?;
    let tensor = tensors
        .remove(REF_LOGPS)
        .filter(|tensor| tensor.dtype == DType::F32 && tensor.shape.len() == 2);
    let tensor = tensor.ok_or_else(|| {
        Error::checkpoint(
            file,
            "holds no numbers of a reference; remove it, and it is made anew",
        )
    })?;
    Ok(state::to_floats(&tensor)
        .chunks(tensor.shape[1].max(1))
        .map(<[f32]>::to_vec)
        .collect())
}
