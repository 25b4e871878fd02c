//! GPTQ (Frantar et al., 2022): column after column is rounded, and the columns to come make up for the error.

use oxiformers_kernels::dense::{self, Weight};
use oxiformers_kernels::threads::for_each_chunk;

use super::affine::{self, Affine, AffineOptions, Grouped};
use super::linalg::inverse_factor;
use super::{Error, Hessian};

/// Columns that are rounded before the rest of the matrix hears of it.
const BLOCK: usize = 128;

/// The options of GPTQ, by the names of `quantization_config`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GptqOptions {
    /// Bits, symmetry and search of scales.
    pub affine: AffineOptions,
    /// Columns of a group; none for whole rows, which is stored as -1.
    pub group_size: Option<usize>,
    /// Rounds columns in the order of their squared inputs, the largest first. Groups are then made of columns that
    /// lie apart.
    pub desc_act: bool,
    /// Rounds groups in that order, and columns within groups: nearly as good, and groups stay side by side (Gafni et
    /// al., 2025). Without effect where `desc_act` is set or a group is a whole row.
    pub act_group_aware: bool,
    /// Chooses the scales of all groups before any column is rounded; with `desc_act`, groups stay side by side.
    pub static_groups: bool,
    /// What is added to the diagonal of the Hessian, as a part of its mean.
    pub damp_percent: f32,
    /// By how much that grows as long as the Hessian is not positive definite.
    pub damp_auto_increment: f32,
}

impl Default for GptqOptions {
    /// The defaults of Transformers' `GPTQConfig`, with 4 bits.
    fn default() -> Self {
        Self {
            affine: AffineOptions {
                bits: 4,
                sym: true,
                mse: 0.0,
            },
            group_size: Some(128),
            desc_act: false,
            act_group_aware: true,
            static_groups: false,
            damp_percent: 0.1,
            damp_auto_increment: 0.01,
        }
    }
}

/// What happened to a matrix.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Report {
    /// The squared error of the outputs for a mean input, as the algorithm estimates it.
    pub loss: f64,
    /// The damping that was used; more than was asked for where that was not enough.
    pub damp_percent: f32,
    /// Input features that were always 0: their weights became 0.
    pub dead: usize,
}

/// A row of the weight while it is rounded, its columns in the order of rounding.
struct Row {
    weights: Vec<f32>,
    codes: Vec<u8>,
    /// Of the groups so far; with static groups of all of them.
    affine: Vec<Affine>,
    errors: Vec<f32>,
    loss: f64,
}

/// Quantizes `weight` `[out_features, in_features]` so that its outputs for the inputs that `hessian` saw change little.
///
/// # Errors
/// Weights or inputs that are not finite, options that cannot be, and a Hessian that no damping makes positive definite.
pub fn gptq(
    weight: &[f32],
    shape: [usize; 2],
    hessian: &Hessian,
    options: &GptqOptions,
) -> Result<(Grouped, Report), Error> {
    affine::check(weight, shape)?;
    options.check()?;
    let [rows, columns] = shape;
    if hessian.in_features() != columns {
        return Err(Error::Features {
            found: hessian.in_features(),
            expected: columns,
        });
    }
    let mut h = hessian.matrix();
    let mut diagonal: Vec<f32> = h.iter().step_by(columns + 1).copied().collect();
    if !diagonal.iter().all(|value| value.is_finite()) {
        return Err(Error::Inputs);
    }
    let dead: Vec<usize> = (0..columns).filter(|at| diagonal[*at] == 0.0).collect();
    for at in &dead {
        (h[at * columns + at], diagonal[*at]) = (1.0, 1.0);
    }
    let group_size = options.group_size.unwrap_or(columns).clamp(1, columns.max(1));
    let order = Order::new(options, group_size, &diagonal);
    let h = permute_both(&h, columns, &order.columns);
    let (factor, damp_percent) = damped_factor(h, columns, options)?;

    let mut state: Vec<Row> = Vec::with_capacity(rows);
    for row in weight.chunks_exact(columns.max(1)) {
        // Whole rows are measured as they are; groups, without what is multiplied with 0 only.
        let mut affine = match options.group_size {
            None => vec![options.affine.fit(row)],
            Some(_) => Vec::with_capacity(columns.div_ceil(group_size)),
        };
        let mut row = row.to_vec();
        dead.iter().for_each(|at| row[*at] = 0.0);
        if options.group_size.is_some() && options.static_groups {
            affine.extend(row.chunks(group_size).map(|group| options.affine.fit(group)));
        }
        let weights = order.columns.iter().map(|at| row[*at as usize]).collect();
        state.push(Row {
            weights,
            codes: vec![0; columns],
            affine,
            errors: Vec::new(),
            loss: 0.0,
        });
    }
    for first in (0..columns).step_by(BLOCK) {
        let block = Block::new(first, columns, &factor, options, group_size, &order);
        for_each_chunk(&mut state, 4, |_, rows| {
            rows.iter_mut().for_each(|row| block.round(row))
        });
        block.spread(&mut state, &factor);
    }

    let groups = columns.div_ceil(group_size);
    let mut result = Grouped {
        shape,
        bits: options.affine.bits,
        group_size,
        codes: vec![0; weight.len()],
        scales: vec![0.0; rows * groups],
        zeros: vec![0; rows * groups],
        g_idx: order.g_idx(options.static_groups, group_size),
    };
    for (at, row) in state.iter().enumerate() {
        let codes = &mut result.codes[at * columns..][..columns];
        order
            .columns
            .iter()
            .zip(&row.codes)
            .for_each(|(to, code)| codes[*to as usize] = *code);
        for (group, affine) in row.affine.iter().enumerate() {
            let to = at * groups + order.stored_group(options, group, group_size);
            result.scales[to] = affine::half(affine.scale, at)?;
            result.zeros[to] = affine.zero as u8;
        }
    }
    let loss = state.iter().map(|row| row.loss).sum();
    Ok((
        result,
        Report {
            loss,
            damp_percent,
            dead: dead.len(),
        },
    ))
}

impl GptqOptions {
    /// Checks numbers that come from a file or a user.
    ///
    /// # Errors
    /// [`Error::Option`] names one that cannot be.
    pub fn check(&self) -> Result<(), Error> {
        let bad = |option, message: &str| {
            Err(Error::Option {
                option,
                message: message.to_string(),
            })
        };
        if !matches!(self.affine.bits, 2 | 3 | 4 | 8) {
            return bad("bits", "GPTQ stores codes of 2, 3, 4 or 8 bits");
        }
        if self.group_size == Some(0) {
            return bad("group_size", "is -1 or above 0");
        }
        if !(self.damp_percent > 0.0 && self.damp_percent < 1.0) {
            return bad("damp_percent", "lies between 0 and 1");
        }
        if !(self.damp_auto_increment >= 0.0 && self.damp_auto_increment < 1.0) {
            return bad("damp_auto_increment", "lies between 0 and 1");
        }
        Ok(())
    }
}

/// In which order columns are rounded.
struct Order {
    /// The column at each place.
    columns: Vec<u32>,
    /// Whether groups are made of columns that lie apart.
    apart: bool,
}

impl Order {
    fn new(options: &GptqOptions, group_size: usize, diagonal: &[f32]) -> Self {
        let n = diagonal.len();
        let largest_first = |columns: &mut [u32]| {
            columns.sort_by(|a, b| diagonal[*b as usize].total_cmp(&diagonal[*a as usize]));
        };
        let mut columns: Vec<u32> = (0..n as u32).collect();
        if options.desc_act {
            largest_first(&mut columns);
        } else if options.act_group_aware && options.group_size.is_some() {
            let whole = n / group_size * group_size;
            let mut groups: Vec<&mut [u32]> = columns[..whole].chunks_mut(group_size).collect();
            groups.iter_mut().for_each(|group| largest_first(group));
            groups.sort_by(|a, b| diagonal[b[0] as usize].total_cmp(&diagonal[a[0] as usize]));
            let sorted: Vec<u32> = groups.iter().flat_map(|group| group.iter().copied()).collect();
            columns[..whole].copy_from_slice(&sorted);
        }
        Self {
            columns,
            apart: options.desc_act && options.group_size.is_some(),
        }
    }

    /// Where the scale of the `group`-th group is stored.
    fn stored_group(&self, options: &GptqOptions, group: usize, group_size: usize) -> usize {
        if self.apart || options.static_groups {
            return group;
        }
        self.columns[group * group_size] as usize / group_size
    }

    fn g_idx(&self, static_groups: bool, group_size: usize) -> Option<Vec<u32>> {
        if !self.apart || static_groups {
            return None;
        }
        let mut g_idx = vec![0; self.columns.len()];
        for (place, column) in self.columns.iter().enumerate() {
            g_idx[*column as usize] = (place / group_size) as u32;
        }
        Some(g_idx)
    }
}

fn permute_both(h: &[f32], n: usize, order: &[u32]) -> Vec<f32> {
    let mut to = vec![0.0; n * n];
    for_each_chunk(&mut to, n.max(1), |row, to| {
        let from = &h[order[row] as usize * n..][..n];
        to.iter_mut()
            .zip(order)
            .for_each(|(to, column)| *to = from[*column as usize]);
    });
    to
}

/// `V` of [`inverse_factor`] with the least damping that works, and that damping.
fn damped_factor(h: Vec<f32>, n: usize, options: &GptqOptions) -> Result<(Vec<f32>, f32), Error> {
    let mean = h.iter().step_by(n + 1).sum::<f32>() / n.max(1) as f32;
    let mut damp = options.damp_percent;
    loop {
        let mut damped = h.clone();
        damped
            .iter_mut()
            .step_by(n + 1)
            .for_each(|value| *value += damp * mean);
        if let Some(factor) = inverse_factor(damped, n) {
            return Ok((factor, damp));
        }
        let next = damp + options.damp_auto_increment;
        if options.damp_auto_increment == 0.0 || next >= 1.0 {
            return Err(Error::NotPositiveDefinite { damp_percent: damp });
        }
        damp = next;
    }
}

/// Some columns side by side, as places in the order of rounding.
struct Block<'a> {
    first: usize,
    width: usize,
    columns: usize,
    /// The upper factor within the block, row by row.
    upper: Vec<f32>,
    options: &'a GptqOptions,
    group_size: usize,
    order: &'a Order,
}

impl<'a> Block<'a> {
    fn new(
        first: usize,
        columns: usize,
        factor: &[f32],
        options: &'a GptqOptions,
        group_size: usize,
        order: &'a Order,
    ) -> Self {
        let width = BLOCK.min(columns - first);
        let mut upper = vec![0.0; width * width];
        for row in 0..width {
            for column in row..width {
                upper[row * width + column] = factor[(first + column) * columns + first + row];
            }
        }
        Self {
            first,
            width,
            columns,
            upper,
            options,
            group_size,
            order,
        }
    }

    /// Rounds the columns of a row.
    fn round(&self, row: &mut Row) {
        let most = self.options.affine.most();
        let mut weights = row.weights[self.first..][..self.width].to_vec();
        row.errors.clear();
        for at in 0..self.width {
            let place = self.first + at;
            let affine = if self.options.group_size.is_none() {
                row.affine[0]
            } else if self.options.static_groups {
                row.affine[self.order.columns[place] as usize / self.group_size]
            } else {
                if place.is_multiple_of(self.group_size) {
                    // As they were before this block, as the original does.
                    let group = place..self.columns.min(place + self.group_size);
                    row.affine.push(self.options.affine.fit(&row.weights[group]));
                }
                row.affine[place / self.group_size]
            };
            let code = affine.code(weights[at], most);
            row.codes[place] = code as u8;
            let upper = &self.upper[at * self.width..][at..self.width];
            let missed = weights[at] - affine.value(code);
            let error = missed / upper[0];
            row.loss += f64::from(error * error) / 2.0;
            weights[at..]
                .iter_mut()
                .zip(upper)
                .for_each(|(weight, factor)| *weight -= error * factor);
            row.errors.push(error);
        }
    }

    /// Lets the columns to come make up for the errors.
    fn spread(&self, state: &mut [Row], factor: &[f32]) {
        let end = self.first + self.width;
        let rest = self.columns - end;
        if rest == 0 {
            return;
        }
        let errors: Vec<f32> = state.iter().flat_map(|row| row.errors.iter().copied()).collect();
        let below = factor.chunks_exact(self.columns).skip(end);
        let weight: Vec<f32> = below
            .flat_map(|row| row[self.first..end].iter().copied())
            .collect();
        let weight = Weight::Plain(&weight, [rest, self.width]);
        let changes = dense::matmul(&errors, self.width, &[(weight, None)], None).concat();
        for_each_chunk(state, 4, |chunk, rows| {
            let changes = changes[chunk * 4 * rest..].chunks_exact(rest);
            for (row, changes) in rows.iter_mut().zip(changes) {
                row.weights[end..]
                    .iter_mut()
                    .zip(changes)
                    .for_each(|(weight, change)| *weight -= change);
            }
        });
    }
}
