//! A rendered conversation to token ids, with one BOS at most.

use super::{ChatTemplate, RenderOptions, Rendered, assistant_mask};
use crate::tokenizer::EncodeOptions;
use crate::{Result, Tokenizer};

/// The tokens of a rendered conversation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EncodedChat {
    /// Token ids.
    pub ids: Vec<u32>,
    /// One flag per token: is it text of a `{% generation %}` block?
    pub assistant_mask: Vec<bool>,
}

impl Rendered {
    /// The tokens of the text, and nothing around them: special tokens are the template's to write.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode(&self, tokenizer: &Tokenizer) -> Result<EncodedChat> {
        let options = EncodeOptions {
            add_special_tokens: false,
            ..EncodeOptions::default()
        };
        let encoding = tokenizer.encode_with(&self.text, &options)?;
        let offsets: Vec<_> = encoding.offsets.iter().map(|(start, end)| *start..*end).collect();
        Ok(EncodedChat {
            assistant_mask: assistant_mask(&self.generation, &offsets),
            ids: encoding.ids,
        })
    }
}

impl ChatTemplate {
    /// Renders a conversation and encodes it, as Transformers' `apply_chat_template` does.
    ///
    /// # Errors
    /// As [`ChatTemplate::render`] and [`Tokenizer::encode`].
    pub fn encode<M: serde::Serialize>(
        &self,
        tokenizer: &Tokenizer,
        messages: &[M],
        options: &RenderOptions,
    ) -> Result<EncodedChat> {
        self.render_tracked(messages, options)?.encode(tokenizer)
    }
}

/// The tokens of a prompt of unknown origin: what the model expects around a text is added, but a BOS that the
/// text begins with, as rendered templates do, stays the only one.
///
/// # Errors
/// As [`Tokenizer::encode`].
pub fn encode_prompt(tokenizer: &Tokenizer, text: &str) -> Result<Vec<u32>> {
    let encoding = tokenizer.encode_with(text, &EncodeOptions::default())?;
    let mut ids = encoding.ids;
    let doubled = tokenizer
        .bos_token_id()
        .is_some_and(|bos| ids.starts_with(&[bos, bos]));
    if doubled && encoding.special_tokens_mask.starts_with(&[1, 0]) {
        ids.remove(0);
    }
    Ok(ids)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Message;
    use oxiformers_hub::ModelFiles;
    use serde_json::json;

    /// Words as tokens; `<s>` is put before each text.
    fn tokenizer() -> Tokenizer {
        let special = |id: u32, content: &str| {
            json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
                   "normalized": false, "special": true})
        };
        let file = json!({
            "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "decoder": null,
            "added_tokens": [special(0, "<s>"), special(1, "</s>")],
            "pre_tokenizer": {"type": "Whitespace"},
            "post_processor": {"type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
                "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
                "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}}},
            "model": {"type": "WordLevel", "unk_token": "?",
                      "vocab": {"<s>": 0, "</s>": 1, "?": 2, "Hi": 3, "you": 4, "été": 5}},
        });
        let config = json!({"bos_token": "<s>", "eos_token": "</s>"});
        let files = [("tokenizer.json", file), ("tokenizer_config.json", config)];
        let files = files.map(|(name, json)| (name.to_string(), json.to_string().into_bytes().into()));
        Tokenizer::from_files(&ModelFiles::from_memory("m", files)).unwrap()
    }

    #[test]
    fn one_bos() {
        let tokenizer = tokenizer();
        assert_eq!(tokenizer.encode("<s>Hi", true).unwrap(), [0, 0, 3]);
        assert_eq!(encode_prompt(&tokenizer, "<s>Hi").unwrap(), [0, 3]);
        assert_eq!(encode_prompt(&tokenizer, "Hi").unwrap(), [0, 3]);
        assert_eq!(encode_prompt(&tokenizer, "").unwrap(), [0]);
        // A second one that the text itself has is kept.
        assert_eq!(encode_prompt(&tokenizer, "<s><s>Hi").unwrap(), [0, 0, 3]);
    }

    #[test]
    fn conversations_are_encoded_as_rendered() {
        let tokenizer = tokenizer();
        let source = "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ m.content }} {% else %}\
                      {% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}{% endif %}{% endfor %}";
        let template = ChatTemplate::new(source)
            .unwrap()
            .with_special_tokens(tokenizer.special_tokens_map());
        let messages = [
            Message::user("été"),
            Message::assistant("Hi you"),
            Message::user("Hi"),
        ];
        let chat = template
            .encode(&tokenizer, &messages, &RenderOptions::default())
            .unwrap();
        assert_eq!(chat.ids, [0, 5, 3, 4, 1, 3]);
        assert_eq!(chat.assistant_mask, [false, false, true, true, true, false]);

        let open = [Message::user("été"), Message::assistant("Hi you")];
        let chat = template
            .encode(&tokenizer, &open, &RenderOptions::continuing())
            .unwrap();
        assert_eq!(chat.ids, [0, 5, 3, 4]);
        assert_eq!(chat.assistant_mask, [false, false, true, true]);
    }
}
