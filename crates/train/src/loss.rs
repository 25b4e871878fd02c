//! How wrong logits are.

use burn::tensor::{IndexingUpdateOp, Int, Tensor, TensorData, activation};
use oxiformers_data::tasks::IGNORED;
use oxiformers_models::nn::{self, CrossEntropyOptions, LabelError};

use crate::Result;

/// The mean of `-log softmax(logits)[target]` over the rows of `logits` `[rows, classes]` whose target is not
/// [`IGNORED`]; with `smoothing` ε, of `(1 − ε)` times this and ε times the mean over all classes (Szegedy et al., 2016).
/// `None` where all are ignored.
///
/// # Errors
/// Targets that are no classes, or not one for each row.
pub fn cross_entropy(logits: Tensor<2>, targets: &[i64], smoothing: f64) -> Result<Option<Tensor<1>>> {
    if targets.iter().all(|target| *target == IGNORED) {
        return Ok(None);
    }
    let options = CrossEntropyOptions {
        ignore_index: IGNORED,
        label_smoothing: smoothing,
        divisor: None,
    };
    Ok(Some(nn::cross_entropy(logits, targets, options)?))
}

/// `log softmax(logits)[target]` of each row: `logits` `[rows, classes]` to `[rows]`; 0 where the target is [`IGNORED`].
///
/// # Errors
/// Targets that are no classes, or not one for each row.
pub fn log_probs(logits: Tensor<2>, targets: &[i64]) -> Result<Tensor<1>> {
    let ([rows, classes], device) = (logits.dims(), logits.device());
    if targets.len() != rows {
        let labels = targets.len();
        return Err(LabelError::Count { labels, rows }.into());
    }
    // The places that count, and their classes.
    let (mut places, mut ids) = (Vec::new(), Vec::new());
    for (row, target) in targets
        .iter()
        .enumerate()
        .filter(|(_, target)| **target != IGNORED)
    {
        let class = usize::try_from(*target).ok().filter(|class| *class < classes);
        places.push(row as i32);
        ids.push(class.ok_or(LabelError::OutOfRange {
            row,
            label: *target,
            classes,
            ignore_index: IGNORED,
        })? as i32);
    }
    let all = Tensor::zeros([rows], &device);
    let count = places.len();
    if count == 0 {
        return Ok(all);
    }
    let places = Tensor::<1, Int>::from_data(TensorData::new(places, [count]), &device);
    let ids = Tensor::<2, Int>::from_data(TensorData::new(ids, [count, 1]), &device);
    let chosen = activation::log_softmax(logits.select(0, places.clone()), 1).gather(1, ids);
    Ok(all.select_assign(0, places, chosen.reshape([count]), IndexingUpdateOp::Add))
}

/// The mean of squared differences (`MSELoss`); both `[rows, outputs]`.
pub fn mean_squared_error(outputs: Tensor<2>, targets: Vec<f32>) -> Tensor<1> {
    let targets = Tensor::<2>::from_data(TensorData::new(targets, outputs.dims()), &outputs.device());
    (outputs - targets).powi_scalar(2).mean()
}

/// The mean of the binary cross entropies of `sigmoid(logits)` and targets of 0 or 1 (`BCEWithLogitsLoss`); both
/// `[rows, classes]`.
pub fn binary_cross_entropy(logits: Tensor<2>, targets: Vec<f32>) -> Tensor<1> {
    let targets = Tensor::<2>::from_data(TensorData::new(targets, logits.dims()), &logits.device());
    // max(x, 0) − x · y + log(1 + exp(−|x|)) does not overflow.
    let softplus = ((logits.clone().abs().neg()).exp() + 1.0).log();
    (activation::relu(logits.clone()) - logits * targets + softplus).mean()
}

#[cfg(test)]
mod tests {
    use burn::tensor::Device;

    use super::*;

    fn number(loss: Tensor<1>) -> f32 {
        loss.into_scalar()
    }

    #[test]
    fn cross_entropies() {
        let device = Device::flex();
        let logits = Tensor::<2>::from_floats([[1.0, 2.0, 0.5], [0.0, 0.0, 0.0], [3.0, -1.0, 0.0]], &device);
        let log_prob = |row: [f32; 3], at: usize| row[at] - row.iter().map(|x| x.exp()).sum::<f32>().ln();
        let rows = [[1.0, 2.0, 0.5], [0.0, 0.0, 0.0], [3.0, -1.0, 0.0]];
        let expected = -(log_prob(rows[0], 1) + log_prob(rows[2], 2)) / 2.0;
        let loss = cross_entropy(logits.clone(), &[1, IGNORED, 2], 0.0)
            .unwrap()
            .expect("loss");
        assert!((number(loss) - expected).abs() < 1e-6);
        let all: f32 = [0, 2]
            .iter()
            .flat_map(|row| (0..3).map(move |at| log_prob(rows[*row], at)))
            .sum();
        let loss = cross_entropy(logits.clone(), &[1, IGNORED, 2], 0.1)
            .unwrap()
            .expect("loss");
        assert!((number(loss) - (0.9 * expected - 0.1 * all / 6.0)).abs() < 1e-6);
        assert!(
            cross_entropy(logits.clone(), &[IGNORED; 3], 0.0)
                .unwrap()
                .is_none()
        );
        assert!(cross_entropy(logits, &[0, 3, 1], 0.0).is_err());
    }

    #[test]
    fn log_probabilities() {
        let device = Device::flex();
        let rows = [[1.0, 2.0, 0.5], [0.0, 0.0, 0.0], [3.0, -1.0, 0.0]];
        let logits = Tensor::<2>::from_floats(rows, &device);
        let found = log_probs(logits.clone(), &[1, IGNORED, 2]).expect("targets");
        let found: Vec<f32> = found.into_data().iter::<f32>().collect();
        let expected = |row: [f32; 3], at: usize| row[at] - row.iter().map(|x| x.exp()).sum::<f32>().ln();
        for (found, expected) in found
            .iter()
            .zip([expected(rows[0], 1), 0.0, expected(rows[2], 2)])
        {
            assert!((found - expected).abs() < 1e-6);
        }
        let none = log_probs(logits.clone(), &[IGNORED; 3]).expect("targets");
        assert_eq!(number(none.abs().sum()), 0.0);
        assert!(log_probs(logits.clone(), &[0, 3, 1]).is_err());
        assert!(log_probs(logits, &[0]).is_err());
    }

    #[test]
    fn other_losses() {
        let device = Device::flex();
        let outputs = Tensor::<2>::from_floats([[1.0, -2.0], [100.0, -100.0]], &device);
        let loss = number(mean_squared_error(outputs.clone(), vec![0.0, 0.0, 99.0, -101.0]));
        assert!((loss - (1.0 + 4.0 + 1.0 + 1.0) / 4.0).abs() < 1e-6);
        let entropy = |x: f32, y: f32| {
            let p = 1.0 / (1.0 + (-x).exp());
            -(y * p.ln() + (1.0 - y) * (1.0 - p).ln())
        };
        let loss = number(binary_cross_entropy(outputs, vec![1.0, 0.0, 0.0, 1.0]));
        let expected = (entropy(1.0, 1.0) + entropy(-2.0, 0.0) + 100.0 + 100.0) / 4.0;
        assert!((loss - expected).abs() < 1e-4, "{loss} {expected}");
    }
}
