//! The distribution after all processors is Transformers': same logits in, same probabilities out.

use oxiformers_generate::logits::softmax;
use oxiformers_generate::{GenerationConfig, LogitsProcessor, LogitsProcessors};
use serde_json::Value;

const TOLERANCE: f32 = 1e-6;

#[test]
fn probabilities_after_processors() {
    let cases: Vec<Value> = serde_json::from_str(include_str!("fixtures/processors.json")).unwrap();
    assert!(cases.len() >= 50);
    let mut worst = 0f32;
    for case in &cases {
        let name = case["name"].as_str().unwrap();
        let ids = |field: &str| -> Vec<u32> { serde_json::from_value(case[field].clone()).unwrap() };
        let config = case["config"].as_object().unwrap().clone();
        let config = GenerationConfig::from_json(config, name).unwrap();
        let max_length = case["max_length"].as_u64().unwrap() as usize;
        let processors = LogitsProcessors::new(&config, &ids("prompt"), &ids("prompt"), max_length).unwrap();
        let number = |value: &Value| match value {
            Value::String(text) => text.parse().unwrap(),
            value => value.as_f64().unwrap() as f32,
        };
        let mut logits: Vec<f32> = case["logits"].as_array().unwrap().iter().map(number).collect();
        processors.process(&ids("ids"), &mut logits);
        let kept = logits.iter().filter(|logit| **logit > -1e30).count();
        assert_eq!(kept as u64, case["kept"].as_u64().unwrap(), "{name}: tokens kept");
        let expected: Vec<f32> = case["probs"].as_array().unwrap().iter().map(number).collect();
        for (id, (ours, theirs)) in softmax(&logits).into_iter().zip(expected).enumerate() {
            let difference = (ours - theirs).abs();
            assert!(
                difference <= TOLERANCE,
                "{name}: token {id}: {ours} instead of {theirs}"
            );
            worst = worst.max(difference);
        }
    }
    println!("{} cases, largest difference {worst:e}", cases.len());
}
