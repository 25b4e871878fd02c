//! A conversation that does not run again what the model has seen.

use std::ops::ControlFlow;

use oxiformers_generate::{Generated, GenerationConfig, PromptCache, Step, Token};
use oxiformers_processors::{Message, RenderOptions};

use crate::{LanguageModel, Result};

/// Messages, and the keys and values of those that the model has seen.
#[derive(Debug)]
pub struct Conversation<'a> {
    model: &'a LanguageModel,
    /// What has been said. It may be changed freely; what it has in common with earlier is not run again.
    pub messages: Vec<Message>,
    /// What the template is asked for beside the messages.
    pub options: RenderOptions,
    past: Option<PromptCache>,
}

impl<'a> Conversation<'a> {
    pub(crate) fn new(model: &'a LanguageModel) -> Self {
        Self {
            model,
            messages: Vec::new(),
            options: RenderOptions::generation(),
            past: None,
        }
    }

    /// The model's answer to the messages, which is appended to them. `on_tokens` sees the new tokens of every
    /// step, none while the prompt runs, and may end the answer. An answer is as long as the model's context
    /// allows unless `config` sets a length.
    ///
    /// # Errors
    /// Where the template refuses the messages, they are too long for the model, or generating fails.
    pub async fn answer(
        &mut self,
        mut config: GenerationConfig,
        mut on_tokens: impl FnMut(&[Token]) -> ControlFlow<()>,
    ) -> Result<Generated> {
        if config.max_new_tokens.is_none() && config.max_length.is_none() {
            config.max_new_tokens = Some(self.model.max_positions().unwrap_or(4096));
        }
        let prompt = self.model.encode_chat(&self.messages, &self.options)?;
        let generator = self.model.generator(config);
        let mut generation = generator.start(&[prompt], self.past.take())?;
        loop {
            let flow = match generation.step().await? {
                Step::Prompt { .. } => on_tokens(&[]),
                Step::Tokens(tokens) => on_tokens(&tokens),
                Step::Done => break,
            };
            if flow.is_break() {
                break;
            }
        }
        let (mut answers, past) = generation.finish_with_cache();
        self.past = past;
        let answer = answers.swap_remove(0);
        if !answer.ids.is_empty() {
            self.messages.push(Message::assistant(answer.text.clone()));
        }
        Ok(answer)
    }
}
