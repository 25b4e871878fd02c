//! Rows of tables.

use burn::backend::flex::FlexTensor;
use burn::tensor::{Int, Tensor};

use super::tensor;
use crate::autodiff::open;
use crate::flex;

/// The rows `ids` `[n]` of a table `[rows, width]`: `[n, width]`. The row `padding` gets no gradient.
pub fn rows(table: Tensor<2>, ids: Tensor<1, Int>, padding: Option<usize>) -> Tensor<2> {
    let [count, width] = table.dims();
    let (table, tape) = match open([table.into_dispatch()]) {
        Ok(([table], tape)) => (flex::contiguous(table), tape),
        Err([table]) => return reference(Tensor::from_dispatch(table), ids, padding),
    };
    // On the CPU, reading back does not wait.
    let ids: Vec<usize> = ids.into_data().iter::<i64>().map(|id| id as usize).collect();
    let values = flex::values(&table);
    let mut found = Vec::with_capacity(ids.len() * width);
    for id in &ids {
        found.extend_from_slice(&values[id * width..(id + 1) * width]);
    }
    let found = tensor(found, &[ids.len(), width]);
    tape.record(found, move |g, _| {
        [Some(scatter(&g, &ids, [count, width], padding))]
    })
}

fn reference(table: Tensor<2>, ids: Tensor<1, Int>, padding: Option<usize>) -> Tensor<2> {
    let found = table.select(0, ids.clone());
    match padding {
        Some(padding) if found.is_autodiff() => {
            let is_padding = ids.equal_elem(padding as i64).unsqueeze_dim::<2>(1);
            let is_padding = is_padding.expand(found.dims());
            found.clone().mask_where(is_padding, found.detach())
        }
        _ => found,
    }
}

/// Adds each row to that of its id.
fn scatter(g: &FlexTensor, ids: &[usize], shape: [usize; 2], padding: Option<usize>) -> FlexTensor {
    let g = flex::contiguous(g.clone());
    let width = shape[1];
    let mut sums = vec![0.0f32; shape[0] * width];
    for (id, g) in ids.iter().zip(flex::values(&g).chunks_exact(width.max(1))) {
        if padding == Some(*id) {
            continue;
        }
        let sums = &mut sums[id * width..(id + 1) * width];
        for (sum, g) in sums.iter_mut().zip(g) {
            *sum += g;
        }
    }
    tensor(sums, &shape)
}
