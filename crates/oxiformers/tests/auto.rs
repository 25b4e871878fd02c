//! Parts of a model are loaded by the name of its folder.

use oxiformers::{
    AutoConfig, AutoModelForCausalLM, AutoTokenizer, CausalLM, FromPretrained, GenerationConfig,
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
