//! Orders of examples that are the same on every platform and need no memory.
//!
//! An order is a permutation that is computed place by place: a Feistel network over the smallest even number of bits
//! that holds every index, walked until it lands within the range (Black and Rogaway, "Ciphers with arbitrary finite
//! domains", 2002). A corpus of any size is shuffled so, and a place in the order is all there is to save.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

/// Rounds of the network; four are enough for pseudo-random permutations (Luby and Rackoff, 1988).
const ROUNDS: usize = 4;

/// A generator for one purpose of one run: the same for the same seed, purpose and numbers, whatever was drawn before.
///
/// So nothing has to be saved of it: an example is masked in the same way when training goes on as it would have been.
pub fn rng(seed: u64, purpose: &str, numbers: [u64; 2]) -> ChaCha8Rng {
    use sha2::{Digest, Sha256};
    let mut hash = Sha256::new();
    hash.update(seed.to_le_bytes());
    numbers
        .iter()
        .for_each(|number| hash.update(number.to_le_bytes()));
    hash.update(purpose.as_bytes());
    ChaCha8Rng::from_seed(hash.finalize().into())
}

/// A number below `limit`, each as likely as the others within 2⁻⁶⁴; 0 where `limit` is 0.
pub fn below(rng: &mut impl RngCore, limit: u64) -> u64 {
    ((u128::from(rng.next_u64()) * u128::from(limit)) >> 64) as u64
}

/// A number in 0..1.
pub fn unit(rng: &mut impl RngCore) -> f64 {
    // The 53 bits that an f64 holds.
    (rng.next_u64() >> 11) as f64 / (1_u64 << 53) as f64
}

/// A permutation of `0..len`.
#[derive(Debug, Clone)]
pub struct Permutation {
    len: u64,
    half: u32,
    keys: [u64; ROUNDS],
}

impl Permutation {
    /// The permutation of `0..len` that belongs to a seed, a purpose and a number (an epoch, say).
    pub fn new(len: u64, seed: u64, purpose: &str, number: u64) -> Self {
        let mut rng = rng(seed, purpose, [number, len]);
        let bits = u64::BITS - len.saturating_sub(1).leading_zeros();
        Self {
            len,
            half: bits.div_ceil(2).max(1),
            keys: std::array::from_fn(|_| rng.next_u64()),
        }
    }

    /// What stands in place `index`, which must be below `len`.
    pub fn at(&self, index: u64) -> u64 {
        debug_assert!(index < self.len);
        let mut at = index;
        loop {
            at = self.round_trip(at);
            // The network covers at most four times the range, so this takes few steps on average; a permutation's
            // cycles lead back, so it ends.
            if at < self.len || self.len == 0 {
                return at;
            }
        }
    }

    fn round_trip(&self, at: u64) -> u64 {
        let mask = (1_u64 << self.half) - 1;
        let (mut left, mut right) = (at >> self.half, at & mask);
        for key in self.keys {
            (left, right) = (right, left ^ (mix(right ^ key) & mask));
        }
        (left << self.half) | right
    }
}

/// A mixing of 64 bits: the finalizer of SplitMix64 (Steele, Lea and Flood, 2014).
fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_index_comes_once() {
        for len in [1, 2, 3, 7, 64, 65, 1000] {
            let order = Permutation::new(len, 42, "train", 0);
            let mut seen: Vec<u64> = (0..len).map(|index| order.at(index)).collect();
            if len == 1000 {
                let still = seen.iter().zip(0..).filter(|(at, index)| **at == *index);
                assert!(still.count() < 10);
            }
            seen.sort_unstable();
            assert!(seen.into_iter().eq(0..len), "{len}");
        }
    }

    #[test]
    fn orders_are_the_same_everywhere() {
        let order = Permutation::new(10, 42, "train", 0);
        let order: Vec<u64> = (0..10).map(|index| order.at(index)).collect();
        assert_eq!(order, ORDER);
        let other = Permutation::new(10, 42, "train", 1);
        assert_ne!((0..10).map(|index| other.at(index)).collect::<Vec<_>>(), ORDER);
        let mut rng = rng(7, "mask", [3, 4]);
        assert_eq!((0..5).map(|_| below(&mut rng, 100)).collect::<Vec<_>>(), DRAWN);
    }

    /// Written down once; a change would change every run.
    const ORDER: [u64; 10] = [5, 4, 8, 3, 0, 1, 9, 6, 2, 7];
    const DRAWN: [u64; 5] = [15, 57, 55, 28, 89];
}
