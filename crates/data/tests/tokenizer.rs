//! Tokenizers that are trained can be loaded, and give texts back.

use oxiformers_data::tokenizer::{Algorithm, TokenizerTraining, Trained};
use oxiformers_data::{Error, Result};
use oxiformers_hub::ModelFiles;
use oxiformers_processors::Tokenizer;

const TEXT: &str = "The cat sat on the mat, and the other cats sat on other mats. Where did the dogs sit? \
                    Nobody knows where dogs sit when cats are sitting. Été, naïve, 你好!";

fn train(training: &TokenizerTraining) -> Result<Trained> {
    training.train((0..20).map(|_| Ok(TEXT.to_string())))
}

fn load(trained: &Trained) -> Tokenizer {
    let folder = tempfile::tempdir().expect("folder");
    trained.save(folder.path()).expect("saved");
    Tokenizer::from_files(&ModelFiles::from_dir(folder.path()).expect("files")).expect("tokenizer")
}

#[test]
fn byte_level_bpe() {
    let mut training = TokenizerTraining::new(Algorithm::Bpe, 300);
    training.special_tokens = vec!["<|im_start|>".to_string()];
    let trained = train(&training).expect("trained");
    assert_eq!((trained.vocab_size, trained.texts), (300, 20));
    let tokenizer = load(&trained);
    // Every text has tokens, and gives itself back.
    for text in [TEXT, "zebra 🦓\n\t x"] {
        let ids = tokenizer.encode(text, true).expect("ids");
        assert_eq!(tokenizer.decode(&ids, false).expect("text"), text);
    }
    assert_eq!(tokenizer.eos_token_id(), Some(0));
    assert_eq!(tokenizer.encode("<|im_start|>", true).expect("ids"), [1]);
    assert!(tokenizer.encode(" cat", true).expect("ids").len() == 1);
}

#[test]
fn word_pieces() {
    let trained = train(&TokenizerTraining::new(Algorithm::WordPiece, 120)).expect("trained");
    let tokenizer = load(&trained);
    let ids = tokenizer.encode("The Cats sat", true).expect("ids");
    assert_eq!((ids.first(), ids.last()), (Some(&2), Some(&3)));
    assert_eq!(tokenizer.decode(&ids, true).expect("text"), "the cats sat");
    assert_eq!(
        (tokenizer.mask_token_id(), tokenizer.pad_token_id()),
        (Some(4), Some(0))
    );
}

#[test]
fn unigrams() {
    let mut training = TokenizerTraining::new(Algorithm::Unigram, 110);
    training.extra_ids = 3;
    let trained = train(&training).expect("trained");
    let tokenizer = load(&trained);
    let ids = tokenizer.encode("the cats sat on the mat", true).expect("ids");
    assert_eq!(ids.last(), Some(&1));
    assert_eq!(
        tokenizer.decode(&ids, true).expect("text"),
        "the cats sat on the mat"
    );
    assert!(
        tokenizer
            .token_to_id("<extra_id_2>")
            .is_some_and(|id| tokenizer.is_special(id))
    );
}

#[test]
fn what_cannot_be_trained_is_named() {
    let error = train(&TokenizerTraining::new(Algorithm::Bpe, 100)).expect_err("too small");
    assert!(error.to_string().contains("at least 257"), "{error}");
    let none = TokenizerTraining::new(Algorithm::Bpe, 300).train(std::iter::empty());
    assert!(none.expect_err("no text").to_string().contains("no text"));
    let broken = || Error::Interrupted;
    let texts = [Ok(TEXT.to_string()), Err(broken()), Ok(TEXT.to_string())];
    let stopped = TokenizerTraining::new(Algorithm::Bpe, 300).train(texts.into_iter());
    assert!(matches!(stopped, Err(Error::Interrupted)));
}
