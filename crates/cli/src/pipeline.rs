//! `oxiformers pipeline`: a task over texts, files or a pipe.

use std::fs::File;
use std::io::{self, Write};
use std::rc::Rc;
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use indicatif::{ProgressBar, ProgressStyle};
use oxiformers::{AnyPipeline, Error, Task, block_on};
use serde_json::{Map, Value, json};

use crate::args::{Format, PipelineArgs, TaskArgs};
use crate::job::{self, Job};
use crate::records;
use crate::{interrupt, session};

/// Batches that are run before their answers are written.
const BATCHES: usize = 8;

pub fn run(args: &PipelineArgs) -> anyhow::Result<()> {
    let task = Task::parse(&args.task)?;
    let options = Value::Object(args.options.to_json()?);
    let form = Form::new(task, args)?;
    let total = match form.is_one() || args.file.is_some() || !args.inputs.is_empty() {
        // What cannot be read is found before hours of work.
        true => Some(
            form.inputs()?
                .try_fold(0, |count, input| input.map(|_| count + 1))?,
        ),
        false => None,
    };
    let model = args.model.as_deref().unwrap_or(task.default_model());
    let mut out = match &args.output {
        Some(path) => {
            let inputs = match (&args.file, args.inputs.as_slice()) {
                (Some(path), _) => json!({ "file": path, "sha256": job::sha256(File::open(path)?)? }),
                (None, []) => bail!("--output: what comes from a pipe cannot be gone on with; name a --file"),
                (None, texts) => json!({ "sha256": job::sha256(serde_json::to_string(texts)?.as_bytes())? }),
            };
            let mut what = json!({ "task": args.task, "model": model, "options": options, "inputs": inputs });
            if let Some(path) = &args.options.table {
                what["table"] = json!({ "file": path, "sha256": job::sha256(File::open(path)?)? });
            }
            Out::Job(Job::open(path, what.as_object().context("no object")?)?)
        }
        None if args.json => Out::Json,
        // What has several lines is set apart from the next answer.
        None => Out::Text {
            apart: total != Some(1),
        },
    };
    let done = match &out {
        Out::Job(job) => job.done,
        _ => 0,
    };
    if done > 0 {
        eprintln!("{done} answers are there already");
    }
    if args.model.is_none() {
        eprintln!("no --model: {model}");
    }
    let (files, load) = session::model(Some(model), &args.run)?;
    let pipeline = AnyPipeline::from_files(&args.task, &files, &load)?;
    let generates = matches!(
        task,
        Task::TextGeneration | Task::Text2TextGeneration | Task::Summarization | Task::Translation
    );
    let batch_size = args.batch_size.unwrap_or(if generates { 8 } else { 128 });

    let bar = progress(total);
    bar.set_position(done as u64);
    bar.reset_eta();
    interrupt::watch();
    // The batch that a job was stopped in is run again whole, for answers are the same to the last digit only in it.
    let size = batch_size * BATCHES;
    let mut count = done - done % size;
    let mut inputs = form.inputs()?.skip(count);
    loop {
        let chunk = inputs.by_ref().take(size).collect::<anyhow::Result<Vec<_>>>()?;
        if chunk.is_empty() {
            break;
        }
        if interrupt::happened() {
            bar.finish_and_clear();
            match &args.output {
                Some(path) => bail!(
                    "stopped: {} has {count} answers, and the same command goes on",
                    path.display()
                ),
                None => bail!("stopped after {count} answers"),
            }
        }
        let answers = out.answers(&pipeline, &chunk, &options, batch_size);
        let answers = answers.map_err(|error| match error {
            Error::Input { index, message } => anyhow!("input {}: {message}", count + index + 1),
            error => error.into(),
        })?;
        let known = done.saturating_sub(count);
        count += answers.len();
        bar.suspend(|| out.write(answers.get(known..).unwrap_or_default()))?;
        bar.set_position(count as u64);
    }
    bar.finish_and_clear();
    match out {
        Out::Job(job) => job.finish(),
        _ => Ok(()),
    }
}

fn progress(total: Option<usize>) -> ProgressBar {
    let (bar, style) = match total {
        Some(0 | 1) => return ProgressBar::hidden(),
        Some(total) => (
            ProgressBar::new(total as u64),
            "{bar:30} {pos}/{len}, {per_sec}, {eta} left",
        ),
        None => (ProgressBar::new_spinner(), "{spinner} {pos}, {per_sec}"),
    };
    bar.enable_steady_tick(Duration::from_millis(500));
    bar.with_style(ProgressStyle::with_template(style).unwrap_or_else(|_| ProgressStyle::default_bar()))
}

/// Where answers go.
enum Out {
    Job(Job),
    Json,
    Text { apart: bool },
}

impl Out {
    /// Answers as they are to be written.
    fn answers(
        &self,
        pipeline: &AnyPipeline,
        inputs: &[Value],
        options: &Value,
        batch_size: usize,
    ) -> oxiformers::Result<Vec<String>> {
        match self {
            Self::Job(_) | Self::Json => {
                let mut answers = block_on(pipeline.run_to_json(inputs, options, batch_size))?;
                answers.iter_mut().for_each(|answer| answer.push('\n'));
                Ok(answers)
            }
            Self::Text { apart } => {
                let answers = block_on(pipeline.run_to_text(inputs, options, batch_size))?;
                let end = |text: &str| {
                    if *apart && text.contains('\n') {
                        "\n\n"
                    } else {
                        "\n"
                    }
                };
                Ok(answers
                    .iter()
                    .map(|text| format!("{text}{}", end(text)))
                    .collect())
            }
        }
    }

    fn write(&mut self, answers: &[String]) -> anyhow::Result<()> {
        match self {
            Self::Job(job) => job.write(&answers.concat()),
            _ => print(&answers.concat()),
        }
    }
}

fn print(text: &str) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    Ok(out.flush()?)
}

/// How texts and rows become inputs of a task.
struct Form<'a> {
    task: Task,
    args: &'a PipelineArgs,
    /// What all texts ask about.
    table: Option<Rc<Value>>,
}

impl<'a> Form<'a> {
    fn new(task: Task, args: &'a PipelineArgs) -> anyhow::Result<Self> {
        let table = match &args.options.table {
            Some(_) if task != Task::TableQuestionAnswering => {
                bail!("--table is for table-question-answering")
            }
            Some(path) => Some(Rc::new(records::table(path)?)),
            None => None,
        };
        let form = Self { task, args, table };
        if form.question().is_some() {
            if form.table.is_none() {
                bail!("--query: what is asked about; name a --table");
            }
            if args.file.is_some() || !args.inputs.is_empty() {
                bail!("--query: there are other questions as well; ask them all as texts");
            }
        }
        Ok(form)
    }

    /// The only question about a table.
    fn question(&self) -> Option<&'a str> {
        let query = self.args.options.query.as_deref();
        query.filter(|_| self.task == Task::TableQuestionAnswering)
    }

    /// The inputs, from wherever they are to come.
    fn inputs(&self) -> anyhow::Result<Box<dyn Iterator<Item = anyhow::Result<Value>> + 'a>> {
        let args = self.args;
        let records: Box<dyn Iterator<Item = anyhow::Result<Value>> + 'a> =
            match (&args.file, args.inputs.as_slice(), self.question()) {
                (Some(path), ..) => records::from_file(path, args.format.unwrap_or(Format::of(path)))?,
                (None, [], Some(question)) => Box::new(std::iter::once(Ok(question.into()))),
                (None, [], None) => records::from_stdin(args.format.unwrap_or(self.piped()))?,
                (None, texts, _) => Box::new(texts.iter().map(|text| Ok(text.clone().into()))),
            };
        let form = Self {
            table: self.table.clone(),
            ..*self
        };
        if let Some((name, one, many)) = self.together() {
            let texts = records
                .map(|record| form.text(record?))
                .collect::<anyhow::Result<Vec<_>>>()?;
            let input = Map::from_iter([(name.to_string(), one), (many.to_string(), texts.into())]);
            return Ok(Box::new(std::iter::once(Ok(input.into()))));
        }
        Ok(Box::new(records.enumerate().map(move |(index, record)| {
            form.input(record?)
                .with_context(|| format!("input {}", index + 1))
        })))
    }

    /// Whether all texts are one input.
    fn is_one(&self) -> bool {
        let given = self.args.file.is_some() || !self.args.inputs.is_empty();
        self.question().is_some() || self.together().is_some() && given
    }

    /// What all texts belong to, and the names of both.
    fn together(&self) -> Option<(&'static str, Value, &'static str)> {
        let options = &self.args.options;
        match self.task {
            Task::SentenceSimilarity => {
                let sentence = options.source_sentence.as_deref()?;
                Some(("source_sentence", sentence.into(), "sentences"))
            }
            Task::Reranking => Some(("query", options.query.as_deref()?.into(), "documents")),
            Task::TableQuestionAnswering if options.sequential => {
                Some(("table", Value::clone(self.table.as_ref()?), "query"))
            }
            _ => None,
        }
    }

    /// What comes through a pipe, unless it is said.
    fn piped(&self) -> Format {
        match self.task {
            Task::QuestionAnswering if self.args.options.question.is_none() => Format::Jsonl,
            Task::SentenceSimilarity | Task::Reranking if self.together().is_none() => Format::Jsonl,
            Task::TableQuestionAnswering if self.table.is_none() => Format::Jsonl,
            _ => Format::Txt,
        }
    }

    /// An input of the task.
    fn input(&self, record: Value) -> anyhow::Result<Value> {
        let record = match (self.task, record) {
            // What may be more than a text can be written as JSON.
            (
                Task::QuestionAnswering
                | Task::TableQuestionAnswering
                | Task::SentenceSimilarity
                | Task::Reranking
                | Task::TextClassification
                | Task::TokenClassification
                | Task::TextGeneration,
                Value::String(text),
            ) if text.starts_with(['{', '[']) => match serde_json::from_str::<Value>(&text) {
                Ok(json) => json,
                Err(_) => text.into(),
            },
            (_, record) => record,
        };
        let has = |name: &str| record.get(name).is_some();
        match (self.task, &self.args.options.question) {
            (Task::QuestionAnswering, Some(question)) => {
                Ok(json!({ "question": question, "context": self.text(record)? }))
            }
            (Task::QuestionAnswering, None) if !record.is_object() => {
                bail!("is a text; name the --question, or write {{\"question\": …, \"context\": …}}")
            }
            (Task::SentenceSimilarity, _) if !record.is_object() => {
                bail!(
                    "is a text; name the --source-sentence, or write {{\"source_sentence\": …, \"sentences\": […]}}"
                )
            }
            (Task::Reranking, _) if !record.is_object() => {
                bail!("is a text; name the --query, or write {{\"query\": …, \"documents\": […]}}")
            }
            (Task::QuestionAnswering | Task::SentenceSimilarity | Task::Reranking, _) => Ok(record),
            (Task::TableQuestionAnswering, _) => match &self.table {
                Some(table) => {
                    let query = match record {
                        Value::Array(_) => record,
                        record => self.text(record)?.into(),
                    };
                    Ok(json!({ "table": **table, "query": query }))
                }
                None if !record.is_object() => {
                    bail!("is a text; name the --table, or write {{\"table\": …, \"query\": …}}")
                }
                None => Ok(record),
            },
            (Task::TextClassification, _) if has("text_pair") => Ok(record),
            (Task::TextGeneration, _) if has("messages") => Ok(record),
            _ if record.is_array() => Ok(record),
            (Task::TextGeneration, _) if self.args.options.chat => {
                Ok(json!([{ "role": "user", "content": self.text(record)? }]))
            }
            (Task::TokenClassification, _) => self.field(record),
            _ => Ok(self.text(record)?.into()),
        }
    }

    /// What stands in the column that was named.
    fn field(&self, record: Value) -> anyhow::Result<Value> {
        match record {
            Value::Object(mut row) => {
                let name = &self.args.column;
                row.remove(name).ok_or_else(|| {
                    let names: Vec<&str> = row.keys().map(String::as_str).collect();
                    anyhow!(
                        "has no `{name}`; choose one of {} with --column",
                        names.join(", ")
                    )
                })
            }
            other => Ok(other),
        }
    }

    fn text(&self, record: Value) -> anyhow::Result<String> {
        match self.field(record)? {
            Value::String(text) => Ok(text),
            other => bail!("is {other}, which is no text"),
        }
    }
}

impl TaskArgs {
    /// The options that were given.
    fn to_json(&self) -> anyhow::Result<Map<String, Value>> {
        let top_k = match self.top_k.as_deref() {
            None => None,
            Some("all") => Some(Value::Null),
            Some(number) => Some(
                number
                    .parse::<usize>()
                    .with_context(|| format!("--top-k {number}"))?
                    .into(),
            ),
        };
        let on = |flag: bool| flag.then_some(Value::Bool(true));
        let given = [
            ("top_k", top_k),
            ("truncation", on(self.truncation)),
            (
                "function_to_apply",
                self.function_to_apply.clone().map(Value::from),
            ),
            (
                "aggregation_strategy",
                self.aggregation_strategy.clone().map(Value::from),
            ),
            ("ignore_labels", self.ignore_labels.clone().map(Value::from)),
            ("stride", self.stride.map(Value::from)),
            ("doc_stride", self.doc_stride.map(Value::from)),
            ("max_answer_len", self.max_answer_len.map(Value::from)),
            ("handle_impossible_answer", on(self.handle_impossible_answer)),
            ("targets", self.targets.clone().map(Value::from)),
            ("candidate_labels", self.candidate_labels.clone().map(Value::from)),
            (
                "hypothesis_template",
                self.hypothesis_template.clone().map(Value::from),
            ),
            ("multi_label", on(self.multi_label)),
            ("sequential", on(self.sequential)),
            ("src_lang", self.src_lang.clone().map(Value::from)),
            ("tgt_lang", self.tgt_lang.clone().map(Value::from)),
            ("max_new_tokens", self.max_new_tokens.map(Value::from)),
        ];
        let given = given
            .into_iter()
            .filter_map(|(name, value)| Some((name.to_string(), value?)));
        let mut options = Map::from_iter(given);
        for setting in &self.set {
            let (name, value) = session::setting(setting)?;
            options.insert(name.to_string(), value);
        }
        Ok(options)
    }
}
