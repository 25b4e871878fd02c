//! The instruction sets and the kinds of codes that there are kernels for.

use super::activations::{QuantizeFew, QuantizeMany};
use super::codes::ShiftKind::{self, Mins, Offset, Zeros};
use super::codes::{Kind, Shape, WIDE};
use super::kernel::{self, Few};
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
use super::tiles::{Tiled, tiled};
use super::whole::WholeActivations;
use super::wide::{self, Wide};
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
use crate::amx;

/// The kernels of an instruction set for a kind of codes.
#[derive(Clone, Copy)]
pub(super) struct Kernels {
    pub few: Few,
    pub wide: Wide,
    pub whole: Few<WholeActivations>,
    /// For `few`.
    pub quantize_few: QuantizeFew,
    /// For `wide`.
    pub quantize_many: QuantizeMany,
    /// Where the processor has matrix tiles.
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    pub tiled: Option<Tiled>,
}

macro_rules! levels {
    ($($(#[$attribute:meta])* $level:ident, $module:ident, $available:expr;)*) => {
        /// An instruction set.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub(super) enum Level {
            $($(#[$attribute])* $level,)*
        }

        impl Level {
            /// The instruction sets of this processor, the best first.
            pub fn here() -> impl Iterator<Item = Self> {
                let all = [$($(#[$attribute])* ($available).then_some(Self::$level),)*];
                all.into_iter().flatten()
            }

            fn of<K: Shape>(self) -> Kernels {
                match self {
                    $($(#[$attribute])* Self::$level => Kernels {
                        few: kernel::$module::few::<K, _>(),
                        wide: wide::$module::wide::<K>(),
                        whole: kernel::$module::few::<K, _>(),
                        quantize_few: kernel::$module::quantize,
                        quantize_many: wide::$module::quantize,
                        #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
                        tiled: (self == Self::Amx).then(tiled::<K>),
                    },)*
                }
            }
        }
    };
}

#[cfg(target_arch = "aarch64")]
use std::arch::is_aarch64_feature_detected as has;
#[cfg(target_arch = "x86_64")]
use std::arch::is_x86_feature_detected as has;

levels! {
    // With the kernels of AVX-512 for few rows.
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    Amx, avx512, has!("avx512f") && has!("avx512bw") && has!("avx512vnni") && amx::available();
    #[cfg(target_arch = "x86_64")]
    Avx512, avx512, has!("avx512f") && has!("avx512bw") && has!("avx512vnni");
    #[cfg(target_arch = "x86_64")]
    Avx2, avx2, has!("avx2") && has!("fma") && has!("f16c");
    #[cfg(target_arch = "aarch64")]
    DotProd, dot_prod, has!("neon") && has!("dotprod");
    #[cfg(target_arch = "aarch64")]
    Neon, neon, has!("neon");
    // Nothing tells a module what runs it: it is built for one or the other.
    #[cfg(all(target_arch = "wasm32", target_feature = "simd128"))]
    Simd128, simd128, true;
    Scalar, scalar, true;
}

impl Level {
    /// The best instruction set of this processor.
    pub fn best() -> Self {
        Self::here().next().unwrap_or(Self::Scalar)
    }
}

macro_rules! kinds {
    ($($shift:ident $group:tt $tables:literal: $($bits:literal)+;)*) => {
        /// All kinds of codes, those of fewer bits before others like them.
        pub(super) static KINDS: &[Kind] = &[$($(kind($bits, $group, $shift, $tables)),+),*];

        impl Level {
            pub fn kernels(self, kind: Kind) -> Option<Kernels> {
                $($(
                    if kind == self::kind($bits, $group, $shift, $tables) {
                        struct Known;
                        impl Shape for Known {
                            const KIND: Kind = self::kind($bits, $group, $shift, $tables);
                        }
                        return Some(self.of::<Known>());
                    }
                )+)*
                None
            }
        }
    };
}

const fn kind(bits: usize, group: usize, shift: ShiftKind, tables: usize) -> Kind {
    Kind {
        bits,
        group,
        shift,
        tables,
    }
}

// The shift, the group, the number of tables, and for what bits.
kinds! {
    Offset 16 0: 3 6;
    Offset 32 0: 2 3 4 5 8;
    Offset WIDE 0: 2 3 4 8;
    Zeros 16 0: 2 3 4 8;
    Zeros 32 0: 2 3 4 8;
    Zeros WIDE 0: 2 3 4 8;
    Mins 16 0: 2 8;
    Mins 32 0: 4 5 8;
    Mins WIDE 0: 4 8;
    Offset 16 1: 4;
    Offset 32 1: 4;
    Offset WIDE 1: 4;
    Offset 16 2: 4;
    Offset 32 2: 4;
    Offset WIDE 2: 4;
}
