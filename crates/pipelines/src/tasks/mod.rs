//! One file per task.

mod embeddings;
mod feature_extraction;
mod fill_mask;
mod question_answering;
mod reranking;
mod sentence_similarity;
mod table_question_answering;
mod text2text_generation;
mod text_classification;
mod text_generation;
mod token_classification;
mod translation;
mod zero_shot_classification;

pub use crate::texts::TextOrPair;
pub use embeddings::{Embedding, Embeddings, EmbeddingsOptions};
pub use feature_extraction::{FeatureExtraction, FeatureExtractionOptions, Features};
pub use fill_mask::{FillMask, FillMaskOptions, Filled, FilledMasks, Targets};
pub use question_answering::{Answer, Question, QuestionAnswering, QuestionAnsweringOptions};
pub use reranking::{Documents, Ranked, Ranking, Reranking, RerankingOptions};
pub use sentence_similarity::{
    SentenceSimilarity, SentenceSimilarityOptions, Sentences, Similarities, SimilarityFunction,
};
pub use table_question_answering::{
    TableAnswer, TableQuestion, TableQuestionAnswering, TableQuestionAnsweringOptions, TableTruncation,
};
pub use text_classification::{
    ClassificationFunction, LabelScore, TextClassification, TextClassificationOptions, TopK,
};
pub use text_generation::{GeneratedText, Prompt, TextGeneration, TextGenerationOptions, TextOrChat, Texts};
pub use text2text_generation::{
    Output, PlainText, Record, Summarization, SummaryText, Text2TextGeneration, Text2TextGenerationOptions,
};
pub use token_classification::{
    AggregationStrategy, Entities, Entity, TextOrWords, TokenClassification, TokenClassificationOptions,
};
pub use translation::{Translation, TranslationOptions, TranslationText};
pub use zero_shot_classification::{
    CandidateLabels, ZeroShotClassification, ZeroShotClassificationOptions, ZeroShotLabels,
};
