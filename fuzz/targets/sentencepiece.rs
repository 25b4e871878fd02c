//! SentencePiece models, as the kinds of tokenizers that use them differently.
#![no_main]

use bytes::Bytes;
use oxiformers_hub::ModelFiles;

const KINDS: [(&str, &str); 5] = [
    ("LlamaTokenizer", "tokenizer.model"),
    ("AlbertTokenizer", "spiece.model"),
    ("PegasusTokenizer", "spiece.model"),
    ("T5Tokenizer", "spiece.model"),
    ("XLMRobertaTokenizer", "sentencepiece.bpe.model"),
];

libfuzzer_sys::fuzz_target!(init: oxiformers_fuzz::let_panics_unwind(), |data: &[u8]| {
    for (class, file) in KINDS {
        let config = serde_json::json!({"tokenizer_class": class}).to_string();
        let files = [("tokenizer_config.json", Bytes::from(config)), (file, Bytes::copy_from_slice(data))];
        let files = files.map(|(name, content)| (name.to_owned(), content));
        oxiformers_fuzz::tokenizer(&ModelFiles::from_memory("model", files));
    }
});
