//! Clipping of gradients by their norm.

use crate::optim::{CHUNK, parallel};

/// The root of the sum of squares of all gradients, as `torch.nn.utils.clip_grad_norm_` returns it. It does not depend on
/// the number of threads.
pub fn norm<'a>(gradients: impl IntoIterator<Item = &'a [f32]>) -> f64 {
    let squares = gradients.into_iter().map(|gradient| {
        let sums = parallel(gradient.chunks(CHUNK), |chunk| {
            pulp::Arch::new().dispatch(
                #[inline(always)]
                || sum_of_squares(chunk),
            )
        });
        sums.iter().sum::<f64>()
    });
    squares.sum::<f64>().sqrt()
}

/// By what gradients are multiplied so that their norm is at most `max_norm`, as `torch.nn.utils.clip_grad_norm_` does.
pub fn clip_coefficient(norm: f64, max_norm: f64) -> f64 {
    (max_norm / (norm + 1e-6)).min(1.0)
}

#[inline(always)]
fn sum_of_squares(x: &[f32]) -> f64 {
    const LANES: usize = 16;
    let mut sums = [0.0f64; LANES];
    let (chunks, rest) = x.as_chunks::<LANES>();
    for chunk in chunks {
        for (sum, x) in sums.iter_mut().zip(chunk) {
            *sum += f64::from(*x) * f64::from(*x);
        }
    }
    let rest: f64 = rest.iter().map(|x| f64::from(*x) * f64::from(*x)).sum();
    sums.iter().sum::<f64>() + rest
}
