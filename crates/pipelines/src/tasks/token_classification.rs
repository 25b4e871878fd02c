//! `token-classification`, also called `ner`: what the words of a text are.

use std::fmt;

use oxiformers_hub::ModelFiles;
use oxiformers_models::AutoModelForTokenClassification;
use oxiformers_nn::LoadOptions;
use oxiformers_processors::tokenizer::{
    Characters, EncodeOptions, Encoding, Sequence, TextInput, Truncation, TruncationStrategy,
};
use serde::{Deserialize, Serialize};

use crate::pipeline::lines;
use crate::texts::{Texts, largest, softmax, tokens_of};
use crate::{Error, Pipeline, Result, Task};

/// Classifies the tokens of texts, and puts those together that belong together.
///
/// ```no_run
/// use oxiformers::tasks::{AggregationStrategy, TokenClassificationOptions};
/// use oxiformers::{FromPretrained, Pipeline, TokenClassification, block_on};
///
/// # fn main() -> Result<(), oxiformers::Error> {
/// let ner = TokenClassification::from_pretrained("dbmdz/bert-large-cased-finetuned-conll03-english")?;
/// let options = TokenClassificationOptions {
///     aggregation_strategy: AggregationStrategy::Simple,
///     ..Default::default()
/// };
/// let texts = ["My name is Wolfgang and I live in Berlin".into()];
/// println!("{}", block_on(ner.run(&texts, &options, 1))?[0]);
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct TokenClassification {
    /// The network.
    pub model: AutoModelForTokenClassification,
    texts: Texts,
}

/// Options of [`TokenClassification`].
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TokenClassificationOptions {
    /// How tokens are put together.
    pub aggregation_strategy: AggregationStrategy,
    /// Labels that are left out.
    pub ignore_labels: Vec<String>,
    /// Reads long texts in windows of the model's length, which share so many tokens. With aggregation only.
    pub stride: Option<usize>,
    /// What is put between words that a text was cut into before.
    pub delimiter: String,
    /// Whether texts that are too long for the model are cut.
    pub truncation: bool,
}

impl Default for TokenClassificationOptions {
    fn default() -> Self {
        Self {
            aggregation_strategy: AggregationStrategy::None,
            ignore_labels: vec!["O".to_string()],
            stride: None,
            delimiter: " ".to_string(),
            truncation: false,
        }
    }
}

/// How tokens are put together.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AggregationStrategy {
    /// Not at all.
    #[default]
    None,
    /// Neighbours of one label, where none begins something new (`B-`).
    Simple,
    /// As `Simple`, and a word has the label of its first token.
    First,
    /// As `Simple`, and a word has the label that is the best on average.
    Average,
    /// As `Simple`, and a word has the label of the token that is surest.
    Max,
}

/// A text, or the words of one. As JSON a string or a list of strings.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum TextOrWords {
    /// A text.
    Text(String),
    /// Words, which are tokenized one by one.
    Words(Vec<String>),
}

impl<T: Into<String>> From<T> for TextOrWords {
    fn from(text: T) -> Self {
        Self::Text(text.into())
    }
}

/// What was found in a text, in its order.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Entities(pub Vec<Entity>);

/// A token, or tokens that belong together.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Entity {
    /// The label of a token; of tokens put together see `entity_group`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub entity: Option<String>,
    /// The label of tokens put together, without `B-` or `I-`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub entity_group: Option<String>,
    /// How likely the label is.
    pub score: f32,
    /// Number of the token.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub index: Option<usize>,
    /// The token, or the text that tokens make.
    pub word: String,
    /// The first of its characters in the text.
    pub start: usize,
    /// The end of its characters in the text.
    pub end: usize,
}

impl Entity {
    /// Its label, whichever it is.
    pub fn label(&self) -> &str {
        self.entity
            .as_deref()
            .or(self.entity_group.as_deref())
            .unwrap_or_default()
    }
}

/// A token with all it could be.
struct Piece {
    word: String,
    scores: Vec<f32>,
    start: usize,
    end: usize,
    index: usize,
    is_subword: bool,
}

/// A token or a word with its label.
struct Tagged {
    label: String,
    score: f32,
    index: usize,
    word: String,
    start: usize,
    end: usize,
}

/// A text whose windows are read.
struct Sentence {
    text: String,
    /// First character of each word, where it was given as words.
    words: Option<Vec<usize>>,
    windows: std::ops::Range<usize>,
}

impl Pipeline for TokenClassification {
    const TASK: Task = Task::TokenClassification;
    type Input = TextOrWords;
    type Options = TokenClassificationOptions;
    type Output = Entities;

    fn from_files(files: &ModelFiles, options: &LoadOptions) -> Result<Self> {
        let model = AutoModelForTokenClassification::from_files(files, options)?;
        Ok(Self {
            texts: Texts::from_files(files, &model.config)?,
            model,
        })
    }

    async fn run(
        &self,
        inputs: &[TextOrWords],
        options: &TokenClassificationOptions,
        batch_size: usize,
    ) -> Result<Vec<Entities>> {
        let (sentences, windows) = self.read(inputs, options)?;
        let forward = async |inputs: &_, _: &_| tokens_of(self.model.forward(inputs)?.logits, inputs).await;
        let logits = self.texts.in_batches(&windows, batch_size, forward).await?;
        let entities = |sentence: &Sentence| {
            let (text, of_sentence) = (Characters::new(&sentence.text), sentence.windows.clone());
            let mut entities = Vec::new();
            for (window, logits) in windows[of_sentence.clone()].iter().zip(&logits[of_sentence]) {
                let pieces = self.pieces(sentence, &text, window, logits, options.aggregation_strategy);
                let found = self.aggregate(pieces, options.aggregation_strategy)?;
                let wanted =
                    |entity: &Entity| !options.ignore_labels.iter().any(|label| label == entity.label());
                entities.extend(found.into_iter().filter(wanted));
            }
            Ok(Entities(match sentence.windows.len() {
                1 => entities,
                _ => without_overlaps(entities),
            }))
        };
        sentences.iter().map(entities).collect()
    }
}

impl TokenClassification {
    fn read(
        &self,
        inputs: &[TextOrWords],
        options: &TokenClassificationOptions,
    ) -> Result<(Vec<Sentence>, Vec<Encoding>)> {
        let truncation = |stride| {
            self.texts.window.map(|length| Truncation {
                max_length: Some(length),
                strategy: TruncationStrategy::LongestFirst,
                stride,
                side: None,
            })
        };
        let truncation = match options.stride {
            Some(_) if options.aggregation_strategy == AggregationStrategy::None => {
                let message =
                    "needs an `aggregation_strategy`: windows share tokens, which would stand there twice";
                return Err(Error::option("stride", message));
            }
            Some(stride) => truncation(stride),
            None => options.truncation.then(|| truncation(0)).flatten(),
        };
        let encode = EncodeOptions {
            truncation,
            ..EncodeOptions::default()
        };
        let (mut sentences, mut windows) = (Vec::new(), Vec::new());
        let mut shortened = 0;
        for (index, input) in inputs.iter().enumerate() {
            let failed = |error: oxiformers_processors::Error| Error::input(index, error.to_string());
            let tokenizer = &self.texts.tokenizer;
            let (text, words, encoding) = match input {
                TextOrWords::Text(text) => (text.clone(), None, tokenizer.encode_with(text, &encode)),
                TextOrWords::Words(words) => {
                    let width = |word: &String| word.chars().count() + options.delimiter.chars().count();
                    let starts = words.iter().scan(0, |at, word| {
                        let start = *at;
                        *at += width(word);
                        Some(start)
                    });
                    let parts: Vec<&str> = words.iter().map(String::as_str).collect();
                    let input = TextInput::Single(Sequence::Words(&parts));
                    let encoding = tokenizer.encode_with(input, &encode);
                    (words.join(&options.delimiter), Some(starts.collect()), encoding)
                }
            };
            let mut encoding = encoding.map_err(failed)?;
            if options.stride.is_none() {
                shortened += usize::from(encoding.is_truncated());
                encoding.overflowing.clear();
            }
            let first = windows.len();
            let what_to_do = "read it in windows with the option `stride`, or have it cut with `truncation`";
            self.texts.check_length(index, encoding.len(), what_to_do)?;
            windows.extend(encoding.into_windows());
            sentences.push(Sentence {
                text,
                words,
                windows: first..windows.len(),
            });
        }
        self.texts.say_cut(shortened, inputs.len());
        Ok((sentences, windows))
    }

    /// The tokens of a window, without those that were put around the text.
    fn pieces(
        &self,
        sentence: &Sentence,
        text: &Characters<'_>,
        window: &Encoding,
        logits: &[Vec<f32>],
        strategy: AggregationStrategy,
    ) -> Vec<Piece> {
        let tokenizer = &self.texts.tokenizer;
        let marked = tokenizer.marks_subwords();
        if !marked && !matches!(strategy, AggregationStrategy::None | AggregationStrategy::Simple) {
            tracing::debug!("the tokenizer does not mark tokens within words: a word begins after a space");
        }
        let mut pieces = Vec::new();
        for (index, logits) in logits.iter().enumerate() {
            if window.special_tokens_mask[index] != 0 {
                continue;
            }
            let (mut start, mut end) = window.offsets[index];
            if let (Some(starts), Some(word)) = (&sentence.words, window.word_ids[index])
                && let Some(at) = starts.get(word as usize)
            {
                (start, end) = (start + at, end + at);
            }
            let id = window.ids[index];
            let word = tokenizer.id_to_token(id).unwrap_or_default();
            let written = text.part((start, end));
            let unknown = tokenizer.unk_token_id() == Some(id);
            let is_subword = match marked {
                true => word.chars().count() != written.chars().count(),
                // Where the text has no space before it.
                false => start > 0 && !text.part((start - 1, start + 1)).contains(' '),
            };
            pieces.push(Piece {
                is_subword: is_subword && !unknown,
                word: if unknown { written.to_string() } else { word },
                scores: softmax(logits),
                start,
                end,
                index,
            });
        }
        pieces
    }

    fn aggregate(&self, pieces: Vec<Piece>, strategy: AggregationStrategy) -> Result<Vec<Entity>> {
        let tagged: Vec<Tagged> = match strategy {
            AggregationStrategy::None | AggregationStrategy::Simple => {
                pieces.into_iter().map(|p| self.tag(p)).collect()
            }
            _ => pieces
                .chunk_by(|_, next| next.is_subword)
                .map(|word| self.tag_word(word, strategy))
                .collect::<Result<_>>()?,
        };
        if strategy == AggregationStrategy::None {
            let entity = |tagged: Tagged| Entity {
                entity: Some(tagged.label),
                entity_group: None,
                score: tagged.score,
                index: Some(tagged.index),
                word: tagged.word,
                start: tagged.start,
                end: tagged.end,
            };
            return Ok(tagged.into_iter().map(entity).collect());
        }
        // A label goes on unless it says that it begins.
        let goes_on = |last: &Tagged, next: &Tagged| {
            !next.label.starts_with("B-") && kind(&last.label) == kind(&next.label)
        };
        tagged.chunk_by(goes_on).map(|group| self.group(group)).collect()
    }

    fn tag(&self, piece: Piece) -> Tagged {
        let (label, score) = largest(&piece.scores).unwrap_or_default();
        Tagged {
            label: self.model.labels.label(label),
            score,
            index: piece.index,
            word: piece.word,
            start: piece.start,
            end: piece.end,
        }
    }

    fn tag_word(&self, word: &[Piece], strategy: AggregationStrategy) -> Result<Tagged> {
        let best = |piece: &Piece| largest(&piece.scores).unwrap_or_default();
        let (label, score) = match strategy {
            AggregationStrategy::Average => {
                let labels = word[0].scores.len();
                let mean = |label: usize| {
                    word.iter().map(|piece| piece.scores[label]).sum::<f32>() / word.len() as f32
                };
                largest(&(0..labels).map(mean).collect::<Vec<_>>()).unwrap_or_default()
            }
            AggregationStrategy::Max => {
                let surer = |a: (usize, f32), b: (usize, f32)| if b.1 > a.1 { b } else { a };
                word.iter().map(best).reduce(surer).unwrap_or_default()
            }
            _ => best(&word[0]),
        };
        Ok(Tagged {
            label: self.model.labels.label(label),
            score,
            index: word[0].index,
            word: self.spell(word.iter().map(|piece| piece.word.clone()).collect())?,
            start: word[0].start,
            end: word[word.len() - 1].end,
        })
    }

    fn group(&self, group: &[Tagged]) -> Result<Entity> {
        let label = &group[0].label;
        Ok(Entity {
            entity: None,
            entity_group: Some(
                label
                    .split_once('-')
                    .map_or(label.as_str(), |(_, kind)| kind)
                    .to_string(),
            ),
            score: group.iter().map(|tagged| tagged.score).sum::<f32>() / group.len() as f32,
            index: None,
            word: self.spell(group.iter().map(|tagged| tagged.word.clone()).collect())?,
            start: group[0].start,
            end: group[group.len() - 1].end,
        })
    }

    fn spell(&self, tokens: Vec<String>) -> Result<String> {
        Ok(self.texts.tokenizer.tokens_to_text(tokens)?)
    }
}

/// A label without what says where in a group it stands.
fn kind(label: &str) -> &str {
    label
        .strip_prefix("B-")
        .or(label.strip_prefix("I-"))
        .unwrap_or(label)
}

/// Of entities that windows share characters of, the longest; of equally long ones, the likeliest.
fn without_overlaps(mut entities: Vec<Entity>) -> Vec<Entity> {
    entities.sort_by_key(|entity| entity.start);
    let mut kept: Vec<Entity> = Vec::new();
    for entity in entities {
        match kept.last_mut() {
            Some(last) if (last.start..last.end).contains(&entity.start) => {
                let rank = |entity: &Entity| (entity.end - entity.start, entity.score);
                if rank(&entity) > rank(last) {
                    *last = entity;
                }
            }
            _ => kept.push(entity),
        }
    }
    kept
}

impl fmt::Display for Entities {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        lines(f, &self.0)
    }
}

impl fmt::Display for Entity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}\t{}\t{:.4}\t{}..{}",
            self.label(),
            self.word,
            self.score,
            self.start,
            self.end
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_overlapping_entities_the_longest_stays() {
        let entity = |start, end, score| Entity {
            entity: None,
            entity_group: Some("PER".to_string()),
            score,
            index: None,
            word: String::new(),
            start,
            end,
        };
        let kept = without_overlaps(vec![
            entity(8, 9, 0.9),
            entity(0, 4, 0.5),
            entity(2, 7, 0.1),
            entity(8, 9, 0.95),
        ]);
        assert_eq!(kept, [entity(2, 7, 0.1), entity(8, 9, 0.95)]);
    }
}
