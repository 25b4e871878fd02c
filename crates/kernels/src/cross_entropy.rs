//! Cross entropy of logits and labels.

use burn::backend::flex::FlexTensor;
use burn::tensor::{Int, Shape, Tensor, TensorData, activation};

use crate::autodiff::{is_tracked, open};
use crate::output::Output;
use crate::threads::{for_each, pieces};
use crate::{flex, math};

/// How a loss is put together from those of the rows.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct CrossEntropyOptions {
    /// Rows with this label count for nothing.
    pub ignore_index: i64,
    /// Share ε of the target that is spread evenly over all classes (Szegedy et al., 2016): the loss of a row is
    /// `(1 − ε) · −log p(label) + ε · mean(−log p)`.
    pub label_smoothing: f64,
    /// What the sum over the rows is divided by; the number of rows that count where `None`. Transformers divides by the
    /// number of labels of all batches whose gradients are put together.
    pub divisor: Option<f64>,
}

impl Default for CrossEntropyOptions {
    fn default() -> Self {
        Self {
            ignore_index: -100,
            label_smoothing: 0.0,
            divisor: None,
        }
    }
}

/// Labels that do not fit the logits.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LabelError {
    /// One that is no class.
    #[error(
        "label {label} in row {row}: there are {classes} classes, counted from 0, and {ignore_index} is ignored"
    )]
    OutOfRange {
        /// The row.
        row: usize,
        /// Its label.
        label: i64,
        /// Number of classes.
        classes: usize,
        /// The label of rows that count for nothing.
        ignore_index: i64,
    },
    /// Too many or too few.
    #[error("{labels} labels for {rows} rows of logits")]
    Count {
        /// Number of labels.
        labels: usize,
        /// Number of rows.
        rows: usize,
    },
}

/// The mean over rows of `−log softmax(logits)[label]`: `logits` `[rows, classes]`, a label for each row, to `[1]`. It is 0
/// where no row counts.
///
/// # Errors
/// Labels that are no classes, or not one for each row.
pub fn cross_entropy(
    logits: Tensor<2>,
    labels: &[i64],
    options: CrossEntropyOptions,
) -> Result<Tensor<1>, LabelError> {
    let targets = Targets::new(labels, logits.dims(), options)?;
    Ok(on_the_cpu(logits, &targets).unwrap_or_else(|logits| reference(logits, &targets)))
}

/// With a gradient that takes the place of the logits, where nobody else holds them.
fn on_the_cpu(logits: Tensor<2>, targets: &Targets) -> Result<Tensor<1>, Tensor<2>> {
    let [rows, classes] = logits.dims();
    let losses = Output::new(rows);
    let loss = |losses: Output| {
        // SAFETY: those of all rows have been written.
        let losses = unsafe { losses.done() };
        let sum: f64 = losses.iter().map(|loss| f64::from(*loss)).sum();
        let mean = (sum / targets.divisor) as f32;
        FlexTensor::from_data(TensorData::new(vec![mean], Shape::from([1])))
    };
    let only_losses = |logits: FlexTensor| {
        let logits = flex::contiguous(logits);
        let logits = flex::values(&logits);
        let (tasks, size) = pieces(rows, (1usize << 14).div_ceil(classes.max(1)));
        for_each(tasks, |index| {
            for row in index * size..rows.min((index + 1) * size) {
                let logits = &logits[row * classes..(row + 1) * classes];
                pulp::Arch::new().dispatch(Loss {
                    logits,
                    label: targets.labels[row],
                    smoothing: targets.smoothing as f32,
                    to: losses.at(row),
                });
            }
        });
    };
    let logits = match flex::unwrap(logits) {
        Ok(logits) => {
            only_losses(logits);
            return Ok(flex::wrap(loss(losses)));
        }
        Err(logits) => logits.into_dispatch(),
    };
    let tracked = is_tracked(&logits);
    let ([logits], tape) = open([logits]).map_err(|[logits]| Tensor::from_dispatch(logits))?;
    if !tracked {
        only_losses(logits);
        return Ok(tape.record(loss(losses), |_, _| [None]));
    }
    let gradient = flex::change(logits, classes, |start, x| {
        for (index, x) in x.chunks_exact_mut(classes.max(1)).enumerate() {
            let row = start / classes.max(1) + index;
            pulp::Arch::new().dispatch(Gradient {
                x,
                label: targets.labels[row],
                smoothing: targets.smoothing as f32,
                factor: (1.0 / targets.divisor) as f32,
                to: losses.at(row),
            });
        }
    });
    Ok(tape.record(loss(losses), |g, _| {
        let factor = flex::values(&flex::contiguous(g))[0];
        if factor == 1.0 {
            return [Some(gradient)];
        }
        let scaled = flex::change(gradient, 1, |_, x| {
            x.iter_mut().for_each(|x| *x *= factor);
        });
        [Some(scaled)]
    }))
}

/// The loss of a row.
struct Loss<'a> {
    logits: &'a [f32],
    label: Option<u32>,
    smoothing: f32,
    to: *mut f32,
}

impl pulp::WithSimd for Loss<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: pulp::Simd>(self, _: S) {
        let x = self.logits;
        let loss = match self.label {
            Some(label) => {
                let most = math::max(x);
                let total = math::sum(x, |x| math::exp(x - most));
                of_row(x, label as usize, most + total.ln(), self.smoothing)
            }
            None => 0.0,
        };
        // SAFETY: nobody else writes the loss of this row.
        unsafe { self.to.write(loss) };
    }
}

/// The loss of a row whose weights `eˣ` sum up to that of `total`.
#[inline(always)]
fn of_row(x: &[f32], label: usize, total: f32, smoothing: f32) -> f32 {
    let loss = total - x[label];
    if smoothing == 0.0 {
        return loss;
    }
    let mean = math::sum(x, |x| x) / x.len() as f32;
    (1.0 - smoothing) * loss + smoothing * (total - mean)
}

/// The loss of a row, whose logits become their gradient.
struct Gradient<'a> {
    x: &'a mut [f32],
    label: Option<u32>,
    smoothing: f32,
    /// What the loss of a row counts.
    factor: f32,
    to: *mut f32,
}

impl pulp::WithSimd for Gradient<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: pulp::Simd>(self, _: S) {
        let Self {
            x, smoothing, factor, ..
        } = self;
        let Some(label) = self.label else {
            x.fill(0.0);
            // SAFETY: nobody else writes the loss of this row.
            return unsafe { self.to.write(0.0) };
        };
        let label = label as usize;
        let most = math::max(x);
        let (of_label, sum) = (
            x[label],
            if smoothing == 0.0 {
                0.0
            } else {
                math::sum(x, |x| x)
            },
        );
        let classes = x.len() as f32;
        let total = math::exp_sum(x, most);
        let log = most + total.ln();
        let loss = (1.0 - smoothing) * (log - of_label) + smoothing * (log - sum / classes);
        // SAFETY: as above.
        unsafe { self.to.write(loss) };
        let (scale, spread) = (factor / total, factor * smoothing / classes);
        for x in x.iter_mut() {
            *x = *x * scale - spread;
        }
        x[label] -= factor * (1.0 - smoothing);
    }
}

/// What rows are held to.
#[derive(Debug, Clone)]
struct Targets {
    /// The class of each row; none where it counts for nothing.
    labels: Vec<Option<u32>>,
    smoothing: f64,
    divisor: f64,
}

impl Targets {
    fn new(
        labels: &[i64],
        [rows, classes]: [usize; 2],
        options: CrossEntropyOptions,
    ) -> Result<Self, LabelError> {
        if labels.len() != rows {
            return Err(LabelError::Count {
                labels: labels.len(),
                rows,
            });
        }
        let ignore_index = options.ignore_index;
        let check = |(row, label): (usize, &i64)| match usize::try_from(*label) {
            _ if *label == ignore_index => Ok(None),
            Ok(class) if class < classes => Ok(Some(class as u32)),
            _ => Err(LabelError::OutOfRange {
                row,
                label: *label,
                classes,
                ignore_index,
            }),
        };
        let labels: Vec<_> = labels.iter().enumerate().map(check).collect::<Result<_, _>>()?;
        let count = labels.iter().flatten().count().max(1) as f64;
        Ok(Self {
            labels,
            smoothing: options.label_smoothing,
            divisor: options.divisor.unwrap_or(count),
        })
    }
}

fn reference(logits: Tensor<2>, targets: &Targets) -> Tensor<1> {
    let ([rows, classes], device, dtype) = (logits.dims(), logits.device(), logits.dtype());
    let ids: Vec<i32> = targets
        .labels
        .iter()
        .map(|label| label.unwrap_or(0) as i32)
        .collect();
    let ids = Tensor::<2, Int>::from_data(TensorData::new(ids, [rows, 1]), &device);
    let counts: Vec<f32> = targets
        .labels
        .iter()
        .map(|label| f32::from(label.is_some()))
        .collect();
    let counts = Tensor::<2>::from_data(TensorData::new(counts, [rows, 1]), &device).cast(dtype);
    let log_probs = activation::log_softmax(logits, 1);
    let mut loss = log_probs.clone().gather(1, ids) * -(1.0 - targets.smoothing);
    if targets.smoothing != 0.0 {
        loss = loss - log_probs.sum_dim(1) * (targets.smoothing / classes as f64);
    }
    (loss * counts).sum() / targets.divisor
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::noise;

    #[test]
    fn bad_labels() {
        let logits = || noise(1, [2, 3]);
        let error = |labels: &[i64]| {
            let options = CrossEntropyOptions::default();
            cross_entropy(logits(), labels, options)
                .expect_err("labels")
                .to_string()
        };
        assert!(error(&[0, 3]).contains("label 3 in row 1: there are 3 classes"));
        assert!(error(&[-1, 0]).contains("label -1 in row 0"));
        assert_eq!(error(&[0]), "1 labels for 2 rows of logits");
        let options = CrossEntropyOptions::default();
        let none = cross_entropy(logits(), &[-100, -100], options).expect("loss");
        assert_eq!(none.into_scalar::<f32>(), 0.0);
    }
}
