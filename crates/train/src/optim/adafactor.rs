//! Adafactor (Shazeer and Stern, 2018): the mean of squares of a matrix, held as one number per row and column.

use std::collections::BTreeMap;

use super::{CHUNK, Optimizer, Parameter, Shapes, State, Step, parallel, state};
use crate::Result;

/// Adafactor as `transformers.optimization.Adafactor` computes it.
#[derive(Debug)]
pub struct Adafactor {
    /// Added to squares of gradients, and the least size of a parameter.
    pub eps: [f64; 2],
    /// Largest root mean square of an update.
    pub clip_threshold: f64,
    /// Exponent by which the mean of squares forgets.
    pub decay_rate: f64,
    /// Decay of the mean of updates, where there is one.
    pub beta1: Option<f64>,
    /// Share of a parameter that is lost per step, times the learning rate.
    pub weight_decay: f64,
    /// Whether steps are relative to the size of a parameter.
    pub scale_parameter: bool,
    /// Whether the learning rate follows from the number of steps.
    pub relative_step: bool,
    /// Whether it starts small.
    pub warmup_init: bool,
    /// What is remembered.
    pub moments: BTreeMap<String, Moments>,
}

/// What is remembered of a parameter.
#[derive(Debug, Clone)]
pub struct Moments {
    step: u64,
    shape: Vec<usize>,
    squares: Squares,
    /// Mean of updates, where `beta1` is set.
    exp_avg: Option<Vec<f32>>,
}

#[derive(Debug, Clone)]
enum Squares {
    /// Means of rows and of columns, of each matrix.
    Factored {
        row: Vec<f32>,
        col: Vec<f32>,
    },
    Whole(Vec<f32>),
}

impl Default for Adafactor {
    fn default() -> Self {
        Self {
            eps: [1e-30, 1e-3],
            clip_threshold: 1.0,
            decay_rate: -0.8,
            beta1: None,
            weight_decay: 0.0,
            scale_parameter: true,
            relative_step: true,
            warmup_init: false,
            moments: BTreeMap::new(),
        }
    }
}

/// Rows and columns of the matrices in a tensor of two dimensions or more.
fn matrix(shape: &[usize]) -> Option<[usize; 2]> {
    match shape {
        [.., rows, cols] if *rows > 0 && *cols > 0 => Some([*rows, *cols]),
        _ => None,
    }
}

impl Moments {
    fn new(shape: &[usize], len: usize, mean: bool) -> Self {
        let squares = match matrix(shape) {
            Some([rows, cols]) => Squares::Factored {
                row: vec![0.0; len / cols],
                col: vec![0.0; len / rows],
            },
            None => Squares::Whole(vec![0.0; len]),
        };
        Self {
            step: 0,
            shape: shape.to_vec(),
            squares,
            exp_avg: mean.then(|| vec![0.0; len]),
        }
    }

    /// The shapes of the means of rows and of columns.
    fn factored_shapes(shape: &[usize]) -> [Vec<usize>; 2] {
        let without = |axis: usize| {
            let mut shape = shape.to_vec();
            shape.remove(axis);
            shape
        };
        [without(shape.len() - 1), without(shape.len() - 2)]
    }

    fn load(from: &state::Moments, mean: bool) -> Result<Self> {
        let squares = if matrix(from.shape).is_some() {
            let [row, col] = Self::factored_shapes(from.shape);
            Squares::Factored {
                row: from.floats_of("exp_avg_sq_row", &row)?,
                col: from.floats_of("exp_avg_sq_col", &col)?,
            }
        } else {
            Squares::Whole(from.floats("exp_avg_sq")?)
        };
        Ok(Self {
            step: from.count("step")?,
            shape: from.shape.to_vec(),
            squares,
            exp_avg: if mean { Some(from.floats("exp_avg")?) } else { None },
        })
    }
}

/// The sum of squares, in pieces whose order does not depend on threads.
fn sum_of_squares(x: &[f32]) -> f64 {
    let sums = parallel(x.chunks(CHUNK), |x| {
        x.iter().map(|x| f64::from(*x) * f64::from(*x)).sum::<f64>()
    });
    sums.iter().sum()
}

fn root_mean_square(x: &[f32]) -> f64 {
    (sum_of_squares(x) / x.len().max(1) as f64).sqrt()
}

impl Adafactor {
    fn learning_rate(&self, lr: f64, step: u64, values: &[f32]) -> f64 {
        let lr = if self.relative_step {
            let most = if self.warmup_init {
                1e-6 * step as f64
            } else {
                1e-2
            };
            most.min(1.0 / (step as f64).sqrt())
        } else {
            lr
        };
        if self.scale_parameter {
            lr * root_mean_square(values).max(self.eps[1])
        } else {
            lr
        }
    }
}

impl Optimizer for Adafactor {
    fn update(&mut self, parameter: Parameter<'_>, values: &mut [f32], grad: &[f32], step: Step) {
        let mut moments = (self.moments.remove(parameter.name))
            .unwrap_or_else(|| Moments::new(parameter.shape, values.len(), self.beta1.is_some()));
        moments.step += 1;
        let lr = self.learning_rate(step.lr, moments.step, values);
        let beta = (1.0 - (moments.step as f64).powf(self.decay_rate)) as f32;
        let (eps, scale) = (self.eps[0] as f32, step.grad_scale);
        let mut updates = match &mut moments.squares {
            Squares::Factored { row, col } => {
                let [rows, cols] = matrix(parameter.shape).unwrap_or([1, 1]);
                factored(grad, [rows, cols], row, col, [beta, eps, scale])
            }
            Squares::Whole(squares) => {
                let mut updates = vec![0.0f32; grad.len()];
                let chunks =
                    (grad.chunks(CHUNK).zip(squares.chunks_mut(CHUNK))).zip(updates.chunks_mut(CHUNK));
                parallel(chunks, |((grad, squares), updates)| {
                    for ((grad, square), update) in grad.iter().zip(squares).zip(updates) {
                        let grad = grad * scale;
                        *square = *square * beta + (grad * grad + eps) * (1.0 - beta);
                        *update = grad / square.sqrt();
                    }
                });
                updates
            }
        };
        let clip = (root_mean_square(&updates) / self.clip_threshold).max(1.0);
        let factor = (lr / clip) as f32;
        let keep = if parameter.decays {
            (1.0 - self.weight_decay * lr) as f32
        } else {
            1.0
        };
        match (&mut moments.exp_avg, self.beta1) {
            (Some(mean), Some(beta1)) => {
                let beta1 = beta1 as f32;
                for (update, mean) in updates.iter_mut().zip(mean) {
                    *mean = *mean * beta1 + *update * factor * (1.0 - beta1);
                    *update = *mean;
                }
            }
            _ => updates.iter_mut().for_each(|update| *update *= factor),
        }
        parallel(
            values.chunks_mut(CHUNK).zip(updates.chunks(CHUNK)),
            |(x, update)| {
                for (x, update) in x.iter_mut().zip(update) {
                    *x = *x * keep - update;
                }
            },
        );
        self.moments.insert(parameter.name.to_string(), moments);
    }

    fn state(&self) -> State {
        let mut state = State::new();
        for (name, moments) in &self.moments {
            let mut save = |moment: &str, tensor| state.insert(format!("{name}.{moment}"), tensor);
            save("step", state::count(moments.step));
            match &moments.squares {
                Squares::Factored { row, col } => {
                    let shapes = Moments::factored_shapes(&moments.shape);
                    save("exp_avg_sq_row", state::floats(row, &shapes[0]));
                    save("exp_avg_sq_col", state::floats(col, &shapes[1]));
                }
                Squares::Whole(squares) => {
                    save("exp_avg_sq", state::floats(squares, &moments.shape));
                }
            }
            if let Some(mean) = &moments.exp_avg {
                save("exp_avg", state::floats(mean, &moments.shape));
            }
        }
        state
    }

    fn load_state(&mut self, state: &State, shapes: &Shapes) -> Result<()> {
        let known = [
            "step",
            "exp_avg_sq_row",
            "exp_avg_sq_col",
            "exp_avg_sq",
            "exp_avg",
        ];
        let mean = self.beta1.is_some();
        self.moments = state::load(state, shapes, &known, |from| Moments::load(from, mean))?;
        Ok(())
    }
}

/// Takes the gradient into the means of rows and columns; the gradient divided by the root of what they say.
fn factored(
    grad: &[f32],
    [rows, cols]: [usize; 2],
    row: &mut [f32],
    col: &mut [f32],
    [beta, eps, scale]: [f32; 3],
) -> Vec<f32> {
    let mut updates = vec![0.0f32; grad.len()];
    let matrices = (grad.chunks(rows * cols).zip(updates.chunks_mut(rows * cols)))
        .zip(row.chunks_mut(rows))
        .zip(col.chunks_mut(cols));
    for (((grad, updates), row), col) in matrices {
        // Some rows a task, each with sums of its own for the columns.
        let height = (CHUNK / cols).clamp(1, rows);
        let sums = parallel(
            grad.chunks(height * cols).zip(row.chunks_mut(height)),
            |(grad, row)| {
                let mut sums = vec![0.0f32; cols];
                for (grad, row) in grad.chunks(cols).zip(row) {
                    let mut total = 0.0f64;
                    for (grad, sum) in grad.iter().zip(&mut sums) {
                        let grad = grad * scale;
                        let square = grad * grad + eps;
                        total += f64::from(square);
                        *sum += square;
                    }
                    *row = *row * beta + (total / cols as f64) as f32 * (1.0 - beta);
                }
                sums
            },
        );
        for (index, col) in col.iter_mut().enumerate() {
            let total: f64 = sums.iter().map(|sums| f64::from(sums[index])).sum();
            *col = *col * beta + (total / rows as f64) as f32 * (1.0 - beta);
        }
        let mean = (row.iter().map(|x| f64::from(*x)).sum::<f64>() / rows as f64) as f32;
        let by_col: Vec<f32> = col.iter().map(|col| 1.0 / col.sqrt()).collect();
        let pieces =
            (grad.chunks(height * cols).zip(updates.chunks_mut(height * cols))).zip(row.chunks(height));
        parallel(pieces, |((grad, updates), row)| {
            for ((grad, updates), row) in grad.chunks(cols).zip(updates.chunks_mut(cols)).zip(row) {
                let by_row = scale / (row / mean).sqrt();
                for ((grad, update), by_col) in grad.iter().zip(updates).zip(&by_col) {
                    *update = grad * by_row * by_col;
                }
            }
        });
    }
    updates
}
