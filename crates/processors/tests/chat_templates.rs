//! Chat templates against what Transformers renders from them.
//!
//! The fixtures are made by `fixtures/chat_templates/make_golden.py`.

use std::path::PathBuf;

use oxiformers_processors::chat_template::NaiveDateTime;
use oxiformers_processors::{ChatTemplate, RenderOptions, Rendered, Result};
use serde_json::{Map, Value};

fn fixtures() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/chat_templates")
}

fn json(name: &str) -> Value {
    serde_json::from_slice(&std::fs::read(fixtures().join(name)).unwrap()).unwrap()
}

/// The fixed clock of the goldens.
fn clock() -> NaiveDateTime {
    "2024-07-26T09:05:07.123456".parse().unwrap()
}

/// Options of `apply_chat_template` in Python's words.
fn options(python: &Map<String, Value>) -> RenderOptions {
    let list = |name: &str| python.get(name).and_then(Value::as_array).cloned();
    let mut options = RenderOptions {
        tools: list("tools"),
        documents: list("documents"),
        now: Some(clock()),
        ..RenderOptions::default()
    };
    for (name, value) in python {
        match name.as_str() {
            "tools" | "documents" => {}
            "add_generation_prompt" => options.add_generation_prompt = value.as_bool().unwrap(),
            "continue_final_message" => {
                options.continue_final_message = Some(value.as_str().unwrap_or("content").into());
            }
            _ => options = options.with(name, value.clone()),
        }
    }
    options
}

fn template(source: &str, special: &Value) -> Result<ChatTemplate> {
    Ok(ChatTemplate::new(source)?.with_special_tokens(special.as_object().unwrap().clone()))
}

/// Where a rendering differs from Python's, in words.
fn difference(ours: &Result<Rendered>, golden: &Value) -> Option<String> {
    let text = golden.get("text").and_then(Value::as_str);
    match (ours, text) {
        (Err(_), None) => None,
        (Ok(ours), Some(text)) if ours.text != text => {
            let same = ours
                .text
                .chars()
                .zip(text.chars())
                .take_while(|(a, b)| a == b)
                .count();
            let from = |text: &str| {
                text.chars()
                    .skip(same.saturating_sub(30))
                    .take(120)
                    .collect::<String>()
            };
            Some(format!(
                "differs:\n  ours   {:?}\n  golden {:?}",
                from(&ours.text),
                from(text)
            ))
        }
        (Ok(ours), Some(_)) => {
            let ours: Vec<[usize; 2]> = ours
                .generation
                .iter()
                .map(|span| [span.start, span.end])
                .collect();
            let golden: Vec<[usize; 2]> = serde_json::from_value(golden["spans"].clone()).unwrap();
            (ours != golden).then(|| format!("generation blocks at {ours:?}, not {golden:?}"))
        }
        (Ok(ours), None) => Some(format!(
            "rendered {:?}, but Python refuses: {}",
            ours.text, golden["message"]
        )),
        (Err(error), Some(text)) => Some(format!("{error}\n  golden {text:?}")),
    }
}

#[test]
fn published_templates() {
    let input = json("cases.json");
    let mut failures = Vec::new();
    let mut count = 0;
    for file in std::fs::read_dir(fixtures().join("templates")).unwrap() {
        let file = file.unwrap().path();
        let name = file.file_stem().unwrap().to_str().unwrap();
        let template = template(&std::fs::read_to_string(&file).unwrap(), &input["special"]).unwrap();
        let golden = json(&format!("golden/{name}.json"));
        for (case, input) in input["cases"].as_object().unwrap() {
            let messages = input["messages"].as_array().unwrap();
            let options = options(input["options"].as_object().unwrap());
            let mut ours = template.render_tracked(messages, &options);
            if let (Some(_), Ok(ours)) = (&options.continue_final_message, &mut ours) {
                // Transformers makes no mask of an open message.
                ours.generation.clear();
            }
            count += 1;
            if let Some(difference) = difference(&ours, &golden[case]) {
                failures.push(format!("{name}/{case}: {difference}"));
            }
        }
    }
    assert!(
        failures.is_empty(),
        "{} of {count}:\n{}",
        failures.len(),
        failures.join("\n")
    );
    assert!(count >= 1000, "only {count} cases");
}

#[test]
fn features_of_jinja() {
    let golden = json("features.json");
    let messages = golden["messages"].as_array().unwrap();
    let mut failures = Vec::new();
    for feature in golden["features"].as_array().unwrap() {
        let source = feature["template"].as_str().unwrap();
        let options = RenderOptions {
            now: Some(clock()),
            ..RenderOptions::default()
        };
        let ours = template(source, &golden["special"])
            .and_then(|template| template.render_tracked(messages, &options));
        if let Some(difference) = difference(&ours, feature) {
            failures.push(format!("{source}\n  {difference}"));
        }
    }
    assert!(
        failures.is_empty(),
        "{}:\n{}",
        failures.len(),
        failures.join("\n")
    );
}

/// Command R brings a template for tools and one for documents beside its default.
#[test]
fn named_templates() {
    let input = json("cases.json");
    let source =
        |name: &str| std::fs::read_to_string(fixtures().join(format!("templates/{name}.jinja"))).unwrap();
    let named = [
        ("default", "cohere2"),
        ("tool_use", "command_a_tool_use"),
        ("rag", "command_a_rag"),
    ];
    let template = ChatTemplate::named(named.map(|(name, file)| (name.to_string(), source(file))))
        .unwrap()
        .with_special_tokens(input["special"].as_object().unwrap().clone());
    assert_eq!(
        template.names().collect::<Vec<_>>(),
        ["default", "tool_use", "rag"]
    );
    for (case, name, file) in [
        ("system", None, "cohere2"),
        ("tools", None, "command_a_tool_use"),
        ("documents", Some("rag"), "command_a_rag"),
        ("tools", Some("default"), "cohere2"),
    ] {
        let case_input = &input["cases"][case];
        let mut options = options(case_input["options"].as_object().unwrap());
        options.template = name.map(str::to_owned);
        let text = template
            .render(case_input["messages"].as_array().unwrap(), &options)
            .unwrap();
        assert_eq!(text, json(&format!("golden/{file}.json"))[case]["text"]);
    }
    let missing = RenderOptions {
        template: Some("nope".into()),
        ..RenderOptions::default()
    };
    let message = [serde_json::json!({"role": "user", "content": "x"})];
    let error = template.render(&message, &missing).unwrap_err().to_string();
    assert!(error.contains("nope") && error.contains("tool_use"), "{error}");
}
