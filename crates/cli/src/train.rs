//! `oxiformers train` and `oxiformers evaluate`.

use std::io::IsTerminal;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, bail};
use oxiformers::device;
use oxiformers::hub::{ModelFiles, Source, resolve};
use oxiformers_data::Progress;
use oxiformers_train::card::{self, About};
use oxiformers_train::{
    Callback, Event, Job, MetricsFile, Outcome, Recipe, Surroundings, TensorBoard, TrainerState,
    TrainingArguments,
};
use serde_json::{Map, Value, json};

use crate::args::{EvaluateArgs, RecipeArgs, TrainArgs};
use crate::{interrupt, session};

mod dashboard;

use dashboard::Dashboard;

/// The recipe with the values of the command line.
fn recipe(args: &RecipeArgs) -> anyhow::Result<Recipe> {
    let name = args.recipe.display();
    let text = std::fs::read_to_string(&args.recipe).with_context(|| name.to_string())?;
    let mut json: Value = toml::from_str(&text).with_context(|| name.to_string())?;
    for (key, value) in values(&args.values)? {
        set(&mut json, &key, value)?;
    }
    Recipe::from_json(json).with_context(|| name.to_string())
}

/// `--name value`, `--name=value` or, for what is true, `--name`.
fn values(words: &[String]) -> anyhow::Result<Vec<(String, Value)>> {
    let mut found = Vec::new();
    let mut words = words.iter().peekable();
    while let Some(word) = words.next() {
        let Some(name) = word.strip_prefix("--") else {
            bail!("`{word}` is not expected here; write --NAME VALUE");
        };
        let (name, value) = match name.split_once('=') {
            Some((name, value)) => (name, value.to_string()),
            // A negative number is a value.
            None => match words.next_if(|next| !next.starts_with("--")) {
                Some(value) => (name, value.clone()),
                None => (name, "true".to_string()),
            },
        };
        found.push((name.replace('-', "_"), parse(&value)));
    }
    Ok(found)
}

/// A value as TOML writes it; anything else is a text.
fn parse(value: &str) -> Value {
    let line = toml::from_str::<Map<String, Value>>(&format!("value = {value}")).ok();
    let value_of = |mut line: Map<String, Value>| line.remove("value").filter(|_| line.is_empty());
    line.and_then(value_of)
        .unwrap_or_else(|| Value::String(value.to_string()))
}

/// Sets `table.name`, or a name that stands in one table only.
fn set(recipe: &mut Value, key: &str, value: Value) -> anyhow::Result<()> {
    let path = match key.contains('.') || key == "task" {
        true => key.to_string(),
        false => {
            let mut all = Recipe::names();
            all.extend(
                TrainingArguments::names()
                    .into_iter()
                    .map(|name| format!("training.{name}")),
            );
            let ends = format!(".{key}");
            let fitting: Vec<_> = all
                .iter()
                .filter(|name| name.ends_with(&ends) && name.matches('.').count() == 1)
                .collect();
            match fitting.as_slice() {
                [one] => (*one).clone(),
                [] => bail!("--{key}: no recipe has such a value"),
                several => bail!("--{key}: may be any of {several:?}; write it with its table"),
            }
        }
    };
    let mut at = recipe;
    for name in path.split('.') {
        let Value::Object(table) = at else {
            bail!("--{key}: `{path}` is no place in a recipe");
        };
        at = table.entry(name).or_insert_with(|| Value::Object(Map::new()));
    }
    *at = value;
    Ok(())
}

/// Finds a model: a folder of its own, or as everywhere.
fn find_model(name: &str) -> oxiformers_train::Result<ModelFiles> {
    if Path::new(name).is_dir() {
        return Ok(ModelFiles::from_dir(Path::new(name))?);
    }
    Ok(resolve(&name.parse::<Source>()?, &session::fetch_options())?)
}

fn prepare(args: &RecipeArgs, recipe: &Recipe, evaluation: bool) -> anyhow::Result<Box<dyn Job>> {
    if let Some(threads) = args.threads {
        device::set_threads(threads.into());
    }
    let bar = indicatif::ProgressBar::new_spinner();
    let mut skipped = 0;
    let mut report = |progress: Progress| {
        skipped = progress.skipped;
        bar.set_message(format!(
            "{} records, {} tokens",
            progress.records, progress.tokens
        ));
        bar.tick();
        match interrupt::happened() {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        }
    };
    let around = Surroundings {
        resolve: &find_model,
        device: device::parse(&args.device)?,
        report: &mut report,
        evaluation,
    };
    let job = recipe.prepare(around)?;
    bar.finish_and_clear();
    if skipped > 0 {
        let records = if skipped == 1 { "record" } else { "records" };
        eprintln!("{skipped} {records} left out, on which nothing can be trained");
    }
    Ok(job)
}

pub fn run(args: &TrainArgs) -> anyhow::Result<()> {
    let mut recipe = recipe(&args.recipe)?;
    if args.resume {
        recipe
            .training
            .insert("resume_from_checkpoint".to_string(), json!(true));
    }
    interrupt::watch();
    let mut job = prepare(&args.recipe, &recipe, false)?;
    if args.dry_run {
        return dry_run(job.as_mut());
    }
    let arguments = job.arguments().clone();
    let output = arguments.output_dir.clone();
    std::fs::create_dir_all(&output).with_context(|| output.display().to_string())?;
    job.watch(Box::new(MetricsFile::new(output.join(MetricsFile::NAME))));
    if arguments.report_to.iter().any(|to| to == "tensorboard") {
        job.watch(Box::new(TensorBoard::new(&output.join("runs"))));
    }
    let stop = Arc::new(AtomicBool::new(false));
    job.watch(Box::new(StopOnInterrupt(stop.clone())));
    job.stop_with(stop);
    if std::io::stderr().is_terminal() && !args.plain {
        job.watch(Box::new(Dashboard::new()));
    } else {
        job.watch(Box::new(Lines));
    }
    let plan = job.plan();
    let result = job.train()?;
    interrupt::unwatch();
    if result.outcome == Outcome::Interrupted {
        eprintln!(
            "stopped after step {}; `--resume` goes on from {}",
            result.global_step,
            output
                .join(format!("checkpoint-{}", result.global_step))
                .display()
        );
        return Ok(());
    }
    job.save_model(&output)?;
    let about = About {
        name: output
            .file_name()
            .map_or("model".into(), |name| name.to_string_lossy().into_owned()),
        base_model: recipe.model.name.clone(),
        task: serde_json::to_value(recipe.task)?
            .as_str()
            .unwrap_or_default()
            .to_string(),
        data: data_names(&recipe)?,
    };
    let history = &job.state().log_history;
    let curves = ["loss", "eval_loss"].map(|name| (name, card::points(history, name)));
    let curves: Vec<_> = curves
        .into_iter()
        .filter(|(_, points)| !points.is_empty())
        .collect();
    write(&output.join(card::CURVE), &card::svg(&curves))?;
    write(
        &output.join("README.md"),
        &card::card(&about, &plan, &arguments, job.state()),
    )?;
    println!(
        "{}: {} steps, loss {:.4}",
        output.display(),
        result.global_step,
        result.training_loss
    );
    let evaluated = history.iter().rev().find(|log| log.contains_key("eval_loss"));
    if let Some(log) = evaluated {
        println!("{}", line(log));
    }
    Ok(())
}

fn write(path: &Path, text: &str) -> anyhow::Result<()> {
    oxiformers_train::checkpoint::write_file(path, text.as_bytes())
        .with_context(|| path.display().to_string())
}

fn data_names(recipe: &Recipe) -> anyhow::Result<Vec<String>> {
    let data = serde_json::to_value(&recipe.data)?;
    Ok(match &data["train"] {
        Value::String(one) => vec![one.clone()],
        Value::Array(many) => many
            .iter()
            .filter_map(|name| Some(name.as_str()?.to_string()))
            .collect(),
        _ => Vec::new(),
    })
}

/// What a training would take.
fn dry_run(job: &mut dyn Job) -> anyhow::Result<()> {
    let plan = job.plan();
    println!(
        "parameters: {} trained of {}",
        plan.trainable_parameters, plan.all_parameters
    );
    println!(
        "examples: {}, for evaluation: {}",
        plan.examples, plan.eval_examples
    );
    println!("steps: {} ({} per epoch)", plan.max_steps, plan.steps_per_epoch);
    let seconds = job.measure()?;
    if let Some(peak) = peak_memory() {
        println!(
            "memory: {:.0} MiB at the peak of two steps",
            peak as f64 / (1 << 20) as f64
        );
    }
    println!(
        "time: {seconds:.3} s per step, {} in all, without evaluation and checkpoints",
        duration(seconds * plan.max_steps as f64)
    );
    Ok(())
}

/// The most memory that this process has held, in bytes, where the system says it.
fn peak_memory() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kilobytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kilobytes << 10)
}

fn duration(seconds: f64) -> String {
    let seconds = seconds.round() as u64;
    match (seconds / 3600, seconds / 60 % 60, seconds % 60) {
        (0, 0, s) => format!("{s} s"),
        (0, m, s) => format!("{m} min {s} s"),
        (h, m, _) => format!("{h} h {m} min"),
    }
}

pub fn evaluate(args: &EvaluateArgs) -> anyhow::Result<()> {
    let recipe = recipe(&args.recipe)?;
    let mut job = prepare(&args.recipe, &recipe, true)?;
    let log = job.evaluate()?;
    if args.json {
        println!("{}", Value::Object(log));
    } else {
        println!("{}", line(&log));
    }
    Ok(())
}

/// A log as a line.
fn line(log: &Map<String, Value>) -> String {
    let number = |value: &Value| match value.as_f64() {
        Some(x) if x != 0.0 && (x.abs() < 1e-3 || x.abs() >= 1e5) => format!("{x:.3e}"),
        Some(x) if x.fract() == 0.0 => format!("{x}"),
        Some(x) => format!("{x:.4}"),
        None => value.to_string(),
    };
    // The step first.
    let step = log.get("step").map(|step| format!("step {step}"));
    let others = log
        .iter()
        .filter(|(name, _)| *name != "step")
        .map(|(name, value)| format!("{name} {}", number(value)));
    step.into_iter().chain(others).collect::<Vec<_>>().join("  ")
}

/// Stops after the step during which Ctrl-C or a signal came.
struct StopOnInterrupt(Arc<AtomicBool>);

impl Callback for StopOnInterrupt {
    fn on_event(
        &mut self,
        _: &Event,
        _: &TrainerState,
        _: &TrainingArguments,
    ) -> oxiformers_train::Result<()> {
        if interrupt::happened() {
            self.0.store(true, Ordering::SeqCst);
        }
        Ok(())
    }
}

/// A line for each log.
struct Lines;

impl Callback for Lines {
    fn on_event(
        &mut self,
        event: &Event,
        _: &TrainerState,
        _: &TrainingArguments,
    ) -> oxiformers_train::Result<()> {
        match event {
            Event::Begin(plan) => eprintln!(
                "{} steps over {} examples, {} of {} parameters trained{}",
                plan.max_steps,
                plan.examples,
                plan.trainable_parameters,
                plan.all_parameters,
                match plan.first_step {
                    0 => String::new(),
                    step => format!(", from step {step}"),
                }
            ),
            Event::Log(log) => eprintln!("{}", line(log)),
            Event::Saved(path) => eprintln!("saved {}", path.display()),
            Event::Skipped(message) => eprintln!("left out: {message}"),
            _ => {}
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_value_is_a_flag() {
        let words = [
            "--learning-rate",
            "1e-4",
            "--data.train=[\"a.txt\", \"b.txt\"]",
            "--bf16",
            "--max-steps",
            "-1",
        ];
        let words = words.map(str::to_string);
        let mut recipe = json!({"task": "causal-lm"});
        for (key, value) in values(&words).expect("values") {
            set(&mut recipe, &key, value).expect("set");
        }
        assert_eq!(
            recipe,
            json!({
                "task": "causal-lm",
                "training": {"learning_rate": 1e-4, "bf16": true, "max_steps": -1},
                "data": {"train": ["a.txt", "b.txt"]},
            })
        );
        let error = set(&mut recipe, "learning_speed", json!(1)).expect_err("unknown");
        assert!(error.to_string().contains("learning_speed"));
        assert!(values(&["word".to_string()]).is_err());
        assert_eq!(parse("text with words"), json!("text with words"));
    }

    #[test]
    fn logs_are_lines() {
        let log = json!({"loss": 1.25, "learning_rate": 5e-5, "epoch": 1.0, "step": 3});
        assert_eq!(
            line(log.as_object().expect("log")),
            "step 3  loss 1.2500  learning_rate 5.000e-5  epoch 1"
        );
        assert_eq!(duration(3725.0), "1 h 2 min");
    }
}
