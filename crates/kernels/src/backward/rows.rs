//! Rows of tables.

use burn::backend::flex::FlexTensor;
use burn::tensor::{Int, Tensor};

use super::tensor;
use crate::autodiff::open;
use crate::flex;

/// The rows `ids` `[n]` of a table `[rows, width]`: `[n, width]`.
pub fn rows(table: Tensor<2>, ids: Tensor<1, Int>) -> Tensor<2> {
    let [count, width] = table.dims();
    let (table, tape) = match open([Some(table.into_dispatch())]) {
        Ok(([Some(table)], tape)) => (flex::contiguous(table), tape),
        Ok(_) => unreachable!("it was given"),
        Err([table]) => {
            let table = table.unwrap_or_else(|| unreachable!("it was given"));
            return Tensor::from_dispatch(table).select(0, ids);
        }
    };
    // On the CPU, reading back does not wait.
    let ids: Vec<usize> = ids.into_data().iter::<i64>().map(|id| id as usize).collect();
    let values = flex::values(&table);
    let mut found = Vec::with_capacity(ids.len() * width);
    for id in &ids {
        found.extend_from_slice(&values[id * width..(id + 1) * width]);
    }
    let found = tensor(found, &[ids.len(), width]);
    tape.record(found, move |g, _| [Some(scatter(&g, &ids, [count, width]))])
}

/// Adds each row to that of its id.
fn scatter(g: &FlexTensor, ids: &[usize], shape: [usize; 2]) -> FlexTensor {
    let g = flex::contiguous(g.clone());
    let width = shape[1];
    let mut sums = vec![0.0f32; shape[0] * width];
    for (id, g) in ids.iter().zip(flex::values(&g).chunks_exact(width.max(1))) {
        let sums = &mut sums[id * width..(id + 1) * width];
        for (sum, g) in sums.iter_mut().zip(g) {
            *sum += g;
        }
    }
    tensor(sums, &shape)
}
