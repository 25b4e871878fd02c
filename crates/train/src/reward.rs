//! Reward models: how good a text is, learned of pairs of which one is better.

use std::sync::Arc;

use burn::tensor::activation::log_sigmoid;
use burn::tensor::{Tensor, TensorData};
use oxiformers_data::tasks::{Batch, Draw, Objective, Row, Targets};
use oxiformers_models::nn::training::Pass;
use oxiformers_models::tasks::{SequenceClassification, TaskType};
use oxiformers_models::{AutoConfig, AutoModelFor};
use serde::{Deserialize, Serialize};

use crate::preferences::{pairs_of, share_above};
use crate::task::{LossOptions, Outputs, Size, Task};
use crate::tasks::{inputs, pass, wrong_targets};
use crate::{Error, Result};

/// What a reward model goes by: names and defaults of TRL's `RewardConfig`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RewardConfig {
    /// What the square of the sum of both rewards counts, so that they lie around 0 (Eisenstein et al., 2023).
    pub center_rewards_coefficient: Option<f64>,
    /// Whether nothing is dropped out while the model learns.
    pub disable_dropout: bool,
}

impl Default for RewardConfig {
    fn default() -> Self {
        Self {
            center_rewards_coefficient: None,
            disable_dropout: true,
        }
    }
}

/// Learns to give the better text the larger number: `−log σ(chosen − rejected − margin)` (Ouyang et al., 2022; the margin:
/// Touvron et al., 2023).
pub struct RewardModeling {
    objective: Arc<dyn Objective>,
    config: RewardConfig,
    pass: Pass,
}

impl RewardModeling {
    /// Pairs as `objective` makes them, for a model of this configuration.
    pub fn new(objective: Arc<dyn Objective>, model: &AutoConfig, config: RewardConfig) -> Self {
        Self {
            objective,
            pass: if config.disable_dropout {
                Pass::default()
            } else {
                pass(&model.json, Some(SequenceClassification::TASK))
            },
            config,
        }
    }
}

impl Task for RewardModeling {
    type Model = AutoModelFor<SequenceClassification>;
    type Batch = Batch;

    async fn collate(&self, _: &Self::Model, rows: &[Row], draw: Draw) -> Result<Batch> {
        Ok(self.objective.collate(rows, draw))
    }

    fn size(&self, batch: &Batch) -> Size {
        pairs_of(batch)
    }

    fn loss(&self, model: &Self::Model, batch: &Batch, _: LossOptions) -> Result<Outputs> {
        let Targets::Numbers(margins) = &batch.labels else {
            return Err(wrong_targets("reward"));
        };
        let logits = model.forward(&inputs(batch))?.logits;
        let [rows, outputs] = logits.dims();
        if outputs != 1 {
            return Err(Error::config(
                "num_labels",
                format!("is {outputs}; a reward is one number"),
            ));
        }
        let pairs = rows / 2;
        let rewards: Tensor<1> = logits.reshape([rows]);
        let chosen = rewards.clone().slice([0..pairs]);
        let rejected = rewards.clone().slice([pairs..rows]);
        let margin: Vec<f32> = (margins.iter())
            .map(|margin| margin.first().copied().unwrap_or(0.0))
            .collect();
        let margin = Tensor::from_data(TensorData::new(margin, [pairs]), &rewards.device());
        let difference = chosen.clone() - rejected.clone();
        let mut loss = -log_sigmoid(difference.clone() - margin).mean();
        if let Some(coefficient) = self.config.center_rewards_coefficient {
            loss = loss + (chosen.clone() + rejected.clone()).powi_scalar(2).mean() * coefficient;
        }
        let rewards = rewards.detach();
        Ok(Outputs {
            logs: vec![
                (
                    "accuracy".into(),
                    share_above(&chosen.detach(), &rejected.detach()),
                ),
                ("margin".into(), difference.detach().mean()),
                ("min_reward".into(), rewards.clone().min()),
                ("mean_reward".into(), rewards.clone().mean()),
                ("max_reward".into(), rewards.max()),
            ],
            ..Outputs::new(Some(loss))
        })
    }

    fn pass(&self) -> Pass {
        self.pass
    }
}
