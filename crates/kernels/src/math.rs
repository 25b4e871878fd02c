//! Functions of one f32, written so that a loop over a slice becomes vector code.
//!
//! They are plain arithmetic without branches: inlined into a loop that runs under [`pulp::Arch::dispatch`],
//! the compiler makes vectors of the machine's width of them.

use std::f32::consts::LOG2_E;

/// `eˣ` within a few units in the last place; what would leave the range of normal numbers stays at its ends.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    // Adding 1.5 · 2²³ rounds to a whole number, which then stands in the low bits.
    const ROUND: f32 = 12_582_912.0;
    // ln 2 in two parts: products with the first are exact.
    const LN_2: [f32; 2] = [0.693_359_4, -2.121_944_4e-4];
    let x = x.clamp(-87.0, 88.0);
    let rounded = x * LOG2_E + ROUND;
    let power = f32::from_bits((rounded.to_bits() << 23).wrapping_add(1.0f32.to_bits()));
    let n = rounded - ROUND;
    let r = x - n * LN_2[0] - n * LN_2[1];
    // Taylor's series; |r| ≤ ln 2 / 2.
    let p = 1.0 / 24.0 + r * (1.0 / 120.0 + r * (1.0 / 720.0));
    let p = 1.0 + r * (1.0 + r * (0.5 + r * (1.0 / 6.0 + r * p)));
    p * power
}

/// `1 / (1 + e⁻ˣ)`.
#[inline(always)]
pub(crate) fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// Hyperbolic tangent.
#[inline(always)]
pub(crate) fn tanh(x: f32) -> f32 {
    let square = x * x;
    // Near zero the quotient below would lose what little there is.
    let series = 2.0 / 15.0 + square * (-17.0 / 315.0 + square * (62.0 / 2835.0));
    let series = x + x * square * (-1.0 / 3.0 + square * series);
    let quotient = 1.0 - 2.0 / (exp(2.0 * x) + 1.0);
    if x.abs() < 0.25 { series } else { quotient }
}

/// The error function within 5e-7: the quotient of two polynomials that Eigen has for it
/// (`generic_fast_erf_float`, `SpecialFunctionsImpl.h`).
#[inline(always)]
pub(crate) fn erf(x: f32) -> f32 {
    // There the quotient is above 1.
    let x = x.clamp(-4.2, 4.2);
    let square = x * x;
    let p = 2.770_681_5e-8 + square * -2.726_142_4e-10;
    let p = -5.692_506_6e-5 + square * (-2.101_024e-6 + square * p);
    let p = -2.954_598e-3 + square * (-7.349_906_4e-4 + square * p);
    let p = x * (-1.609_603_3e-2 + square * p);
    let q = -2.133_740_6e-4 + square * -1.456_607_2e-5;
    let q = -7.373_329e-3 + square * (-1.682_827e-3 + square * q);
    let q = -1.426_474e-2 + square * q;
    (p / q).clamp(-1.0, 1.0)
}

/// `x += y`.
pub(crate) fn add(x: &mut [f32], y: &[f32]) {
    struct Add<'a>(&'a mut [f32], &'a [f32]);

    impl pulp::WithSimd for Add<'_> {
        type Output = ();

        #[inline(always)]
        fn with_simd<S: pulp::Simd>(self, _: S) {
            for (x, y) in self.0.iter_mut().zip(self.1) {
                *x += y;
            }
        }
    }

    pulp::Arch::new().dispatch(Add(x, y));
}

/// Partial sums: a few vectors of any machine.
const LANES: usize = 32;

/// `Σ f(x)` in many partial sums, which vectors can hold.
#[inline(always)]
pub(crate) fn sum(x: &[f32], f: impl Fn(f32) -> f32) -> f32 {
    let (chunks, rest) = x.as_chunks::<LANES>();
    let mut sums = [0.0f32; LANES];
    for chunk in chunks {
        for (sum, x) in sums.iter_mut().zip(chunk) {
            *sum += f(*x);
        }
    }
    let mut total = fold(sums, |a, b| a + b);
    for x in rest {
        total += f(*x);
    }
    total
}

/// `Σ xᵢ yᵢ` in many partial sums.
#[inline(always)]
pub(crate) fn dot(x: &[f32], y: &[f32]) -> f32 {
    let ((chunks, rest), (other_chunks, other_rest)) = (x.as_chunks::<LANES>(), y.as_chunks::<LANES>());
    let mut sums = [0.0f32; LANES];
    for (x, y) in chunks.iter().zip(other_chunks) {
        for ((sum, x), y) in sums.iter_mut().zip(x).zip(y) {
            *sum += x * y;
        }
    }
    let mut total = fold(sums, |a, b| a + b);
    for (x, y) in rest.iter().zip(other_rest) {
        total += x * y;
    }
    total
}

/// Puts lanes together, half of them at a time.
#[inline(always)]
fn fold<const LANES: usize>(mut lanes: [f32; LANES], f: impl Fn(f32, f32) -> f32) -> f32 {
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            lanes[i] = f(lanes[i], lanes[i + width]);
        }
        width /= 2;
    }
    lanes[0]
}

/// Makes every `x` `e^(x − offset)`; returns their sum.
#[inline(always)]
pub(crate) fn exp_sum(x: &mut [f32], offset: f32) -> f32 {
    let mut sums = [0.0f32; LANES];
    let (chunks, rest) = x.as_chunks_mut::<LANES>();
    for chunk in chunks {
        for (sum, x) in sums.iter_mut().zip(chunk) {
            *x = exp(*x - offset);
            *sum += *x;
        }
    }
    for x in rest.iter_mut() {
        *x = exp(*x - offset);
    }
    let mut total = fold(sums, |a, b| a + b);
    for x in rest {
        total += *x;
    }
    total
}

/// The largest of `x`.
#[inline(always)]
pub(crate) fn max(x: &[f32]) -> f32 {
    let larger = |a: f32, b: f32| if a > b { a } else { b };
    let (chunks, rest) = x.as_chunks::<LANES>();
    let mut most = [f32::NEG_INFINITY; LANES];
    for chunk in chunks {
        for (most, x) in most.iter_mut().zip(chunk) {
            *most = larger(*x, *most);
        }
    }
    let mut largest = fold(most, larger);
    for x in rest {
        largest = larger(*x, largest);
    }
    largest
}

/// Probabilities `eˣ / Σ eˣ`; all zero where no value is above negative infinity.
pub fn softmax(x: &[f32]) -> Vec<f32> {
    struct Softmax<'a>(&'a [f32]);

    impl pulp::WithSimd for Softmax<'_> {
        type Output = Vec<f32>;

        #[inline(always)]
        fn with_simd<S: pulp::Simd>(self, _: S) -> Vec<f32> {
            let most = max(self.0);
            let mut probs = vec![0.0f32; self.0.len()];
            if most == f32::NEG_INFINITY {
                return probs;
            }
            for (p, x) in probs.iter_mut().zip(self.0) {
                let x = *x - most;
                // Below, `exp` stays at the least normal number.
                *p = if x < -87.0 { 0.0 } else { exp(x) };
            }
            let mut sums = [0.0f64; LANES];
            let (chunks, rest) = probs.as_chunks::<LANES>();
            for chunk in chunks {
                for (sum, p) in sums.iter_mut().zip(chunk) {
                    *sum += f64::from(*p);
                }
            }
            let mut total: f64 = sums.iter().sum();
            for p in rest {
                total += f64::from(*p);
            }
            let factor = (1.0 / total) as f32;
            for p in &mut probs {
                *p *= factor;
            }
            probs
        }
    }

    pulp::Arch::new().dispatch(Softmax(x))
}

/// The index of the largest value, the first of equals; none where no value is above negative infinity.
pub fn argmax(x: &[f32]) -> Option<usize> {
    /// The piece with the largest value, and that value.
    struct Best<'a>(&'a [f32]);

    const PIECE: usize = 1024;

    impl pulp::WithSimd for Best<'_> {
        type Output = (usize, f32);

        #[inline(always)]
        fn with_simd<S: pulp::Simd>(self, _: S) -> (usize, f32) {
            let mut best = (0, f32::NEG_INFINITY);
            for (index, piece) in self.0.chunks(PIECE).enumerate() {
                let most = max(piece);
                if most > best.1 {
                    best = (index, most);
                }
            }
            best
        }
    }

    let (piece, most) = pulp::Arch::new().dispatch(Best(x));
    let start = piece * PIECE;
    let found = x.get(start..)?.iter().position(|x| *x == most)?;
    (most > f32::NEG_INFINITY).then_some(start + found)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The largest of `difference` over a range of arguments.
    fn worst(difference: impl Fn(f64) -> f64) -> f64 {
        (-400_000..400_000)
            .map(|i| f64::from(i as f32 * 2e-4))
            .map(difference)
            .fold(0.0, f64::max)
    }

    #[test]
    fn close_to_the_exact_functions() {
        let relative = worst(|x| (f64::from(exp(x as f32)) / x.exp() - 1.0).abs());
        assert!(relative < 4e-7, "exp: {relative}");
        let absolute = worst(|x| (f64::from(sigmoid(x as f32)) - 1.0 / (1.0 + (-x).exp())).abs());
        assert!(absolute < 3e-7, "sigmoid: {absolute}");
        let absolute = worst(|x| (f64::from(tanh(x as f32)) - x.tanh()).abs());
        assert!(absolute < 3e-7, "tanh: {absolute}");
        let relative = worst(|x| {
            (f64::from(tanh((x / 400.0) as f32)) - (x / 400.0).tanh()).abs() / (x / 400.0).abs().max(1e-9)
        });
        assert!(relative < 3e-7, "small tanh: {relative}");
        assert!((erf(0.5) - 0.520_499_9).abs() < 5e-7);
        assert!((erf(-1.5) + 0.966_105_15).abs() < 5e-7);
        assert_eq!(erf(10.0), 1.0);
        assert!(exp(f32::NAN).is_nan());
        assert!(exp(f32::NEG_INFINITY) < 1e-37);
    }

    #[test]
    fn softmax_of_a_few_numbers() {
        let x: Vec<f32> = (0..100).map(|i| ((i * 37) % 101) as f32 / 9.0).collect();
        let total: f64 = x.iter().map(|x| f64::from(*x).exp()).sum();
        for (x, p) in x.iter().zip(softmax(&x)) {
            assert!((f64::from(p) - f64::from(*x).exp() / total).abs() < 1e-7);
        }
        let never = f32::NEG_INFINITY;
        assert_eq!(softmax(&[never, 0.0, -200.0, 0.0]), [0.0, 0.5, 0.0, 0.5]);
        assert_eq!(softmax(&[never; 3]), [0.0; 3]);
        assert!(softmax(&[f32::NAN, 1.0])[0].is_nan());
    }

    #[test]
    fn the_first_of_the_largest() {
        let never = f32::NEG_INFINITY;
        assert_eq!(argmax(&[never, 1.0, f32::NAN, 3.0, 3.0]), Some(3));
        assert_eq!(argmax(&[never; 40]), None);
        assert_eq!(argmax(&[]), None);
        let x: Vec<f32> = (0..5000).map(|i| ((i * 37) % 4999) as f32).collect();
        assert_eq!(argmax(&x).map(|i| x[i]), Some(4998.0));
    }

    #[test]
    fn sums_and_maxima() {
        for len in [0, 1, 63, 64, 65, 200] {
            let x: Vec<f32> = (0..len).map(|i| ((i * 37) % 101) as f32 - 90.0).collect();
            assert_eq!(sum(&x, |x| x), x.iter().sum::<f32>());
            assert_eq!(max(&x), x.iter().copied().fold(f32::NEG_INFINITY, f32::max));
        }
    }
}
