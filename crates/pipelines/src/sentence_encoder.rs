//! Sentences to vectors.

use oxiformers_hub::ModelFiles;
use oxiformers_models::SentenceModel;
use oxiformers_nn::{EncoderInputs, LoadOptions};
use oxiformers_processors::Tokenizer;
use oxiformers_processors::tokenizer::{EncodeOptions, Encoding, Truncation};

use crate::Result;
use crate::texts::{Shape, TOKENS_AT_ONCE, in_batches, rows_of};

/// A model of sentence embeddings with its tokenizer: what Python calls a `SentenceTransformer`.
///
/// ```no_run
/// use oxiformers::{FromPretrained, SentenceEncoder};
///
/// # fn main() -> Result<(), oxiformers::Error> {
/// let model = SentenceEncoder::from_pretrained("sentence-transformers/all-MiniLM-L6-v2")?;
/// let sentences = ["A man is eating food.", "Someone has dinner."];
/// let embeddings = oxiformers::block_on(model.encode(&sentences, 32))?;
/// let similarity: f32 = embeddings[0].iter().zip(&embeddings[1]).map(|(a, b)| a * b).sum();
/// println!("{similarity}");
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct SentenceEncoder {
    /// What to call it in messages.
    pub name: String,
    /// The network.
    pub model: SentenceModel,
    /// Text to token ids.
    pub tokenizer: Tokenizer,
}

impl SentenceEncoder {
    /// Loads a model from its files; [`from_pretrained`](crate::FromPretrained::from_pretrained) does so by its name.
    /// Without `modules.json`, an embedding is the mean over an encoder's hidden states.
    ///
    /// # Errors
    /// Whatever does not fit is named: the file, the field, the tensor.
    pub fn from_files(files: &ModelFiles, options: &LoadOptions) -> Result<Self> {
        let model = SentenceModel::from_files(files, options)?;
        Ok(Self {
            name: files.name().to_string(),
            tokenizer: Tokenizer::from_files(&files.folder(&model.place))?,
            model,
        })
    }

    /// The embedding of each sentence, `batch_size` of similar length at a time. What is longer than
    /// [`max_seq_length`](Self::max_seq_length) is cut, which is said. The model's default prompt stands before each sentence, if it
    /// has one.
    ///
    /// # Errors
    /// Where a sentence cannot be tokenized, or the device fails.
    pub async fn encode(&self, sentences: &[&str], batch_size: usize) -> Result<Vec<Vec<f32>>> {
        let name = self.model.default_prompt_name.as_deref();
        let prompt = name.and_then(|name| self.model.prompts.get(name));
        self.encode_with_prompt(prompt.map_or("", String::as_str), sentences, batch_size)
            .await
    }

    /// Like [`encode`](Self::encode), with this text before each sentence; [`SentenceModel::prompts`] holds those that
    /// the model was trained with.
    ///
    /// # Errors
    /// As [`encode`](Self::encode).
    pub async fn encode_with_prompt(
        &self,
        prompt: &str,
        sentences: &[&str],
        batch_size: usize,
    ) -> Result<Vec<Vec<f32>>> {
        let prompt_tokens = self.prompt_tokens(prompt)?;
        let encode = |sentence: &&str| self.row(&format!("{prompt}{sentence}"));
        let rows = sentences.iter().map(encode).collect::<Result<Vec<_>>>()?;
        let shortened = rows.iter().filter(|row| row.is_truncated()).count();
        if shortened > 0 {
            let length = self.max_seq_length().unwrap_or_default();
            tracing::warn!(
                "{shortened} of {} sentences were cut to {length} tokens",
                rows.len()
            );
        }
        let pad = self.tokenizer.pad_token_id().unwrap_or(0);
        let forward = async |batch: &[usize]| {
            let rows: Vec<Vec<u32>> = batch.iter().map(|row| rows[*row].ids.clone()).collect();
            let inputs = EncoderInputs::padded(&rows, pad);
            rows_of(self.model.forward(&inputs, prompt_tokens)?).await
        };
        let architecture = &self.model.model.config.architecture;
        let shape = |row: &Encoding| Shape {
            group: architecture.batch_group(row.len()),
            length: row.len(),
        };
        in_batches(&rows, batch_size, TOKENS_AT_ONCE, shape, forward).await
    }

    /// The longest sentence in tokens, special ones included, if there is a limit.
    pub fn max_seq_length(&self) -> Option<usize> {
        let model = self.model.model.config.architecture.max_position_embeddings();
        let own = (self.model.max_seq_length).or(self.tokenizer.config().model_max_length);
        [own, model].into_iter().flatten().min()
    }

    fn row(&self, text: &str) -> Result<Encoding> {
        let lower;
        let text = match self.model.do_lower_case {
            true => {
                lower = text.to_lowercase();
                &lower
            }
            false => text,
        };
        let options = EncodeOptions {
            truncation: self.max_seq_length().map(|max_length| Truncation {
                max_length: Some(max_length),
                ..Truncation::default()
            }),
            ..EncodeOptions::default()
        };
        Ok(self.tokenizer.encode_with(text, &options)?)
    }

    /// How many of a sentence's tokens are the prompt's.
    fn prompt_tokens(&self, prompt: &str) -> Result<usize> {
        if prompt.is_empty() {
            return Ok(0);
        }
        let ids = self.row(prompt)?.ids;
        let ends = [
            self.tokenizer.special_token_id("sep_token"),
            self.tokenizer.eos_token_id(),
        ];
        // The token that ends a text does not follow the prompt.
        let ended = ids.last().is_some_and(|last| ends.contains(&Some(*last)));
        Ok(ids.len() - usize::from(ended))
    }
}
