//! The shares of values that architectures leave out while they are trained, by the names that they give them in their
//! `config.json`, with the defaults of Transformers.

use oxiformers_nn::training::Dropout;
use serde_json::Value;

use crate::Task;

/// The dropout of a model that `config.json` describes, with the head of `task` if it has one.
pub fn dropout(config: &Value, task: Option<Task>) -> Dropout {
    let rates = Rates(config);
    let [head_input, classifier] = task.map_or([0.0; 2], |task| rates.of_head(task));
    Dropout {
        head_input,
        classifier,
        adapters: true,
        ..rates.of_body()
    }
}

/// What a `config.json` says.
#[derive(Clone, Copy)]
struct Rates<'a>(&'a Value);

impl Rates<'_> {
    fn model_type(&self) -> &str {
        self.0.get("model_type").and_then(Value::as_str).unwrap_or("")
    }

    /// The first of these fields that is there.
    fn first(&self, names: &[&str], default: f64) -> f64 {
        let number = |name: &&str| self.0.get(*name).and_then(Value::as_f64);
        let found = names.iter().find_map(number).unwrap_or(default);
        if (0.0..1.0).contains(&found) { found } else { 0.0 }
    }

    fn of_body(&self) -> Dropout {
        let none = Dropout::default();
        let rate = |name, default| self.first(&[name], default);
        match self.model_type() {
            model_type @ ("gpt2" | "gptj") => {
                let default = if model_type == "gpt2" { 0.1 } else { 0.0 };
                let residual = rate("resid_pdrop", default);
                Dropout {
                    embedding: rate("embd_pdrop", default),
                    attention: rate("attn_pdrop", default),
                    attention_output: residual,
                    feed_forward: residual,
                    ..none
                }
            }
            "phi" => {
                let residual = rate("resid_pdrop", 0.0);
                Dropout {
                    embedding: rate("embd_pdrop", 0.0),
                    attention: rate("attention_dropout", 0.0),
                    attention_output: residual,
                    feed_forward: residual,
                    ..none
                }
            }
            "phi3" => {
                let residual = rate("resid_pdrop", 0.0);
                Dropout {
                    attention: rate("attention_dropout", 0.0),
                    attention_output: residual,
                    feed_forward: residual,
                    ..none
                }
            }
            "mpt" => {
                let rate = self
                    .0
                    .get("attn_config")
                    .map_or(0.0, |config| Rates(config).first(&["attn_pdrop"], 0.0));
                Dropout {
                    attention: rate,
                    attention_output: rate,
                    feed_forward: rate,
                    ..none
                }
            }
            "opt" => Dropout {
                attention: rate("attention_dropout", 0.0),
                attention_output: rate("dropout", 0.1),
                feed_forward: rate("dropout", 0.1),
                ..none
            },
            "gpt_neox" | "bloom" | "falcon" | "stablelm" => self.of_hidden_dropout(),
            "starcoder2" => Dropout {
                embedding: rate("embedding_dropout", 0.0),
                attention: rate("attention_dropout", 0.0),
                attention_output: rate("residual_dropout", 0.0),
                feed_forward: rate("residual_dropout", 0.0),
                ..none
            },
            model_type @ ("bart" | "mbart" | "plbart" | "m2m_100" | "marian" | "pegasus") => {
                let of_attention = if matches!(model_type, "plbart" | "m2m_100") {
                    0.1
                } else {
                    0.0
                };
                let hidden = rate("dropout", 0.1);
                Dropout {
                    embedding: hidden,
                    attention: rate("attention_dropout", of_attention),
                    attention_output: hidden,
                    feed_forward: hidden,
                    activation: rate("activation_dropout", 0.0),
                    ..none
                }
            }
            "t5" | "mt5" | "umt5" => {
                let everywhere = rate("dropout_rate", 0.1);
                Dropout {
                    embedding: everywhere,
                    attention: everywhere,
                    attention_output: everywhere,
                    feed_forward: everywhere,
                    activation: everywhere,
                    last: everywhere,
                    ..none
                }
            }
            "distilbert" => Dropout {
                embedding: rate("dropout", 0.1),
                attention: rate("attention_dropout", 0.1),
                feed_forward: rate("dropout", 0.1),
                ..none
            },
            "modernbert" => Dropout {
                embedding: rate("embedding_dropout", 0.0),
                attention: rate("attention_dropout", 0.0),
                attention_output: rate("attention_dropout", 0.0),
                activation: rate("mlp_dropout", 0.0),
                ..none
            },
            model_type @ ("bert" | "roberta" | "xlm-roberta" | "camembert" | "electra" | "big_bird"
            | "layoutlm" | "longformer" | "mpnet" | "tapas" | "deberta-v2" | "albert"
            | "nomic_bert") => {
                let hidden = self.hidden_dropout_prob();
                let default = if matches!(model_type, "albert" | "nomic_bert") {
                    0.0
                } else {
                    0.1
                };
                Dropout {
                    embedding: hidden,
                    attention: rate("attention_probs_dropout_prob", default),
                    attention_output: hidden,
                    // ALBERT has one for its feed-forward block, too, which nothing goes through.
                    feed_forward: if model_type == "albert" { 0.0 } else { hidden },
                    ..none
                }
            }
            _ => Dropout {
                attention: rate("attention_dropout", 0.0),
                ..none
            },
        }
    }

    fn of_hidden_dropout(&self) -> Dropout {
        let [hidden, attention] =
            ["hidden_dropout", "attention_dropout"].map(|name| self.first(&[name], 0.0));
        let says = |name, default| self.0.get(name).and_then(Value::as_bool).unwrap_or(default);
        let of_both = Dropout {
            attention,
            attention_output: hidden,
            feed_forward: hidden,
            ..Dropout::default()
        };
        match self.model_type() {
            "gpt_neox" => Dropout {
                embedding: hidden,
                ..of_both
            },
            "stablelm" => Dropout {
                attention_output: 0.0,
                ..of_both
            },
            "falcon" => {
                // The weights of attention without ALiBi are left as they are.
                let weights = if says("alibi", false) { attention } else { 0.0 };
                match says("parallel_attn", true) || says("new_decoder_architecture", false) {
                    true => Dropout {
                        attention: weights,
                        parallel: hidden,
                        ..Dropout::default()
                    },
                    false => Dropout {
                        attention: weights,
                        attention_output: attention,
                        ..of_both
                    },
                }
            }
            _ => of_both,
        }
    }

    fn hidden_dropout_prob(&self) -> f64 {
        let default = if matches!(self.model_type(), "albert" | "nomic_bert") {
            0.0
        } else {
            0.1
        };
        self.first(&["hidden_dropout_prob"], default)
    }

    /// Of what the first layer of a head gets, and of what its output layer gets.
    fn of_head(&self, task: Task) -> [f64; 2] {
        let rate = |name, default| self.first(&[name], default);
        let hidden = self.hidden_dropout_prob();
        let output = |rate| [0.0, rate];
        match (task, self.model_type()) {
            (Task::Base | Task::MaskedLM | Task::NextSentencePrediction | Task::PreTraining, _) => [0.0; 2],
            (Task::DocumentQuestionAnswering, _) => [0.0; 2],
            (Task::TableQuestionAnswering, _) => output(hidden),
            (Task::QuestionAnswering, "distilbert") => output(rate("qa_dropout", 0.1)),
            (Task::QuestionAnswering, "big_bird") => [hidden, 0.0],
            (_, "modernbert") => output(rate("classifier_dropout", 0.0)),
            (Task::QuestionAnswering, _) => [0.0; 2],
            (Task::TokenClassification, "distilbert") => output(rate("dropout", 0.1)),
            (_, "distilbert") => output(rate("seq_classif_dropout", 0.2)),
            (Task::TokenClassification, "deberta-v2") => output(hidden),
            (_, "deberta-v2") => [rate("pooler_dropout", 0.0), rate("cls_dropout", hidden)],
            (_, "albert") => output(rate("classifier_dropout_prob", 0.1)),
            (Task::MultipleChoice, "electra") => output(rate("summary_last_dropout", 0.1)),
            (Task::SequenceClassification, "longformer" | "mpnet") => [hidden; 2],
            (_, "longformer" | "mpnet" | "layoutlm" | "tapas") => output(hidden),
            (Task::MultipleChoice, "roberta" | "xlm-roberta" | "camembert" | "big_bird") => output(hidden),
            (
                Task::SequenceClassification,
                "roberta" | "xlm-roberta" | "camembert" | "electra" | "big_bird",
            ) => [rate("classifier_dropout", hidden); 2],
            (_, "bert" | "roberta" | "xlm-roberta" | "camembert" | "electra" | "big_bird" | "nomic_bert") => {
                output(rate("classifier_dropout", hidden))
            }
            (Task::TokenClassification, "t5" | "mt5" | "umt5") => output(rate("classifier_dropout", 0.0)),
            (_, "bart" | "mbart" | "plbart" | "t5" | "mt5" | "umt5") => [rate("classifier_dropout", 0.0); 2],
            (Task::TokenClassification, "bloom" | "falcon" | "stablelm") => {
                output(self.first(&["classifier_dropout", "hidden_dropout"], 0.0))
            }
            (Task::TokenClassification, "gpt_neox") => output(rate("classifier_dropout", 0.1)),
            (Task::TokenClassification, _) => {
                output(self.first(&["classifier_dropout", "hidden_dropout"], 0.1))
            }
            // Decoders that judge texts drop nothing.
            _ => [0.0; 2],
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn by_the_names_of_architectures() {
        let gpt2 = dropout(
            &json!({"model_type": "gpt2", "embd_pdrop": 0.2, "resid_pdrop": 0.3}),
            None,
        );
        let expected = Dropout {
            embedding: 0.2,
            attention: 0.1,
            attention_output: 0.3,
            feed_forward: 0.3,
            adapters: true,
            ..Dropout::default()
        };
        assert_eq!(gpt2, expected);
        let t5 = dropout(&json!({"model_type": "t5"}), None);
        assert_eq!((t5.attention, t5.activation, t5.last), (0.1, 0.1, 0.1));
        let t5 = dropout(&json!({"model_type": "t5", "dropout_rate": 0.0}), None);
        let nothing = Dropout {
            adapters: true,
            ..Dropout::default()
        };
        assert_eq!(t5, nothing);
        let llama = dropout(&json!({"model_type": "llama", "attention_dropout": 0.25}), None);
        assert_eq!((llama.attention, llama.attention_output), (0.25, 0.0));
        let mpt = json!({"model_type": "mpt", "attn_config": {"attn_pdrop": 0.3}});
        assert_eq!(dropout(&mpt, None).feed_forward, 0.3);
        // One after the other, or what both add at once.
        for (old, new, alibi, expected) in [
            (true, false, false, [0.0, 0.0, 0.0, 0.2]),
            (false, true, false, [0.0, 0.0, 0.0, 0.2]),
            (false, false, true, [0.3, 0.3, 0.2, 0.0]),
        ] {
            let falcon = json!({
                "model_type": "falcon", "hidden_dropout": 0.2, "attention_dropout": 0.3,
                "parallel_attn": old, "new_decoder_architecture": new, "alibi": alibi,
            });
            let falcon = dropout(&falcon, None);
            let found = [
                falcon.attention,
                falcon.attention_output,
                falcon.feed_forward,
                falcon.parallel,
            ];
            assert_eq!(found, expected);
        }
        let opt = dropout(&json!({"model_type": "opt"}), None);
        assert_eq!((opt.embedding, opt.feed_forward), (0.0, 0.1));
        // A rate that would leave nothing is none.
        let nothing = json!({"model_type": "opt", "dropout": 1.0});
        assert_eq!(dropout(&nothing, None).feed_forward, 0.0);
    }

    #[test]
    fn of_heads() {
        let of = |config, task| {
            let dropout = dropout(&config, Some(task));
            [dropout.head_input, dropout.classifier]
        };
        let bert = json!({"model_type": "bert", "hidden_dropout_prob": 0.2, "classifier_dropout": null});
        assert_eq!(of(bert.clone(), Task::SequenceClassification), [0.0, 0.2]);
        assert_eq!(of(bert.clone(), Task::QuestionAnswering), [0.0; 2]);
        assert_eq!(of(bert, Task::MaskedLM), [0.0; 2]);
        let roberta = json!({"model_type": "roberta", "classifier_dropout": 0.3});
        assert_eq!(of(roberta.clone(), Task::SequenceClassification), [0.3; 2]);
        assert_eq!(of(roberta, Task::TokenClassification), [0.0, 0.3]);
        let distilbert = json!({"model_type": "distilbert"});
        assert_eq!(of(distilbert, Task::SequenceClassification), [0.0, 0.2]);
        let gpt2 = json!({"model_type": "gpt2"});
        assert_eq!(of(gpt2.clone(), Task::SequenceClassification), [0.0; 2]);
        assert_eq!(of(gpt2, Task::TokenClassification), [0.0, 0.1]);
    }
}
