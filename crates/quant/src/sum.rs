//! Sums in the order in which PyTorch adds, so that what is made of them is the same to the last bit.

/// Lanes of a vector.
const LANES: usize = 8;
/// Vectors that are added side by side.
const ROWS: usize = 4;
/// Levels of partial sums.
const LEVELS: usize = 4;

/// What `torch.sum` gives for a contiguous f32 tensor on one thread of a processor with AVX2.
pub(crate) fn sum(values: &[f32]) -> f32 {
    let (vectors, rest) = values.as_chunks::<LANES>();
    let whole = row_sum(vectors);
    let mut total = 0.0;
    rest.iter().for_each(|value| total += value);
    whole.iter().for_each(|value| total += value);
    total
}

type Vector = [f32; LANES];

fn add(to: &mut Vector, from: &Vector) {
    to.iter_mut().zip(from).for_each(|(to, from)| *to += from);
}

fn row_sum(vectors: &[Vector]) -> Vector {
    let (rows, rest) = vectors.as_chunks::<ROWS>();
    let mut partial = cascade(rows);
    rest.iter().for_each(|vector| add(&mut partial[0], vector));
    let [mut first, others @ ..] = partial;
    others.iter().for_each(|vector| add(&mut first, vector));
    first
}

/// Sums of short runs, and of those, so that rounding errors grow slowly.
fn cascade(rows: &[[Vector; ROWS]]) -> [Vector; ROWS] {
    let power = (ceil_log2(rows.len()) / LEVELS).max(4);
    let step = 1usize << power;
    let mask = step - 1;
    let mut sums = [[[0.0f32; LANES]; ROWS]; LEVELS];
    let mut done = 0;
    let (runs, rest) = rows.split_at(rows.len() / step * step);
    for run in runs.chunks_exact(step) {
        run.iter().for_each(|row| add_rows(&mut sums[0], row));
        done += step;
        for level in 1..LEVELS {
            let below = std::mem::take(&mut sums[level - 1]);
            add_rows(&mut sums[level], &below);
            if done & (mask << (level * power)) != 0 {
                break;
            }
        }
    }
    rest.iter().for_each(|row| add_rows(&mut sums[0], row));
    let [mut first, others @ ..] = sums;
    others.iter().for_each(|sum| add_rows(&mut first, sum));
    first
}

fn add_rows(to: &mut [Vector; ROWS], from: &[Vector; ROWS]) {
    to.iter_mut().zip(from).for_each(|(to, from)| add(to, from));
}

fn ceil_log2(n: usize) -> usize {
    if n <= 2 {
        1
    } else {
        (usize::BITS - (n - 1).leading_zeros()) as usize
    }
}
