//! Dropout (Srivastava et al., 2014) whose draws follow from numbers alone: a backward pass makes them again instead of
//! keeping them.

/// Which values are left out.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Dropout {
    /// The share that is left out, from 0 on and below 1.
    pub rate: f64,
    /// Where the randomness comes from: the same for the same number.
    pub seed: u64,
}

impl Dropout {
    /// The same for one of many rows.
    #[inline(always)]
    pub fn of_row(self, row: u64) -> Self {
        let seed = draw(self.seed, row);
        Self { seed, ..self }
    }

    /// Multiplies values, the first of which is the one at `first`, with 0, or with what keeps their expectation.
    #[inline(always)]
    pub fn apply(self, first: usize, x: &mut [f32]) {
        // Of the numbers from 0 to 2²⁴, those that lie below the rate.
        let below = (self.rate * (1 << 24) as f64).ceil() as u64;
        let scale = (1.0 / (1.0 - self.rate)) as f32;
        for (i, x) in x.iter_mut().enumerate() {
            let left_out = draw(self.seed, (first + i) as u64) >> 40 < below;
            *x *= if left_out { 0.0 } else { scale };
        }
    }

    /// What `count` values from the first one on are multiplied with.
    pub fn factors(self, count: usize) -> Vec<f32> {
        let mut factors = vec![1.0; count];
        self.apply(0, &mut factors);
        factors
    }
}

/// A number of 64 random bits at a place of a sequence (SplitMix64: Steele, Lea and Flood, 2014).
#[inline(always)]
pub fn draw(seed: u64, place: u64) -> u64 {
    let mut x = seed.wrapping_add(place.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_of_values() {
        let dropout = Dropout { rate: 0.25, seed: 3 };
        let factors = dropout.factors(10_000);
        let left_out = factors.iter().filter(|x| **x == 0.0).count();
        assert!((2300..2700).contains(&left_out), "{left_out}");
        assert!(factors.iter().all(|x| *x == 0.0 || (x - 4.0 / 3.0).abs() < 1e-6));
        let mut part = vec![1.0; 100];
        dropout.apply(500, &mut part);
        assert_eq!(part, factors[500..600]);
        assert_ne!(dropout.of_row(1).factors(100), dropout.of_row(2).factors(100));
        let none = Dropout { rate: 0.0, seed: 3 };
        assert!(none.factors(100).iter().all(|x| *x == 1.0));
    }
}
