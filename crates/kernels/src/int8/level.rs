//! The instruction sets that there are kernels for.

use super::kernel::{self, Few};
use super::wide::{self, Wide};
use crate::ggml::Format;

/// The kernels of an instruction set for a format.
#[derive(Clone, Copy)]
pub(super) struct Kernels {
    pub few: Few,
    pub wide: Wide,
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

            pub fn kernels<F: Format<B, N>, const B: usize, const N: usize>(self) -> Kernels {
                match self {
                    $($(#[$attribute])* Self::$level => Kernels {
                        few: kernel::$module::few::<F, B, N>(),
                        wide: wide::$module::wide::<F, B, N>(),
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
