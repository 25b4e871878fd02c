//! The real ALBERT of rxnmapper, a legacy pickle, against what Transformers made of the same file
//! (`fixtures/rxnmapper.py`). Skipped, loudly, where the model is not at hand:
//! `oxiformers download pypi:rxnmapper==0.4.3` brings it into the cache.

use oxiformers::hub::{FetchOptions, Source, resolve};
use oxiformers::{AutoModelForMaskedLM, EncoderInputs, LoadOptions};
use serde::Deserialize;

const MODEL: &str = "pypi:rxnmapper==0.4.3/rxnmapper/models/transformers/albert_heads_8_uspto_all_1310k";

#[derive(Deserialize)]
struct Answer {
    reaction: String,
    input_ids: Vec<u32>,
    mask: usize,
    top: Vec<usize>,
    scores: Vec<f64>,
}

#[test]
fn masked_tokens_equal_transformers() {
    let options = FetchOptions {
        offline: true,
        ..FetchOptions::from_env()
    };
    let source: Source = MODEL.parse().unwrap();
    let files = match resolve(&source, &options) {
        Ok(files) => files,
        Err(error) => {
            println!("!!!! SKIPPED, the real model is not in the cache: {error} !!!!");
            return;
        }
    };
    let model = AutoModelForMaskedLM::from_files(&files, &LoadOptions::default()).unwrap();
    let answers: Vec<Answer> = serde_json::from_str(include_str!("fixtures/rxnmapper.json")).unwrap();
    // All of them at once: padding changes nothing.
    let rows: Vec<Vec<u32>> = answers.iter().map(|answer| answer.input_ids.clone()).collect();
    let logits = model.forward(&EncoderInputs::padded(&rows, 0)).unwrap().logits;
    for (row, answer) in answers.iter().enumerate() {
        let logits = logits.clone().narrow(0, row, 1).narrow(1, answer.mask, 1);
        let logits: Vec<f64> = logits.into_data().iter::<f64>().collect();
        let total: f64 = logits.iter().map(|x| x.exp()).sum();
        let mut order: Vec<usize> = (0..logits.len()).collect();
        order.sort_by(|a, b| logits[*b].total_cmp(&logits[*a]));
        assert_eq!(order[..5], answer.top, "{}", answer.reaction);
        for (id, score) in answer.top.iter().zip(&answer.scores) {
            let ours = logits[*id].exp() / total;
            assert!(
                (ours - score).abs() < 1e-4,
                "{}: {ours} is not {score}",
                answer.reaction
            );
        }
    }
}
