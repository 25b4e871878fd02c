//! Steps of GRPO as TRL makes them, of answers that are given; and what a model learns of its own.
//!
//! `fixtures/make_objectives.py` made the reference.

mod given;

use std::sync::Mutex;

use burn::tensor::Device;
use given::{curves, dataset, load, objective};
use oxiformers_data::tasks::prompted::Prompted;
use oxiformers_data::tasks::prompts::Prompts;
use oxiformers_data::tasks::{Draw, Row, Texts};
use oxiformers_hub::ModelFiles;
use oxiformers_models::nn::LoadOptions;
use oxiformers_models::{AutoConfig, AutoModelFor, AutoModelForCausalLM};
use oxiformers_processors::Tokenizer;
use oxiformers_train::grpo::{Grpo, GrpoConfig, Judged};
use oxiformers_train::reference::Reference;
use oxiformers_train::rewards::{Reward, RewardModel};
use oxiformers_train::{LossOptions, Outputs, Result, Size, Task, Trained, Trainer, TrainingArguments};
use serde_json::json;

/// GRPO with answers that are given, one batch after the other.
struct Answered {
    of: Grpo,
    group: usize,
    answers: Mutex<std::vec::IntoIter<Vec<u32>>>,
}

impl Task for Answered {
    type Model = AutoModelForCausalLM;
    type Batch = Judged;

    async fn collate(&self, model: &Self::Model, rows: &[Row], _: Draw) -> Result<Judged> {
        let answers = || {
            let mut answers = self.answers.lock().expect("answers");
            answers.by_ref().take(rows.len() * self.group).collect::<Vec<_>>()
        };
        let answers = answers();
        self.of.judge(model, rows, &answers).await
    }

    fn rows_per_example(&self) -> usize {
        self.of.rows_per_example()
    }

    fn steps_per_batch(&self) -> u64 {
        self.of.steps_per_batch()
    }

    fn size(&self, batch: &Judged) -> Size {
        self.of.size(batch)
    }

    fn loss(&self, model: &Self::Model, batch: &Judged, options: LossOptions) -> Result<Outputs> {
        self.of.loss(model, batch, options)
    }
}

#[test]
fn given_answers() {
    for (name, case) in curves().iter().filter(|(name, _)| name.starts_with("grpo")) {
        let folder = tempfile::tempdir().expect("folder");
        let (files, parameters, options, saver) = load(&objective("model"));
        let model = AutoModelForCausalLM::from_files(&files, &options).expect("model");
        let tokenizer = Tokenizer::from_files(&files).expect("tokenizer");
        let texts = Texts::new(tokenizer, None, None).expect("texts");
        let settings = case["recipe"]["objective"].clone();
        let config: GrpoConfig = serde_json::from_value(settings).expect("objective");
        let reward_model = |_: &str| {
            let files = ModelFiles::from_dir(&objective("reward")).expect("reward model");
            let options = LoadOptions {
                device: Device::flex(),
                ..LoadOptions::default()
            };
            Ok(RewardModel {
                model: AutoModelFor::from_files(&files, &options).expect("reward model"),
                tokenizer: Tokenizer::from_files(&files).expect("tokenizer"),
                template: None,
                prompt_column: "prompt".to_string(),
            })
        };
        let reward = |section| Reward::new(section, reward_model).expect("reward");
        let rewards = config
            .rewards
            .iter()
            .map(|section| (reward(section), section.weight))
            .collect();
        let prompts = Prompts {
            prompted: Prompted {
                texts: texts.clone(),
                template: None,
                append_eos: true,
            },
            prompt_column: "prompt".to_string(),
            needed: vec!["answer".to_string()],
        };
        let data = dataset(
            &objective("questions.jsonl"),
            &prompts,
            &folder.path().join("cache"),
        );
        let reference = (config.beta > 0.0).then(|| Reference::new(&model, None));
        let answers: Vec<Vec<u32>> = serde_json::from_value(case["answers"].clone()).expect("answers");
        let task = Answered {
            group: config.num_generations,
            answers: Mutex::new(answers.into_iter()),
            of: Grpo::new(
                config,
                rewards,
                texts,
                vec![1],
                &AutoConfig::from_files(&files).expect("config"),
                reference,
            )
            .expect("task"),
        };
        let mut training = case["recipe"]["training"].as_object().expect("training").clone();
        training.insert("output_dir".to_string(), json!(folder.path()));
        training.insert("save_strategy".to_string(), json!("no"));
        let trained = Trained {
            model,
            parameters,
            saver: Box::new(saver),
        };
        let mut trainer = Trainer::new(
            TrainingArguments::from_json(training).expect("arguments"),
            task,
            trained,
            data,
            None,
        )
        .expect("trainer");
        trainer
            .train_blocking()
            .unwrap_or_else(|error| panic!("{name}: {error}"));
        given::compare(name, &trainer.state().log_history, &case["steps"]);
    }
}
