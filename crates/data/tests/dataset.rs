//! What a training sees of a cache: blocks, parts, orders; and caches that somebody has damaged.

use std::collections::BTreeSet;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use oxiformers_data::{
    BadData, CacheOptions, DataFile, Dataset, Example, Preprocessor, SampleBy, Sampler, SamplingStrategy,
    TokenCache, batches, prepare,
};
use proptest::prelude::*;
use serde_json::{Value, json};

/// Words become their lengths.
struct Lengths;

impl Preprocessor for Lengths {
    fn settings(&self) -> Value {
        json!("lengths")
    }

    fn examples(&self, record: &Value) -> Result<Vec<Example>, String> {
        let words = record.as_str().unwrap_or_default().split_whitespace();
        let ids = words.map(|word| word.len() as i32).collect();
        Ok(vec![Example::default().with("input_ids", ids)])
    }
}

/// 1,200 lines of 1 to 7 words, in a cache of several parts: it is interrupted on the way.
fn cache(folder: &Path) -> TokenCache {
    let path = folder.join("data.txt");
    let line = |i: usize| format!("{}\n", vec!["a".repeat(i % 9 + 1); i % 7 + 1].join(" "));
    std::fs::write(&path, (0..1200).map(line).collect::<String>()).unwrap();
    let files = [DataFile::new(&path, None).unwrap()];
    let options = CacheOptions {
        folder: folder.join("cache"),
        sample_by: SampleBy::Line,
        bad_data: BadData::Stop,
        max_records: None,
    };
    // Where it is made already, there is nothing to interrupt.
    let _ = prepare(&files, &Lengths, &options, &mut |_| ControlFlow::Break(()));
    let cache = prepare(&files, &Lengths, &options, &mut |_| ControlFlow::Continue(())).unwrap();
    assert!(cache.prepared.parts > 1);
    cache
}

fn ids(data: &Dataset, index: u64) -> Vec<i32> {
    data.get(index).unwrap().ints("input_ids").unwrap().to_vec()
}

#[test]
fn blocks_join_texts() {
    let folder = tempfile::tempdir().unwrap();
    let examples = Dataset::new(cache(folder.path()));
    let stream: Vec<i32> = (0..examples.len())
        .flat_map(|index| ids(&examples, index))
        .collect();
    let texts: Vec<usize> = (0..examples.len())
        .flat_map(|index| vec![index as usize; examples.tokens(index).unwrap()])
        .collect();
    let blocks = Dataset::blocks(cache(folder.path()), 16, true).unwrap();
    assert_eq!(blocks.len(), stream.len() as u64 / 16);
    for index in 0..blocks.len() {
        let range = index as usize * 16..(index as usize + 1) * 16;
        assert_eq!(ids(&blocks, index), stream[range.clone()]);
        let example = blocks.get(index).unwrap();
        let expected: Vec<i32> = texts[range.clone()]
            .iter()
            .map(|text| (text - texts[range.start]) as i32)
            .collect();
        assert_eq!(example.ints("segments").unwrap(), expected, "block {index}");
        let place = blocks.source(index, &example);
        let lines =
            [texts[range.start] + 1, texts[range.end - 1] + 1].map(|line| format!("data.txt: line {line}"));
        assert!(place.contains(&lines[0]) && place.ends_with(&lines[1]), "{place}");
    }
    assert!(blocks.get(blocks.len()).is_err());
    assert!(Dataset::blocks(cache(folder.path()), 1 << 20, false).is_err());
}

#[test]
fn a_split_holds_every_example_once() {
    let folder = tempfile::tempdir().unwrap();
    let place = |data: &Dataset, index| {
        let example = data.get(index).unwrap();
        data.source(index, &example)
    };
    let all = |data: &Dataset| {
        (0..data.len())
            .map(|index| place(data, index))
            .collect::<BTreeSet<_>>()
    };
    let (train, held) = Dataset::new(cache(folder.path())).split(0.25, 42);
    assert_eq!((train.len(), held.len()), (900, 300));
    let (one, other) = (all(&train), all(&held));
    assert_eq!(
        (one.len(), other.len(), one.union(&other).count()),
        (900, 300, 1200)
    );
    assert!(one.iter().all(|place| place.contains("data.txt: line ")));
    let (again, _) = Dataset::new(cache(folder.path())).split(0.25, 42);
    assert_eq!(all(&again), one);
    assert_eq!(again.fingerprint(), train.fingerprint());
    let (another, _) = Dataset::new(cache(folder.path())).split(0.25, 43);
    assert_ne!(all(&another), one);
    assert_eq!(place(&train.clone().take(5), 4), place(&train, 4));
    assert!(train.take(5).get(5).is_err());
}

#[test]
fn every_epoch_sees_every_example() {
    let folder = tempfile::tempdir().unwrap();
    let data = Dataset::new(cache(folder.path()));
    assert_eq!((batches(1200, 7, false), batches(1200, 7, true)), (172, 171));
    let epoch = |strategy, epoch| -> Vec<Vec<u64>> {
        let mut sampler = Sampler::new(&data, 7, false, strategy, 42, epoch);
        (0..172).map(|number| sampler.batch(number).unwrap()).collect()
    };
    for strategy in [
        SamplingStrategy::Random,
        SamplingStrategy::Sequential,
        SamplingStrategy::GroupByLength,
    ] {
        let first = epoch(strategy, 0);
        let seen: BTreeSet<u64> = first.iter().flatten().copied().collect();
        assert_eq!((seen.len(), first[171].len()), (1200, 3));
        assert_eq!(first, epoch(strategy, 0));
        assert_eq!(
            first == epoch(strategy, 1),
            strategy == SamplingStrategy::Sequential
        );
        // A place in the order is found without those before it.
        let mut sampler = Sampler::new(&data, 7, false, strategy, 42, 0);
        assert_eq!(sampler.batch(100).unwrap(), first[100]);
        assert!(sampler.batch(172).unwrap().is_empty());
    }
    let grouped = epoch(SamplingStrategy::GroupByLength, 0);
    let lengths = |batch: &Vec<u64>| {
        batch
            .iter()
            .map(|index| data.tokens(*index).unwrap())
            .collect::<Vec<_>>()
    };
    let wasted = |batches: &[Vec<u64>]| -> usize {
        let of = |batch| {
            let lengths = lengths(batch);
            lengths
                .iter()
                .map(|length| lengths.iter().max().unwrap() - length)
                .sum::<usize>()
        };
        batches.iter().map(of).sum()
    };
    assert!(wasted(&grouped) * 10 < wasted(&epoch(SamplingStrategy::Random, 0)));
}

/// The files of the parts.
fn parts(folder: &Path) -> Vec<PathBuf> {
    let caches = std::fs::read_dir(folder.join("cache")).unwrap().flatten();
    let whole = caches
        .map(|entry| entry.path())
        .find(|path| path.join("dataset.json").exists())
        .unwrap();
    vec![whole.join("part-00000.safetensors"), whole]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn a_damaged_cache_is_read_or_refused(at in 0_usize..4000, byte in any::<u8>(), cut in any::<bool>()) {
        let folder = tempfile::tempdir().unwrap();
        drop(cache(folder.path()));
        let [part, whole] = &parts(folder.path())[..] else { panic!("parts") };
        let mut bytes = std::fs::read(part).unwrap();
        let at = at % bytes.len();
        if cut {
            bytes.truncate(at);
        } else {
            bytes[at] ^= byte;
        }
        std::fs::write(part, bytes).unwrap();
        if let Ok(cache) = TokenCache::open(whole) {
            for index in 0..cache.len().min(2000) {
                let _ = cache.get(index);
            }
            let _ = cache.stream("input_ids", 3, 64);
            let _ = cache.segments("input_ids", 3, 64);
        }
    }
}
