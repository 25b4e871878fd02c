//! Preferences: answers that are better than others become likelier (DPO and its kin, KTO, ORPO).

use std::borrow::Cow;
use std::sync::Arc;

use burn::tensor::activation::{log_sigmoid, relu, sigmoid};
use burn::tensor::{Device, Tensor, TensorData};
use oxiformers_data::tasks::{Batch, Draw, IGNORED, Objective, Row, Targets};
use oxiformers_models::nn::Parameter;
use oxiformers_models::nn::training::Pass;
use oxiformers_models::{AutoConfig, AutoModelForCausalLM, CausalLM};
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Value;

use crate::optim::State;
use crate::reference::{Reference, known, learned, sequence_log_probs, token_log_probs};
use crate::task::{LossOptions, Outputs, Size, Task};
use crate::tasks::pass;
use crate::{Error, Result};

/// How much better the chosen answer is to be, and how that is counted, by the names of TRL.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DpoLoss {
    /// `−log σ(β Δ)` (Rafailov et al., 2023), where Δ is the difference of the log-ratios of model and reference.
    Sigmoid,
    /// `max(0, 1 − β Δ)` (Zhao et al., 2023).
    Hinge,
    /// `(Δ − 1 / 2β)²` of log-ratios per token (Azar et al., 2023).
    Ipo,
    /// The divergence from labels that are wrong with a probability (Ji et al., 2024).
    ExoPair,
    /// Both answers against the reference (Chen et al., 2024).
    NcaPair,
    /// Unbiased where labels are wrong with a probability (Chowdhury et al., 2024).
    Robust,
    /// `−log σ(chosen) − log σ(−rejected)` (Jung et al., 2024, without its shift).
    BcoPair,
    /// Squares of what is won and lost (Wu et al., 2024).
    SppoHard,
    /// The chosen answer up, the rejected one down (D'Oosterlinck et al., 2024).
    ApoZero,
    /// Both down, the rejected one more (the same).
    ApoDown,
    /// A blend of logistic and exponential losses that was found by search (Lu et al., 2024).
    Discopop,
    /// The cross entropy of the chosen answer.
    Sft,
    /// `sigmoid` of log-ratios per token.
    SigmoidNorm,
    /// Optimal transport between what the model and the reference say of pairs, each sorted (Melnyk et al., 2024).
    Aot,
    /// The same between chosen and rejected answers, which then belong to no pairs.
    AotUnpaired,
}

impl DpoLoss {
    /// Whether it is made of differences of what answers of a pair are worth alone. In all others a term of the prompt stays,
    /// which only Kullback and Leibler's divergence has none of.
    fn takes_differences(self) -> bool {
        matches!(
            self,
            Self::Sigmoid
                | Self::SigmoidNorm
                | Self::Hinge
                | Self::Ipo
                | Self::ExoPair
                | Self::Robust
                | Self::Discopop
                | Self::Sft
        )
    }
}

/// By which f-divergence the model is held to the reference (Wang et al., 2023), by the names of TRL.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FDivergence {
    /// That of Kullback and Leibler, from the model to the reference.
    ReverseKl,
    /// The same from the reference to the model.
    ForwardKl,
    /// Jensen and Shannon's.
    JsDivergence,
    /// The α-divergence, between the first two.
    AlphaDivergence,
}

impl FDivergence {
    /// What an answer is worth: `f'(t)` of the ratio `t` of its probabilities, of which `log_ratio` is the logarithm.
    fn score(self, log_ratio: Tensor<1>, alpha: f64) -> Tensor<1> {
        match self {
            Self::ReverseKl => log_ratio,
            Self::ForwardKl => -(-log_ratio).exp() + 1.0,
            Self::JsDivergence => log_sigmoid(log_ratio) + std::f64::consts::LN_2,
            // The limit.
            Self::AlphaDivergence if (alpha - 1.0).abs() < 1e-6 => log_ratio,
            Self::AlphaDivergence => {
                let power = (log_ratio * (alpha - 1.0)).clamp_max(LARGEST_POWER);
                (power.exp() - 1.0) / (alpha - 1.0)
            }
        }
    }
}

/// What an exponential of f32 is taken of at most: the result is still a number.
const LARGEST_POWER: f64 = 80.0;

/// One loss or several.
fn one_or_more<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<DpoLoss>, D::Error> {
    let list = match Value::deserialize(deserializer)? {
        Value::Array(list) => list,
        one => vec![one],
    };
    let loss = |value| DpoLoss::deserialize(value);
    let losses = list.into_iter().map(loss).collect::<Result<_, _>>();
    losses.map_err(|error: serde_json::Error| D::Error::custom(format!("`loss_type`: {error}")))
}

/// What DPO goes by: names and defaults of TRL's `DPOConfig`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DpoConfig {
    /// What is to become small, one or several.
    #[serde(deserialize_with = "one_or_more")]
    pub loss_type: Vec<DpoLoss>,
    /// What each loss counts, where there are several; 1 for each where `None`.
    pub loss_weights: Option<Vec<f64>>,
    /// How strongly the model is held to the reference; τ of IPO.
    pub beta: f64,
    /// How likely it is that a label is wrong (`robust`, `exo_pair`, `aot`, `aot_unpaired`).
    pub label_smoothing: f64,
    /// By which divergence the model is held to the reference.
    pub f_divergence_type: FDivergence,
    /// The α of `alpha_divergence`.
    pub f_alpha_divergence_coef: f64,
    /// The temperature of `discopop`.
    pub discopop_tau: f64,
    /// Whether what the reference says is computed before the training, and then dropped.
    pub precompute_ref_log_probs: bool,
    /// Rows whose reference is computed at a time; those of a batch where `None`.
    pub precompute_ref_batch_size: Option<usize>,
    /// Whether the reference follows the model (Gorbatovski et al., 2024).
    pub sync_ref_model: bool,
    /// The part of the model in a reference that follows it.
    pub ref_model_mixup_alpha: f64,
    /// Steps after which it follows.
    pub ref_model_sync_steps: u64,
    /// Whether nothing is dropped out while the model learns.
    pub disable_dropout: bool,
}

impl Default for DpoConfig {
    fn default() -> Self {
        Self {
            loss_type: vec![DpoLoss::Sigmoid],
            loss_weights: None,
            beta: 0.1,
            label_smoothing: 0.0,
            f_divergence_type: FDivergence::ReverseKl,
            f_alpha_divergence_coef: 0.5,
            discopop_tau: 0.05,
            precompute_ref_log_probs: false,
            precompute_ref_batch_size: None,
            sync_ref_model: false,
            ref_model_mixup_alpha: 0.6,
            ref_model_sync_steps: 512,
            disable_dropout: true,
        }
    }
}

impl DpoConfig {
    /// Checks what can be known before a model is loaded.
    ///
    /// # Errors
    /// Numbers that make no sense, and what does not go together.
    pub fn check(&self, has_adapter: bool) -> Result<()> {
        self.losses()?;
        if !self.sync_ref_model {
            return Ok(());
        }
        if has_adapter || self.precompute_ref_log_probs {
            let message = "needs a reference that is a model of its own: not with `model.adapter` or \
                           `precompute_ref_log_probs`";
            return Err(Error::config("objective.sync_ref_model", message));
        }
        let alpha = self.ref_model_mixup_alpha;
        if !(0.0..=1.0).contains(&alpha) {
            let message = format!("is {alpha}; it must lie from 0 to 1");
            return Err(Error::config("objective.ref_model_mixup_alpha", message));
        }
        if self.ref_model_sync_steps == 0 {
            return Err(Error::config(
                "objective.ref_model_sync_steps",
                "must be 1 at least",
            ));
        }
        Ok(())
    }

    /// The losses, and what each counts.
    fn losses(&self) -> Result<Vec<(DpoLoss, f64)>> {
        let types = self.loss_type.clone();
        let weights = self
            .loss_weights
            .clone()
            .unwrap_or_else(|| vec![1.0; types.len()]);
        if types.is_empty() || weights.len() != types.len() {
            let message = format!(
                "has {} numbers, and there are {} losses",
                weights.len(),
                types.len()
            );
            return Err(Error::config("objective.loss_weights", message));
        }
        positive("objective.beta", self.beta)?;
        positive("objective.discopop_tau", self.discopop_tau)?;
        let epsilon = self.label_smoothing;
        let bad = |message: &str| {
            Err(Error::config(
                "objective.label_smoothing",
                format!("is {epsilon}; {message}"),
            ))
        };
        if types.contains(&DpoLoss::Robust) && !(0.0..0.5).contains(&epsilon) {
            return bad("of robust, it lies from 0 to below 0.5");
        }
        if types.contains(&DpoLoss::ExoPair) && !(epsilon > 0.0 && epsilon < 1.0) {
            return bad("of exo_pair, it lies between 0 and 1, such as 1e-3");
        }
        if self.f_divergence_type != FDivergence::ReverseKl {
            if !self.f_alpha_divergence_coef.is_finite() {
                return Err(Error::config("objective.f_alpha_divergence_coef", "is no number"));
            }
            if let Some(loss) = types.iter().find(|loss| !loss.takes_differences()) {
                let name = serde_json::to_value(loss).unwrap_or_default();
                let message = format!("goes with differences of answers only, and not with the loss {name}");
                return Err(Error::config("objective.f_divergence_type", message));
            }
        }
        Ok(types.into_iter().zip(weights).collect())
    }
}

pub(crate) fn positive(field: &str, number: f64) -> Result<()> {
    match number > 0.0 && number.is_finite() {
        true => Ok(()),
        false => Err(Error::config(field, format!("is {number}; it must be above 0"))),
    }
}

/// Rows of answers, and what is known about them.
#[derive(Debug)]
pub struct Judged {
    batch: Batch,
    /// What the reference says about each row.
    reference: Tensor<1>,
    /// How far the model is from the reference in general, `[1]`.
    kl: Tensor<1>,
    /// Whether the answer of each row is a good one, where rows are no pairs.
    good: Vec<bool>,
}

impl Judged {
    /// Pairs of a batch. Whoever judges them does it while the batch is made, where nothing is dropped out.
    fn pairs(batch: Batch, reference: Tensor<1>) -> Self {
        Self {
            kl: Tensor::zeros([1], &reference.device()),
            batch,
            reference,
            good: Vec::new(),
        }
    }
}

fn numbers(values: Vec<f32>, device: &Device) -> Tensor<1> {
    let count = values.len();
    Tensor::from_data(TensorData::new(values, [count]), device)
}

/// The first half of the numbers, and the other.
fn halves(both: &Tensor<1>) -> [Tensor<1>; 2] {
    let [all] = both.dims();
    [
        both.clone().slice([0..all / 2]),
        both.clone().slice([all / 2..all]),
    ]
}

/// The share of places where one number is larger than the other.
pub(crate) fn share_above(one: &Tensor<1>, other: &Tensor<1>) -> Tensor<1> {
    one.clone().greater(other.clone()).float().mean()
}

/// Numbers with their names.
type Logs = Vec<(Cow<'static, str>, Tensor<1>)>;

/// Numbers of both answers of pairs that are logged.
fn logs(rewards: [Tensor<1>; 2], logps: [Tensor<1>; 2]) -> Logs {
    let [chosen, rejected] = rewards.map(Tensor::detach);
    let [logps_chosen, logps_rejected] = logps.map(Tensor::detach);
    vec![
        ("rewards/accuracies".into(), share_above(&chosen, &rejected)),
        (
            "rewards/margins".into(),
            (chosen.clone() - rejected.clone()).mean(),
        ),
        ("rewards/chosen".into(), chosen.mean()),
        ("rewards/rejected".into(), rejected.mean()),
        ("logps/chosen".into(), logps_chosen.mean()),
        ("logps/rejected".into(), logps_rejected.mean()),
    ]
}

/// Direct preference optimization (Rafailov et al., 2023), with its other losses.
pub struct Dpo {
    objective: Arc<dyn Objective>,
    config: DpoConfig,
    losses: Vec<(DpoLoss, f64)>,
    reference: Reference,
    pass: Pass,
}

/// Log-probabilities of answers, `[pairs]` each.
struct Pairs {
    chosen: Tensor<1>,
    rejected: Tensor<1>,
    /// The same by the reference.
    ref_chosen: Tensor<1>,
    ref_rejected: Tensor<1>,
    /// How many tokens they have.
    chosen_tokens: Tensor<1>,
    rejected_tokens: Tensor<1>,
}

impl Dpo {
    /// Pairs as `objective` makes them, for a model of this configuration that is held to `reference`.
    ///
    /// # Errors
    /// Numbers that make no sense.
    pub fn new(
        objective: Arc<dyn Objective>,
        model: &AutoConfig,
        config: DpoConfig,
        reference: Reference,
    ) -> Result<Self> {
        Ok(Self {
            objective,
            losses: config.losses()?,
            pass: if config.disable_dropout {
                Pass::default()
            } else {
                pass(&model.json, None)
            },
            config,
            reference,
        })
    }

    /// The loss of each pair, `[pairs]`.
    fn loss_of(&self, loss: DpoLoss, pairs: &Pairs) -> Tensor<1> {
        let DpoConfig {
            beta,
            label_smoothing: epsilon,
            f_divergence_type: divergence,
            f_alpha_divergence_coef: alpha,
            discopop_tau,
            ..
        } = self.config;
        let chosen = divergence.score(pairs.chosen.clone() - pairs.ref_chosen.clone(), alpha);
        let rejected = divergence.score(pairs.rejected.clone() - pairs.ref_rejected.clone(), alpha);
        let delta = chosen.clone() - rejected.clone();
        let per_token = || {
            chosen.clone() / pairs.chosen_tokens.clone() - rejected.clone() / pairs.rejected_tokens.clone()
        };
        // Labels may be wrong.
        let smoothed = |logits: Tensor<1>| {
            log_sigmoid(logits.clone()) * -(1.0 - epsilon) - log_sigmoid(-logits) * epsilon
        };
        match loss {
            DpoLoss::Sigmoid => -log_sigmoid(delta * beta),
            DpoLoss::SigmoidNorm => -log_sigmoid(per_token() * beta),
            DpoLoss::Hinge => relu(-(delta * beta) + 1.0),
            DpoLoss::Ipo => (per_token() - 1.0 / (2.0 * beta)).powi_scalar(2),
            DpoLoss::Robust => {
                let [clean, flipped] = [delta.clone() * beta, delta * -beta].map(log_sigmoid);
                (clean * -(1.0 - epsilon) + flipped * epsilon) / (1.0 - 2.0 * epsilon)
            }
            DpoLoss::ExoPair => {
                let side = |logits: Tensor<1>, probability: f64| {
                    sigmoid(logits.clone()) * (log_sigmoid(logits) - probability.ln())
                };
                side(delta.clone() * beta, 1.0 - epsilon) + side(delta * -beta, epsilon)
            }
            DpoLoss::NcaPair => {
                let (chosen, rejected) = (chosen * beta, rejected * beta);
                -log_sigmoid(chosen.clone()) - log_sigmoid(-chosen) * 0.5 - log_sigmoid(-rejected) * 0.5
            }
            DpoLoss::BcoPair => -log_sigmoid(chosen * beta) - log_sigmoid(rejected * -beta),
            DpoLoss::SppoHard => {
                (chosen - 0.5 / beta).powi_scalar(2) + (rejected + 0.5 / beta).powi_scalar(2)
            }
            DpoLoss::ApoZero => sigmoid(chosen * -beta) + sigmoid(rejected * beta),
            DpoLoss::ApoDown => sigmoid(chosen * beta) + sigmoid(delta * -beta),
            DpoLoss::Discopop => {
                let logits = delta * beta;
                let part = sigmoid(logits.clone() / discopop_tau);
                -log_sigmoid(logits.clone()) * (-part.clone() + 1.0) + (-logits).exp() * part
            }
            DpoLoss::Aot => {
                let ours = (pairs.chosen.clone() - pairs.rejected.clone()).sort(0);
                let theirs = (pairs.ref_chosen.clone() - pairs.ref_rejected.clone()).sort(0);
                smoothed((ours - theirs) * beta)
            }
            DpoLoss::AotUnpaired => smoothed((chosen.sort(0) - rejected.sort(0)) * beta),
            // The mean over the tokens of the batch.
            DpoLoss::Sft => -pairs.chosen.clone().sum() / pairs.chosen_tokens.clone().sum(),
        }
    }
}

impl Task for Dpo {
    type Model = AutoModelForCausalLM;
    type Batch = Judged;

    async fn collate(&self, model: &Self::Model, rows: &[Row], draw: Draw) -> Result<Judged> {
        let batch = self.objective.collate(rows, draw);
        let reference = match known(rows) {
            Some(known) => numbers(known, &model.device()),
            None => self
                .reference
                .judge(model, |model| sequence_log_probs(model, &batch))?,
        };
        Ok(Judged::pairs(batch, reference))
    }

    fn size(&self, batch: &Judged) -> Size {
        pairs_of(&batch.batch)
    }

    fn loss(&self, model: &Self::Model, judged: &Judged, _: LossOptions) -> Result<Outputs> {
        let batch = &judged.batch;
        let device = model.device();
        let [chosen, rejected] = halves(&sequence_log_probs(model, batch)?);
        let [ref_chosen, ref_rejected] = halves(&judged.reference);
        let [chosen_tokens, rejected_tokens] = halves(&numbers(learned(batch), &device));
        let pairs = Pairs {
            chosen,
            rejected,
            ref_chosen,
            ref_rejected,
            chosen_tokens,
            rejected_tokens,
        };
        let losses = self.losses.iter();
        let losses = losses.map(|(loss, weight)| self.loss_of(*loss, &pairs).mean() * *weight);
        let beta = self.config.beta;
        Ok(Outputs {
            logs: logs(
                [
                    (pairs.chosen.clone() - pairs.ref_chosen.clone()) * beta,
                    (pairs.rejected.clone() - pairs.ref_rejected.clone()) * beta,
                ],
                [pairs.chosen.clone(), pairs.rejected.clone()],
            ),
            ..Outputs::new(losses.reduce(|sum, loss| sum + loss))
        })
    }

    fn after_step(&mut self, model: &Self::Model, trainable: &[Parameter], step: u64) {
        let config = &self.config;
        if config.sync_ref_model && step.is_multiple_of(config.ref_model_sync_steps) {
            self.reference
                .follow(model, trainable, config.ref_model_mixup_alpha);
        }
    }

    async fn state(&self, trainable: &[Parameter]) -> Result<State> {
        match self.config.sync_ref_model {
            true => self.reference.state(trainable).await,
            false => Ok(State::default()),
        }
    }

    fn load_state(&mut self, state: State, trainable: &[Parameter]) -> Result<()> {
        match self.config.sync_ref_model {
            true => self.reference.load_state(&state, trainable),
            false => Ok(()),
        }
    }

    fn pass(&self) -> Pass {
        self.pass
    }
}

/// Two rows are an item.
pub(crate) fn pairs_of(batch: &Batch) -> Size {
    Size {
        items: batch.lengths.len() as u64 / 2,
        tokens: batch.tokens() as u64,
    }
}

/// How answers that are no pairs are counted, by the names of TRL.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum KtoLoss {
    /// Against how far the model is from the reference in general (Ethayarajh et al., 2024).
    Kto,
    /// The good ones up, the bad ones down (D'Oosterlinck et al., 2024).
    ApoZeroUnpaired,
}

/// What KTO goes by: names and defaults of TRL's `KTOConfig`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct KtoConfig {
    /// How answers are counted.
    pub loss_type: KtoLoss,
    /// How strongly the model is held to the reference.
    pub beta: f64,
    /// What a good answer counts.
    pub desirable_weight: f64,
    /// What a bad answer counts.
    pub undesirable_weight: f64,
    /// Whether nothing is dropped out while the model learns.
    pub disable_dropout: bool,
}

impl Default for KtoConfig {
    fn default() -> Self {
        Self {
            loss_type: KtoLoss::Kto,
            beta: 0.1,
            desirable_weight: 1.0,
            undesirable_weight: 1.0,
            disable_dropout: true,
        }
    }
}

/// Kahneman-Tversky optimization (Ethayarajh et al., 2024): answers, each good or bad.
pub struct Kto {
    objective: Arc<dyn Objective>,
    config: KtoConfig,
    reference: Reference,
    pass: Pass,
}

impl Kto {
    /// Answers as `objective` makes them, for a model of this configuration that is held to `reference`.
    ///
    /// # Errors
    /// Numbers that make no sense.
    pub fn new(
        objective: Arc<dyn Objective>,
        model: &AutoConfig,
        config: KtoConfig,
        reference: Reference,
    ) -> Result<Self> {
        positive("objective.beta", config.beta)?;
        positive("objective.desirable_weight", config.desirable_weight)?;
        positive("objective.undesirable_weight", config.undesirable_weight)?;
        Ok(Self {
            objective,
            pass: if config.disable_dropout {
                Pass::default()
            } else {
                pass(&model.json, None)
            },
            config,
            reference,
        })
    }
}

/// Some of the rows of a batch.
fn part(batch: &Batch, rows: std::ops::Range<usize>) -> Batch {
    Batch {
        input_ids: batch.input_ids[rows.clone()].to_vec(),
        lengths: batch.lengths[rows.clone()].to_vec(),
        labels: match &batch.labels {
            Targets::Tokens(labels) => Targets::Tokens(labels[rows].to_vec()),
            other => other.clone(),
        },
        ..batch.clone()
    }
}

impl Task for Kto {
    type Model = AutoModelForCausalLM;
    type Batch = Judged;

    async fn collate(&self, model: &Self::Model, rows: &[Row], draw: Draw) -> Result<Judged> {
        let good = |row: &Row| row.example.ints("label").is_some_and(|label| label.contains(&1));
        let (all, count) = (self.objective.collate(rows, draw), rows.len());
        let batch = part(&all, 0..count);
        let of = |batch: &Batch| {
            self.reference
                .judge(model, |model| sequence_log_probs(model, batch))
        };
        let mut judged = Judged::pairs(batch.clone(), of(&batch)?);
        judged.good = rows.iter().map(good).collect();
        if self.config.loss_type == KtoLoss::Kto {
            let mismatched = part(&all, count..2 * count);
            let ours = sequence_log_probs(&model.without_autodiff(), &mismatched)?;
            judged.kl = (ours - of(&mismatched)?).mean().clamp_min(0.0);
        }
        Ok(judged)
    }

    fn size(&self, judged: &Judged) -> Size {
        Size {
            items: judged.good.len() as u64,
            tokens: judged.batch.tokens() as u64,
        }
    }

    fn loss(&self, model: &Self::Model, judged: &Judged, _: LossOptions) -> Result<Outputs> {
        let (count, device, config) = (judged.good.len(), model.device(), &self.config);
        let logps = sequence_log_probs(model, &judged.batch)?;
        let ratios = logps.clone() - judged.reference.clone();
        let kl = judged.kl.clone();
        let each =
            |of: &dyn Fn(bool) -> f32| numbers(judged.good.iter().map(|good| of(*good)).collect(), &device);
        let sign = each(&|good| if good { 1.0 } else { -1.0 });
        let weights = each(&|good| match good {
            true => config.desirable_weight as f32,
            false => config.undesirable_weight as f32,
        });
        let gain = (ratios.clone() - kl.clone()) * sign * config.beta;
        // 1 − σ(gain).
        let loss = (sigmoid(-gain) * weights).mean();
        let mut logs: Logs = vec![("kl".into(), kl)];
        let goods = judged.good.iter().filter(|good| **good).count();
        let mean = |of: Tensor<1>, good: bool| {
            let count = if good { goods } else { count - goods };
            (count > 0).then(|| (of.detach() * each(&|of| f32::from(of == good))).sum() / count as f64)
        };
        let rewards = [true, false].map(|good| mean(ratios.clone() * config.beta, good));
        if let [Some(chosen), Some(rejected)] = &rewards {
            logs.push(("rewards/margins".into(), chosen.clone() - rejected.clone()));
        }
        let [chosen, rejected] = rewards;
        let named = [
            ("rewards/chosen", chosen),
            ("rewards/rejected", rejected),
            ("logps/chosen", mean(logps.clone(), true)),
            ("logps/rejected", mean(logps, false)),
        ];
        logs.extend(
            named
                .into_iter()
                .filter_map(|(name, value)| Some((name.into(), value?))),
        );
        Ok(Outputs {
            logs,
            ..Outputs::new(Some(loss))
        })
    }

    fn pass(&self) -> Pass {
        self.pass
    }
}

/// What ORPO goes by: names and defaults of TRL's `ORPOConfig`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct OrpoConfig {
    /// What the odds count against the cross entropy: λ.
    pub beta: f64,
    /// Whether nothing is dropped out while the model learns.
    pub disable_dropout: bool,
}

impl Default for OrpoConfig {
    fn default() -> Self {
        Self {
            beta: 0.1,
            disable_dropout: true,
        }
    }
}

/// Odds ratio preference optimization (Hong et al., 2024): the cross entropy of the chosen answer with its prompt, and the
/// odds of the chosen answer against the other. There is no reference.
pub struct Orpo {
    objective: Arc<dyn Objective>,
    beta: f64,
    pass: Pass,
}

impl Orpo {
    /// Pairs as `objective` makes them, for a model of this configuration.
    ///
    /// # Errors
    /// Numbers that make no sense.
    pub fn new(objective: Arc<dyn Objective>, model: &AutoConfig, config: &OrpoConfig) -> Result<Self> {
        positive("objective.beta", config.beta)?;
        Ok(Self {
            objective,
            beta: config.beta,
            pass: if config.disable_dropout {
                Pass::default()
            } else {
                pass(&model.json, None)
            },
        })
    }
}

/// `log(1 − eˣ)` of numbers below 0, also where they are close to it.
fn log1mexp(x: Tensor<1>) -> Tensor<1> {
    let half = (x / 2.0).tanh();
    (half.clone() * -2.0 / (-half + 1.0)).log()
}

impl Task for Orpo {
    type Model = AutoModelForCausalLM;
    type Batch = Batch;

    async fn collate(&self, _: &Self::Model, rows: &[Row], draw: Draw) -> Result<Batch> {
        Ok(self.objective.collate(rows, draw))
    }

    fn size(&self, batch: &Batch) -> Size {
        pairs_of(batch)
    }

    fn loss(&self, model: &Self::Model, batch: &Batch, _: LossOptions) -> Result<Outputs> {
        let device = model.device();
        let Targets::Tokens(labels) = &batch.labels else {
            return Err(crate::tasks::wrong_targets("orpo"));
        };
        let pairs = labels.len() / 2;
        let [rows, seq] = batch.dims();
        // Of the chosen rows, the prompt is learned, too.
        let mut whole = batch.clone();
        let all = |(row, labels): (usize, &Vec<i64>)| {
            let real = |at: usize| match at < batch.lengths[row] {
                true => i64::from(batch.input_ids[row][at]),
                false => IGNORED,
            };
            match row < pairs {
                true => (0..seq).map(real).collect(),
                false => labels.clone(),
            }
        };
        whole.labels = Targets::Tokens(labels.iter().enumerate().map(all).collect());
        let log_probs = token_log_probs(model, &whole, 1.0)?;
        // A token's log-probability stands at the token before it.
        let answers: Vec<f32> = (labels.iter())
            .flat_map(|labels| {
                let next = labels.iter().skip(1).map(|label| f32::from(*label != IGNORED));
                next.chain([0.0]).take(seq).collect::<Vec<_>>()
            })
            .collect();
        let answers = Tensor::<2>::from_data(TensorData::new(answers, [rows, seq]), &device);
        let counts = numbers(learned(batch), &device);
        let logps = (log_probs.clone() * answers).sum_dim(1).reshape([rows]) / counts;
        let [chosen, rejected] = halves(&logps);
        let tokens = learned(&whole)[..pairs]
            .iter()
            .map(|count| f64::from(*count) - 1.0)
            .sum::<f64>();
        let nll = -log_probs.slice([0..pairs, 0..seq]).sum() / tokens.max(1.0);
        let log_odds =
            (chosen.clone() - rejected.clone()) - (log1mexp(chosen.clone()) - log1mexp(rejected.clone()));
        let ratio = log_sigmoid(log_odds.clone()).mean();
        let loss = nll.clone() - ratio.clone() * self.beta;
        let mut logs = logs(
            [chosen.clone() * self.beta, rejected.clone() * self.beta],
            [chosen, rejected],
        );
        logs.push(("nll_loss".into(), nll.detach()));
        logs.push(("log_odds_ratio".into(), ratio.detach()));
        logs.push(("log_odds_chosen".into(), log_odds.detach().mean()));
        Ok(Outputs {
            logs,
            ..Outputs::new(Some(loss))
        })
    }

    fn pass(&self) -> Pass {
        self.pass
    }
}
