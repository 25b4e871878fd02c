//! `question-answering`: where in a text the answer to a question stands.

use std::collections::HashMap;
use std::fmt;
use std::ops::Range;

use burn::tensor::Tensor;
use oxiformers_hub::ModelFiles;
use oxiformers_models::AutoModelForQuestionAnswering;
use oxiformers_nn::LoadOptions;
use oxiformers_processors::tokenizer::{
    Characters, EncodeOptions, Encoding, Side, Truncation, TruncationStrategy,
};
use serde::{Deserialize, Serialize};

use crate::texts::{Texts, softmax, tokens_of};
use crate::{Error, OneOrMany, Pipeline, Result, Task};

/// Finds answers in texts of any length: long ones are read in windows.
///
/// ```no_run
/// use oxiformers::tasks::Question;
/// use oxiformers::{FromPretrained, Pipeline, QuestionAnswering, block_on};
///
/// # fn main() -> Result<(), oxiformers::Error> {
/// let answer = QuestionAnswering::from_pretrained("distilbert/distilbert-base-cased-distilled-squad")?;
/// let question = Question::new("Where do I live?", "My name is Wolfgang and I live in Berlin");
/// println!("{}", block_on(answer.run(&[question], &Default::default(), 1))?[0]);
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct QuestionAnswering {
    /// The network.
    pub model: AutoModelForQuestionAnswering,
    texts: Texts,
}

/// Options of [`QuestionAnswering`].
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct QuestionAnsweringOptions {
    /// How many answers to give at most.
    pub top_k: usize,
    /// How many tokens a window shares with the one before it; by default 128, or half a window.
    pub doc_stride: Option<usize>,
    /// The longest answer in tokens.
    pub max_answer_len: usize,
    /// The length of a window in tokens, question included; by default 384, or what the model takes.
    pub max_seq_len: Option<usize>,
    /// Whether the answer may be that there is none, which is an empty text.
    pub handle_impossible_answer: bool,
    /// Whether answers are whole words; languages without spaces are better off without.
    pub align_to_words: bool,
}

impl Default for QuestionAnsweringOptions {
    fn default() -> Self {
        Self {
            top_k: 1,
            doc_stride: None,
            max_answer_len: 15,
            max_seq_len: None,
            handle_impossible_answer: false,
            align_to_words: true,
        }
    }
}

/// A question and the text that answers it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Question {
    /// What is asked.
    pub question: String,
    /// Where the answer stands.
    pub context: String,
}

impl Question {
    /// A question about a text.
    pub fn new(question: impl Into<String>, context: impl Into<String>) -> Self {
        Self {
            question: question.into(),
            context: context.into(),
        }
    }
}

/// A part of the text that answers the question.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Answer {
    /// How likely it is, over all windows that it was found in.
    pub score: f32,
    /// The first of its characters in the text.
    pub start: usize,
    /// The end of its characters in the text.
    pub end: usize,
    /// The answer.
    pub answer: String,
}

/// Begin and end of a possible answer among the tokens of a window.
struct Span {
    score: f32,
    start: usize,
    end: usize,
}

impl Pipeline for QuestionAnswering {
    const TASK: Task = Task::QuestionAnswering;
    type Input = Question;
    type Options = QuestionAnsweringOptions;
    type Output = OneOrMany<Answer>;

    fn from_files(files: &ModelFiles, options: &LoadOptions) -> Result<Self> {
        let model = AutoModelForQuestionAnswering::from_files(files, options)?;
        Ok(Self {
            texts: Texts::from_files(files, &model.config)?,
            model,
        })
    }

    async fn run(
        &self,
        inputs: &[Question],
        options: &QuestionAnsweringOptions,
        batch_size: usize,
    ) -> Result<Vec<OneOrMany<Answer>>> {
        let (windows, of_input) = self.windows(inputs, options)?;
        let forward = async |inputs: &_, _: &_| {
            let logits = self.model.forward(inputs)?.logits;
            let both = Tensor::stack::<3>(vec![logits.start_logits, logits.end_logits], 2);
            tokens_of(both, inputs).await
        };
        let logits = self.texts.in_batches(&windows, batch_size, forward).await?;
        let answer = |(input, of_input): (&Question, Range<usize>)| {
            let windows = windows[of_input.clone()].iter().zip(&logits[of_input]);
            self.answers(input, windows, options)
        };
        Ok(inputs.iter().zip(of_input).map(answer).collect())
    }
}

impl QuestionAnswering {
    /// Which of the two texts of a row is the context: the question stands first where rows are filled at the right.
    fn context_is(&self) -> usize {
        match self.texts.tokenizer.config().padding_side {
            Side::Right => 1,
            Side::Left => 0,
        }
    }

    /// The windows over all contexts, and which of them are whose.
    fn windows(
        &self,
        inputs: &[Question],
        options: &QuestionAnsweringOptions,
    ) -> Result<(Vec<Encoding>, Vec<Range<usize>>)> {
        for (name, value) in [
            ("top_k", options.top_k),
            ("max_answer_len", options.max_answer_len),
        ] {
            if value == 0 {
                return Err(Error::option(name, "is 0; it must be 1 or more"));
            }
        }
        let length = options
            .max_seq_len
            .unwrap_or(384.min(self.texts.window.unwrap_or(384)));
        if let Some(window) = self.texts.window.filter(|window| length > *window) {
            let message = format!("is {length}, and {} takes {window}", self.texts.name);
            return Err(Error::option("max_seq_len", message));
        }
        let stride = options.doc_stride.unwrap_or(128.min(length / 2));
        if stride > length {
            let message = format!("is {stride}, more than a window has, which is {length}");
            return Err(Error::option("doc_stride", message));
        }
        let encode = EncodeOptions {
            truncation: Some(Truncation {
                max_length: Some(length),
                strategy: match self.context_is() {
                    1 => TruncationStrategy::OnlySecond,
                    _ => TruncationStrategy::OnlyFirst,
                },
                stride,
                side: None,
            }),
            ..EncodeOptions::default()
        };
        let (mut windows, mut of_input) = (Vec::new(), Vec::new());
        for (index, input) in inputs.iter().enumerate() {
            for (name, text) in [("question", &input.question), ("context", &input.context)] {
                if text.is_empty() {
                    return Err(Error::input(index, format!("`{name}` is empty")));
                }
            }
            let pair = match self.context_is() {
                1 => (&input.question, &input.context),
                _ => (&input.context, &input.question),
            };
            let encoding = self.texts.tokenizer.encode_with(pair, &encode);
            let encoding = encoding.map_err(|error| Error::input(index, error.to_string()))?;
            self.texts
                .check_length(index, encoding.len(), "make `max_seq_len` smaller")?;
            let first = windows.len();
            windows.extend(encoding.into_windows());
            of_input.push(first..windows.len());
        }
        Ok((windows, of_input))
    }

    fn answers<'a>(
        &self,
        input: &Question,
        windows: impl Iterator<Item = (&'a Encoding, &'a Vec<Vec<f32>>)>,
        options: &QuestionAnsweringOptions,
    ) -> OneOrMany<Answer> {
        // Some candidates become the same word.
        let candidates = match options.align_to_words {
            true => options.top_k * 2 + 10,
            false => options.top_k,
        };
        let context = Characters::new(&input.context);
        let mut answers: Vec<Answer> = Vec::new();
        let mut known: HashMap<String, usize> = HashMap::new();
        let mut no_answer = f32::INFINITY;
        for (window, logits) in windows {
            let (spans, none) = self.spans(window, logits, candidates, options.max_answer_len);
            no_answer = no_answer.min(none);
            for span in spans {
                let (start, end) = self.characters(window, &span, options.align_to_words);
                let answer = context.part((start, end));
                match known.get(&answer.to_lowercase()) {
                    Some(index) => answers[*index].score += span.score,
                    None => {
                        known.insert(answer.to_lowercase(), answers.len());
                        answers.push(Answer {
                            score: span.score,
                            start,
                            end,
                            answer: answer.to_string(),
                        });
                    }
                }
            }
        }
        if options.handle_impossible_answer {
            answers.push(Answer {
                score: no_answer,
                start: 0,
                end: 0,
                answer: String::new(),
            });
        }
        answers.sort_by(|a, b| b.score.total_cmp(&a.score));
        answers.truncate(options.top_k);
        OneOrMany::of(answers)
    }

    /// The likeliest answers within a window, and how likely it holds none.
    fn spans(&self, window: &Encoding, logits: &[Vec<f32>], most: usize, max_len: usize) -> (Vec<Span>, f32) {
        let (context, cls) = (self.context_is(), self.texts.tokenizer.cls_token_id());
        // The first token, too, takes part: some models point at it where there is no answer.
        let possible: Vec<bool> = (window.sequence_ids.iter().zip(&window.ids))
            .map(|(sequence, id)| *sequence == Some(context) || cls == Some(*id))
            .collect();
        let probabilities = |which: usize| {
            let logit =
                |(token, possible): (&Vec<f32>, &bool)| if *possible { token[which] } else { -10000.0 };
            softmax(&logits.iter().zip(&possible).map(logit).collect::<Vec<_>>())
        };
        let (mut starts, mut ends) = (probabilities(0), probabilities(1));
        let none = starts[0] * ends[0];
        (starts[0], ends[0]) = (0.0, 0.0);
        let mut spans = Vec::new();
        for (start, begins) in starts.iter().enumerate().filter(|(start, _)| possible[*start]) {
            for (end, stops) in ends
                .iter()
                .enumerate()
                .skip(start)
                .take(max_len)
                .filter(|(end, _)| possible[*end])
            {
                let score = begins * stops;
                if score > 0.0 {
                    spans.push(Span { score, start, end });
                }
            }
        }
        spans.sort_by(|a, b| b.score.total_cmp(&a.score));
        spans.truncate(most);
        (spans, none)
    }

    /// The characters of a span in the context; of whole words where that is asked for and the tokenizer knows words.
    fn characters(&self, window: &Encoding, span: &Span, align_to_words: bool) -> (usize, usize) {
        let word = |token: usize| window.word_to_chars(window.word_ids[token]?, self.context_is());
        let words = align_to_words
            .then(|| word(span.start).zip(word(span.end)))
            .flatten();
        match words {
            Some(((start, _), (_, end))) => (start, end),
            None => (window.offsets[span.start].0, window.offsets[span.end].1),
        }
    }
}

impl fmt::Display for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}\t{:.4}\t{}..{}",
            self.answer, self.score, self.start, self.end
        )
    }
}
