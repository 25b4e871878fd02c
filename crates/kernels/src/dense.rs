//! Dense weights times rows of f32: `x · Wᵀ`, with bias and activation on the way out.
//!
//! Weights that stay are regrouped once, into panels of 16 rows with the values of a column side by side, in f32
//! or in 16 or 8 bits that are widened as they are read. A product walks over the panels: some rows of `x` times one or
//! two panels are summed up in registers, and nothing runs across lanes (Goto and van de Geijn, 2008). Weights that
//! change, as in training, are multiplied as they lie, or regrouped piece by piece where there are many rows.

use std::cell::Cell;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use pulp::{Simd, WithSimd};

use crate::activation::{self, Activation};
use crate::lines::AHEAD;
use crate::memory::Bytes;
use crate::output::Output;
use crate::threads::{for_each, for_each_chunk, num_threads, pieces};

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod tiles;

/// Where there are none.
#[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
mod tiles {
    pub const MANY: usize = usize::MAX;
    pub const ROWS: usize = super::ROWS;

    pub fn available() -> bool {
        false
    }

    impl super::Task<'_> {
        pub unsafe fn by_tiles(&self, _rows: usize, _outputs: std::ops::Range<usize>) -> bool {
            false
        }
    }
}

/// Rows of weights in a panel.
const PANEL: usize = 16;
/// Columns that are multiplied at a time: this much of a few rows of `x` stays in the nearest cache.
const COLUMNS: usize = 384;
/// From a row of copied `x` to the next one: not a power of two, so that rows do not share cache lines.
const STRIDE: usize = COLUMNS + 16;
/// Rows of `x` that a task takes.
const ROWS: usize = 112;
/// Multiplications below which nothing is handed to another thread.
const SMALL: usize = 1 << 16;
/// Up to so many rows of `x`, weights of fewer than 32 bits are widened in registers.
const FEW: usize = 4;
/// Up to so many rows of `x`, weights that were not regrouped are multiplied as they lie.
const AS_THEY_LIE: usize = 16;
/// From so many rows of `x` on, they are regrouped as a whole before, instead of by every task.
const REGROUPED: usize = 4 * ROWS;

/// How the values of a [`DenseMatrix`] are held.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Float {
    /// 32 bits.
    F32,
    /// IEEE half precision.
    F16,
    /// The upper half of 32 bits.
    Bf16,
    /// 8 bits, of which 4 are the exponent and 3 the fraction, without infinities; groups of columns of a row have a scale
    /// (Micikevicius et al., 2022, "FP8 formats for deep learning").
    F8E4M3,
}

impl Float {
    /// Bytes of a value.
    pub fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
            Self::F8E4M3 => 1,
        }
    }
}

/// A matrix `[rows, cols]` regrouped for products.
pub struct DenseMatrix {
    rows: usize,
    cols: usize,
    float: Float,
    /// Panels `[cols, PANEL]`, in the processor's byte order.
    data: Bytes,
    /// Of [`Float::F8E4M3`] alone.
    scales: Scales,
}

/// What the values of a panel's rows are multiplied with.
#[derive(Default)]
struct Scales {
    /// `[blocks of columns, panels, PANEL]`, times [`F8_UNIT`]; no number where a value of the block is none.
    values: Vec<f32>,
    /// Columns of a block.
    columns: usize,
}

/// What floats of 8 bits are loaded as a fraction of.
const F8_UNIT: f32 = 256.0;

impl std::fmt::Debug for DenseMatrix {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "DenseMatrix({} x {}, {:?})", self.rows, self.cols, self.float)
    }
}

impl DenseMatrix {
    /// Regroups row-major little-endian values, whose number the caller has checked; `done` is told what has been
    /// read and is not needed any more.
    ///
    /// Floats of 8 bits have a scale of 1; for others, [`pack_scaled`](Self::pack_scaled).
    pub fn pack(float: Float, rows: usize, cols: usize, bytes: &[u8], done: &(dyn Fn(&[u8]) + Sync)) -> Self {
        if float == Float::F8E4M3 {
            return Self::pack_scaled([rows, cols], bytes, &[1.0], [rows, cols], done);
        }
        let to = Bytes::zeroed(rows.div_ceil(PANEL) * cols * PANEL * float.bytes());
        Self::pack_to(to, float, [rows, cols], bytes, done)
    }

    /// Regroups row-major floats of 8 bits. Blocks of so many rows and columns each have one of `scales`, row by row of
    /// blocks; how many there are the caller has checked.
    pub fn pack_scaled(
        [rows, cols]: [usize; 2],
        codes: &[u8],
        scales: &[f32],
        [block_rows, block_cols]: [usize; 2],
        done: &(dyn Fn(&[u8]) + Sync),
    ) -> Self {
        let (block_rows, block_cols) = (block_rows.max(1), block_cols.max(1));
        let (across, panels) = (cols.div_ceil(block_cols), rows.div_ceil(PANEL));
        let mut values = vec![0.0; across * panels * PANEL];
        for (row, codes) in codes.chunks_exact(cols.max(1)).enumerate() {
            let scales = &scales[row / block_rows * across..];
            for (block, (codes, scale)) in codes.chunks(block_cols).zip(scales).enumerate() {
                let is_number = codes.iter().all(|code| code & 0x7F != 0x7F);
                values[block * panels * PANEL + row] = if is_number { scale * F8_UNIT } else { f32::NAN };
            }
        }
        let data = Bytes::zeroed(panels * cols * PANEL);
        let mut matrix = Self::pack_to(data, Float::F8E4M3, [rows, cols], codes, done);
        matrix.scales = Scales {
            values,
            columns: block_cols,
        };
        matrix
    }

    fn pack_to(
        data: Bytes,
        float: Float,
        [rows, cols]: [usize; 2],
        bytes: &[u8],
        done: &(dyn Fn(&[u8]) + Sync),
    ) -> Self {
        let panel_bytes = cols * PANEL * float.bytes();
        let panels = rows.div_ceil(PANEL);
        let mut matrix = Self {
            rows,
            cols,
            float,
            data,
            scales: Scales::default(),
        };
        let row_bytes = cols * float.bytes();
        let (_, size) = pieces(panels, 4);
        let chunk = (size * panel_bytes).max(1);
        for_each_chunk(&mut matrix.data, chunk, |piece, to| {
            let from =
                piece * size * PANEL * row_bytes..bytes.len().min((piece + 1) * size * PANEL * row_bytes);
            let panels = bytes[from.clone()].chunks(PANEL * row_bytes);
            for (from, to) in panels.zip(to.chunks_exact_mut(panel_bytes)) {
                match float {
                    Float::F32 => regroup(from, row_bytes, to, |b| u32::from_le_bytes(b).to_ne_bytes()),
                    Float::F16 | Float::Bf16 => {
                        regroup(from, row_bytes, to, |b| u16::from_le_bytes(b).to_ne_bytes())
                    }
                    Float::F8E4M3 => regroup(from, row_bytes, to, |b: [u8; 1]| b),
                }
            }
            done(&bytes[from]);
        });
        matrix
    }

    /// Regroups the transpose of row-major values `[cols, rows]`.
    fn pack_turned([rows, cols]: [usize; 2], values: &[f32]) -> Self {
        let panel_bytes = cols * PANEL * 4;
        let panels = rows.div_ceil(PANEL);
        let mut matrix = Self {
            rows,
            cols,
            float: Float::F32,
            data: Bytes::temporary(panels * panel_bytes),
            scales: Scales::default(),
        };
        for_each_chunk(&mut matrix.data, panel_bytes.max(1), |panel, to| {
            let own = panel * PANEL..rows.min((panel + 1) * PANEL);
            for (row, to) in values
                .chunks_exact(rows.max(1))
                .zip(to.chunks_exact_mut(4 * PANEL))
            {
                let from = bytemuck::cast_slice(&row[own.clone()]);
                to[..from.len()].copy_from_slice(from);
            }
        });
        matrix
    }

    /// `[out_features, in_features]`.
    pub fn shape(&self) -> [usize; 2] {
        [self.rows, self.cols]
    }

    /// A panel from the column on.
    fn panel(&self, panel: usize, column: usize) -> *const u8 {
        let first = (panel * self.cols + column) * PANEL * self.float.bytes();
        self.data[first..].as_ptr()
    }

    /// Bytes held in memory.
    pub fn num_bytes(&self) -> usize {
        self.data.len() + 4 * self.scales.values.len()
    }

    /// Where the next column with other scales begins.
    fn block_end(&self, column: usize) -> usize {
        match self.scales.columns {
            0 => self.cols,
            columns => (column / columns + 1) * columns,
        }
    }

    /// The scales of a panel's rows in the block of a column, before those of the next panel.
    fn scales(&self, panel: usize, column: usize) -> *const f32 {
        match self.scales.columns {
            0 => std::ptr::null(),
            columns => {
                let block = column / columns * self.rows.div_ceil(PANEL);
                self.scales.values[(block + panel) * PANEL..].as_ptr()
            }
        }
    }

    /// Writes some columns of a panel as f32.
    ///
    /// # Safety
    /// There is room for them.
    unsafe fn widen(&self, kernels: &Kernels, panel: usize, columns: Range<usize>, to: *mut f32) {
        let mut at = columns.start;
        while at < columns.end {
            let end = columns.end.min(self.block_end(at));
            let (from, scales) = (self.panel(panel, at), self.scales(panel, at));
            // SAFETY: the caller's.
            unsafe {
                kernels.widen(self.float)(from, scales, to.add((at - columns.start) * PANEL), end - at)
            };
            at = end;
        }
    }
}

/// Puts the elements of a column of up to `PANEL` rows side by side.
fn regroup<const N: usize>(from: &[u8], row_bytes: usize, to: &mut [u8], each: impl Fn([u8; N]) -> [u8; N]) {
    let to = to.as_chunks_mut::<N>().0;
    for (lane, row) in from.chunks_exact(row_bytes.max(1)).enumerate() {
        let column = to[lane..].iter_mut().step_by(PANEL);
        for (to, from) in column.zip(row.as_chunks::<N>().0) {
            *to = each(*from);
        }
    }
}

/// A matrix `[rows, cols]` of a product.
#[derive(Clone, Copy)]
pub enum Weight<'a> {
    /// Regrouped.
    Packed(&'a DenseMatrix),
    /// Row-major values, and the numbers of rows and columns.
    Plain(&'a [f32], [usize; 2]),
    /// The same, but it is the transposed matrix that lies there: `[columns, rows]`.
    Turned(&'a [f32], [usize; 2]),
}

impl Weight<'_> {
    /// `[out_features, in_features]`.
    pub fn shape(&self) -> [usize; 2] {
        match self {
            Self::Packed(matrix) => matrix.shape(),
            Self::Plain(_, shape) | Self::Turned(_, shape) => *shape,
        }
    }
}

/// What weights are multiplied with: `[rows, columns]`, of which either the rows or the columns are dense.
#[derive(Clone, Copy)]
pub struct Left<'a> {
    values: &'a [f32],
    rows: usize,
    columns: usize,
    /// From a row to the next one, and from a column.
    strides: [usize; 2],
}

impl<'a> Left<'a> {
    /// Row-major values.
    pub fn new(values: &'a [f32], columns: usize) -> Self {
        Self {
            values,
            rows: values.len() / columns.max(1),
            columns,
            strides: [columns, 1],
        }
    }

    /// The matrix whose transposed form `[columns, rows]` lies there.
    pub fn turned(values: &'a [f32], rows: usize) -> Self {
        Self {
            values,
            rows,
            columns: values.len() / rows.max(1),
            strides: [1, rows],
        }
    }

    /// Some columns of row-major values.
    pub fn part(self, columns: Range<usize>) -> Self {
        Self {
            values: &self.values[(columns.start * self.strides[1]).min(self.values.len())..],
            columns: columns.len(),
            ..self
        }
    }

    /// Some rows.
    fn block(self, rows: Range<usize>) -> Self {
        Self {
            values: &self.values[(rows.start * self.strides[0]).min(self.values.len())..],
            rows: rows.len(),
            ..self
        }
    }

    /// All values, where they lie one after the other.
    fn dense(&self) -> Option<&'a [f32]> {
        let dense = self.strides == [self.columns, 1];
        dense.then(|| &self.values[..self.rows * self.columns])
    }

    /// Writes some columns of all rows, which then begin `stride` apart.
    fn copy(&self, columns: Range<usize>, stride: usize, to: &mut [f32]) {
        let [row_stride, column_stride] = self.strides;
        if column_stride == 1 {
            for (row, to) in to.chunks_mut(stride).take(self.rows).enumerate() {
                let from = &self.values[row * row_stride..][columns.clone()];
                to[..columns.len()].copy_from_slice(from);
            }
            return;
        }
        for (index, column) in columns.enumerate() {
            let from = &self.values[column * column_stride..][..self.rows];
            for (to, from) in to[index..].iter_mut().step_by(stride).zip(from) {
                *to = *from;
            }
        }
    }
}

/// Weights and the bias `[out_features]` that is added to their product.
pub type Layer<'a> = (Weight<'a>, Option<&'a [f32]>);

/// `act(x · Wᵀ + bias)`, `[batch, out_features]`, of `x` `[batch, in_features]` for several weights of the same
/// `in_features`.
pub fn matmul(x: &[f32], in_features: usize, layers: &[Layer], act: Option<Activation>) -> Vec<Vec<f32>> {
    let x = Left::new(x, in_features);
    let by_tiles = uses_tiles(x.rows);
    let products = layers
        .iter()
        .map(|layer| Product::new(*layer, x.rows, by_tiles))
        .collect();
    multiply(x, products, act)
}

/// `x · Wᵀ`, `[rows, out_features]`, of `x` `[rows, in_features]`.
pub(crate) fn product(x: Left, weight: Weight) -> Vec<f32> {
    let product = Product::new((weight, None), x.rows, uses_tiles(x.rows));
    only(multiply(x, vec![product], None))
}

/// `sum + x · Wᵀ`.
pub(crate) fn add_product(sum: Vec<f32>, x: Left, weight: Weight) -> Vec<f32> {
    assert_eq!(sum.len(), x.rows * weight.shape()[0]);
    let product = Product {
        weight,
        bias: None,
        out: Output::over(sum),
        by_tiles: false,
        add: true,
    };
    only(multiply(x, vec![product], None))
}

fn multiply(x: Left, given: Vec<Product>, act: Option<Activation>) -> Vec<Vec<f32>> {
    let (batch, in_features) = (x.rows, x.columns);
    let by_tiles = given.iter().any(|product| product.by_tiles);
    let regrouped: Vec<_> = given.iter().map(|product| product.regrouped(batch)).collect();
    let mut products = given;
    for (product, matrix) in products.iter_mut().zip(&regrouped) {
        if let Some(matrix) = matrix {
            product.weight = Weight::Packed(matrix);
        }
    }
    // Rows in equal blocks, and so many pairs of panels a task that all threads have some.
    let blocks = blocks(batch, by_tiles);
    let pairs: usize = products.iter().map(Product::pairs).sum();
    let work = batch * in_features * pairs * 2 * PANEL;
    let chunks = match work {
        ..SMALL => 1,
        _ => (4 * num_threads()).div_ceil(blocks).clamp(1, pairs.max(1)),
    };
    let size = pairs.div_ceil(chunks).max(1);
    let chunks = pairs.div_ceil(size);
    let first_id = (chunks > 1).then(|| X_ID.fetch_add(blocks as u64, Ordering::Relaxed));
    let task = |index: usize| {
        let (block, chunk) = (index / chunks, index % chunks);
        let rows = block * batch / blocks..(block + 1) * batch / blocks;
        let mut first = 0;
        for product in &products {
            let count = product.pairs();
            let own = (chunk * size).max(first)..((chunk + 1) * size).min(first + count);
            if !own.is_empty() && !rows.is_empty() {
                let task = Task {
                    x: x.block(rows.clone()),
                    x_id: first_id.map(|first| first + block as u64),
                    product,
                    first_row: rows.start,
                    panels: 2 * (own.start - first)..2 * (own.end - first),
                    act,
                };
                task.run();
            }
            first += count;
        }
    };
    if work < SMALL {
        (0..blocks * chunks).for_each(task);
    } else {
        for_each(blocks * chunks, task);
    }
    // SAFETY: the tasks were all rows times all panels.
    products
        .into_iter()
        .map(|product| unsafe { product.out.done() })
        .collect()
}

/// `act(x · W₁ᵀ + b₁) · W₂ᵀ + b₂`, `[batch, out_features]`, of `x` `[batch, in_features]`.
///
/// What is between the two products stays in the cache, some rows at a time.
pub fn feed_forward(x: &[f32], in_features: usize, [first, second]: [Layer; 2], act: Activation) -> Vec<f32> {
    let batch = x.len() / in_features.max(1);
    let [inner, _] = first.0.shape();
    let by_tiles = uses_tiles(batch);
    let blocks = blocks(batch, by_tiles);
    // Few rows: all threads on one product, then on the other.
    if blocks < 2 * num_threads() {
        let between = only(matmul(x, in_features, &[first], Some(act)));
        return only(matmul(&between, inner, &[second], None));
    }
    let out = Product::new(second, batch, by_tiles);
    for_each(blocks, |block| {
        let rows = block * batch / blocks..(block + 1) * batch / blocks;
        let between = Product::new(first, rows.len(), by_tiles);
        let x = &x[rows.start * in_features..rows.end * in_features];
        Task::all(Left::new(x, in_features), &between, 0, Some(act)).run();
        // SAFETY: the task has written all rows.
        let between = unsafe { between.out.done() };
        Task::all(Left::new(&between, inner), &out, rows.start, None).run();
    });
    // SAFETY: the tasks have written all rows.
    unsafe { out.out.done() }
}

/// Whether rows are multiplied by matrix tiles.
fn uses_tiles(rows: usize) -> bool {
    #[cfg(test)]
    if tests::WITHOUT_TILES.get() {
        return false;
    }
    rows >= tiles::MANY && tiles::available()
}

/// Into how many blocks so many rows of `x` are cut, as equal as can be: where there are more than threads, as many for
/// each. None is so small that sums are made in another order.
fn blocks(rows: usize, by_tiles: bool) -> usize {
    let blocks = rows.div_ceil(if by_tiles { tiles::ROWS } else { ROWS }).max(1);
    if blocks > num_threads() {
        blocks.next_multiple_of(num_threads())
    } else {
        blocks
    }
}

/// The result of a single product.
fn only(mut products: Vec<Vec<f32>>) -> Vec<f32> {
    products.pop().unwrap_or_default()
}

/// A product whose result several tasks write.
struct Product<'a> {
    weight: Weight<'a>,
    bias: Option<&'a [f32]>,
    out: Output,
    /// Whether there are matrix tiles to make it with.
    by_tiles: bool,
    /// Whether it is added to what is there.
    add: bool,
}

impl<'a> Product<'a> {
    fn new((weight, bias): Layer<'a>, batch: usize, by_tiles: bool) -> Self {
        let out = Output::new(batch * weight.shape()[0]);
        Self {
            weight,
            bias,
            out,
            by_tiles,
            add: false,
        }
    }

    /// The weight in panels, where that pays and it is not.
    fn regrouped(&self, rows: usize) -> Option<DenseMatrix> {
        if rows < REGROUPED || self.by_tiles {
            return None;
        }
        match self.weight {
            Weight::Packed(_) => None,
            Weight::Plain(values, [rows, cols]) => {
                let bytes = bytemuck::cast_slice(values);
                // As they lie in memory.
                cfg!(target_endian = "little").then(|| {
                    let to = Bytes::temporary(rows.div_ceil(PANEL) * cols * PANEL * 4);
                    DenseMatrix::pack_to(to, Float::F32, [rows, cols], bytes, &|_| ())
                })
            }
            Weight::Turned(values, shape) => Some(DenseMatrix::pack_turned(shape, values)),
        }
    }

    /// Whether it is made of the weights as they lie, with so many rows of dense `x`.
    fn as_they_lie(&self, rows: usize) -> bool {
        matches!(self.weight, Weight::Plain(..)) && rows <= AS_THEY_LIE && !self.add
    }

    /// Pairs of panels, the last of which may be half empty.
    fn pairs(&self) -> usize {
        self.weight.shape()[0].div_ceil(2 * PANEL)
    }
}

/// How so many columns are cut into pieces of [`COLUMNS`] at most.
#[derive(Clone, Copy)]
struct Pieces(usize);

impl Pieces {
    fn count(self) -> usize {
        self.0.div_ceil(COLUMNS).max(1)
    }

    fn columns(self, piece: usize) -> Range<usize> {
        let width = self.0.div_ceil(self.count());
        piece * width..self.0.min((piece + 1) * width)
    }
}

/// The next [`Task::x_id`].
static X_ID: AtomicU64 = AtomicU64::new(0);

/// What a thread needs for a task.
#[derive(Default)]
struct Scratch {
    /// Rows of `x`, piece for piece of their columns.
    x: Vec<f32>,
    /// Of which [`Task::x_id`] these are all pieces.
    holds: Option<u64>,
    /// The panels of a piece.
    panels: Vec<f32>,
}

thread_local! {
    static SCRATCH: Cell<Option<Scratch>> = const { Cell::new(None) };
}

/// Some rows of `x` times some panels.
struct Task<'a> {
    x: Left<'a>,
    /// A number of these rows, where several tasks have them: a thread copies them for the first one.
    x_id: Option<u64>,
    product: &'a Product<'a>,
    /// The row of the result that the first row of `x` makes.
    first_row: usize,
    panels: Range<usize>,
    act: Option<Activation>,
}

impl<'a> Task<'a> {
    /// All panels.
    fn all(x: Left<'a>, product: &'a Product<'a>, first_row: usize, act: Option<Activation>) -> Self {
        Self {
            x,
            x_id: None,
            product,
            first_row,
            panels: 0..2 * product.pairs(),
            act,
        }
    }

    fn run(&self) {
        let [out_features, _] = self.product.weight.shape();
        let rows = self.x.rows;
        let outputs = self.panels.start * PANEL..out_features.min(self.panels.end * PANEL);
        match (self.product.weight, self.x.dense()) {
            (Weight::Plain(values, _), Some(x)) if self.product.as_they_lie(rows) => {
                pulp::Arch::new().dispatch(AsTheyLie {
                    task: self,
                    x,
                    values,
                    outputs: outputs.clone(),
                });
            }
            // SAFETY: there are tiles.
            _ if self.product.by_tiles && unsafe { self.by_tiles(rows, outputs.clone()) } => (),
            _ => self.by_panels(rows, outputs.clone()),
        }
        pulp::Arch::new().dispatch(Finish {
            task: self,
            rows,
            outputs,
        });
    }

    /// Writes the sums.
    fn by_panels(&self, rows: usize, outputs: Range<usize>) {
        let [out_features, in_features] = self.product.weight.shape();
        let kernels = kernels();
        let Scratch {
            mut x,
            holds,
            mut panels,
        } = SCRATCH.take().unwrap_or_default();
        let pieces = Pieces(in_features);
        let size = rows * STRIDE;
        let few = rows <= AS_THEY_LIE;
        let held = if few || self.x_id.is_some() {
            pieces.count()
        } else {
            1
        };
        x.resize(x.len().max(held * size), 0.0);
        panels.resize(2 * PANEL * COLUMNS, 0.0);
        let is_there = self.x_id.is_some() && self.x_id == holds;
        let at = |piece: usize| piece % held * size..(piece % held + 1) * size;
        let copy = |piece: usize, x: &mut [f32]| {
            if !is_there {
                self.x.copy(pieces.columns(piece), STRIDE, x);
            }
        };
        let mut multiply = |piece: usize, first: usize, x: &[f32]| {
            let columns = pieces.columns(piece);
            let outputs = first..outputs.end.min(first + 2 * PANEL);
            let (weights, stride, float) = self.weights(kernels, &outputs, &columns, rows, &mut panels);
            let scaled = match self.product.weight {
                Weight::Packed(matrix) if float == Float::F8E4M3 => Some(matrix),
                _ => None,
            };
            let mut at = columns.start;
            // Once even where there are no columns.
            loop {
                let end = scaled.map_or(columns.end, |matrix| columns.end.min(matrix.block_end(at)));
                let skipped = at - columns.start;
                let part = Part {
                    weights: weights.wrapping_add(skipped * PANEL * float.bytes()),
                    stride,
                    scales: scaled.map_or(std::ptr::null(), |matrix| {
                        matrix.scales(outputs.start / PANEL, at)
                    }),
                    columns: end - at,
                    ahead: if few && rows > 1 { AHEAD } else { 0 },
                    outputs: outputs.len(),
                    x: x[skipped..].as_ptr(),
                    rows,
                    add: self.product.add || at > 0,
                    out: self.product.out.at(self.first_row * out_features + outputs.start),
                    out_stride: out_features,
                };
                // SAFETY: everything is as the fields say, and this task alone writes the outputs of its rows.
                unsafe { part.run(kernels, float) };
                at = end;
                if at >= columns.end {
                    break;
                }
            }
        };
        let firsts = outputs.clone().step_by(2 * PANEL);
        if few {
            // Reading weights is what takes long: from the first to the last.
            (0..pieces.count()).for_each(|piece| copy(piece, &mut x[at(piece)]));
            for first in firsts {
                (0..pieces.count()).for_each(|piece| multiply(piece, first, &x[at(piece)]));
            }
        } else {
            for piece in 0..pieces.count() {
                copy(piece, &mut x[at(piece)]);
                firsts
                    .clone()
                    .for_each(|first| multiply(piece, first, &x[at(piece)]));
            }
        }
        SCRATCH.set(Some(Scratch {
            x,
            holds: self.x_id,
            panels,
        }));
    }

    /// The `columns` of the one or two panels of `outputs`: where they are, how many bytes lie between two panels,
    /// and how the values are held. What is not regrouped in f32 already is so in `scratch`, but for few rows.
    fn weights(
        &self,
        kernels: &Kernels,
        outputs: &Range<usize>,
        columns: &Range<usize>,
        rows: usize,
        scratch: &mut [f32],
    ) -> (*const u8, usize, Float) {
        let panels = outputs.start / PANEL..outputs.end.div_ceil(PANEL);
        let stride = PANEL * COLUMNS;
        match self.product.weight {
            Weight::Packed(matrix) => {
                let float = matrix.float;
                let panel_bytes = matrix.cols * PANEL * float.bytes();
                if float == Float::F32 || rows <= FEW {
                    return (matrix.panel(panels.start, columns.start), panel_bytes, float);
                }
                for (panel, to) in panels.zip(scratch.chunks_exact_mut(stride)) {
                    // SAFETY: there is room for all columns of a piece.
                    unsafe { matrix.widen(kernels, panel, columns.clone(), to.as_mut_ptr()) };
                }
            }
            Weight::Plain(values, [out_features, in_features]) => {
                for (panel, to) in panels.zip(scratch.chunks_exact_mut(stride)) {
                    let rows = panel * PANEL..out_features.min((panel + 1) * PANEL);
                    to[..columns.len() * PANEL].fill(0.0);
                    for (lane, row) in rows.enumerate() {
                        let from = &values[row * in_features..][columns.clone()];
                        for (to, from) in to[lane..].iter_mut().step_by(PANEL).zip(from) {
                            *to = *from;
                        }
                    }
                }
            }
            Weight::Turned(values, [out_features, _]) => {
                for (panel, to) in panels.zip(scratch.chunks_exact_mut(stride)) {
                    let rows = panel * PANEL..out_features.min((panel + 1) * PANEL);
                    for (column, to) in columns.clone().zip(to.as_chunks_mut::<PANEL>().0) {
                        let from = &values[column * out_features..][rows.clone()];
                        to[..from.len()].copy_from_slice(from);
                        to[from.len()..].fill(0.0);
                    }
                }
            }
        }
        (scratch.as_ptr().cast(), 4 * stride, Float::F32)
    }
}

/// Few rows times weights that are read once and not moved.
struct AsTheyLie<'a> {
    task: &'a Task<'a>,
    x: &'a [f32],
    values: &'a [f32],
    outputs: Range<usize>,
}

impl WithSimd for AsTheyLie<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let (task, values) = (self.task, self.values);
        let [out_features, in_features] = task.product.weight.shape();
        for (index, x) in self.x.chunks(4 * in_features.max(1)).enumerate() {
            let out = task.product.out.at((task.first_row + 4 * index) * out_features);
            let outputs = self.outputs.clone();
            // SAFETY: this task alone writes these outputs of its rows.
            unsafe {
                match x.len() / in_features {
                    1 => dots::<S, 1>(simd, x, values, in_features, outputs, out, out_features),
                    2 => dots::<S, 2>(simd, x, values, in_features, outputs, out, out_features),
                    3 => dots::<S, 3>(simd, x, values, in_features, outputs, out, out_features),
                    _ => dots::<S, 4>(simd, x, values, in_features, outputs, out, out_features),
                }
            }
        }
    }
}

/// Adds the bias and applies the activation to the sums of a task.
struct Finish<'a> {
    task: &'a Task<'a>,
    rows: usize,
    outputs: Range<usize>,
}

impl WithSimd for Finish<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { task, outputs, .. } = self;
        if task.product.bias.is_none() && task.act.is_none() {
            return;
        }
        let [out_features, _] = task.product.weight.shape();
        for row in task.first_row..task.first_row + self.rows {
            let out = task.product.out.at(row * out_features + outputs.start);
            // SAFETY: this task alone reads and writes these outputs of its rows.
            let out = unsafe { std::slice::from_raw_parts_mut(out, outputs.len()) };
            if let Some(bias) = task.product.bias {
                for (out, bias) in out.iter_mut().zip(&bias[outputs.clone()]) {
                    *out += bias;
                }
            }
            if let Some(act) = task.act {
                let (x, up) = (out, None);
                activation::Apply { act, x, up }.with_simd(simd);
            }
        }
    }
}

/// `M` rows of `x` times the rows `outputs` of `w`, both row-major.
///
/// # Safety
/// `out` points to `M` rows, `stride` apart, whose elements `outputs` nobody else reads or writes.
#[inline(always)]
unsafe fn dots<S: Simd, const M: usize>(
    simd: S,
    x: &[f32],
    w: &[f32],
    in_features: usize,
    outputs: Range<usize>,
    out: *mut f32,
    stride: usize,
) {
    const N: usize = 4;
    let mut rows_of_x = [x; M];
    for m in 0..M {
        rows_of_x[m] = &x[m * in_features..(m + 1) * in_features];
    }
    let x = rows_of_x;
    let whole = in_features / S::F32_LANES * S::F32_LANES;
    for first in outputs.clone().step_by(N) {
        // At the end some rows are read twice.
        let (mut rows, mut rows_of_w) = ([0; N], [w; N]);
        for n in 0..N {
            rows[n] = (first + n).min(outputs.end - 1);
            rows_of_w[n] = &w[rows[n] * in_features..(rows[n] + 1) * in_features];
        }
        let w = rows_of_w;
        let mut sums = [[simd.splat_f32s(0.0); N]; M];
        let mut k = 0;
        while k < whole {
            // SAFETY: `k + F32_LANES` is at most `in_features`, the length of each row.
            unsafe {
                let mut weights = [simd.splat_f32s(0.0); N];
                for n in 0..N {
                    weights[n] = w[n].as_ptr().add(k).cast::<S::f32s>().read_unaligned();
                }
                for m in 0..M {
                    let x = x[m].as_ptr().add(k).cast::<S::f32s>().read_unaligned();
                    for n in 0..N {
                        sums[m][n] = simd.mul_add_e_f32s(x, weights[n], sums[m][n]);
                    }
                }
            }
            k += S::F32_LANES;
        }
        for m in 0..M {
            for n in 0..N {
                let mut sum = simd.reduce_sum_f32s(sums[m][n]);
                for k in whole..in_features {
                    sum += x[m][k] * w[n][k];
                }
                // SAFETY: the caller's.
                unsafe { *out.add(m * stride + rows[n]) = sum };
            }
        }
    }
}

/// Some columns of one panel or two, and the rows of `x` that are multiplied with them.
#[derive(Clone, Copy)]
struct Part {
    weights: *const u8,
    /// Bytes from a panel to the next.
    stride: usize,
    /// Those of the rows of weights, where values are scaled.
    scales: *const f32,
    columns: usize,
    /// So many bytes before their turn weights are asked for.
    ahead: usize,
    /// Rows of weights in the panels.
    outputs: usize,
    /// Rows that are `STRIDE` apart.
    x: *const f32,
    rows: usize,
    /// Whether the result of earlier columns is there already.
    add: bool,
    out: *mut f32,
    out_stride: usize,
}

impl Part {
    /// # Safety
    /// The pointers are to what the fields say, and the values of the weights are held as `float` says.
    unsafe fn run(&self, kernels: &Kernels, float: Float) {
        // SAFETY: the caller's.
        unsafe {
            let one = match float {
                Float::F32 => kernels.one,
                Float::F16 => kernels.f16,
                Float::Bf16 => kernels.bf16,
                Float::F8E4M3 => kernels.f8,
            };
            let two = kernels
                .two
                .filter(|_| float == Float::F32 && self.outputs > PANEL);
            // What needs two rounds with two panels at a time, but one with one, is as quick and reads less.
            if let Some(two) = two.filter(|two| self.rows <= two.len() || self.rows > one.len()) {
                return self.groups(two);
            }
            for first in (0..self.outputs).step_by(PANEL) {
                let panel = Self {
                    weights: self.weights.add(first / PANEL * self.stride),
                    scales: self.scales.wrapping_add(first),
                    outputs: (self.outputs - first).min(PANEL),
                    out: self.out.add(first),
                    ..*self
                };
                panel.groups(one);
            }
        }
    }

    /// Cuts the rows into groups for which there are kernels, as equal as can be.
    ///
    /// # Safety
    /// That of [`run`](Self::run).
    unsafe fn groups(&self, kernels: &[Kernel]) {
        let groups = self.rows.div_ceil(kernels.len());
        for group in 0..groups {
            let first = group * self.rows / groups;
            let rows = (group + 1) * self.rows / groups - first;
            // SAFETY: the caller's.
            unsafe { kernels[rows - 1](self, first) };
        }
    }
}

/// Sums some rows of `x`, from that numbered by the second argument on.
///
/// # Safety
/// That of [`Part::run`]; and the processor has the kernel's instructions.
type Kernel = unsafe fn(&Part, usize);

/// Writes as many columns of a panel as the last argument says as f32, with the scales of the second one where values
/// have some.
///
/// # Safety
/// The pointers are to the columns, to scales and to room; and the processor has the instructions.
type Widen = unsafe fn(*const u8, *const f32, *mut f32, usize);

/// What is fastest on a processor. The kernels are those for one row, for two, and so on.
struct Kernels {
    /// For two panels at a time, where there are enough registers.
    two: Option<&'static [Kernel]>,
    one: &'static [Kernel],
    f16: &'static [Kernel],
    bf16: &'static [Kernel],
    f8: &'static [Kernel],
    widen: [Widen; 3],
}

impl Kernels {
    fn widen(&self, float: Float) -> Widen {
        match float {
            Float::F32 | Float::F16 => self.widen[0],
            Float::Bf16 => self.widen[1],
            Float::F8E4M3 => self.widen[2],
        }
    }
}

fn kernels() -> &'static Kernels {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::is_x86_feature_detected as has;
        if has!("avx512f") {
            return &avx512::KERNELS;
        }
        if has!("avx2") && has!("fma") && has!("f16c") {
            return &avx2::KERNELS;
        }
    }
    &portable::KERNELS
}

/// The panel's lanes of one column, and what is done with them.
///
/// # Safety
/// The methods may only be called on a processor that has the instructions of the implementation, inlined into a
/// function that is compiled for them; pointers are to as many values as there are lanes.
trait Lanes {
    type Vector: Copy;

    unsafe fn zero() -> Self::Vector;
    /// Asks for what lies there, wherever that is.
    #[inline(always)]
    unsafe fn prefetch(_from: *const u8) {}
    unsafe fn load(from: *const f32) -> Self::Vector;
    unsafe fn load_f16(from: *const u16) -> Self::Vector;
    unsafe fn load_bf16(from: *const u16) -> Self::Vector;
    /// In units of [`F8_UNIT`]; what is no number comes as one.
    unsafe fn load_f8(from: *const u8) -> Self::Vector;
    unsafe fn store(v: Self::Vector, to: *mut f32);
    unsafe fn add(a: Self::Vector, b: Self::Vector) -> Self::Vector;
    unsafe fn scale(a: Self::Vector, b: Self::Vector) -> Self::Vector;
    /// Adds the products of one value of `x` with `P` vectors of weights.
    unsafe fn multiply<const P: usize>(
        sums: [Self::Vector; P],
        x: *const f32,
        weights: [Self::Vector; P],
    ) -> [Self::Vector; P];
}

/// How a value is held in a panel.
trait Values {
    const BYTES: usize;
    const SCALED: bool = false;

    /// # Safety
    /// That of [`Lanes`].
    unsafe fn load<L: Lanes>(from: *const u8) -> L::Vector;
}

macro_rules! values {
    ($name:ident, $bytes:literal, $load:ident $(, $scaled:literal)?) => {
        struct $name;

        impl Values for $name {
            const BYTES: usize = $bytes;
            $(const SCALED: bool = $scaled;)?

            #[inline(always)]
            unsafe fn load<L: Lanes>(from: *const u8) -> L::Vector {
                // SAFETY: the caller's.
                unsafe { L::$load(from.cast()) }
            }
        }
    };
}

values!(F32, 4, load);
values!(F16, 2, load_f16);
values!(Bf16, 2, load_bf16);
values!(F8, 1, load_f8, true);

/// `M` rows of `x` from `first` on times `P` panels: a [`Kernel`].
///
/// # Safety
/// That of [`Kernel`] and [`Lanes`].
#[inline(always)]
#[allow(clippy::needless_range_loop)]
unsafe fn sum<L: Lanes, W: Values, const M: usize, const P: usize>(part: &Part, first: usize) {
    // SAFETY: the caller's.
    unsafe {
        // Two sums for each element where one would wait for itself.
        let split = M * P < 8;
        let (mut sums, mut others) = ([[L::zero(); P]; M], [[L::zero(); P]; M]);
        let mut x = part.x.add(first * STRIDE);
        let mut weights = part.weights;
        for _ in 0..part.columns / 2 {
            column::<L, W, M, P>(&mut sums, x, weights, [part.stride, part.ahead]);
            let (x1, weights1) = (x.add(1), weights.add(PANEL * W::BYTES));
            if split {
                column::<L, W, M, P>(&mut others, x1, weights1, [part.stride, part.ahead]);
            } else {
                column::<L, W, M, P>(&mut sums, x1, weights1, [part.stride, part.ahead]);
            }
            (x, weights) = (x.add(2), weights.add(2 * PANEL * W::BYTES));
        }
        if !part.columns.is_multiple_of(2) {
            column::<L, W, M, P>(&mut sums, x, weights, [part.stride, part.ahead]);
        }
        if split {
            for m in 0..M {
                for p in 0..P {
                    sums[m][p] = L::add(sums[m][p], others[m][p]);
                }
            }
        }
        if W::SCALED {
            for p in 0..P {
                let scales = L::load(part.scales.add(p * PANEL));
                for m in 0..M {
                    sums[m][p] = L::scale(sums[m][p], scales);
                }
            }
        }
        // Short loops, which are unrolled: sums that are counted through would have to lie in memory.
        let at = |m, p| part.out.add((first + m) * part.out_stride + p * PANEL);
        if part.outputs == P * PANEL {
            for m in 0..M {
                for p in 0..P {
                    if part.add {
                        sums[m][p] = L::add(L::load(at(m, p)), sums[m][p]);
                    }
                    L::store(sums[m][p], at(m, p));
                }
            }
            return;
        }
        // The last panels have fewer rows of weights than lanes.
        let mut tile = [[[0.0f32; PANEL]; P]; M];
        for m in 0..M {
            for p in 0..P {
                L::store(sums[m][p], tile[m][p].as_mut_ptr());
            }
        }
        for (m, tile) in tile.iter().enumerate() {
            let out = std::slice::from_raw_parts_mut(at(m, 0), part.outputs);
            for (out, sum) in out.iter_mut().zip(tile.as_flattened()) {
                *out = if part.add { *out + sum } else { *sum };
            }
        }
    }
}

/// Adds the products of one column.
///
/// # Safety
/// That of [`Kernel`] and [`Lanes`].
#[inline(always)]
unsafe fn column<L: Lanes, W: Values, const M: usize, const P: usize>(
    sums: &mut [[L::Vector; P]; M],
    x: *const f32,
    weights: *const u8,
    [stride, ahead]: [usize; 2],
) {
    // SAFETY: the caller's.
    unsafe {
        let mut w = [L::zero(); P];
        for (p, w) in w.iter_mut().enumerate() {
            let weights = weights.add(p * stride);
            L::prefetch(weights.wrapping_add(ahead));
            *w = W::load::<L>(weights);
        }
        for (m, sums) in sums.iter_mut().enumerate() {
            *sums = L::multiply(*sums, x.add(m * STRIDE), w);
        }
    }
}

/// A [`Widen`].
///
/// # Safety
/// That of [`Widen`] and [`Lanes`].
#[inline(always)]
unsafe fn widen<L: Lanes, W: Values>(from: *const u8, scales: *const f32, to: *mut f32, columns: usize) {
    // SAFETY: the caller's.
    unsafe {
        let scales = if W::SCALED { L::load(scales) } else { L::zero() };
        for column in 0..columns {
            let from = from.add(column * PANEL * W::BYTES);
            L::prefetch(from.wrapping_add(AHEAD));
            let mut values = W::load::<L>(from);
            if W::SCALED {
                values = L::scale(values, scales);
            }
            L::store(values, to.add(column * PANEL));
        }
    }
}

/// The [`Kernels`] of an implementation of [`Lanes`], compiled for its instructions.
macro_rules! kernels {
    ($lanes:ty, $(#[$features:meta])* $(two: $($two:literal)+,)? one: $($one:literal)+, few: $($few:literal)+) => {
        use super::{Bf16, F8, F16, F32, Kernel, Kernels, Part, Values};

        pub(super) static KERNELS: Kernels = Kernels {
            two: kernels!(@some $([$(sum::<F32, $two, 2>),+])?),
            one: &[$(sum::<F32, $one, 1> as Kernel),+],
            f16: &[$(sum::<F16, $few, 1> as Kernel),+],
            bf16: &[$(sum::<Bf16, $few, 1> as Kernel),+],
            f8: &[$(sum::<F8, $few, 1> as Kernel),+],
            widen: [widen::<F16>, widen::<Bf16>, widen::<F8>],
        };

        $(#[$features])*
        unsafe fn sum<W: Values, const M: usize, const P: usize>(part: &Part, first: usize) {
            // SAFETY: the caller's; the features are enabled here.
            unsafe { super::sum::<$lanes, W, M, P>(part, first) }
        }

        $(#[$features])*
        unsafe fn widen<W: Values>(from: *const u8, scales: *const f32, to: *mut f32, columns: usize) {
            // SAFETY: the caller's; the features are enabled here.
            unsafe { super::widen::<$lanes, W>(from, scales, to, columns) }
        }
    };
    (@some) => { None };
    (@some [$($kernel:expr),+]) => { Some(&[$($kernel as Kernel),+]) };
}

// The bodies are plain arithmetic, and loads and stores that the callers vouch for.
#[cfg(target_arch = "x86_64")]
#[allow(clippy::undocumented_unsafe_blocks)]
mod avx512 {
    use std::arch::asm;
    use std::arch::x86_64::*;

    struct Avx512;

    kernels!(
        Avx512,
        #[target_feature(enable = "avx512f")]
        two: 1 2 3 4 5 6 7 8 9 10 11 12 13 14,
        one: 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28,
        few: 1 2 3 4
    );

    impl super::Lanes for Avx512 {
        type Vector = __m512;

        #[inline(always)]
        unsafe fn zero() -> __m512 {
            unsafe { _mm512_setzero_ps() }
        }
        #[inline(always)]
        unsafe fn prefetch(from: *const u8) {
            unsafe { _mm_prefetch::<_MM_HINT_T0>(from.cast()) }
        }
        #[inline(always)]
        unsafe fn load(from: *const f32) -> __m512 {
            unsafe { _mm512_loadu_ps(from) }
        }
        #[inline(always)]
        unsafe fn load_f16(from: *const u16) -> __m512 {
            unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(from.cast())) }
        }
        #[inline(always)]
        unsafe fn load_bf16(from: *const u16) -> __m512 {
            unsafe {
                let words = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast()));
                _mm512_castsi512_ps(_mm512_slli_epi32::<16>(words))
            }
        }
        #[inline(always)]
        unsafe fn load_f8(from: *const u8) -> __m512 {
            unsafe {
                // Sign, exponent and fraction where half precision has them, whose exponents are 8 more.
                let codes = _mm256_cvtepi8_epi16(_mm_loadu_si128(from.cast()));
                let halves = _mm256_and_si256(
                    _mm256_slli_epi16::<7>(codes),
                    _mm256_set1_epi16(0xBF80_u16 as i16),
                );
                _mm512_cvtph_ps(halves)
            }
        }
        #[inline(always)]
        unsafe fn store(v: __m512, to: *mut f32) {
            unsafe { _mm512_storeu_ps(to, v) }
        }
        #[inline(always)]
        unsafe fn add(a: __m512, b: __m512) -> __m512 {
            unsafe { _mm512_add_ps(a, b) }
        }
        #[inline(always)]
        unsafe fn scale(a: __m512, b: __m512) -> __m512 {
            unsafe { _mm512_mul_ps(a, b) }
        }
        #[inline(always)]
        unsafe fn multiply<const P: usize>(
            mut sums: [__m512; P],
            x: *const f32,
            weights: [__m512; P],
        ) -> [__m512; P] {
            unsafe {
                if P == 2 {
                    (sums[0], sums[1]) = multiply_two(sums[0], sums[1], x, weights[0], weights[1]);
                } else {
                    for p in 0..P {
                        sums[p] = multiply_one(sums[p], x, weights[p]);
                    }
                }
                sums
            }
        }
    }

    // In assembly, because the compiler would gather the broadcasts of all rows before it multiplies, and has no
    // registers for them.

    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn multiply_two(
        mut a: __m512,
        mut b: __m512,
        x: *const f32,
        v: __m512,
        w: __m512,
    ) -> (__m512, __m512) {
        // Of the type that makes it a vector register.
        let _value: __m512;
        unsafe {
            asm!(
                "vbroadcastss {value}, dword ptr [{x}]",
                "vfmadd231ps {a}, {value}, {v}",
                "vfmadd231ps {b}, {value}, {w}",
                value = out(zmm_reg) _value,
                x = in(reg) x,
                v = in(zmm_reg) v,
                w = in(zmm_reg) w,
                a = inout(zmm_reg) a,
                b = inout(zmm_reg) b,
                options(pure, readonly, nostack, preserves_flags),
            );
        }
        (a, b)
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn multiply_one(mut sum: __m512, x: *const f32, w: __m512) -> __m512 {
        unsafe {
            asm!(
                "vfmadd231ps {sum}, {w}, dword ptr [{x}]{{1to16}}",
                x = in(reg) x,
                w = in(zmm_reg) w,
                sum = inout(zmm_reg) sum,
                options(pure, readonly, nostack, preserves_flags),
            );
        }
        sum
    }
}

#[cfg(target_arch = "x86_64")]
#[allow(clippy::undocumented_unsafe_blocks)]
mod avx2 {
    use std::arch::x86_64::*;

    struct Avx2;

    kernels!(
        Avx2,
        #[target_feature(enable = "avx2,fma,f16c")]
        one: 1 2 3 4 5 6,
        few: 1 2 3 4
    );

    impl super::Lanes for Avx2 {
        type Vector = [__m256; 2];

        #[inline(always)]
        unsafe fn zero() -> [__m256; 2] {
            unsafe { [_mm256_setzero_ps(); 2] }
        }
        #[inline(always)]
        unsafe fn load(from: *const f32) -> [__m256; 2] {
            unsafe { [_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(8))] }
        }
        #[inline(always)]
        unsafe fn load_f16(from: *const u16) -> [__m256; 2] {
            unsafe {
                [
                    _mm256_cvtph_ps(_mm_loadu_si128(from.cast())),
                    _mm256_cvtph_ps(_mm_loadu_si128(from.add(8).cast())),
                ]
            }
        }
        #[inline(always)]
        unsafe fn load_bf16(from: *const u16) -> [__m256; 2] {
            unsafe {
                let (a, b) = (_mm_loadu_si128(from.cast()), _mm_loadu_si128(from.add(8).cast()));
                let (a, b) = (_mm256_cvtepu16_epi32(a), _mm256_cvtepu16_epi32(b));
                [
                    _mm256_castsi256_ps(_mm256_slli_epi32::<16>(a)),
                    _mm256_castsi256_ps(_mm256_slli_epi32::<16>(b)),
                ]
            }
        }
        #[inline(always)]
        unsafe fn load_f8(from: *const u8) -> [__m256; 2] {
            unsafe {
                let codes = _mm256_cvtepi8_epi16(_mm_loadu_si128(from.cast()));
                let halves = _mm256_and_si256(
                    _mm256_slli_epi16::<7>(codes),
                    _mm256_set1_epi16(0xBF80_u16 as i16),
                );
                [
                    _mm256_cvtph_ps(_mm256_castsi256_si128(halves)),
                    _mm256_cvtph_ps(_mm256_extracti128_si256::<1>(halves)),
                ]
            }
        }
        #[inline(always)]
        unsafe fn store(v: [__m256; 2], to: *mut f32) {
            unsafe {
                _mm256_storeu_ps(to, v[0]);
                _mm256_storeu_ps(to.add(8), v[1]);
            }
        }
        #[inline(always)]
        unsafe fn scale(a: [__m256; 2], b: [__m256; 2]) -> [__m256; 2] {
            unsafe { [_mm256_mul_ps(a[0], b[0]), _mm256_mul_ps(a[1], b[1])] }
        }
        #[inline(always)]
        unsafe fn add(a: [__m256; 2], b: [__m256; 2]) -> [__m256; 2] {
            unsafe { [_mm256_add_ps(a[0], b[0]), _mm256_add_ps(a[1], b[1])] }
        }
        #[inline(always)]
        unsafe fn multiply<const P: usize>(
            mut sums: [[__m256; 2]; P],
            x: *const f32,
            weights: [[__m256; 2]; P],
        ) -> [[__m256; 2]; P] {
            unsafe {
                let x = _mm256_set1_ps(*x);
                for p in 0..P {
                    for half in 0..2 {
                        sums[p][half] = _mm256_fmadd_ps(x, weights[p][half], sums[p][half]);
                    }
                }
                sums
            }
        }
    }
}

/// Arrays, of which the compiler makes the vectors that it may count on: NEON, SIMD128, SSE2.
#[allow(clippy::undocumented_unsafe_blocks)]
mod portable {
    use super::PANEL;

    struct Portable;

    #[cfg(target_arch = "aarch64")]
    kernels!(Portable, one: 1 2 3 4 5 6, few: 1 2 3 4);
    #[cfg(not(target_arch = "aarch64"))]
    kernels!(Portable, one: 1 2, few: 1 2);

    impl super::Lanes for Portable {
        type Vector = [f32; PANEL];

        #[inline(always)]
        unsafe fn zero() -> [f32; PANEL] {
            [0.0; PANEL]
        }
        #[inline(always)]
        unsafe fn load(from: *const f32) -> [f32; PANEL] {
            unsafe { from.cast::<[f32; PANEL]>().read_unaligned() }
        }
        #[inline(always)]
        unsafe fn load_f16(from: *const u16) -> [f32; PANEL] {
            let halves = unsafe { from.cast::<[u16; PANEL]>().read_unaligned() };
            let mut values = [0.0; PANEL];
            for (value, half) in values.iter_mut().zip(halves) {
                *value = half::f16::from_bits(half).to_f32();
            }
            values
        }
        #[inline(always)]
        unsafe fn load_bf16(from: *const u16) -> [f32; PANEL] {
            let halves = unsafe { from.cast::<[u16; PANEL]>().read_unaligned() };
            let mut values = [0.0; PANEL];
            for (value, half) in values.iter_mut().zip(halves) {
                *value = f32::from_bits(u32::from(half) << 16);
            }
            values
        }
        #[inline(always)]
        unsafe fn load_f8(from: *const u8) -> [f32; PANEL] {
            let codes = unsafe { from.cast::<[i8; PANEL]>().read_unaligned() };
            let mut values = [0.0; PANEL];
            for (value, code) in values.iter_mut().zip(codes) {
                // Sign, exponent and fraction in their places; the product corrects the bias of the exponent.
                let bits = (i32::from(code) << 20) as u32 & 0x87F0_0000;
                *value = f32::from_bits(bits) * f32::from_bits((112 + 127) << 23);
            }
            values
        }
        #[inline(always)]
        unsafe fn scale(mut a: [f32; PANEL], b: [f32; PANEL]) -> [f32; PANEL] {
            for (a, b) in a.iter_mut().zip(b) {
                *a *= b;
            }
            a
        }
        #[inline(always)]
        unsafe fn store(v: [f32; PANEL], to: *mut f32) {
            unsafe { to.cast::<[f32; PANEL]>().write_unaligned(v) }
        }
        #[inline(always)]
        unsafe fn add(mut a: [f32; PANEL], b: [f32; PANEL]) -> [f32; PANEL] {
            for (a, b) in a.iter_mut().zip(b) {
                *a += b;
            }
            a
        }
        #[inline(always)]
        unsafe fn multiply<const P: usize>(
            mut sums: [[f32; PANEL]; P],
            x: *const f32,
            weights: [[f32; PANEL]; P],
        ) -> [[f32; PANEL]; P] {
            let x = unsafe { *x };
            for (sums, weights) in sums.iter_mut().zip(&weights) {
                for (sum, w) in sums.iter_mut().zip(weights) {
                    // One instruction on every processor of this kind; elsewhere it might be a call.
                    *sum = if cfg!(target_arch = "aarch64") {
                        x.mul_add(*w, *sum)
                    } else {
                        x * w + *sum
                    };
                }
            }
            sums
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    thread_local! {
        /// Set where a test wants the kernels of processors without tiles.
        pub(super) static WITHOUT_TILES: Cell<bool> = const { Cell::new(false) };
    }

    fn noise(seed: u64, len: usize) -> Vec<f32> {
        let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
        let mut next = || {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1 << 23) as f32 - 1.0
        };
        (0..len).map(|_| next()).collect()
    }

    fn expected(x: &[f32], w: &[f32], [rows, cols]: [usize; 2], bias: Option<&[f32]>) -> Vec<f32> {
        let dot = |x: &[f32], w: &[f32]| {
            x.iter()
                .zip(w)
                .map(|(x, w)| f64::from(*x) * f64::from(*w))
                .sum::<f64>()
        };
        let row = |x: &[f32]| -> Vec<f32> {
            let value =
                |o: usize| dot(x, &w[o * cols..(o + 1) * cols]) as f32 + bias.map_or(0.0, |bias| bias[o]);
            (0..rows).map(value).collect()
        };
        x.chunks(cols).flat_map(row).collect()
    }

    fn check(weight: Weight, w: &[f32], batch: usize, act: Option<Activation>) {
        let [rows, cols] = weight.shape();
        let x = noise(1, batch * cols);
        let bias = noise(2, rows);
        for bias in [None, Some(&bias[..])] {
            let [out] = &matmul(&x, cols, &[(weight, bias)], act)[..] else {
                panic!("one result");
            };
            for (found, expected) in out.iter().zip(expected(&x, w, [rows, cols], bias)) {
                let expected = if act == Some(Activation::Relu) {
                    expected.max(0.0)
                } else {
                    expected
                };
                assert!(
                    (found - expected).abs() < 2e-5 * (cols as f32).sqrt(),
                    "{rows} x {cols}, {batch}: {found} {expected}"
                );
            }
        }
    }

    #[test]
    fn like_the_sum_of_products() {
        for [rows, cols] in [
            [1, 1],
            [5, 3],
            [16, 8],
            [33, 65],
            [100, 384],
            [40, 385],
            [17, 1000],
        ] {
            let w = noise(3, rows * cols);
            let narrowed = |to: fn(f32) -> u16, from: fn(u16) -> f32| -> (Vec<u8>, Vec<f32>) {
                let bits: Vec<u16> = w.iter().map(|w| to(*w)).collect();
                (
                    bits.iter().flat_map(|b| b.to_le_bytes()).collect(),
                    bits.iter().map(|b| from(*b)).collect(),
                )
            };
            let f32s = (
                w.iter().flat_map(|w| w.to_le_bytes()).collect::<Vec<u8>>(),
                w.clone(),
            );
            let f16s = narrowed(
                |x| half::f16::from_f32(x).to_bits(),
                |x| half::f16::from_bits(x).to_f32(),
            );
            let bf16s = narrowed(
                |x| half::bf16::from_f32(x).to_bits(),
                |x| half::bf16::from_bits(x).to_f32(),
            );
            for batch in [1, 2, 3, 4, 5, 7, 13, 14, 15, 16, 17, 28, 29, 48, 130] {
                for (float, (bytes, w)) in [(Float::F32, &f32s), (Float::F16, &f16s), (Float::Bf16, &bf16s)] {
                    let packed = DenseMatrix::pack(float, rows, cols, bytes, &|_| ());
                    check(Weight::Packed(&packed), w, batch, Some(Activation::Relu));
                }
                check(Weight::Plain(&w, [rows, cols]), &w, batch, None);
            }
        }
    }

    /// A float of 8 bits by its definition.
    fn f8(code: u8) -> f32 {
        let (exponent, fraction) = (i32::from(code >> 3 & 15), f32::from(code & 7));
        let size = match (exponent, code & 7) {
            (15, 7) => f32::NAN,
            (0, _) => fraction / 8.0 * 2f32.powi(-6),
            _ => (1.0 + fraction / 8.0) * 2f32.powi(exponent - 7),
        };
        if code & 0x80 != 0 { -size } else { size }
    }

    #[test]
    fn scaled_floats_of_8_bits() {
        for ([rows, cols], block) in [
            ([1, 1], [1, 1]),
            ([33, 65], [33, 65]),
            ([40, 385], [1, 385]),
            ([100, 300], [7, 128]),
            ([50, 1000], [16, 100]),
            ([20, 40], [20, 3]),
        ] {
            // Up to 1.
            let code = |x: f32| (x.to_bits() >> 24 & 0x80) as u8 | (x.abs() * 56.0) as u8;
            let codes: Vec<u8> = noise(3, rows * cols).into_iter().map(code).collect();
            let across = cols.div_ceil(block[1]);
            let scales = noise(5, rows.div_ceil(block[0]) * across);
            let value =
                |at: usize| f8(codes[at]) * scales[at / cols / block[0] * across + at % cols / block[1]];
            let w: Vec<f32> = (0..rows * cols).map(value).collect();
            let packed = DenseMatrix::pack_scaled([rows, cols], &codes, &scales, block, &|_| ());
            for batch in [1, 2, 4, 5, 16, 17, 130] {
                check(Weight::Packed(&packed), &w, batch, Some(Activation::Relu));
            }
        }
    }

    #[test]
    fn every_float_of_8_bits() {
        let codes: Vec<u8> = (0..=u8::MAX).collect();
        for (codes, scale) in [(&codes[..], 1.0f32), (&codes[..0x7F], 2f32.powi(-90))] {
            let shape = [codes.len(), 1];
            let packed = DenseMatrix::pack_scaled(shape, codes, &[scale], shape, &|_| ());
            for batch in [1, 6] {
                let out = &matmul(&vec![1.0; batch], 1, &[(Weight::Packed(&packed), None)], None)[0];
                for (code, found) in codes.iter().cycle().zip(out) {
                    let expected = f8(*code) * scale;
                    assert!(
                        *found == expected || found.is_nan() && expected.is_nan(),
                        "{code:x}"
                    );
                }
            }
        }
    }

    /// Either side may be stored transposed, and a product may be added to what is there.
    #[test]
    fn turned_sides() {
        let turn = |x: &[f32], columns: usize| -> Vec<f32> {
            let rows = x.len() / columns;
            (0..x.len()).map(|i| x[i % rows * columns + i / rows]).collect()
        };
        for [rows, cols] in [[1, 1], [5, 3], [33, 65], [100, 384], [17, 1000]] {
            for batch in [1, 3, 15, 29, 130, 500] {
                let (x, w) = (noise(1, batch * cols), noise(3, rows * cols));
                let (turned_x, turned_w) = (turn(&x, cols), turn(&w, cols));
                let expected = expected(&x, &w, [rows, cols], None);
                let near = |found: &[f32], factor: f32| {
                    let error = (found.iter().zip(&expected)).map(|(a, b)| (a - factor * b).abs());
                    assert!(error.fold(0.0, f32::max) < 2e-5 * factor * (cols as f32).sqrt());
                };
                for x in [Left::new(&x, cols), Left::turned(&turned_x, batch)] {
                    for w in [
                        Weight::Plain(&w, [rows, cols]),
                        Weight::Turned(&turned_w, [rows, cols]),
                    ] {
                        let once = product(x, w);
                        near(&once, 1.0);
                        near(&add_product(once, x, w), 2.0);
                    }
                }
            }
        }
    }

    #[test]
    fn every_half_float() {
        for batch in [1, 6] {
            let bits: Vec<u16> = (0..=u16::MAX).collect();
            let bytes: Vec<u8> = bits.iter().flat_map(|bits| bits.to_le_bytes()).collect();
            let finite: Vec<u16> = bits
                .iter()
                .copied()
                .filter(|bits| bits & 0x7C00 != 0x7C00)
                .collect();
            let finite_bytes: Vec<u8> = finite.iter().flat_map(|bits| bits.to_le_bytes()).collect();
            for (bits, bytes) in [(bits, bytes), (finite, finite_bytes)] {
                let packed = DenseMatrix::pack(Float::F16, bits.len(), 1, &bytes, &|_| ());
                let weight = Weight::Packed(&packed);
                let out = &matmul(&vec![1.0; batch], 1, &[(weight, None)], None)[0];
                for (bits, found) in bits.iter().cycle().zip(out) {
                    let expected = half::f16::from_bits(*bits).to_f32();
                    assert!(
                        *found == expected || found.is_nan() && expected.is_nan(),
                        "{bits:x}"
                    );
                }
            }
        }
    }

    #[test]
    fn both_layers_of_a_feed_forward_block() {
        let (a, b) = (noise(4, 50 * 24), noise(5, 30 * 50));
        let bias = noise(6, 50);
        let layers = [
            (Weight::Plain(&a, [50, 24]), Some(&bias[..])),
            (Weight::Plain(&b, [30, 50]), None),
        ];
        for batch in [3, ROWS * 2 * num_threads() + 5] {
            let x = noise(1, batch * 24);
            let mut between = expected(&x, &a, [50, 24], Some(&bias));
            between.iter_mut().for_each(|x| *x = x.max(0.0));
            let found = feed_forward(&x, 24, layers, Activation::Relu);
            for (found, expected) in found.iter().zip(expected(&between, &b, [30, 50], None)) {
                assert!((found - expected).abs() < 1e-3, "{found} {expected}");
            }
        }
    }

    #[test]
    fn several_at_once() {
        let (a, b) = (noise(4, 40 * 64), noise(5, 100 * 64));
        let x = noise(1, 20 * 64);
        let layers = [
            (Weight::Plain(&a, [40, 64]), None),
            (Weight::Plain(&b, [100, 64]), None),
        ];
        let out = matmul(&x, 64, &layers, None);
        let near = |a: &[f32], b: &[f32]| a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-4);
        assert!(near(&out[0], &expected(&x, &a, [40, 64], None)));
        assert!(near(&out[1], &expected(&x, &b, [100, 64], None)));
    }

    /// The products as both kinds of kernels make them: with matrix tiles, if there are any, and without.
    fn both_ways(x: &[f32], layer: Layer) -> [Vec<f32>; 2] {
        let [_, in_features] = layer.0.shape();
        [false, true].map(|without| {
            WITHOUT_TILES.set(without);
            let out = matmul(x, in_features, &[layer], None).concat();
            WITHOUT_TILES.set(false);
            out
        })
    }

    /// How far results are from the exact sums, in units of what f32 rounds off the sum of the products' sizes: the mean
    /// square's root, and the largest.
    fn errors(found: &[f32], x: &[f32], w: &[f32], [rows, cols]: [usize; 2]) -> [f64; 2] {
        let (mut squares, mut largest) = (0.0, 0.0f64);
        for (index, found) in found.iter().enumerate() {
            let (x, w) = (&x[index / rows * cols..], &w[index % rows * cols..]);
            let products = x
                .iter()
                .zip(w)
                .take(cols)
                .map(|(x, w)| f64::from(*x) * f64::from(*w));
            let (sum, size) = products.fold((0.0, 1e-300), |(sum, size), p| (sum + p, size + p.abs()));
            let error = (f64::from(*found) - sum) / size * f64::from(1 << 24);
            (squares, largest) = (squares + error * error, largest.max(error.abs()));
        }
        [(squares / found.len() as f64).sqrt(), largest]
    }

    /// Sums of parts are no worse than sums of f32: for numbers of one size and of many sizes, of one sign, and for sums
    /// that nearly cancel.
    #[test]
    fn matrix_tiles_are_as_exact_as_vectors() {
        let of_many_sizes = |seed, len| -> Vec<f32> {
            let powers = noise(seed + 100, len);
            let values = noise(seed, len).into_iter().zip(powers);
            values
                .map(|(x, power)| x * 2f32.powi((power * 40.0) as i32))
                .collect()
        };
        let of_one_sign = |seed, len| -> Vec<f32> { noise(seed, len).into_iter().map(f32::abs).collect() };
        // Each value is followed by its opposite, but for the last bits.
        let cancelling = |seed, len| -> Vec<f32> {
            let mut values = noise(seed, len);
            for pair in values.as_chunks_mut::<2>().0 {
                pair[1] = -pair[0] * (1.0 + pair[1] / f32::from(1u16 << 12));
            }
            values
        };
        type Make<'a> = &'a dyn Fn(u64, usize) -> Vec<f32>;
        let kinds: [(&str, Make, Make); 4] = [
            ("of one size", &noise, &noise),
            ("of many sizes", &of_many_sizes, &of_many_sizes),
            ("of one sign", &of_one_sign, &of_one_sign),
            ("cancelling", &cancelling, &|_, len| vec![0.7; len]),
        ];
        for (name, make_x, make_w) in kinds {
            for [batch, rows, cols] in [[100, 40, 32], [64, 33, 384], [70, 32, 1500]] {
                let (x, w) = (make_x(1, batch * cols), make_w(2, rows * cols));
                let [tiles, vectors] = both_ways(&x, (Weight::Plain(&w, [rows, cols]), None))
                    .map(|out| errors(&out, &x, &w, [rows, cols]));
                println!("{name}, {cols} columns: {tiles:.3?} with tiles, {vectors:.3?} without");
                assert!(
                    tiles[0] <= 1.25 * vectors[0] + 0.25,
                    "{name}: {tiles:?} {vectors:?}"
                );
                assert!(
                    tiles[1] <= 1.5 * vectors[1] + 1.0,
                    "{name}: {tiles:?} {vectors:?}"
                );
            }
        }
    }

    /// Infinities and NaN come out where they do without tiles, and the largest numbers are no infinities; numbers that
    /// are too small for parts are lost, but nothing else.
    #[test]
    fn matrix_tiles_and_unusual_numbers() {
        let [batch, rows, cols] = [70, 40, 100];
        let (x, w) = (noise(1, batch * cols), noise(2, rows * cols));
        let of = |x: &[f32], w: &[f32]| both_ways(x, (Weight::Plain(w, [rows, cols]), None));
        for bad in [f32::INFINITY, f32::NEG_INFINITY, f32::NAN] {
            for (in_x, in_w) in [
                (Some(5 * cols + 99), None),
                (None, Some(39 * cols)),
                (Some(0), Some(0)),
            ] {
                let (mut x, mut w) = (x.clone(), w.clone());
                in_x.into_iter().for_each(|at| x[at] = bad);
                in_w.into_iter().for_each(|at| w[at] = bad);
                let [tiles, vectors] = of(&x, &w);
                for (index, (a, b)) in tiles.iter().zip(&vectors).enumerate() {
                    assert!(
                        a.is_nan() && b.is_nan() || a == b || (a - b).abs() < 1e-4,
                        "{index}: {a} {b}"
                    );
                }
            }
        }
        let mut largest = vec![0.0; batch * cols];
        let mut one = vec![0.0; rows * cols];
        largest[cols] = f32::MAX;
        one[cols] = 1.0;
        let [tiles, vectors] = of(&largest, &one);
        assert_eq!(tiles, vectors);
        assert_eq!(tiles[rows + 1], f32::MAX);
        let small: Vec<f32> = x.iter().map(|x| x * 1e-38).collect();
        let [tiles, vectors] = of(&small, &w);
        let near = |(a, b): (&f32, &f32)| (a - b).abs() <= cols as f32 * f32::MIN_POSITIVE;
        assert!(tiles.iter().zip(&vectors).all(near));
    }
}
