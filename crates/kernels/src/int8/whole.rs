//! A tile of weights times rows of activations that are whole numbers of 8 bits with one scale a row, as BitNet has them
//! (Ma et al., "The era of 1-bit LLMs", 2024).
//!
//! Where rows of weights have one scale, too, nothing is scaled before a row ends: what is summed up are whole numbers.

use super::codes::{Kind, Plan, Shape, ShiftKind, WIDE};
use super::kernel::{Few, Rows, step};
use super::simd::{Simd, Split};
use super::{BLOCK, ROUND, Tile, batches};

/// Rows of activations for these kernels.
pub(super) struct WholeActivations {
    pub rows: usize,
    /// Bytes of a row's codes.
    row_bytes: usize,
    /// [Batch](batches) for batch of `m` rows: `[cols / 4, m, 4]`, or `[cols / 4, 2, m, 2]` where they are [words](Split).
    codes: Vec<i8>,
    /// What a code stands for, for each row.
    scales: Vec<f32>,
    /// Sums of codes.
    sums: Vec<i32>,
}

impl Kind {
    /// Whether there are kernels for this kind.
    const fn can_be_whole(self) -> bool {
        self.group == WIDE && self.tables == 0 && matches!(self.shift, ShiftKind::Offset)
    }
}

impl Plan {
    /// Whether rows have one scale each, and their products with whole numbers of 8 bits fit 32 bits.
    pub(super) fn is_whole(&self) -> bool {
        let columns = self.blocks * BLOCK;
        let fits = columns << (self.kind.bits + 7) <= i32::MAX as usize;
        self.kind.can_be_whole() && self.group_blocks >= self.blocks && fits
    }
}

impl Rows for WholeActivations {
    fn rows(&self) -> usize {
        self.rows
    }

    fn take(kind: Kind) -> bool {
        kind.can_be_whole()
    }

    /// Of a tile for which [`Plan::is_whole`] holds.
    #[inline(always)]
    unsafe fn batch<S: Simd, K: Shape, const M: usize>(&self, tile: &Tile, first: usize) {
        let plan = &tile.weight.plan;
        let full = K::KIND.bits == 8;
        let offset = plan.offset - if full { S::BIAS } else { 0 };
        let four = M * step_bytes(S::SPLIT);
        // So many sums that no product waits for the one before it, and registers have room for all.
        let apart = const { if M < 8 { 4 / M } else { 1 } };
        // SAFETY: all offsets stay within the tile, which is as `Plan` says, and the rows `first..first + M`.
        unsafe {
            let mut codes = self.codes.as_ptr().add(first * self.row_bytes);
            let mut sums = [[S::splat(0); M]; 4];
            for (sum, row) in sums[0].iter_mut().zip(&self.sums[first..first + M]) {
                *sum = S::splat(-offset * row);
            }
            let mut at = tile.codes.as_ptr();
            let scale = S::load_float(at.cast());
            at = at.add(K::HEAD_BYTES);
            macro_rules! steps {
                ($($step:literal)*) => {$(
                    let w = step::<S, $step>(at, K::KIND.bits);
                    S::dots_whole::<M>(&mut sums[$step % apart], w, codes.add($step * four), full);
                )*};
            }
            for _ in 0..plan.blocks {
                steps!(0 1 2 3 4 5 6 7);
                at = at.add(K::BLOCK_BYTES);
                codes = codes.add(8 * four);
            }
            let scale = S::mul(scale, S::load_float(tile.factors.as_ptr()));
            let [a, b, c, d] = sums;
            for (m, (((a, b), c), d)) in a.into_iter().zip(b).zip(c).zip(d).enumerate() {
                let sum = S::add_sums(S::add_sums(a, b), S::add_sums(c, d));
                let values = S::mul(S::to_float(sum), scale);
                tile.store::<S>(S::scale_add(values, self.scales[first + m], S::zero()), first + m);
            }
        }
    }
}

/// Bytes of four columns of a row of activations.
const fn step_bytes(split: Split) -> usize {
    match split {
        Split::Bytes => 4,
        Split::Words => 8,
    }
}

/// The whole numbers that a row of activations becomes, their sum, and what 1 stands for: a 127th of the largest absolute
/// value, which counts as 1e-5 at least. A row with infinities or what is no number becomes zeros that stand for no number.
pub(super) fn quantize_row(x: &[f32], codes: &mut [i8]) -> (i32, f32) {
    struct Row<'a>(&'a [f32], &'a mut [i8]);

    impl pulp::WithSimd for Row<'_> {
        type Output = (i32, f32);

        #[inline(always)]
        fn with_simd<S: pulp::Simd>(self, _: S) -> (i32, f32) {
            let Self(x, codes) = self;
            // As integers the bits of absolute values are ordered as the values are, infinity and NaN last.
            let mut largest = 0u32;
            for x in x {
                largest = largest.max(x.to_bits() & 0x7FFF_FFFF);
            }
            let largest = f32::from_bits(largest);
            if !largest.is_finite() {
                codes.fill(0);
                return (0, f32::NAN);
            }
            let scale = 127.0 / largest.max(1e-5);
            let mut sum = 0;
            for (code, x) in codes.iter_mut().zip(x) {
                let whole = ((x * scale + ROUND).to_bits() as i32).wrapping_sub(ROUND.to_bits() as i32);
                *code = whole as i8;
                sum += whole;
            }
            (sum, 1.0 / scale)
        }
    }

    pulp::Arch::new().dispatch(Row(x, codes))
}

impl WholeActivations {
    /// Quantizes `x` `[rows, cols]`, `cols` a multiple of 32, to 8 bits.
    pub fn quantize(x: &[f32], cols: usize, whole: Few<Self>) -> Self {
        let rows = x.len() / cols.max(1);
        let row_bytes = cols / 4 * step_bytes(whole.split);
        let mut all = Self {
            rows,
            row_bytes,
            // Kernels may read four more.
            codes: vec![0; rows * row_bytes + 4],
            scales: vec![0.0; rows],
            sums: vec![0; rows],
        };
        let mut own = vec![0; cols];
        for (first, len) in batches(rows, whole.most) {
            let codes = &mut all.codes[first * row_bytes..(first + len) * row_bytes];
            for row in 0..len {
                let x = &x[(first + row) * cols..][..cols];
                (all.sums[first + row], all.scales[first + row]) = quantize_row(x, &mut own);
                place(whole.split, &own, row, len, codes);
            }
        }
        all
    }
}

/// Puts the codes of a row in their places in a batch.
fn place(split: Split, own: &[i8], row: usize, rows: usize, to: &mut [i8]) {
    let fours = own.as_chunks::<4>().0;
    let to = to.as_chunks_mut::<4>().0;
    match split {
        Split::Bytes => {
            for (four, to) in fours.iter().zip(to.chunks_exact_mut(rows)) {
                to[row] = *four;
            }
        }
        Split::Words => {
            for (four, to) in fours.iter().zip(to.chunks_exact_mut(2 * rows)) {
                let four = four.map(i16::from);
                to[row] = bytemuck::cast([four[0], four[2]]);
                to[rows + row] = bytemuck::cast([four[1], four[3]]);
            }
        }
    }
}
