//! A language model with everything that belongs to it.

use oxiformers_generate::{GenerationConfig, Generator};
use oxiformers_hub::ModelFiles;
use oxiformers_models::{AutoModelForCausalLM, CausalLM};
use oxiformers_nn::LoadOptions;
use oxiformers_processors::{ChatTemplate, Message, RenderOptions, Tokenizer};

use crate::{Conversation, Error, Result};

/// A causal language model with its tokenizer, chat template and generation settings.
#[derive(Debug)]
pub struct LanguageModel {
    /// What to call it in messages.
    pub name: String,
    /// The network.
    pub model: AutoModelForCausalLM,
    /// Text to token ids and back.
    pub tokenizer: Tokenizer,
    /// How conversations are written down, if the model knows conversations.
    pub chat_template: Option<ChatTemplate>,
    /// How its makers suggest to generate.
    pub generation_config: GenerationConfig,
}

impl LanguageModel {
    /// Loads a model from its files; [`from_pretrained`](crate::FromPretrained::from_pretrained) does so by its name.
    ///
    /// # Errors
    /// Whatever does not fit is named: the file, the field, the tensor.
    pub fn from_files(files: &ModelFiles, options: &LoadOptions) -> Result<Self> {
        // First: its weights are made ready while the tokenizer comes into being.
        let model = AutoModelForCausalLM::from_files(files, options)?;
        let tokenizer = Tokenizer::from_files(files)?;
        Ok(Self {
            name: files.name().to_string(),
            model,
            chat_template: ChatTemplate::from_files(files, &tokenizer)?,
            generation_config: generation_config(files, &tokenizer)?,
            tokenizer,
        })
    }

    /// A generator for this model, with its tokenizer.
    pub fn generator(&self, config: GenerationConfig) -> Generator<'_> {
        Generator::new(&self.model, config).with_tokenizer(&self.tokenizer)
    }

    /// The tokens of a conversation, ready for the model's answer.
    ///
    /// # Errors
    /// Where the model has no chat template, or its template refuses the conversation.
    pub fn encode_chat(&self, messages: &[Message], options: &RenderOptions) -> Result<Vec<u32>> {
        let template = self
            .chat_template
            .as_ref()
            .ok_or_else(|| Error::NoChatTemplate(self.name.clone()))?;
        Ok(template.encode(&self.tokenizer, messages, options)?.ids)
    }

    /// A conversation that has not begun.
    pub fn conversation(&self) -> Conversation<'_> {
        Conversation::new(self)
    }

    /// Longest sequence that the model was made for, if it says so.
    pub fn max_positions(&self) -> Option<usize> {
        self.model.max_position_embeddings()
    }
}

/// The model's own settings, completed by what its tokenizer and a GGUF's metadata know of special tokens.
pub(crate) fn generation_config(files: &ModelFiles, tokenizer: &Tokenizer) -> Result<GenerationConfig> {
    let mut config = GenerationConfig::from_files(files)?;
    let eos = &mut config.eos_token_id;
    if eos.is_empty() {
        eos.extend(tokenizer.eos_token_id());
    }
    if let Some(metadata) = files.gguf_metadata()? {
        // Ends of a turn, which the format names beside the end of a text.
        for key in ["tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"] {
            let id = metadata.get_u64(key).and_then(|id| u32::try_from(id).ok());
            eos.extend(id.filter(|id| !eos.contains(id)));
        }
    }
    config.bos_token_id = config.bos_token_id.or_else(|| tokenizer.bos_token_id());
    config.pad_token_id = config.pad_token_id.or_else(|| tokenizer.pad_token_id());
    Ok(config)
}
