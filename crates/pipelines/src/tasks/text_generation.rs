//! `text-generation`: how a text goes on, or a conversation.

use std::fmt;

use oxiformers_generate::{Generated, GenerationConfig};
use oxiformers_hub::ModelFiles;
use oxiformers_nn::LoadOptions;
use oxiformers_processors::tokenizer::TruncationStrategy;
use oxiformers_processors::{Message, RenderOptions};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::generation::{changed, generate, with_defaults};
use crate::pipeline::lines;
use crate::texts;
use crate::{Error, LanguageModel, Pipeline, Result, Task};

/// Continues texts and conversations. Where neither the model nor the options say otherwise, it draws at most 256 tokens
/// at a temperature of 0.7.
///
/// ```no_run
/// use oxiformers::{FromPretrained, Message, Pipeline, TextGeneration, block_on};
///
/// # fn main() -> Result<(), oxiformers::Error> {
/// let generate = TextGeneration::from_pretrained("HuggingFaceTB/SmolLM2-135M-Instruct")?;
/// let chat = vec![Message::user("What is the capital of France?")];
/// println!("{}", block_on(generate.run(&[chat.into()], &Default::default(), 1))?[0]);
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct TextGeneration {
    /// The model with its tokenizer and template.
    pub model: LanguageModel,
    config: GenerationConfig,
    texts: texts::Texts,
}

/// Options of [`TextGeneration`]. As JSON, the fields of [`GenerationConfig`] stand beside them.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default)]
pub struct TextGenerationOptions {
    /// Whether the prompt stands before what is generated.
    pub return_full_text: bool,
    /// Whether to give token ids instead of text, the prompt's included.
    pub return_tensors: bool,
    /// What is put before each text.
    pub prefix: String,
    /// Whether the last message is to be continued instead of answered; by default where it is the assistant's.
    pub continue_final_message: Option<bool>,
    /// `hole` cuts the beginning of a prompt so that there is room for all new tokens.
    pub handle_long_generation: Option<String>,
    /// JSON schemas of the functions that the model may call.
    pub tools: Option<Vec<Value>>,
    /// Documents that the model may read.
    pub documents: Option<Vec<Value>>,
    /// Further variables of the chat template.
    pub chat_template_kwargs: Map<String, Value>,
    /// Whether texts that are too long for the model are cut; conversations are not.
    pub truncation: bool,
    /// Settings of generation, by name.
    #[serde(flatten)]
    pub generation: Map<String, Value>,
}

impl Default for TextGenerationOptions {
    fn default() -> Self {
        Self {
            return_full_text: true,
            return_tensors: false,
            prefix: String::new(),
            continue_final_message: None,
            handle_long_generation: None,
            tools: None,
            documents: None,
            chat_template_kwargs: Map::new(),
            truncation: false,
            generation: Map::new(),
        }
    }
}

/// What is to be continued: as JSON a text, a list of messages, or an object with a list of `messages`.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(untagged)]
pub enum Prompt {
    /// A text.
    Text(String),
    /// A conversation.
    Chat(Vec<Message>),
    /// The same.
    Messages {
        /// What was said.
        messages: Vec<Message>,
    },
}

impl From<&str> for Prompt {
    fn from(text: &str) -> Self {
        Self::Text(text.to_string())
    }
}

impl From<String> for Prompt {
    fn from(text: String) -> Self {
        Self::Text(text)
    }
}

impl From<Vec<Message>> for Prompt {
    fn from(messages: Vec<Message>) -> Self {
        Self::Chat(messages)
    }
}

/// A text or a conversation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum TextOrChat {
    /// A text.
    Text(String),
    /// A conversation.
    Chat(Vec<Message>),
}

/// What was generated.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum GeneratedText {
    /// As text.
    #[serde(rename = "generated_text")]
    Text(TextOrChat),
    /// As token ids.
    #[serde(rename = "generated_token_ids")]
    Ids(Vec<u32>),
}

/// What was generated for a prompt, `num_return_sequences` times.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Texts(pub Vec<GeneratedText>);

impl Pipeline for TextGeneration {
    const TASK: Task = Task::TextGeneration;
    type Input = Prompt;
    type Options = TextGenerationOptions;
    type Output = Texts;

    fn from_files(files: &ModelFiles, options: &LoadOptions) -> Result<Self> {
        let model = LanguageModel::from_files(files, options)?;
        let defaults = json!({ "max_new_tokens": 256, "do_sample": true, "temperature": 0.7 });
        let defaults = defaults.as_object().cloned().unwrap_or_default();
        Ok(Self {
            config: with_defaults(files, model.generation_config.clone(), defaults)?,
            texts: texts::Texts::new(&model.name, model.tokenizer.clone(), model.max_positions()),
            model,
        })
    }

    async fn run(
        &self,
        inputs: &[Prompt],
        options: &TextGenerationOptions,
        batch_size: usize,
    ) -> Result<Vec<Texts>> {
        let config = changed(&self.config, &options.generation)?;
        let mut prompts = self.prompts(inputs, options)?;
        if let Some(way) = &options.handle_long_generation {
            self.make_room(&mut prompts, way, &config)?;
        }
        for (index, prompt) in prompts.iter().enumerate() {
            self.texts
                .check_length(index, prompt.len().max(1), "shorten it")?;
        }
        let generated = generate(&self.model.generator(config), &prompts, batch_size).await?;
        let answer = |((input, prompt), generated): ((&Prompt, &Vec<u32>), Vec<Generated>)| {
            let one = |generated| self.record(input, prompt, generated, options);
            Ok(Texts(generated.into_iter().map(one).collect::<Result<_>>()?))
        };
        inputs.iter().zip(&prompts).zip(generated).map(answer).collect()
    }
}

impl TextGeneration {
    fn prompts(&self, inputs: &[Prompt], options: &TextGenerationOptions) -> Result<Vec<Vec<u32>>> {
        let cut = options.truncation.then_some(TruncationStrategy::LongestFirst);
        let tokenizer = &self.model.tokenizer;
        let encode = |(index, input): (usize, &Prompt)| match input {
            // Nothing is a prompt too: the model begins.
            Prompt::Text(text) if text.is_empty() && options.prefix.is_empty() => {
                Ok(tokenizer.encode("", true)?)
            }
            Prompt::Text(text) if options.handle_long_generation.is_some() => {
                Ok(tokenizer.encode(&format!("{}{text}", options.prefix), true)?)
            }
            Prompt::Text(text) => {
                let encoding = self
                    .texts
                    .encode(index, &format!("{}{text}", options.prefix), cut)?;
                self.texts.say_cut(usize::from(encoding.is_truncated()), 1);
                Ok(encoding.ids)
            }
            Prompt::Chat(messages) | Prompt::Messages { messages } => {
                let template = RenderOptions {
                    tools: options.tools.clone(),
                    documents: options.documents.clone(),
                    kwargs: options.chat_template_kwargs.clone(),
                    ..match continues(messages, options) {
                        true => RenderOptions::continuing(),
                        false => RenderOptions::generation(),
                    }
                };
                self.model.encode_chat(messages, &template)
            }
        };
        inputs.iter().enumerate().map(encode).collect()
    }

    /// Cuts the beginning of prompts.
    fn make_room(&self, prompts: &mut [Vec<u32>], way: &str, config: &GenerationConfig) -> Result<()> {
        let fail = |message: String| Err(Error::option("handle_long_generation", message));
        if way != "hole" {
            return fail(format!("is {way:?}; only \"hole\" is known"));
        }
        let Some(limit) = self.texts.window else {
            return Ok(());
        };
        let mut shortened = 0;
        for prompt in prompts.iter_mut() {
            let new = match (config.max_new_tokens, config.max_length) {
                (Some(new), _) => new,
                (None, length) => length.unwrap_or(20).saturating_sub(prompt.len()),
            };
            if prompt.len() + new > limit {
                let keep = limit.saturating_sub(new);
                if keep == 0 {
                    return fail(format!("{new} new tokens leave no room for a prompt in {limit}"));
                }
                shortened += 1;
                prompt.drain(..prompt.len() - keep);
            }
        }
        self.texts.say_cut(shortened, prompts.len());
        Ok(())
    }

    fn record(
        &self,
        input: &Prompt,
        prompt: &[u32],
        generated: Generated,
        options: &TextGenerationOptions,
    ) -> Result<GeneratedText> {
        if options.return_tensors {
            return Ok(GeneratedText::Ids([prompt, &generated.ids].concat()));
        }
        let new = self.model.tokenizer.decode(&generated.ids, true)?;
        let text = match input {
            _ if !options.return_full_text => TextOrChat::Text(new),
            Prompt::Text(text) => TextOrChat::Text(format!("{text}{new}")),
            Prompt::Chat(messages) | Prompt::Messages { messages } => {
                let mut messages = messages.clone();
                match messages.last_mut() {
                    Some(last) if continues(std::slice::from_ref(last), options) => {
                        last.content = Some(format!("{}{new}", last.text()).into());
                    }
                    _ => messages.push(Message::assistant(new)),
                }
                TextOrChat::Chat(messages)
            }
        };
        Ok(GeneratedText::Text(text))
    }
}

/// Whether the last message is to be continued.
fn continues(messages: &[Message], options: &TextGenerationOptions) -> bool {
    let assistant = messages.last().is_some_and(|last| last.role == "assistant");
    options.continue_final_message.unwrap_or(assistant)
}

impl fmt::Display for Texts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        lines(f, &self.0)
    }
}

impl fmt::Display for GeneratedText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Text(TextOrChat::Text(text)) => f.write_str(text),
            // What was said before is known.
            Self::Text(TextOrChat::Chat(messages)) => {
                f.write_str(&messages.last().map(Message::text).unwrap_or_default())
            }
            Self::Ids(ids) => f.write_str(&ids.iter().map(u32::to_string).collect::<Vec<_>>().join(" ")),
        }
    }
}
