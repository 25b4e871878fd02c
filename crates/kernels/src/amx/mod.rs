//! Matrix tiles (AMX): registers of 16 rows of 64 bytes, and instructions that multiply them.
//!
//! The compiler has no stable names for them, so each instruction is a line of assembly. It never uses these registers
//! itself: what one line leaves in them the next one finds. Rows of tiles are read fastest from whole cache lines.

use std::arch::asm;
use std::arch::x86_64::__cpuid_count;
use std::sync::OnceLock;

pub(crate) mod parts;

/// Whether tiles of bf16 can be multiplied, and AVX-512 prepares them; asks the system for them the first time.
pub(crate) fn available() -> bool {
    static AVAILABLE: OnceLock<bool> = OnceLock::new();
    *AVAILABLE.get_or_init(|| {
        use std::arch::is_x86_feature_detected as has;
        has!("avx512f") && has!("avx512bw") && processor_has_tiles() && system_grants_tiles()
    })
}

fn processor_has_tiles() -> bool {
    const TILES: u32 = 1 << 24;
    const BF16: u32 = 1 << 22;
    __cpuid_count(0, 0).eax >= 7 && __cpuid_count(7, 0).edx & (TILES | BF16) == TILES | BF16
}

/// Linux saves tiles only for processes that ask: all threads may use them then. Kernels that do not know them refuse.
fn system_grants_tiles() -> bool {
    const ARCH_PRCTL: isize = 158;
    const REQUEST_PERMISSION: usize = 0x1023;
    const TILE_DATA: usize = 18;
    let result: isize;
    // SAFETY: a system call that touches no memory of ours.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") ARCH_PRCTL => result,
            in("rdi") REQUEST_PERMISSION,
            in("rsi") TILE_DATA,
            out("rcx") _,
            out("r11") _,
            options(nostack),
        );
    }
    result == 0
}

/// The shapes of the eight tiles: bytes of a row, and rows.
#[repr(C, align(64))]
pub(crate) struct Shapes {
    palette: [u8; 16],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

impl Shapes {
    /// All tiles of 16 rows of 64 bytes.
    pub const WHOLE: Self = Self::new([(64, 16); 8]);

    pub const fn new(tiles: [(u16, u8); 8]) -> Self {
        let mut shapes = Self {
            palette: [0; 16],
            row_bytes: [0; 16],
            rows: [0; 16],
        };
        shapes.palette[0] = 1;
        let mut tile = 0;
        while tile < 8 {
            (shapes.row_bytes[tile], shapes.rows[tile]) = tiles[tile];
            tile += 1;
        }
        shapes
    }
}

/// While it lives, this thread has tiles.
pub(crate) struct Tiles(());

impl Tiles {
    /// Gives this thread tiles of the shapes.
    ///
    /// # Safety
    /// Tiles are [`available`], and the thread has none.
    pub unsafe fn new(shapes: &Shapes) -> Self {
        // SAFETY: the shapes are 64 bytes as the processor reads them, none larger than a register.
        unsafe {
            asm!("ldtilecfg [{shapes}]", shapes = in(reg) shapes, options(nostack, preserves_flags, readonly))
        };
        Self(())
    }
}

impl Drop for Tiles {
    fn drop(&mut self) {
        // SAFETY: whoever made it vouched for tiles.
        unsafe { asm!("tilerelease", options(nostack, preserves_flags, nomem)) };
    }
}

/// Fills the tile `T` with zeros.
///
/// # Safety
/// The thread has [`Tiles`].
#[inline(always)]
pub(crate) unsafe fn zero<const T: usize>() {
    // SAFETY: the caller's.
    unsafe { asm!("tilezero tmm{t}", t = const T, options(nostack, preserves_flags, nomem)) };
}

/// Loads the tile `T`, whose rows lie `stride` bytes apart.
///
/// # Safety
/// The thread has [`Tiles`], and `from` is the address of all rows.
#[inline(always)]
pub(crate) unsafe fn load<const T: usize>(from: *const u8, stride: usize) {
    // SAFETY: the caller's.
    unsafe {
        asm!(
            "tileloadd tmm{t}, [{from} + 1 * {stride}]",
            t = const T,
            from = in(reg) from,
            stride = in(reg) stride,
            options(nostack, preserves_flags, readonly),
        );
    }
}

/// Stores the tile `T`, whose rows come `stride` bytes apart.
///
/// # Safety
/// The thread has [`Tiles`], and there is room for all rows.
#[inline(always)]
pub(crate) unsafe fn store<const T: usize>(to: *mut u8, stride: usize) {
    // SAFETY: the caller's.
    unsafe {
        asm!(
            "tilestored [{to} + 1 * {stride}], tmm{t}",
            t = const T,
            to = in(reg) to,
            stride = in(reg) stride,
            options(nostack, preserves_flags),
        );
    }
}

/// Adds to the tile `C`, of f32, the product of `A`, of pairs of bf16, and `B`, each of whose rows has for every column
/// of `C` the pair that belongs to a column of pairs of `A`. Subnormal numbers count as zeros.
///
/// # Safety
/// The thread has [`Tiles`], and their shapes fit.
#[inline(always)]
pub(crate) unsafe fn multiply<const C: usize, const A: usize, const B: usize>() {
    // SAFETY: the caller's.
    unsafe {
        asm!(
            "tdpbf16ps tmm{c}, tmm{a}, tmm{b}",
            c = const C,
            a = const A,
            b = const B,
            options(nostack, preserves_flags, nomem),
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_product_of_tiles() {
        if !available() {
            eprintln!("no matrix tiles here");
            return;
        }
        let value = |number: usize| half::bf16::from_f32(number as f32);
        let a: Vec<half::bf16> = (0..512).map(|at| value(at % 7)).collect();
        let b: Vec<half::bf16> = (0..512).map(|at| value(at % 5)).collect();
        let mut c = [1.0f32; 256];
        // SAFETY: tiles are available; the arrays are as large as tiles.
        unsafe {
            let _tiles = Tiles::new(&Shapes::WHOLE);
            load::<0>(c.as_ptr().cast(), 64);
            load::<1>(a.as_ptr().cast(), 64);
            load::<2>(b.as_ptr().cast(), 64);
            multiply::<0, 1, 2>();
            store::<0>(c.as_mut_ptr().cast(), 64);
            zero::<0>();
        }
        for (at, found) in c.iter().enumerate() {
            let (row, column) = (at / 16, at % 16);
            let product = |k: usize| a[row * 32 + k].to_f32() * b[k / 2 * 32 + 2 * column + k % 2].to_f32();
            assert_eq!(*found, 1.0 + (0..32).map(product).sum::<f32>());
        }
    }
}
