//! Group relative policy optimization (Shao et al., 2024): a model answers prompts several times, and what is better than
//! the other answers to the same prompt becomes likelier.

use std::borrow::Cow;

use burn::tensor::{Tensor, TensorData};
use oxiformers_data::tasks::prompts::{prompt, record};
use oxiformers_data::tasks::{Batch, Draw, IGNORED, Row, Targets, Texts};
use oxiformers_generate::{GenerationConfig, Generator};
use oxiformers_models::nn::training::Pass;
use oxiformers_models::{AutoConfig, AutoModelForCausalLM, CausalLM};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::preferences::positive;
use crate::reference::{Reference, learned, token_log_probs};
use crate::rewards::{Answer, Reward, RewardSection};
use crate::task::{LossOptions, Outputs, Size, Task};
use crate::tasks::pass;
use crate::{Error, Result};

/// How the losses of tokens are put together, by the names of TRL.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GrpoLoss {
    /// The mean over the tokens of an answer, and the mean of these (Shao et al., 2024).
    Grpo,
    /// The mean over the tokens of a batch.
    Bnpo,
    /// The sum over the tokens, divided by the longest length that answers may have (Liu et al., 2025).
    DrGrpo,
    /// The mean over the tokens of all batches of a step (Yu et al., 2025).
    Dapo,
}

/// What advantages are divided by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ScaleRewards {
    /// The standard deviation of the rewards of a prompt's answers.
    Group,
    /// That of all rewards of a batch.
    Batch,
    /// Nothing (Liu et al., 2025).
    None,
}

/// What a ratio is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ImportanceSampling {
    /// A token.
    Token,
    /// An answer: the geometric mean of its tokens' (Zheng et al., 2025).
    Sequence,
}

/// What GRPO goes by: names and defaults of TRL's `GRPOConfig`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct GrpoConfig {
    /// What answers are judged by.
    pub rewards: Vec<RewardSection>,
    /// Answers to each prompt.
    pub num_generations: usize,
    /// Most tokens of an answer.
    pub max_completion_length: usize,
    /// Divisor of the logits.
    pub temperature: f64,
    /// Answers are drawn among the likeliest tokens that together have this probability.
    pub top_p: f64,
    /// Answers are drawn among so many of the likeliest tokens; 0 is all.
    pub top_k: usize,
    /// Answers are drawn among tokens at least this fraction as likely as the likeliest.
    pub min_p: Option<f64>,
    /// Divides the logits of tokens that were there already.
    pub repetition_penalty: f64,
    /// How strongly the model is held to the reference; 0 for not at all.
    pub beta: f64,
    /// Whether the divergence from the reference is weighted by the ratio, so that its gradient has no bias.
    pub use_bias_correction_kl: bool,
    /// Steps that learn from the same answers.
    pub num_iterations: u64,
    /// How far below 1 a ratio counts.
    pub epsilon: f64,
    /// How far above 1 a ratio counts; `epsilon` where `None`.
    pub epsilon_high: Option<f64>,
    /// The largest ratio of answers that are worse than others.
    pub delta: Option<f64>,
    /// What a ratio is of.
    pub importance_sampling_level: ImportanceSampling,
    /// What advantages are divided by.
    pub scale_rewards: ScaleRewards,
    /// How the losses of tokens are put together.
    pub loss_type: GrpoLoss,
    /// Whether answers that were cut off are left out.
    pub mask_truncated_completions: bool,
    /// Whether nothing is dropped out while the model learns.
    pub disable_dropout: bool,
}

impl Default for GrpoConfig {
    fn default() -> Self {
        Self {
            rewards: Vec::new(),
            num_generations: 8,
            max_completion_length: 512,
            temperature: 1.0,
            top_p: 1.0,
            top_k: 0,
            min_p: None,
            repetition_penalty: 1.0,
            beta: 0.0,
            use_bias_correction_kl: true,
            num_iterations: 1,
            epsilon: 0.2,
            epsilon_high: None,
            delta: None,
            importance_sampling_level: ImportanceSampling::Token,
            scale_rewards: ScaleRewards::Group,
            loss_type: GrpoLoss::Dapo,
            mask_truncated_completions: false,
            disable_dropout: false,
        }
    }
}

impl GrpoConfig {
    /// # Errors
    /// Numbers that make no sense.
    fn check(&self) -> Result<()> {
        let refuse = |field: &str, message: String| Err(Error::config(format!("objective.{field}"), message));
        if self.num_generations < 2 {
            let message = format!(
                "is {}; answers are compared with others: 2 at least",
                self.num_generations
            );
            return refuse("num_generations", message);
        }
        if self.max_completion_length == 0 || self.num_iterations == 0 {
            return refuse(
                "num_iterations",
                "and `max_completion_length` are 1 at least".to_string(),
            );
        }
        positive("objective.temperature", self.temperature)?;
        if !(self.beta >= 0.0 && self.beta.is_finite()) {
            return refuse("beta", format!("is {}; it is 0 or above", self.beta));
        }
        for (name, epsilon) in [
            ("epsilon", Some(self.epsilon)),
            ("epsilon_high", self.epsilon_high),
        ] {
            if epsilon.is_some_and(|epsilon| !(epsilon >= 0.0 && epsilon.is_finite())) {
                return refuse(name, "must be 0 or above".to_string());
            }
        }
        Ok(())
    }

    /// How answers are drawn, by a model with these tokens at the end of texts.
    fn generation(&self, eos_token_id: Vec<u32>) -> GenerationConfig {
        GenerationConfig {
            do_sample: true,
            max_new_tokens: Some(self.max_completion_length),
            num_return_sequences: self.num_generations,
            temperature: self.temperature,
            top_p: self.top_p,
            top_k: self.top_k,
            min_p: self.min_p,
            repetition_penalty: self.repetition_penalty,
            eos_token_id,
            ..GenerationConfig::default()
        }
    }
}

/// Answers, and how good each is.
#[derive(Debug)]
pub struct Judged {
    batch: Batch,
    /// How much better than the others each answer is.
    advantages: Vec<f32>,
    /// Log-probabilities of tokens when the answers were given, `[batch, seq]`, where several steps learn from them.
    old: Option<Tensor<2>>,
    /// The same by the reference.
    reference: Option<Tensor<2>>,
    logs: Vec<(Cow<'static, str>, f64)>,
}

/// Learns of answers that the model gives by itself.
pub struct Grpo {
    config: GrpoConfig,
    rewards: Vec<(Reward, f64)>,
    generation: GenerationConfig,
    texts: Texts,
    reference: Option<Reference>,
    pass: Pass,
}

impl Grpo {
    /// A training by `rewards`, each with its weight, of a model of this configuration that is held to `reference`, where
    /// there is one. A token of `eos_token_id` ends an answer.
    ///
    /// # Errors
    /// Numbers that make no sense, or no reward.
    pub fn new(
        config: GrpoConfig,
        rewards: Vec<(Reward, f64)>,
        texts: Texts,
        eos_token_id: Vec<u32>,
        model: &AutoConfig,
        reference: Option<Reference>,
    ) -> Result<Self> {
        config.check()?;
        if rewards.is_empty() {
            return Err(Error::config(
                "objective.rewards",
                "must say what answers are judged by",
            ));
        }
        let generation = config.generation(eos_token_id);
        generation.validate()?;
        Ok(Self {
            rewards,
            generation,
            texts,
            reference,
            pass: if config.disable_dropout {
                Pass::default()
            } else {
                pass(&model.json, None)
            },
            config,
        })
    }

    /// The answers of a model to prompts, a prompt's one after the other. They depend on its weights, the draw and the first
    /// row alone.
    async fn answers(&self, model: &AutoModelForCausalLM, rows: &[Row], draw: Draw) -> Result<Vec<Vec<u32>>> {
        let config = GenerationConfig {
            seed: rows.first().map(|row| draw.seed(row.index)),
            ..self.generation.clone()
        };
        let prompts: Vec<_> = rows.iter().map(prompt).collect();
        let generated = Generator::new(model, config).generate(&prompts).await?;
        Ok(generated.into_iter().map(|generated| generated.ids).collect())
    }

    /// A batch of answers to the prompts of `rows`, a prompt's one after the other, and how good each is.
    ///
    /// # Errors
    /// Where the batch does not fit the model, or a reward cannot be computed.
    pub async fn judge(
        &self,
        model: &AutoModelForCausalLM,
        rows: &[Row],
        answers: &[Vec<u32>],
    ) -> Result<Judged> {
        let group = answers.len() / rows.len().max(1);
        let prompts: Vec<_> = rows
            .iter()
            .flat_map(|row| std::iter::repeat_n(prompt(row), group))
            .collect();
        let ended = |ids: &Vec<u32>| {
            ids.last()
                .is_some_and(|id| self.generation.eos_token_id.contains(id))
        };
        let records: Vec<Value> = rows.iter().map(record).collect();
        let mut texts = Vec::with_capacity(answers.len());
        for (at, ids) in answers.iter().enumerate() {
            texts.push(Answer {
                record: &records[at / group.max(1)],
                text: self
                    .texts
                    .tokenizer
                    .decode(ids, true)
                    .map_err(oxiformers_data::Error::from)?,
                tokens: ids.len(),
            });
        }
        let mut logs: Vec<(Cow<'static, str>, f64)> = Vec::new();
        let mut rewards = vec![0.0; answers.len()];
        for (reward, weight) in &self.rewards {
            let of = reward.of(&texts).await?;
            let (mean, std) = mean_and_std(&of);
            logs.push((format!("rewards/{}/mean", reward.name()).into(), mean));
            logs.push((format!("rewards/{}/std", reward.name()).into(), std));
            for (sum, reward) in rewards.iter_mut().zip(of) {
                *sum += weight * reward;
            }
        }
        let (advantages, same) = advantages(&rewards, group, self.config.scale_rewards);
        let (mean, std) = mean_and_std(&rewards);
        let lengths: Vec<f64> = answers.iter().map(|ids| ids.len() as f64).collect();
        let cut = answers.iter().filter(|ids| !ended(ids)).count();
        logs.push(("reward".into(), mean));
        logs.push(("reward_std".into(), std));
        logs.push(("frac_reward_zero_std".into(), same));
        logs.push(("completions/mean_length".into(), mean_and_std(&lengths).0));
        logs.push((
            "completions/clipped_ratio".into(),
            cut as f64 / answers.len().max(1) as f64,
        ));
        let sequences: Vec<Vec<u32>> = prompts
            .iter()
            .zip(answers)
            .map(|(a, b)| [&a[..], b].concat())
            .collect();
        let mut labels: Vec<Vec<i64>> = (prompts.iter().zip(answers))
            .map(|(prompt, answer)| {
                let masked = self.config.mask_truncated_completions && !ended(answer);
                let label = |id: &u32| if masked { IGNORED } else { i64::from(*id) };
                std::iter::repeat_n(IGNORED, prompt.len())
                    .chain(answer.iter().map(label))
                    .collect()
            })
            .collect();
        let padding = self.texts.padding;
        padding.fill(&mut labels, IGNORED);
        let batch = Batch::from_rows(sequences, Vec::new(), padding).with_labels(Targets::Tokens(labels));
        let log_probs =
            |model: &AutoModelForCausalLM| token_log_probs(model, &batch, self.config.temperature);
        let old = match self.config.num_iterations {
            1 => None,
            _ => Some(log_probs(&model.without_autodiff())?),
        };
        let reference = match &self.reference {
            Some(reference) => Some(reference.judge(model, log_probs)?),
            None => None,
        };
        Ok(Judged {
            batch,
            advantages,
            old,
            reference,
            logs,
        })
    }
}

/// The mean of numbers, and their standard deviation as of a sample.
fn mean_and_std(numbers: &[f64]) -> (f64, f64) {
    let mean = numbers.iter().sum::<f64>() / numbers.len().max(1) as f64;
    let squares: f64 = numbers.iter().map(|number| (number - mean).powi(2)).sum();
    (
        mean,
        (squares / (numbers.len().saturating_sub(1)).max(1) as f64).sqrt(),
    )
}

/// How much better than the others of its group each answer is, and the share of answers in groups that are all alike.
fn advantages(rewards: &[f64], group: usize, scale: ScaleRewards) -> (Vec<f32>, f64) {
    let of_all = mean_and_std(rewards).1;
    let (mut advantages, mut same) = (Vec::with_capacity(rewards.len()), 0);
    for rewards in rewards.chunks(group.max(1)) {
        let (mean, std) = mean_and_std(rewards);
        let divisor = match scale {
            ScaleRewards::Group => std + 1e-4,
            ScaleRewards::Batch => of_all + 1e-4,
            ScaleRewards::None => 1.0,
        };
        same += if std < 1e-8 { rewards.len() } else { 0 };
        advantages.extend(rewards.iter().map(|reward| ((reward - mean) / divisor) as f32));
    }
    (advantages, same as f64 / rewards.len().max(1) as f64)
}

impl Task for Grpo {
    type Model = AutoModelForCausalLM;
    type Batch = Judged;

    async fn collate(&self, model: &Self::Model, rows: &[Row], draw: Draw) -> Result<Judged> {
        let answers = self.answers(&model.without_autodiff(), rows, draw).await?;
        self.judge(model, rows, &answers).await
    }

    fn rows_per_example(&self) -> usize {
        self.config.num_generations
    }

    fn steps_per_batch(&self) -> u64 {
        self.config.num_iterations
    }

    fn size(&self, judged: &Judged) -> Size {
        Size {
            items: match self.config.loss_type {
                GrpoLoss::Dapo => learned(&judged.batch).iter().sum::<f32>() as u64,
                _ => judged.advantages.len() as u64,
            },
            tokens: judged.batch.tokens() as u64,
        }
    }

    fn loss(&self, model: &Self::Model, judged: &Judged, _: LossOptions) -> Result<Outputs> {
        let (config, device) = (&self.config, model.device());
        let log_probs = token_log_probs(model, &judged.batch, config.temperature)?;
        let [rows, seq] = log_probs.dims();
        let Targets::Tokens(labels) = &judged.batch.labels else {
            return Err(crate::tasks::wrong_targets("grpo"));
        };
        // A token's log-probability stands at the token before it.
        let mask: Vec<f32> = (labels.iter())
            .flat_map(|labels| labels.iter().skip(1).chain([&IGNORED]))
            .map(|label| f32::from(*label != IGNORED))
            .collect();
        let mask = Tensor::<2>::from_data(TensorData::new(mask, [rows, seq]), &device);
        let advantages = TensorData::new(judged.advantages.clone(), [rows, 1]);
        let advantages = Tensor::<2>::from_data(advantages, &device);
        let counts = mask.clone().sum_dim(1).clamp_min(1.0);
        let old = judged.old.clone().unwrap_or_else(|| log_probs.clone().detach());
        let log_ratio = log_probs.clone() - old;
        let ratio = match config.importance_sampling_level {
            ImportanceSampling::Token => log_ratio.exp(),
            ImportanceSampling::Sequence => {
                let mean = (log_ratio * mask.clone()).sum_dim(1) / counts.clone();
                mean.exp().expand([rows, seq])
            }
        };
        let (low, high) = (
            1.0 - config.epsilon,
            1.0 + config.epsilon_high.unwrap_or(config.epsilon),
        );
        let clipped = ratio.clone().clamp(low, high) * advantages.clone();
        let most = match config.delta {
            Some(delta) => ratio.clone().clamp_max(delta),
            None => ratio.clone(),
        };
        let mut losses = -(most * advantages.clone()).min_pair(clipped);
        let mut logs: Vec<(Cow<'static, str>, Tensor<1>)> = Vec::new();
        let tokens = mask.clone().sum().clamp_min(1.0);
        let mean = |of: Tensor<2>| (of.detach() * mask.clone()).sum() / tokens.clone();
        if let Some(reference) = &judged.reference {
            let above = reference.clone() - log_probs;
            let mut kl = above.clone().exp() - above - 1.0;
            if config.use_bias_correction_kl {
                kl = kl * ratio.clone();
            }
            logs.push(("kl".into(), mean(kl.clone())));
            losses = losses + kl * config.beta;
        }
        let ratio = ratio.detach();
        let worse = advantages.clone().lower_elem(0.0).float();
        let better = advantages.greater_elem(0.0).float();
        logs.push((
            "clip_ratio/low_mean".into(),
            mean(ratio.clone().lower_elem(low).float() * worse),
        ));
        logs.push((
            "clip_ratio/high_mean".into(),
            mean(ratio.greater_elem(high).float() * better),
        ));
        let losses = losses * mask.clone();
        let loss = match config.loss_type {
            GrpoLoss::Grpo => (losses.sum_dim(1) / counts).mean(),
            GrpoLoss::Bnpo | GrpoLoss::Dapo => losses.sum() / tokens,
            GrpoLoss::DrGrpo => losses.sum() / (rows * config.max_completion_length) as f64,
        };
        for (name, value) in &judged.logs {
            logs.push((name.clone(), Tensor::from_data([*value as f32], &device)));
        }
        Ok(Outputs {
            logs,
            ..Outputs::new(Some(loss))
        })
    }

    fn pass(&self) -> Pass {
        self.pass
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn advantages_of_groups() {
        let rewards = [0.0, 1.0, 1.0, 0.0, 3.0, 3.0, 3.0, 3.0];
        let std = (4.0 * 0.25f64 / 3.0).sqrt();
        let (group, same) = advantages(&rewards, 4, ScaleRewards::Group);
        assert!((f64::from(group[1]) - 0.5 / (std + 1e-4)).abs() < 1e-6);
        assert_eq!((group[4], same), (0.0, 0.5));
        let (none, _) = advantages(&rewards, 4, ScaleRewards::None);
        assert_eq!(none[..4], [-0.5, 0.5, 0.5, -0.5]);
        let (batch, _) = advantages(&rewards, 4, ScaleRewards::Batch);
        let std = mean_and_std(&rewards).1;
        assert!((f64::from(batch[0]) + 0.5 / (std + 1e-4)).abs() < 1e-6);
    }
}
