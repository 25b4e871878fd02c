//! The model card: what was trained, on what, and how it went.

use std::fmt::Write;

use serde_json::{Map, Value};

use crate::state::TrainerState;
use crate::{Plan, TrainingArguments};

/// The file with the curve, beside the card.
pub const CURVE: &str = "loss.svg";

/// What a card says besides the numbers.
#[derive(Debug, Clone, Default)]
pub struct About {
    /// What the model is called.
    pub name: String,
    /// The checkpoint that the training began with.
    pub base_model: Option<String>,
    /// The task, as recipes call it.
    pub task: String,
    /// The files of the data.
    pub data: Vec<String>,
}

/// The points of a log: `(step, value)`.
pub fn points(history: &[Map<String, Value>], name: &str) -> Vec<(f64, f64)> {
    let point = |log: &Map<String, Value>| Some((log.get("step")?.as_f64()?, log.get(name)?.as_f64()?));
    history
        .iter()
        .filter_map(point)
        .filter(|(_, value)| value.is_finite())
        .collect()
}

/// A card in Markdown, with the front matter that the Hub reads.
pub fn card(about: &About, plan: &Plan, arguments: &TrainingArguments, state: &TrainerState) -> String {
    let mut text = String::from("---\nlibrary_name: transformers\n");
    if let Some(base) = &about.base_model {
        let _ = writeln!(text, "base_model: {base}");
    }
    let _ = writeln!(
        text,
        "tags:\n- generated_from_trainer\n- oxiformers\n---\n\n# {}\n",
        about.name
    );
    match &about.base_model {
        Some(base) => {
            let _ = writeln!(
                text,
                "This model was fine-tuned from `{base}` for {} on {}.\n",
                about.task,
                about.data.join(", ")
            );
        }
        None => {
            let _ = writeln!(
                text,
                "This model was trained from scratch for {} on {}.\n",
                about.task,
                about.data.join(", ")
            );
        }
    }
    let last = state
        .log_history
        .iter()
        .rev()
        .find(|log| log.contains_key("eval_loss"));
    if let Some(last) = last {
        text.push_str("It achieves on the evaluation set:\n\n");
        for (name, value) in last {
            if let (Some(name), Some(value)) = (name.strip_prefix("eval_"), value.as_f64())
                && !["runtime", "samples_per_second"].contains(&name)
            {
                let _ = writeln!(text, "- {name}: {value:.4}");
            }
        }
        text.push('\n');
    }
    let _ = writeln!(
        text,
        "![Loss over the steps of the training]({CURVE})\n\n## Training procedure\n"
    );
    let defaults = TrainingArguments::default().to_json();
    let _ = writeln!(
        text,
        "{} of {} parameters were trained on {} examples over {} steps.\n\n| argument | value |\n|---|---|",
        plan.trainable_parameters, plan.all_parameters, plan.examples, state.global_step
    );
    let always = [
        "learning_rate",
        "per_device_train_batch_size",
        "seed",
        "optim",
        "lr_scheduler_type",
        "num_train_epochs",
    ];
    for (name, value) in arguments.to_json() {
        let hidden = ["output_dir", "resume_from_checkpoint"].contains(&name.as_str());
        if !hidden && (always.contains(&name.as_str()) || defaults.get(&name) != Some(&value)) {
            let _ = writeln!(text, "| {name} | {} |", value.to_string().trim_matches('"'));
        }
    }
    let rows: Vec<_> = state
        .log_history
        .iter()
        .filter(|log| log.contains_key("eval_loss"))
        .collect();
    if !rows.is_empty() {
        let mut names: Vec<&String> = rows[0].keys().filter(|name| name.starts_with("eval_")).collect();
        names.retain(|name| !name.ends_with("runtime") && !name.ends_with("per_second"));
        let heads: Vec<&str> = names
            .iter()
            .map(|name| name.trim_start_matches("eval_"))
            .collect();
        let _ = writeln!(
            text,
            "\n## Evaluations\n\n| step | epoch | {} |\n|---|---|{}",
            heads.join(" | "),
            "---|".repeat(heads.len())
        );
        for log in rows {
            let number = |name: &str| log.get(name).and_then(Value::as_f64).unwrap_or(f64::NAN);
            let values: Vec<_> = names.iter().map(|name| format!("{:.4}", number(name))).collect();
            let _ = writeln!(
                text,
                "| {} | {:.2} | {} |",
                number("step"),
                number("epoch"),
                values.join(" | ")
            );
        }
    }
    text
}

/// Curves as SVG: each with its name and points.
pub fn svg(curves: &[(&str, Vec<(f64, f64)>)]) -> String {
    const SIZE: (f64, f64) = (720.0, 360.0);
    const EDGE: f64 = 48.0;
    const COLORS: [&str; 4] = ["#2563eb", "#dc2626", "#059669", "#7c3aed"];
    let all = || curves.iter().flat_map(|(_, points)| points);
    let range = |of: fn(&(f64, f64)) -> f64| {
        let (low, high) = all()
            .map(of)
            .fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), x| {
                (low.min(x), high.max(x))
            });
        match high > low {
            true => (low, high),
            false if low.is_finite() => (low - 0.5, low + 0.5),
            false => (0.0, 1.0),
        }
    };
    let ((left, right), (low, high)) = (range(|point| point.0), range(|point| point.1));
    let x = |value: f64| EDGE + (value - left) / (right - left) * (SIZE.0 - 2.0 * EDGE);
    let y = |value: f64| SIZE.1 - EDGE - (value - low) / (high - low) * (SIZE.1 - 2.0 * EDGE);
    let mut text = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {} {}\" font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n",
        SIZE.0, SIZE.1
    );
    for line in 0..=4 {
        let share = f64::from(line) / 4.0;
        let (value, step) = (low + share * (high - low), left + share * (right - left));
        let _ = writeln!(
            text,
            "<line x1=\"{EDGE}\" x2=\"{0}\" y1=\"{1:.1}\" y2=\"{1:.1}\" stroke=\"#e5e7eb\"/>\n\
             <text x=\"{2}\" y=\"{3:.1}\" text-anchor=\"end\">{value:.3}</text>\n\
             <text x=\"{4:.1}\" y=\"{5}\" text-anchor=\"middle\">{step:.0}</text>",
            SIZE.0 - EDGE,
            y(value),
            EDGE - 6.0,
            y(value) + 4.0,
            x(step),
            SIZE.1 - EDGE + 18.0
        );
    }
    for (index, (name, points)) in curves.iter().enumerate() {
        let color = COLORS[index % COLORS.len()];
        // More points than there are pixels say nothing.
        let every = points.len().div_ceil(1000).max(1);
        let line: Vec<_> = points
            .iter()
            .step_by(every)
            .map(|(at, value)| format!("{:.1},{:.1}", x(*at), y(*value)))
            .collect();
        let _ = writeln!(
            text,
            "<polyline fill=\"none\" stroke=\"{color}\" stroke-width=\"1.5\" points=\"{}\"/>\n\
             <text x=\"{}\" y=\"{}\" fill=\"{color}\">{name}</text>",
            line.join(" "),
            SIZE.0 - EDGE - 120.0,
            EDGE + 16.0 * index as f64
        );
    }
    let _ = writeln!(
        text,
        "<text x=\"{}\" y=\"{}\" text-anchor=\"middle\">step</text>\n</svg>",
        SIZE.0 / 2.0,
        SIZE.1 - 10.0
    );
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_card_has_the_numbers_and_the_curve() {
        let log = |value: Value| value.as_object().expect("log").clone();
        let state = TrainerState {
            global_step: 20,
            log_history: vec![
                log(json!({"loss": 2.0, "step": 10})),
                log(
                    json!({"eval_loss": 1.25, "eval_accuracy": 0.75, "eval_runtime": 3.0, "epoch": 1.0, "step": 10}),
                ),
                log(json!({"loss": 1.0, "step": 20})),
            ],
            ..TrainerState::default()
        };
        let plan = Plan {
            examples: 80,
            eval_examples: 8,
            steps_per_epoch: 10,
            max_steps: 20,
            first_step: 0,
            trainable_parameters: 5,
            all_parameters: 7,
        };
        let about = About {
            name: "m".to_string(),
            base_model: Some("org/base".to_string()),
            task: "text-classification".to_string(),
            data: vec!["a.csv".to_string()],
        };
        let text = card(&about, &plan, &TrainingArguments::default(), &state);
        for part in [
            "base_model: org/base",
            "accuracy: 0.7500",
            "| learning_rate | 0.00005 |",
            "| 10 | 1.00 |",
            "5 of 7",
        ] {
            assert!(
                text.contains(part) || (part.contains("0.00005") && text.contains("5e-5")),
                "{part}: {text}"
            );
        }
        assert!(!text.contains("runtime"));
        let image = svg(&[
            ("loss", points(&state.log_history, "loss")),
            ("eval_loss", points(&state.log_history, "eval_loss")),
        ]);
        assert_eq!(image.matches("<polyline").count(), 2);
        assert!(image.contains("48.0,48.0") && !image.contains("NaN"), "{image}");
        assert!(!svg(&[]).contains("NaN"));
    }
}
