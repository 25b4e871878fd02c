//! Parts of a model are loaded by the name of its folder.

use oxiformers::{
    AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, CausalLM, FromPretrained,
    GenerationConfig, Seq2SeqLM,
};

const FOLDER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../models/tests/fixtures/llama");

#[test]
fn from_pretrained() {
    assert_eq!(AutoConfig::from_pretrained(FOLDER).unwrap().model_type, "llama");
    assert_eq!(
        AutoModelForCausalLM::from_pretrained(FOLDER)
            .unwrap()
            .vocab_size(),
        96
    );
    assert!(!GenerationConfig::from_pretrained(FOLDER).unwrap().do_sample);
    // The fixture has no tokenizer.
    let error = AutoTokenizer::from_pretrained(FOLDER).unwrap_err().to_string();
    assert!(error.contains("tokenizer"), "{error}");
    let error = AutoConfig::from_pretrained("no such/name/at all").unwrap_err();
    assert!(error.to_string().contains("no such/name"), "{error}");
}

#[test]
fn encoder_decoders() {
    let folder = format!("{FOLDER}/../seq2seq/marian-separate");
    let model = AutoModelForSeq2SeqLM::from_pretrained(&folder).unwrap();
    assert_eq!((model.vocab_size(), model.source_vocab_size()), (80, 96));
    // Without a generation_config.json, config.json says how to generate, and the architecture what it leaves out.
    let config = GenerationConfig::from_pretrained(&folder).unwrap();
    assert_eq!(config.decoder_start_token_id, Some(79));
    assert_eq!(config.forced_eos_token_id, [0]);
    let config = GenerationConfig::from_pretrained(&format!("{FOLDER}/../seq2seq/mt5")).unwrap();
    assert_eq!(
        (config.decoder_start_token_id, config.eos_token_id),
        (Some(0), vec![1])
    );
}
