//! Learning rates against Transformers'.
//!
//! `fixtures/make.py` made the reference.

mod common;

use oxiformers_train::{Schedule, ScheduleConfig, SchedulerType};
use serde_json::{Value, json};

fn numbers(list: &Value) -> Vec<f64> {
    list.as_array()
        .expect("a list")
        .iter()
        .map(|x| x.as_f64().expect("a number"))
        .collect()
}

#[test]
fn like_transformers() {
    let reference = common::json("schedules.json");
    let metrics = numbers(&reference["metrics"]);
    let cases = reference["cases"].as_object().expect("cases");
    let mut seen = std::collections::BTreeSet::new();
    for (name, case) in cases {
        let config: ScheduleConfig = serde_json::from_value(case["config"].clone()).expect(name);
        seen.insert(case["config"]["lr_scheduler_type"].to_string());
        let mut schedule = Schedule::new(&config, 1e-3, 100).expect(name);
        for (step, expected) in numbers(&case["rates"]).into_iter().enumerate() {
            let ours = schedule.learning_rate(step);
            assert!(
                (ours - expected).abs() <= 1e-12,
                "{name}, step {step}: {ours} {expected}"
            );
            if schedule.observes() {
                schedule.observe(metrics[step]);
                // A schedule that was saved goes on.
                let saved = serde_json::to_string(&schedule).expect("JSON");
                schedule = serde_json::from_str(&saved).expect("JSON");
            }
        }
    }
    assert_eq!(seen.len(), 12, "{seen:?}");
}

#[test]
fn settings_that_make_no_sense() {
    let build = |fields: Value| {
        let config: ScheduleConfig = serde_json::from_value(fields).expect("fields");
        Schedule::new(&config, 1e-3, 100)
            .expect_err("an error")
            .to_string()
    };
    assert!(build(json!({"lr_scheduler_type": "polynomial", "lr_end": 0.1})).contains("lr_end"));
    assert!(build(json!({"lr_scheduler_type": "cosine_with_min_lr"})).contains("min_lr"));
    assert!(build(json!({"lr_scheduler_type": "warmup_stable_decay"})).contains("num_decay_steps"));
    let long = json!({"lr_scheduler_type": "warmup_stable_decay", "num_decay_steps": 99, "warmup_steps": 2});
    assert!(build(long).contains("num_decay_steps"));
    assert!(build(json!({"lr_scheduler_type": "greedy", "greedy": {"factor": 1.0}})).contains("factor"));
    assert!(serde_json::from_value::<ScheduleConfig>(json!({"lr_scheduler_type": "wavy"})).is_err());
    let config = ScheduleConfig {
        lr_scheduler_type: SchedulerType::Linear,
        ..ScheduleConfig::default()
    };
    assert!(Schedule::new(&config, f64::NAN, 10).is_err());
    // A training of no steps has a learning rate all the same.
    assert!(
        Schedule::new(&config, 1.0, 0)
            .expect("a schedule")
            .learning_rate(0)
            .is_finite()
    );
}
