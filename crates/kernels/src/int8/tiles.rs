//! A tile of weights times rows of activations, by matrix tiles (AMX).
//!
//! Matrix tiles multiply bf16, which holds any code exactly, and sum up f32. An activation is the sum of two bf16, 16
//! bits in all: it is not quantized. The sums of each group of columns are stored, scaled, and added to what the vector
//! registers hold of a row. What is stored can be loaded quickly only a while later, so codes are widened some blocks
//! before their turn, and sums are scaled some groups after it.

use std::arch::x86_64::*;
use std::mem::MaybeUninit;

use super::codes::{Plan, Shape, ShiftKind, WIDE};
use super::kernel::step;
use super::simd::{Avx512, Simd};
use super::wide::Unpacked;
use super::{BLOCK, Int8Matrix, Shared, TILE, Tile};
use crate::amx::{self, Shapes};
use crate::lines::{Line, make_room};
use crate::threads::{for_each, pieces};

/// Rows of activations from which on this is the fastest.
pub(super) const MANY: usize = 10;

/// Parts of an activation.
const PARTS: usize = 2;
/// Blocks that are unpacked before they are multiplied.
const AHEAD: usize = 4;
/// Sums that wait for their scales.
const BEHIND: usize = 4;

/// The kernel for a kind of codes.
#[derive(Clone, Copy)]
pub(super) struct Tiled {
    pub multiply: Multiply,
    /// What the thread's tiles have to be.
    pub shapes: &'static Shapes,
}

/// Writes the products of a tile with some blocks of 16 rows of activations, of which the first is numbered by the third
/// argument.
///
/// # Safety
/// The tile is of the kernel's kind and has as many blocks as the activations, and 16 factors; its output has room for
/// all rows; the thread has tiles of the kernel's shapes.
pub(super) type Multiply =
    unsafe fn(tile: &Tile, x: &TiledActivations, first: usize, blocks: usize, scratch: &mut Unpacked);

pub(super) fn tiled<K: Shape>() -> Tiled {
    // Half a block: tile 1 and 5 have weights, 2 and 3 activations.
    const HALF: Shapes = {
        let whole = (64, 16);
        Shapes::new([whole, (64, 8), (32, 16), (32, 16), whole, (64, 8), whole, whole])
    };
    Tiled {
        multiply: multiply::<K>,
        shapes: if K::GROUPS == 2 { &HALF } else { &Shapes::WHOLE },
    }
}

/// Rows of activations, each value as two bf16.
pub(super) struct TiledActivations {
    pub rows: usize,
    cols: usize,
    /// `[rows / 16, cols / 32, 2, 16]`: the parts of a block of columns of each row, as [`place`] orders them.
    values: Vec<Line>,
    /// Sums of values in blocks, and in their first and second halves: `[rows / 16, cols / 32, 3]`, of 16 rows.
    sums: Vec<Line>,
}

impl TiledActivations {
    /// Takes `x` `[rows, cols]` apart, `cols` a multiple of 32.
    pub fn split(x: &[f32], cols: usize) -> Self {
        let (rows, blocks) = (x.len() / cols.max(1), cols / BLOCK);
        let row_blocks = rows.div_ceil(TILE);
        let mut all = Self {
            rows,
            cols,
            values: Vec::new(),
            sums: Vec::new(),
        };
        make_room(&mut all.values, row_blocks * blocks * PARTS * TILE);
        make_room(&mut all.sums, row_blocks * blocks * 3);
        let (values, sums) = (Shared(all.values.as_mut_ptr()), Shared(all.sums.as_mut_ptr()));
        // Below some thousand values, handing over costs more than the work.
        let (count, size) = pieces(row_blocks, 16 * 1024 / (TILE * cols).max(1));
        for_each(count, |piece| {
            for block in piece * size..row_blocks.min((piece + 1) * size) {
                let x = &x[block * TILE * cols..rows.min((block + 1) * TILE) * cols];
                // SAFETY: blocks of rows are disjoint, and there is room for each; whoever has tiles has AVX-512.
                unsafe {
                    let values = values.at(block * blocks * PARTS * TILE);
                    place(x, cols, values, sums.at(block * blocks * 3));
                }
            }
        });
        all
    }

    /// Blocks of 16 rows.
    pub fn row_blocks(&self) -> usize {
        self.rows.div_ceil(TILE)
    }

    /// Bytes of a block of rows.
    pub fn block_bytes(&self) -> usize {
        2 * PARTS * TILE * self.cols
    }
}

/// Splits up to 16 rows. Of each block of columns, the pair `2 s + h` is the columns `4 s + h` and `4 s + h + 2`, which
/// are a word of four codes.
///
/// # Safety
/// There is room for all parts, in lines that are zero.
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn place(x: &[f32], cols: usize, values: *mut Line, sums: *mut Line) {
    let column = |at: usize| (at / 2 * 4 + at % 2) as i32;
    let pairs: [[i32; TILE]; 2] = [0, 2].map(|right| std::array::from_fn(|at| column(at) + right));
    let upper = _mm512_set1_epi32(0xFFFF_0000u32 as i32);
    let half = _mm512_set1_epi32(0x8000);
    for (row, x) in x.chunks_exact(cols).enumerate() {
        for (block, x) in x.as_chunks::<BLOCK>().0.iter().enumerate() {
            // SAFETY: the caller's.
            unsafe {
                let (a, b) = (_mm512_loadu_ps(x.as_ptr()), _mm512_loadu_ps(x[16..].as_ptr()));
                let mut parts = [_mm512_setzero_si512(); PARTS];
                let mut sum = _mm512_setzero_ps();
                for (right, pair) in pairs.iter().enumerate() {
                    let x = _mm512_permutex2var_ps(a, _mm512_loadu_si512(pair.as_ptr().cast()), b);
                    let first = _mm512_and_si512(_mm512_castps_si512(x), upper);
                    let rest = _mm512_castps_si512(_mm512_sub_ps(x, _mm512_castsi512_ps(first)));
                    let second = _mm512_and_si512(_mm512_add_epi32(rest, half), upper);
                    let kept = _mm512_add_ps(_mm512_castsi512_ps(first), _mm512_castsi512_ps(second));
                    sum = _mm512_add_ps(sum, kept);
                    parts = match right {
                        0 => [_mm512_srli_epi32::<16>(first), _mm512_srli_epi32::<16>(second)],
                        _ => [
                            _mm512_or_si512(parts[0], first),
                            _mm512_or_si512(parts[1], second),
                        ],
                    };
                }
                let to = values.add(block * PARTS * TILE + row);
                _mm512_store_si512(to.cast(), parts[0]);
                _mm512_store_si512(to.add(TILE).cast(), parts[1]);
                let halves = [0x00FF, 0xFF00].map(|half| _mm512_mask_reduce_add_ps(half, sum));
                let to: *mut f32 = sums.add(3 * block).cast();
                *to.add(row) = halves[0] + halves[1];
                *to.add(TILE + row) = halves[0];
                *to.add(2 * TILE + row) = halves[1];
            }
        }
    }
}

impl Plan {
    /// What each code is multiplied as: the sum of two bf16.
    pub(super) fn words(&self) -> [[u16; 64]; 2] {
        let mut words = [[0; 64]; 2];
        let [table, fine] = &self.tables;
        for code in 0..64 {
            let value = match self.kind.tables {
                0 => code as i32 - self.offset,
                1 => i32::from(table[code % 16]) - 128,
                _ => 128 * (i32::from(table[code % 16]) - 128) + i32::from(fine[code % 16]),
            } as f32;
            let first = value.to_bits() >> 16;
            let second = (value - f32::from_bits(first << 16)).to_bits() >> 16;
            (words[0][code], words[1][code]) = (first as u16, second as u16);
        }
        words
    }
}

/// Where the parts of an unpacked tile are.
struct Room {
    /// `[blocks, parts, 16]`: see [`place`].
    codes: *mut Line,
    /// For each group, f32 of all rows.
    scales: *mut Line,
    mins: *mut Line,
    groups: usize,
}

/// What is to be unpacked next.
struct Rest {
    at: *const u8,
    block: usize,
}

/// A tile as [`row_block`] takes it: packed, or unpacked already.
trait Form {
    /// Whether groups have several blocks.
    const WIDE: bool;
    /// Groups in a block.
    const GROUPS: usize;
    /// Parts of codes.
    const PARTS: usize;
    /// Whether groups have minimums; zero points become such.
    const MINS: bool;
    const PACKED: bool;

    /// Unpacks the next block.
    ///
    /// # Safety
    /// There is one, in a tile of this kind, and room for it; inlined into a function that is compiled for AVX-512.
    unsafe fn unpack(rest: &mut Rest, matrix: &Int8Matrix, to: &Room);
}

struct Packed<K>(K);

impl<K: Shape> Form for Packed<K> {
    const WIDE: bool = K::KIND.group == WIDE;
    const GROUPS: usize = K::GROUPS;
    const PARTS: usize = if K::KIND.tables > 1 { 2 } else { 1 };
    const MINS: bool = !matches!(K::KIND.shift, ShiftKind::Offset);
    const PACKED: bool = true;

    #[inline(always)]
    unsafe fn unpack(rest: &mut Rest, matrix: &Int8Matrix, to: &Room) {
        // SAFETY: the caller's.
        unsafe { unpack::<K>(rest, matrix, to) }
    }
}

struct Ready<const WIDE: bool, const GROUPS: usize, const PARTS: usize, const MINS: bool>;

impl<const WIDE: bool, const GROUPS: usize, const PARTS: usize, const MINS: bool> Form
    for Ready<WIDE, GROUPS, PARTS, MINS>
{
    const WIDE: bool = WIDE;
    const GROUPS: usize = GROUPS;
    const PARTS: usize = PARTS;
    const MINS: bool = MINS;
    const PACKED: bool = false;

    #[inline(always)]
    unsafe fn unpack(_: &mut Rest, _: &Int8Matrix, _: &Room) {}
}

/// [`Form::unpack`].
///
/// # Safety
/// See there.
#[inline(always)]
unsafe fn unpack<K: Shape>(rest: &mut Rest, matrix: &Int8Matrix, to: &Room) {
    // SAFETY: the caller's.
    unsafe {
        let Rest { mut at, block } = *rest;
        // The scale, and the minimum, of a group; the bytes of a scale, and from there to the shift.
        macro_rules! group {
            ($number:expr, $load:ident, $at:expr, $arrays:expr) => {{
                let scale = Avx512::$load($at.cast());
                Avx512::store(scale, to.scales.add($number).cast());
                if Packed::<K>::MINS {
                    let mut shift = Avx512::$load($at.add($arrays).cast());
                    if matches!(K::KIND.shift, ShiftKind::Zeros) {
                        shift = _mm512_mul_ps(_mm512_sub_ps(_mm512_setzero_ps(), scale), shift);
                    }
                    Avx512::store(shift, to.mins.add($number).cast());
                }
            }};
        }
        if K::KIND.group == WIDE {
            let blocks = matrix.plan.group_blocks;
            if block.is_multiple_of(blocks) {
                group!(block / blocks, load_float, at, 4 * TILE);
                at = at.add(K::HEAD_BYTES);
            }
        } else {
            let scales = at.add(K::CODE_BYTES);
            group!(K::GROUPS * block, load_half, scales, 2 * TILE * K::GROUPS);
            if K::GROUPS > 1 {
                group!(
                    K::GROUPS * block + 1,
                    load_half,
                    scales.add(2 * TILE),
                    2 * TILE * K::GROUPS
                );
            }
        }
        let lines: *mut __m512i = to.codes.add(block * Packed::<K>::PARTS * TILE).cast();
        let words =
            |part: usize, upper: usize| -> *const i32 { matrix.words[part][32 * upper..].as_ptr().cast() };
        let (first, second) = (
            _mm512_loadu_si512(words(0, 0).cast()),
            _mm512_loadu_si512(words(1, 0).cast()),
        );
        let first_upper = _mm512_loadu_si512(words(0, 1).cast());
        macro_rules! steps {
            ($($step:literal)*) => {$(
                let codes = step::<Avx512, $step>(at, K::KIND.bits);
                let odd = _mm512_srli_epi16::<8>(codes);
                let to = lines.add(2 * $step);
                match K::KIND.bits {
                    8 => {
                        let [even, odd] = whole(codes, matrix.plan.offset);
                        _mm512_store_si512(to, even);
                        _mm512_store_si512(to.add(1), odd);
                    }
                    6 => {
                        _mm512_store_si512(to, _mm512_permutex2var_epi16(first, codes, first_upper));
                        _mm512_store_si512(to.add(1), _mm512_permutex2var_epi16(first, odd, first_upper));
                    }
                    _ => {
                        _mm512_store_si512(to, _mm512_permutexvar_epi16(codes, first));
                        _mm512_store_si512(to.add(1), _mm512_permutexvar_epi16(odd, first));
                    }
                }
                if Packed::<K>::PARTS > 1 {
                    _mm512_store_si512(to.add(TILE), _mm512_permutexvar_epi16(codes, second));
                    _mm512_store_si512(to.add(TILE + 1), _mm512_permutexvar_epi16(odd, second));
                }
            )*};
        }
        steps!(0 1 2 3 4 5 6 7);
        *rest = Rest {
            at: at.add(K::BLOCK_BYTES),
            block: block + 1,
        };
    }
}

/// Bytes less `offset`, as bf16: those numbered 0 and 2 of each lane, and 1 and 3.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn whole(codes: __m512i, offset: i32) -> [__m512i; 2] {
    let (byte, offset) = (_mm512_set1_epi32(0xFF), _mm512_set1_epi32(offset));
    let float = |codes: __m512i| {
        let code = _mm512_sub_epi32(_mm512_and_si512(codes, byte), offset);
        _mm512_castps_si512(_mm512_cvtepi32_ps(code))
    };
    // Eight bits: nothing is cut off.
    let pair = |a: __m512i, b: __m512i| _mm512_or_si512(_mm512_srli_epi32::<16>(a), b);
    [
        pair(float(codes), float(_mm512_srli_epi32::<16>(codes))),
        pair(
            float(_mm512_srli_epi32::<8>(codes)),
            float(_mm512_srli_epi32::<24>(codes)),
        ),
    ]
}

/// A [`Multiply`].
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
unsafe fn multiply<K: Shape>(
    tile: &Tile,
    x: &TiledActivations,
    first: usize,
    row_blocks: usize,
    scratch: &mut Unpacked,
) {
    let plan = &tile.weight.plan;
    let groups = match K::KIND.group {
        WIDE => plan.blocks.div_ceil(plan.group_blocks),
        _ => plan.blocks * K::GROUPS,
    };
    make_room(&mut scratch.codes, plan.blocks * Packed::<K>::PARTS * TILE);
    make_room(&mut scratch.scales, groups);
    make_room(&mut scratch.mins, groups);
    let room = Room {
        codes: scratch.codes.as_mut_ptr(),
        scales: scratch.scales.as_mut_ptr(),
        mins: scratch.mins.as_mut_ptr(),
        groups,
    };
    // SAFETY: the caller's; there is room for all blocks and groups, and the first block of rows unpacks them.
    unsafe {
        row_block::<Packed<K>>(tile, x, first, &room);
        let ready = match (
            Packed::<K>::WIDE,
            K::GROUPS,
            Packed::<K>::PARTS,
            Packed::<K>::MINS,
        ) {
            (true, _, 2, _) => ready::<Ready<true, 1, 2, false>>,
            (true, _, _, false) => ready::<Ready<true, 1, 1, false>>,
            (true, _, _, true) => ready::<Ready<true, 1, 1, true>>,
            (_, 1, 2, _) => ready::<Ready<false, 1, 2, false>>,
            (_, 1, _, false) => ready::<Ready<false, 1, 1, false>>,
            (_, 1, _, true) => ready::<Ready<false, 1, 1, true>>,
            (_, _, 2, _) => ready::<Ready<false, 2, 2, false>>,
            (_, _, _, false) => ready::<Ready<false, 2, 1, false>>,
            (_, _, _, true) => ready::<Ready<false, 2, 1, true>>,
        };
        for block in first + 1..first + row_blocks {
            ready(tile, x, block, &room);
        }
    }
}

/// [`row_block`] of a tile that is unpacked.
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn ready<F: Form>(tile: &Tile, x: &TiledActivations, block: usize, room: &Room) {
    // SAFETY: the caller's.
    unsafe { row_block::<F>(tile, x, block, room) }
}

/// The products with a block of 16 rows; unpacks the tile in passing if it is packed.
///
/// # Safety
/// See [`Multiply`]; there is room for the tile, or it is there; inlined into a function that is compiled for AVX-512.
#[inline(always)]
#[allow(clippy::needless_range_loop)]
unsafe fn row_block<F: Form>(tile: &Tile, x: &TiledActivations, row_block: usize, room: &Room) {
    const WAITING: usize = 2 * BEHIND;
    #[repr(align(64))]
    #[allow(dead_code)]
    struct Sums([[f32; TILE * TILE]; WAITING]);
    let (matrix, plan) = (tile.weight, &tile.weight.plan);
    let (blocks, groups) = (plan.blocks, room.groups);
    let mut rest = Rest {
        at: tile.codes.as_ptr(),
        block: 0,
    };
    let mut waiting = MaybeUninit::<Sums>::uninit();
    let waiting: *mut [f32; TILE * TILE] = waiting.as_mut_ptr().cast();
    // SAFETY: the caller's.
    unsafe {
        let values = x.values.as_ptr().add(row_block * blocks * PARTS * TILE);
        let x_sums: *const f32 = x.sums.as_ptr().add(row_block * blocks * 3).cast();
        let mut total = [_mm512_setzero_ps(); TILE];
        if F::PACKED {
            while rest.block < blocks.min(AHEAD) {
                F::unpack(&mut rest, matrix, room);
            }
        }
        // Two groups in turn: the tile of one is stored while that of the other is summed up.
        macro_rules! group {
            ($own:literal, $other:literal, $group:expr) => {
                let group = $group;
                if group < groups {
                    amx::zero::<$own>();
                    let own = if F::WIDE {
                        group * plan.group_blocks..blocks.min((group + 1) * plan.group_blocks)
                    } else {
                        group / F::GROUPS..group / F::GROUPS + 1
                    };
                    // Half a tile's lines and half of each line, where groups are halves of blocks.
                    let half = if F::GROUPS > 1 { group % 2 } else { 0 };
                    for block in own {
                        let w = room.codes.add(block * F::PARTS * TILE + half * TILE / 2);
                        let x: *const u8 = values.add(block * PARTS * TILE).cast::<u8>().add(32 * half);
                        amx::load::<1>(w.cast(), 64);
                        amx::load::<2>(x, 64);
                        amx::multiply::<$own, 2, 1>();
                        amx::load::<3>(x.add(64 * TILE), 64);
                        amx::multiply::<$own, 3, 1>();
                        if F::PARTS > 1 {
                            amx::load::<5>(w.add(TILE).cast(), 64);
                            amx::multiply::<$own, 2, 5>();
                        }
                        if F::PACKED && half + 1 == F::GROUPS && rest.block < blocks {
                            F::unpack(&mut rest, matrix, room);
                        }
                    }
                }
                if group > 0 && group <= groups {
                    amx::store::<$other>(waiting.add((group - 1) % WAITING).cast(), 64);
                }
                if group >= BEHIND && group - BEHIND < groups {
                    let group = group - BEHIND;
                    let sums: *const f32 = waiting.add(group % WAITING).cast();
                    let scale = _mm512_load_ps(room.scales.add(group).cast());
                    for m in 0..TILE {
                        total[m] = _mm512_fmadd_ps(_mm512_load_ps(sums.add(TILE * m)), scale, total[m]);
                    }
                    if F::MINS {
                        let min = _mm512_load_ps(room.mins.add(group).cast());
                        let mut of_group = Sums16([0.0; TILE]);
                        let from = match (F::WIDE, F::GROUPS) {
                            (true, _) => {
                                let end = blocks.min((group + 1) * plan.group_blocks);
                                let mut sum = _mm512_setzero_ps();
                                for block in group * plan.group_blocks..end {
                                    sum = _mm512_add_ps(sum, _mm512_load_ps(x_sums.add(3 * TILE * block)));
                                }
                                _mm512_store_ps(of_group.0.as_mut_ptr(), sum);
                                of_group.0.as_ptr()
                            }
                            (_, 1) => x_sums.add(3 * TILE * group),
                            _ => x_sums.add(TILE * (3 * (group / 2) + 1 + group % 2)),
                        };
                        for m in 0..TILE {
                            total[m] = _mm512_fmadd_ps(min, _mm512_set1_ps(*from.add(m)), total[m]);
                        }
                    }
                }
            };
        }
        let mut group = 0;
        while group < groups + BEHIND {
            group!(0, 4, group);
            group!(4, 0, group + 1);
            group += 2;
        }
        let factors = Avx512::load_float(tile.factors.as_ptr());
        for (m, total) in total.into_iter().enumerate() {
            let row = row_block * TILE + m;
            if row < x.rows {
                tile.store::<Avx512>(_mm512_mul_ps(total, factors), row);
            }
        }
    }
}

#[repr(align(64))]
struct Sums16([f32; TILE]);
