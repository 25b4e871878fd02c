//! Fresh parameters.

use std::f64::consts::TAU;

/// A normal distribution with mean 0.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Normal {
    /// Its standard deviation.
    pub std: f64,
    /// So many standard deviations from the mean, it ends.
    pub cutoff: f64,
}

impl Normal {
    /// One that does not end.
    pub fn new(std: f64) -> Self {
        let cutoff = f64::INFINITY;
        Self { std, cutoff }
    }
}

/// `count` values of a distribution: the same for the same seed and name, on every platform and whatever else is initialized
/// (Box and Muller, 1958, over SplitMix64).
pub fn normal(seed: u64, name: &str, Normal { std, cutoff }: Normal, count: usize) -> Vec<f32> {
    // FNV-1a over the name, from a state that the seed sets.
    let mut state = 0xcbf2_9ce4_8422_2325 ^ mix(seed);
    for byte in name.bytes() {
        state = (state ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    }
    let mut unit = || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        ((mix(state) >> 11) as f64 + 0.5) / (1_u64 << 53) as f64
    };
    let mut values = Vec::with_capacity(count + 1);
    while values.len() < count {
        let (radius, angle) = ((-2.0 * unit().ln()).sqrt(), TAU * unit());
        let pair = [radius * angle.cos(), radius * angle.sin()];
        values.extend(
            pair.iter()
                .filter(|x| x.abs() <= cutoff)
                .map(|x| (x * std) as f32),
        );
    }
    values.truncate(count);
    values
}

/// The finalizer of SplitMix64 (Steele, Lea and Flood, 2014).
fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn normal_values_by_seed_and_name() {
        let half = Normal::new(0.5);
        let values = normal(1, "a", half, 20_001);
        let count = values.len() as f64;
        let mean = values.iter().map(|x| f64::from(*x)).sum::<f64>() / count;
        let var = values.iter().map(|x| (f64::from(*x) - mean).powi(2)).sum::<f64>() / count;
        assert!(
            mean.abs() < 0.02 && (var.sqrt() - 0.5).abs() < 0.02,
            "{mean} {var}"
        );
        let outside = values.iter().filter(|x| x.abs() > 1.0).count() as f64 / count;
        assert!((outside - 0.0455).abs() < 0.01, "{outside}");
        assert_eq!(values[..7], normal(1, "a", half, 7));
        assert_ne!(values[..7], normal(2, "a", half, 7));
        assert_ne!(values[..7], normal(1, "b", half, 7));
        let narrow = Normal { cutoff: 1.5, ..half };
        let values = normal(1, "a", narrow, 20_001);
        assert!(values.len() == 20_001 && values.iter().all(|x| x.abs() <= 0.75));
        assert!(values.iter().any(|x| x.abs() > 0.7));
    }
}
